"""Without human queries held-out documents decide: their queries reach no training, and what they show is marked."""

import json
from collections import Counter

import numpy as np
import pytest

from helpers.tiny_recipe import Finished, build_llm
from lce_trainer.artifacts import read_manifest
from lce_trainer.cli import main
from lce_trainer.pipeline.evaluate import (
    FUSED,
    SYNTHETIC,
    held_out_queries,
    held_out_shape,
    held_out_texts,
    is_judged,
    measures_synthetic,
)
from lce_trainer.pipeline.facts import _recipe, repos
from lce_trainer.pipeline.run import Run, open_run

NO_PEOPLE = ("evaluate.queries=null", "evaluate.dev_queries=null", "train.dev_fraction=0.2", "train.max_steps=2")
NAMES = ("publish.model_id=user/fish", "publish.dataset_id=user/fish-groups")


@pytest.fixture(scope="module")
def whole(finished, tmp_path_factory) -> Finished:
    """A run of the tiny recipe without a human query; look, and do not touch."""
    folder = tmp_path_factory.mktemp("synthetic")
    root = finished.copy(folder / "run", "passages", "queries")
    assert main(["run", str(finished.recipe), f"run_dir={root}", *NO_PEOPLE]) == 0
    return Finished(finished.recipe, root, "", "")


def opened(whole: Finished, *settings: str) -> Run:
    return open_run(whole.recipe, [f"run_dir={whole.root}", *NO_PEOPLE, *NAMES, *settings])


@pytest.fixture
def run(whole) -> Run:
    return opened(whole)


