"""The report of a finished run, and groups in the terminal."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lce_trainer.artifacts import read_manifest, write_manifest
from lce_trainer.cli import main
from lce_trainer.evaluation.metrics import MEASURES
from lce_trainer.pipeline.evaluate import comparisons, query_table
from lce_trainer.pipeline.facts import gather_facts
from lce_trainer.pipeline.report import describe_groups, render_report, sample_groups
from lce_trainer.pipeline.run import Run, open_run

ALL = ("passages", "queries", "candidates", "groups", "model", "evaluation", "logs")
ATTACK = "<script>alert(1)</script> & <b onclick='x'>moon</b>"
# Elements of HTML without an end tag, and of SVG written as <line/>.
ALONE = {"meta", "br", "line", "circle", "rect", "polyline"}


def test_the_evaluation_holds_each_query_beside_the_comparison_and_cards_show_the_comparison_alone(finished):
    run = open_run(finished.recipe)
    manifest = read_manifest(finished.root / "evaluation", "evaluation")
    assert set(manifest.files) == {"in_domain.parquet", "in_domain_by_query.parquet"}
    assert comparisons(manifest) == ["in_domain"]
    (evaluation,) = gather_facts(run).evaluations
    assert evaluation.queries == 12
    rows = query_table(run, "in_domain")
    assert len(rows) == 12 and set(rows[0]["systems"]) == {row["system"] for row in evaluation.rows}
    assert rows.to_list() == pq.read_table(finished.root / "evaluation" / "in_domain_by_query.parquet").to_pylist()


def copied(finished, tmp_path: Path, *names: str) -> Run:
    """The run with a part of what it made."""
    finished.copy(tmp_path / "run", *(names or ALL))
    return open_run(finished.recipe, [f"run_dir={tmp_path / 'run'}"])


def rewrite(folder: Path, name: str, change, **manifest) -> None:
    """Change the rows of one table of an artifact, as if the stage had made them, and what else its manifest holds."""
    old = read_manifest(folder)
    if name:
        table = pq.read_table(folder / name)
        pq.write_table(pa.Table.from_pylist(change(table.to_pylist()), schema=table.schema), folder / name)
    made = {"config": old.config, "inputs": old.inputs, "counts": old.counts, "facts": old.facts} | manifest
    write_manifest(folder, old.files, kind=old.kind, **made)


def chain(root: Path, parent: str, child: str) -> None:
    """Have the manifest of one artifact name another as what it was made from."""
    inputs = read_manifest(root / child).inputs
    rewrite(root / child, "", None, inputs={**inputs, parent: read_manifest(root / parent).digest})


class Page(HTMLParser):
    """What stands on a page, and a check that every element is closed in its place."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.texts: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in ALONE:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ALONE:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip() and self.open[-1] != "style":
            self.texts.append(" ".join(data.split()))


def test_the_page_of_a_finished_run_holds_each_figure_of_the_table(finished):
    path = finished.root / "report.html"
    assert f"  report:   {path}\n" in finished.printed
    page = Page(path.read_text(encoding="utf-8"))
    run = open_run(finished.recipe)
    rows = run.table("evaluation", "in_domain").to_list()
    assert len(rows) == 6 * len(MEASURES)
    for row in rows:
        assert f"{row['mean']:.3f} [{row['ci_low']:.3f}, {row['ci_high']:.3f}]" in page.texts
        assert row["p_value"] is None or f"{row['p_value']:.4f}" in page.texts
        assert row["system"] in page.texts
    outcome, _, line = run.manifest("evaluation").facts["verdict"]["in_domain"].partition(": ")
    assert outcome in page.texts and line in page.texts
    assert path.read_text(encoding="utf-8") == render_report(run)


