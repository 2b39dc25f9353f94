"""The command that attacks a reranker: a model with a file, or a recipe's own."""

import json

import pytest

from helpers.tiny import WORDS
from lce_trainer.cli import main


@pytest.fixture
def labelled(tmp_path):
    """Rows of 12 queries with one relevant passage and three others each."""
    rows = [
        {"query": f"what {WORDS[i]}", "passage": f"{WORDS[(i + j) % 20]} river", "label": int(j == 0)}
        for i in range(12)
        for j in range(4)
    ]
    path = tmp_path / "labelled.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_model_is_attacked_and_printed_and_written_as_json(tiny_reranker, labelled, tmp_path, capsys):
    found = {}
    for name, flags in (("text", []), ("kept", ["--special-tokens"])):
        file = tmp_path / "made" / f"{name}.json"
        arguments = ["attack", str(tiny_reranker), "--groups", str(labelled), "--json", str(file), *flags]
        assert main(arguments) == 0
        captured = capsys.readouterr()
        found[name] = json.loads(file.read_text())
        assert "36 triples of 12 queries, from labelled.jsonl, labelled by people" in captured.out
        assert "12 queries are few" in captured.err
        assert max(map(len, captured.out.splitlines())) <= 120
        for row in found[name]["attacks"]:
            assert f"\n{row['attack']} " in captured.out
            assert 0 <= row["low"] <= row["share"] <= row["high"] <= 1
    assert (found["text"]["queries"], found["text"]["triples"]) == (12, 36)
    shares = {name: {row["attack"]: row["share"] for row in one["attacks"]} for name, one in found.items()}
    assert len(shares["text"]) == 12
    assert [one["special_tokens_in_texts"] for one in found.values()] == [False, True]
    special = {"20 pad tokens", "query + separator, twice", "separator + query, behind"}
    assert {name for name in shares["text"] if shares["text"][name] != shares["kept"][name]} <= special
    assert str(tmp_path) not in json.dumps(found)


def test_a_recipe_is_attacked_on_its_dev_queries(finished, tmp_path, capsys):
    root = finished.copy(tmp_path / "run", "passages", "queries", "candidates", "groups", "model")
    assert main(["attack", str(finished.recipe), f"run_dir={root}", "--queries", "5"]) == 0
    assert "triples of 5 queries, from dev.jsonl, labelled by people" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{model}"], "name them by --groups"),
        (["{model}", "--groups", "{labelled}", "--queries", "0"], "--queries must be 1 or more, not 0"),
        (["{model}", "--groups", "{labelled}", "train.seed=1"], "train.seed=1 overrides a recipe, and"),
        (["{model}", "--groups", "nowhere.csv"], "nowhere.csv"),
    ],
)
def test_what_cannot_be_attacked_is_one_line(arguments, message, tiny_reranker, labelled, capsys):
    names = {"model": tiny_reranker, "labelled": labelled}
    assert main(["attack", *(word.format_map(names) for word in arguments)]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("error: ") == 1 and "Traceback" not in captured.err