def test_queries_of_held_out_documents_reach_no_training_and_are_measured_once_a_passage(run):
    queries, passages = run.table("queries"), run.table("passages")
    document = dict(zip(passages["passage_id"], passages["doc_id"], strict=True))
    held = held_out_queries(run)
    inside, outside = queries.select(held.nonzero()[0]), queries.select((~held).nonzero()[0])
    of = [{document[source] for source in rows["source_passage_id"]} for rows in (inside, outside)]
    assert not of[0] & of[1]
    assert len(of[0]) == -(-len(of[0] | of[1]) // 10)
    trained = set(run.table("candidates")["query_id"])
    assert trained == set(outside["query_id"]) and not set(run.table("groups")["query_id"]) & set(inside["query_id"])
    assert run.manifest("candidates").counts["held_out_queries"] == len(inside)
    measured = run.table("evaluation", f"{SYNTHETIC}_by_query")
    sources = dict(zip(inside["query_id"], inside["source_passage_id"], strict=True))
    assert Counter(sources[key] for key in measured["query_id"]) == Counter(set(inside["source_passage_id"]))
    assert held_out_texts(run) == {SYNTHETIC: inside["query"][:]}
    assert run.manifest("evaluation").counts["held_out_documents"] == len(of[0])
    assert "near_duplicates_synthetic" in run.manifest("model").counts


def test_the_source_passage_is_the_one_that_is_relevant(run):
    queries = run.table("queries")
    texts = dict(zip(run.table("passages")["passage_id"], run.table("passages")["text"], strict=True))
    source = {row["query_id"]: texts[row["source_passage_id"]] for row in queries}
    rows = run.table("evaluation", f"{SYNTHETIC}_by_query").to_list()
    found = [row for row in rows if row["right_passage"] is not None]
    assert found and all(row["right_passage"] == source[row["query_id"]] for row in found)
    for row in found:  # one relevant passage at a rank is an nDCG of its discount
        for ndcg, rank in zip(row["ndcg@10"], row["right_rank"], strict=True):
            assert ndcg == pytest.approx(1 / np.log2(1 + rank) if rank is not None and rank <= 10 else 0)


def test_what_synthetic_queries_show_is_called_that_wherever_it_stands(run, whole, capsys):
    manifest = run.manifest("evaluation")
    (line,) = manifest.facts["verdict"].values()
    assert line.partition(":")[0] in {
        f"{outcome} on SYNTHETIC queries" for outcome in ("BETTER", "WORSE", "NO DIFFERENCE SHOWN")
    }
    assert line.endswith(", which is no proof for queries that people ask") and FUSED in line
    assert manifest.facts["synthetic"] == [SYNTHETIC]
    assert main(["evaluate", str(whole.recipe), f"run_dir={whole.root}", *NO_PEOPLE]) == 0
    printed = capsys.readouterr().out
    title = "SYNTHETIC queries of held-out documents"
    assert f"{title}, " in printed and line in printed
    assert (whole.root / "evaluation" / "synthetic.md").read_text().startswith(title)
    figures = json.loads((whole.root / "evaluation" / "evaluation.json").read_text())[SYNTHETIC]
    assert (figures["synthetic"], figures["title"], figures["verdict"]) == (True, title, line)
    counts = manifest.counts
    assert (
        f"wrote the {counts['held_out_queries']} queries from {counts['held_out_documents']} held-out documents"
        in figures["note"]
    )
    assert "kept from training" in figures["note"] and "only relevant one" in figures["note"]
    page = (whole.root / "report.html").read_text()
    assert f"Comparison, {title}" in page and "on SYNTHETIC queries</b>" in page
    card = repos(run)[-1].files["README.md"].decode()
    assert f"### {title}" in card and f"**{line}**" in card and "On **SYNTHETIC queries**" in card
    assert "human judgments" not in card and f"name: {title}" in card


def test_pools_are_judged_by_another_model(whole, tmp_path, capsys):
    folder = tmp_path / "other"
    build_llm(seed=1).save_pretrained(folder)
    for file in (whole.recipe.parent / "llm").glob("token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    root = whole.copy(tmp_path / "run", "passages", "queries", "candidates", "groups", "model")
    judged = ("evaluate.synthetic.judge=likelihood", f"evaluate.synthetic.model={folder}")
    settings = [f"run_dir={root}", *NO_PEOPLE, *NAMES, *judged]
    assert main(["evaluate", str(whole.recipe), *settings]) == 0
    assert "is the judge that labeled" not in capsys.readouterr().err
    run = open_run(whole.recipe, settings)
    manifest = run.manifest("evaluation")
    alone = opened(whole).table("evaluation", SYNTHETIC)[0]["queries"]
    assert manifest.counts["judged_relevant"] > run.table("evaluation", SYNTHETIC)[0]["queries"] == alone
    assert manifest.counts["judged_pairs"] >= manifest.counts["judged_relevant"]
    assert "which did not label the training's groups" in manifest.facts["notes"][SYNTHETIC]
    assert str(tmp_path) not in manifest.facts["notes"][SYNTHETIC] and str(tmp_path) not in _recipe(run)
    before = (root / "evaluation" / "journal.jsonl").read_bytes()
    assert main(["evaluate", str(whole.recipe), *settings, "evaluate.synthetic.model=null"]) == 0
    assert "is the judge that labeled the training's groups" in capsys.readouterr().err
    assert (root / "evaluation" / "journal.jsonl").read_bytes().startswith(before)


def test_a_model_that_may_have_learned_from_what_it_is_measured_on_is_refused(whole, capsys):
    recipe = [str(whole.recipe), f"run_dir={whole.root}", *NO_PEOPLE]
    assert main(["evaluate", *recipe, "evaluate.synthetic.documents=0.2"]) == 2
    assert "may have learned from the queries" in capsys.readouterr().err
    assert main(["evaluate", *recipe, "evaluate.synthetic.documents=0.6"]) == 2
    assert "must be from 0 to 0.5" in capsys.readouterr().err
    assert read_manifest(whole.root / "evaluation").kind == "evaluation"


@pytest.mark.parametrize(
    ("setting", "judged"),
    [
        ("evaluate.queries=test.jsonl", True),
        ("train.groups=mine.jsonl", False),
        ("evaluate.synthetic.documents=0", False),
    ],
)
def test_human_queries_and_groups_made_elsewhere_leave_nothing_held_out(setting, judged, whole):
    run = opened(whole, setting)
    assert not measures_synthetic(run) and held_out_texts(run) == held_out_shape(run) == {}
    assert is_judged(run) == judged
