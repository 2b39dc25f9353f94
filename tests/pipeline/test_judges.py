"""Judges are compared on labelled pairs by the command: real models, all tiny."""

import json

import pytest

from lce_trainer.cli import main

PAIRS = [
    {"query": query, "passage": f"{query} {end}", "label": label}
    for query in ("red fish", "blue river", "old stone", "moon leaf", "seed root")
    for end, label in (("falls on snow", 1), ("and a bird", 0), ("in the sand", 0))
]


@pytest.fixture
def labelled(tmp_path):
    path = tmp_path / "labelled.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    return path


def compare(finished, tmp_path, capsys, *arguments):
    root = tmp_path / "run"
    assert main(["judges", str(finished.recipe), f"run_dir={root}", *map(str, arguments)]) == 0
    captured = capsys.readouterr()
    return captured, json.loads((root / "judges" / "judges.json").read_text())


def test_judges_are_compared_by_figures_and_cost_and_agreement(finished, tmp_path, capsys, labelled, tiny_reranker):
    wanted = ["--judge", "likelihood", "--judge", "pairwise", "--judge", "reranker", "--judge", "encoder"]
    arguments = ["--pairs", labelled, *wanted, f"label.reranker={tiny_reranker}", "llm.price={input: 2, output: 8}"]
    captured, found = compare(finished, tmp_path, capsys, *arguments)
    assert (found["pairs"], found["queries"], found["relevant"]) == (15, 5, 5)
    assert [row["judge"] for row in found["judges"]] == ["likelihood", "pairwise", "reranker", "encoder"]
    for row in found["judges"]:
        assert row["auc_low"] <= row["auc"] <= row["auc_high"] and row["seconds_per_1000"] > 0
        by_llm = row["judge"] in ("likelihood", "pairwise")
        assert (row["tokens_per_1000"] is not None) == (row["money_per_1000"] is not None) == by_llm
    likelihood, pairwise = found["judges"][:2]
    assert likelihood["money_per_1000"] == pytest.approx(likelihood["tokens_per_1000"] * 2 / 1e6, rel=0.01)
    assert pairwise["tokens_per_1000"] > 2 * likelihood["tokens_per_1000"]
    assert [row["judges"] for row in found["ensembles"]] == [
        *([name, "encoder"] for name in ("likelihood", "pairwise", "reranker")),
        ["likelihood", "pairwise", "reranker", "encoder"],
    ]
    assert len(found["agreement"]) == 6 and found["skipped"] == {}
    for text in ("15 pairs of 5 queries, 5 relevant", "\nlikelihood + encoder ", "\nall ", "Spearman", "money/1,000"):
        assert text in captured.out
    assert max(map(len, captured.out.partition("JSON:")[0].splitlines())) <= 120
    assert "pairs are few" in captured.err
    # The same again asks for nothing, and has the figures of the calls that were made.
    _, again = compare(finished, tmp_path, capsys, *arguments)
    assert again["judges"][:2] == found["judges"][:2]
    assert str(tmp_path) not in json.dumps(found)


def test_without_a_choice_all_that_can_be_had_are_compared_and_the_others_named(finished, tmp_path, capsys, labelled):
    captured, found = compare(finished, tmp_path, capsys, "--pairs", labelled)
    assert [row["judge"] for row in found["judges"]] == ["likelihood", "pairwise", "encoder"]
    assert found["skipped"]["reranker"] == "the reranker is label.reranker, which the recipe does not set"
    for name in ("verdict", "grade"):  # the tiny model has no tokens of their answers
        assert "cannot be told from the others" in found["skipped"][name]
    assert "left out: reranker: the reranker is label.reranker" in captured.out


def test_pairs_are_made_from_dev_queries(finished, tmp_path, capsys):
    root = finished.copy(tmp_path / "run", "passages")
    assert root.is_dir()
    _, found = compare(finished, tmp_path, capsys, "--judge", "encoder", "--limit", "24")
    assert found["from"] == "dev.jsonl" and found["ensembles"] == []
    assert 8 < found["pairs"] <= 24
    assert found["relevant"] == found["queries"] <= found["pairs"] / 2


def test_of_many_pairs_some_are_drawn_by_whole_queries(finished, tmp_path, capsys, labelled):
    _, found = compare(finished, tmp_path, capsys, "--judge", "encoder", "--pairs", labelled, "--limit", "6")
    assert (found["pairs"], found["queries"]) == (6, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--judge", "oracle"], "there is no judge 'oracle', only verdict, grade"),
        (["--judge", "reranker"], "label.reranker, which the recipe does not set"),
        (["--judge", "encoder", "mine.encoder=null"], "label.encoder or mine.encoder, which the recipe does not set"),
        (["--limit", "1"], "--limit must be 2 or more"),
        (["--judge", "encoder", "evaluate.dev_queries=null"], "name a file of rows of query, passage and label"),
    ],
)
def test_what_cannot_be_compared_is_refused(arguments, message, finished, tmp_path, capsys):
    assert main(["judges", str(finished.recipe), f"run_dir={tmp_path / 'run'}", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([*PAIRS, {**PAIRS[0], "label": 0}], "row 16: the pair was given before with another label"),
        (PAIRS[:1], "all 1 labels are above 0"),
        ([{**PAIRS[0], "label": "good"}], "'good', which is not a finite number"),
        ([{"query": "red fish", "label": 1}], "'passage' is missing or null"),
        ([{"query": "red fish", "passage": "a"}], "no column label"),
    ],
)
def test_pairs_that_cannot_be_read_are_refused_by_file_and_row(rows, message, finished, tmp_path, capsys):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["judges", str(finished.recipe), f"run_dir={tmp_path / 'run'}", "--pairs", str(path)]
    assert main([*arguments, "--judge", "encoder"]) == 2
    error = capsys.readouterr().err
    assert message in error and "pairs.jsonl" in error


def test_a_pair_that_stands_twice_counts_once(finished, tmp_path, capsys, labelled):
    labelled.write_text(labelled.read_text() * 2)
    _, found = compare(finished, tmp_path, capsys, "--judge", "encoder", "--pairs", labelled)
    assert found["pairs"] == 15