def test_the_page_holds_every_stage(finished):
    text = (finished.root / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    for title in ("Learning", "Shortcuts", "Groups", "Versions and settings", "Score of the judge", "Training loss"):
        assert title in page.texts
    run = open_run(finished.recipe)
    for name in ("passages", "queries", "candidates", "groups"):
        for what, count in run.manifest(name).counts.items():
            assert what.replace("_", " ") in " ".join(page.texts)
            assert not count or f"{count:,}" in page.texts
    for group in sample_groups(run, 3):
        assert group["query"] in page.texts
    log = json.loads((finished.root / "logs" / "model.json").read_text())["log_history"]
    for entry in (entry for entry in log if "eval_ndcg@10" in entry):
        assert f"<title>step {entry['step']}: {entry['eval_ndcg@10']:.3f}</title>" in text


def test_the_page_needs_no_network_and_no_script_and_names_no_path_of_the_machine(finished):
    text = (finished.root / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not {"script", "link", "img", "iframe"} & page.tags
    assert not {name for name, _ in page.attributes} & {"src", "href", "onclick", "onload", "srcset"}
    assert not re.findall(r"https?:|url\(|@import", text)
    for path in (finished.recipe.parent, finished.root, Path.home(), Path(__file__).parents[2]):
        assert str(path) not in text
    assert "llm@" in text  # the language model's name, which is a folder here


def test_texts_of_the_corpus_are_data(finished, tmp_path):
    run = copied(finished, tmp_path)
    attack = lambda rows: [{**row, "query": ATTACK, "passages": [ATTACK] * len(row["labels"])} for row in rows]  # noqa: E731
    rewrite(run.root / "groups", "train.parquet", attack)
    chain(run.root, "groups", "model")
    chain(run.root, "model", "evaluation")
    rewrite(
        run.root / "evaluation",
        "in_domain_by_query.parquet",
        lambda rows: [{**row, "query_type": ATTACK, "query": ATTACK, "ndcg@10": [0.0, 0, 0, 0, 0, 1]} for row in rows],
    )
    text = render_report(run)
    assert "<script" not in text and "onclick='x'>" not in text
    page = Page(text)
    assert page.texts.count(ATTACK) >= 6 + 10  # three groups, ten wins
    assert "Wins" in page.texts and "Losses" not in page.texts


def test_a_reranker_that_is_named_by_its_folder_is_shown_by_its_name(finished, tmp_path):
    run = copied(finished, tmp_path)
    named = {"BM25": "/srv/ours/strong", "encoder": "/srv/theirs/strong"}
    rename = lambda rows: [{**row, "system": named.get(row["system"], row["system"])} for row in rows]  # noqa: E731
    rewrite(run.root / "evaluation", "in_domain.parquet", rename)
    rewrite(
        run.root / "evaluation",
        "in_domain_by_query.parquet",
        lambda rows: [{**row, "systems": [named.get(name, name) for name in row["systems"]]} for row in rows],
    )
    text = render_report(run)
    assert "/srv/" not in text
    assert {"strong", "strong (2)"} <= set(Page(text).texts)
    assert "reranker + first stage against strong, nDCG@10" in text


@pytest.mark.parametrize(
    ("made", "shown", "left_out"),
    [
        ((), ("Not evaluated",), ("Learning", "Shortcuts", "Comparison")),
        (("passages",), ("Passages of the corpus",), ("Learning", "Queries written")),
        (("passages", "queries", "candidates", "groups"), ("Shortcuts", "Score of the judge"), ("Learning",)),
        (("model",), ("chosen on 8 human dev queries",), ("Comparison", "Shortcuts", "Training loss")),
        (("model", "evaluation"), ("Comparison, in domain",), ("Shortcuts", "Groups")),
    ],
)
def test_stages_that_are_missing_are_left_out(made, shown, left_out, finished, tmp_path):
    (tmp_path / "run").mkdir()
    run = copied(finished, tmp_path, *(made or ("logs",)))
    text = render_report(run)
    Page(text)
    assert all(part in text for part in shown)
    assert not [part for part in left_out if f"<h2>{part}" in text or f"<h3>{part}" in text]


def test_what_the_model_was_not_trained_on_is_left_out(finished, tmp_path, caplog):
    run = copied(finished, tmp_path)
    counts = read_manifest(run.root / "groups").counts
    rewrite(run.root / "groups", "", None, counts={**counts, "another": 1})
    text = render_report(run)
    assert "Comparison, in domain" in text and "<h2>Groups" not in text
    assert "holds other groups than those that its model was made from" in caplog.text
    model = read_manifest(run.root / "model")
    rewrite(run.root / "model", "", None, counts={**model.counts, "another": 1})
    assert "Not evaluated" in render_report(run)


def test_secrets_of_the_settings_are_not_on_the_page(finished, tmp_path):
    run = copied(finished, tmp_path, "model")
    config = read_manifest(run.root / "model").config
    arguments = {**config["arguments"], "hub_token": "hf_secret", "logging_dir": "/srv/logs"}
    rewrite(run.root / "model", "", None, config={**config, "arguments": arguments})
    text = render_report(run)
    assert "hf_secret" not in text and "/srv" not in text and "learning_rate" in text


def test_groups_are_drawn_by_the_seed_and_shown_in_the_width_of_the_terminal(finished, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    assert main(["inspect", str(finished.recipe), "--groups", "4"]) == 0
    printed = capsys.readouterr().out
    assert main(["inspect", str(finished.recipe), "--groups", "4"]) == 0
    assert capsys.readouterr().out == printed
    assert len(re.findall("^query ", printed, re.MULTILINE)) == 4
    assert max(map(len, printed.splitlines())) == 60
    groups = sample_groups(open_run(finished.recipe), 4)
    passage, _, score = groups[0]["negatives"][0]
    assert f"  negative    0 {score:>+6.2f}  {passage[:20]}" in printed
    assert main(["inspect", str(finished.recipe), "--groups", "0"]) == 2
    assert "must be 1 or more, not 0" in capsys.readouterr().err


def test_groups_made_elsewhere_are_shown_without_soft_labels(finished, tmp_path, capsys):
    row = {"query": "what is a fish", "passages": ["a fish", "a bird"], "labels": [2.0, 0.0]}
    (tmp_path / "mine.jsonl").write_text(json.dumps(row) + "\n")
    assert main(["inspect", str(finished.recipe), f"train.groups={tmp_path / 'mine.jsonl'}"]) == 0
    assert "  positive    2         a fish\n  negative    0         a bird\n" in capsys.readouterr().out


def test_groups_that_are_not_made_yet_are_an_error_that_names_the_stage(finished, tmp_path, capsys):
    assert main(["inspect", str(finished.recipe), f"run_dir={tmp_path / 'none'}"]) == 2
    assert "run lce-trainer label with this recipe first" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_text_cannot_steer_the_terminal_and_a_wide_character_fills_two_columns():
    group = {
        "query": "red\x1b[31m\n\u202eevil",
        "positives": [("魚" * 40, 1.0, None)],
        "negatives": [("e\u0301" * 16, 0.0, -0.5)],
    }
    query, positive, negative = describe_groups([group], width=40).splitlines()
    assert query.endswith("red [31m evil")
    assert positive == "  positive    1         " + "魚" * 7 + "…"
    assert negative == "  negative    0  -0.50  " + "e\u0301" * 16
