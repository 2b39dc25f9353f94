"""The names of columns say what they hold: never their order, their type, or a number that stands for a class."""

import json
import logging
from itertools import permutations
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, List, Value

from lce_trainer.errors import GroupsError
from lce_trainer.groups.convert import load_groups, to_groups
from lce_trainer.groups.schema import validate_groups

LAYOUTS = {
    "triplets": {"query": ["q"], "positive": ["p"], "negative": ["n"]},
    "tuples": {"question": ["q"], "answer": ["p"], "negative_1": ["n"], "negative_2": ["m"], "negative_10": ["o"]},
    "pairs": {"query": ["q", "q"], "passage": ["p", "n"], "label": [1, 0]},
    "pairs of text": {"question": ["q", "q"], "text": ["p", "n"], "label": ["1", "0"]},
    "one name of two": {"sentence": ["q", "q"], "document": ["p", "n"], "relevance": [1, 0]},
    "lists": {"query": ["q"], "docs": [["p", "n"]], "labels": [[1, 0]]},
    "FlagEmbedding": {"query": ["q"], "pos": [["p"]], "neg": [["n"]], "prompt": ["x"]},
    "ms-swift": {"query": ["q"], "response": ["p"], "rejected_response": [["n"]]},
    "ms-swift, one": {"query": ["q"], "response": ["p"], "rejected_response": ["n"]},
    "no name of the query": {"zeile": ["q"], "positive": ["p"], "negative": ["n"]},
}


def content(groups: Dataset) -> list[tuple[str, list[str], list[float]]]:
    return [(row["query"], row["passages"], row["labels"]) for row in groups]


@pytest.mark.parametrize("name", LAYOUTS)
def test_columns_in_any_order_and_any_case_give_the_same_groups(name):
    columns = LAYOUTS[name]
    wanted = content(to_groups(Dataset.from_dict(columns))[0])
    assert wanted[0][0] == "q" and wanted[0][1][:2] == ["p", "n"] and wanted[0][2][:2] == [1, 0]
    for order in list(permutations(columns))[:24]:
        rows = {key: columns[key] for key in order}
        assert content(to_groups(Dataset.from_dict(rows))[0]) == wanted, order
        upper = {f" {key.title().replace('_', '-')} ": value for key, value in rows.items()}
        assert content(to_groups(Dataset.from_dict(upper))[0]) == wanted, order
    if name == "tuples":
        assert wanted[0][1] == ["p", "n", "m", "o"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_rows_with_sorted_keys_read_alike_from_a_file(name, tmp_path):
    rows = Dataset.from_dict(LAYOUTS[name])
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row, sort_keys=True) + "\n" for row in rows))
    assert content(load_groups(str(tmp_path / "a.jsonl"))) == content(to_groups(rows)[0])


def test_order_decides_only_where_no_name_is_known_and_that_is_logged(tmp_path, caplog):
    rows = Dataset.from_dict({"a": ["q", "q"], "b": ["p", "n"], "label": [1, 0]})
    assert content(to_groups(rows)[0]) == [("q", ["p", "n"], [1, 0])]
    assert "no name says whether a or b holds the queries" in caplog.text
    caplog.clear()
    (tmp_path / "triples.tsv").write_text("what is it\ta good answer here\ta bad one\n1999\t42\t-7\n")
    groups, _ = to_groups(tmp_path / "triples.tsv")
    assert content(groups)[0] == ("what is it", ["a good answer here", "a bad one"], [1, 0])
    assert "the rows have no names of columns" in caplog.text
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        to_groups(Dataset.from_dict(LAYOUTS["pairs"]))
    assert not caplog.text


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"query": ["q"], "question": ["p"], "label": [1]}, "query and question may both be queries"),
        ({"text": ["q"], "passage": ["p"], "label": [1]}, "text and passage may both be passages"),
        ({"Query": ["q"], "query": ["q"], "positive": ["p"], "negative": ["n"]}, "'Query' and 'query' have one name"),
        ({"query": ["q"], "pos": [["p"]], "positives": [["p"]], "neg": [["n"]]}, "pos and positives may be the same"),
        ({"query": ["q"], "passage": ["p"], "label": ["maybe"]}, "label holds 'maybe': labels are numbers"),
    ],
)
def test_names_that_leave_it_open_are_refused(columns, message):
    with pytest.raises(GroupsError, match=message):
        to_groups(Dataset.from_dict(columns))


@pytest.mark.parametrize("names", [["relevant", "unrelated"], ["negative", "positive"], ["No", "Yes"], ["1", "0"]])
def test_a_class_is_read_by_its_name(names):
    good = next(i for i, name in enumerate(names) if name in ("relevant", "positive", "Yes", "1"))
    features = Features({"query": Value("string"), "passage": Value("string"), "label": ClassLabel(names=names)})
    rows = {"query": ["q", "q"], "passage": ["n", "p"], "label": [1 - good, good]}
    assert content(to_groups(Dataset.from_dict(rows, features=features))[0]) == [("q", ["p", "n"], [1, 0])]
    lists = Features(
        {"query": Value("string"), "passages": List(Value("string")), "labels": List(ClassLabel(names=names))}
    )
    grouped = Dataset.from_dict(
        {"query": ["q"], "passages": [["n", "p"]], "labels": [[1 - good, good]]}, features=lists
    )
    assert content(to_groups(grouped)[0]) == [("q", ["p", "n"], [1, 0])]
    with pytest.raises(GroupsError, match="labels are classes"):
        validate_groups(grouped)


def test_classes_that_may_be_grades_are_refused():
    features = Features({"query": Value("string"), "passage": Value("string"), "label": ClassLabel(names=["E", "S"])})
    with pytest.raises(GroupsError, match="label holds 'E', 'S': labels are numbers"):
        to_groups(Dataset.from_dict({"query": ["q", "q"], "passage": ["p", "n"], "label": [0, 1]}, features=features))


@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_queries_and_passages_that_say_numbers_are_texts(ending, tmp_path):
    sign = "," if ending == "csv" else "\t"
    rows = [("1", "01", "NA"), ("2024-01-15", "true", "3.50"), ("12345678901234567890", "007", "7")]
    text = sign.join(("Query", "Positive", "Negative")) + "\n" + "".join(sign.join(row) + "\n" for row in rows)
    (tmp_path / f"a.{ending}").write_text(text)
    groups, _ = to_groups(tmp_path / f"a.{ending}")
    assert [(row["query"], *row["passages"]) for row in groups] == rows


def test_a_quote_in_a_tsv_file_swallows_no_row(tmp_path):
    lines = ["query\tpositive\tnegative"] + [
        f"{quote}q{i}\tp{i}\tn{i}" for i, quote in enumerate(['"', "", '"', "", ""])
    ]
    (tmp_path / "a.tsv").write_text("\n".join(lines))
    groups, _ = to_groups(tmp_path / "a.tsv")
    assert groups["query"][:] == ['"q0', "q1", '"q2', "q3", "q4"]


def test_an_error_names_the_file(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"query": "q", "docs": ["p", "n"], "labels": [1]}')
    with pytest.raises(GroupsError, match=r"a\.jsonl: row 0: 1 labels for 2 of docs"):
        to_groups(tmp_path / "a.jsonl")


# ---- judgments and runs

QUERIES, CORPUS, QRELS = {"1": "q"}, {"p": "P", "a": "A", "b": "B", "c": "C"}, {"1": {"p": 1}}


def negatives(run: object, tmp_path: Path, **more: object) -> list[str]:
    if isinstance(run, str):
        (tmp_path / "run.tsv").write_text(run)
        run = tmp_path / "run.tsv"
    groups, _ = to_groups(queries=QUERIES, corpus=CORPUS, qrels=QRELS, run=run, **more)
    return groups[0]["passage_ids"][1:]


@pytest.mark.parametrize(
    ("run", "found"),
    [
        ("1\tc\t0.5\n1\ta\t9.25\n1\tb\t3\n", ["a", "b", "c"]),  # scores
        ("1\tc\t-3\n1\ta\t-1\n1\tb\t-2\n", ["a", "b", "c"]),
        ("1\ta\t30\n1\tb\t20\n1\tc\t10\n", ["a", "b", "c"]),
        ("1\tc\t3\n1\ta\t1\n1\tb\t2\n", ["a", "b", "c"]),  # MS MARCO's ranks
        ("1\ta\t1\n1\tb\t2\n1\tc\t3\n", ["a", "b", "c"]),
        ("query_id\tdoc_id\tscore\n1\tc\t1\n1\tb\t2\n1\ta\t3\n", ["a", "b", "c"]),
        ("qid\tpid\trank\n1\tc\t30\n1\tb\t20\n1\ta\t10\n", ["a", "b", "c"]),
        ("1 Q0 c 1 1.5 x\n1 Q0 a 2 9.5 x\n1 Q0 b 3 3 x\n", ["a", "b", "c"]),
        ("1\ta\t7.5\n1\ta\t6.5\n1\tb\t3\n1\tc\t1\n", ["a", "b", "c"]),  # one candidate twice
    ],
)
def test_a_run_is_read_by_its_scores_or_ranks(run, found, tmp_path):
    assert negatives(run, tmp_path) == found
    assert negatives(run, tmp_path, depth=2) == found[:2]


@pytest.mark.parametrize("run", ["1\tc\t3\n1\tb\t2\n1\ta\t1\n", "1\ta\t2\n1\tb\t5\n1\tc\t9\n", "1\ta\t0\n1\tb\t1\n"])
def test_a_run_whose_numbers_may_be_ranks_or_scores_is_refused(run, tmp_path):
    with pytest.raises(GroupsError, match=r"run\.tsv: the third column holds whole numbers from .* may be ranks or"):
        negatives(run, tmp_path)


def test_ranks_and_scores_that_contradict_each_other_are_refused(tmp_path):
    rows = {"query_id": ["1"] * 3, "doc_id": ["a", "b", "c"], "rank": [1, 2, 3], "bm25_score": [9.5, 9.0, 9.25]}
    with pytest.raises(GroupsError, match="row 3: rank and bm25_score order the candidates differently"):
        negatives(Dataset.from_dict(rows), tmp_path)
    assert negatives(Dataset.from_dict({**rows, "bm25_score": [9.5, 9.5, 9.25]}), tmp_path) == ["a", "b", "c"]


def test_mtebs_lists_of_candidates_and_ranxs_dicts_are_read(tmp_path):
    run = Dataset.from_dict({"corpus-ids": [["a", "b"]], "query-id": ["1"]})
    assert negatives(run, tmp_path) == ["a", "b"]
    (tmp_path / "run.json").write_text('{"1": {"b": 1.5, "a": 2.5}}')
    assert negatives(tmp_path / "run.json", tmp_path) == ["a", "b"]
    (tmp_path / "qrels.json").write_text('{"1": {"p": 1, "c": 0}}')
    groups, _ = to_groups(queries=QUERIES, corpus=CORPUS, qrels=tmp_path / "qrels.json")
    assert groups["passage_ids"][:] == [["p", "c"]]


def test_ids_stay_as_they_are_written_in_every_file(tmp_path):
    ids = ["1", "01", "12345678901234567890", "12345678901234567891", "2024-01-15", "true", "NA"]
    (tmp_path / "corpus.tsv").write_text("".join(f"{key}\ttext of {key}\n" for key in ids))
    (tmp_path / "corpus.csv").write_text("id,text\n" + "".join(f"{key},text of {key}\n" for key in ids))
    (tmp_path / "qrels.txt").write_text("1 0 01 1\n1 0 12345678901234567891 0\n")
    for corpus in ("corpus.tsv", "corpus.csv"):
        groups, counts = to_groups(
            queries={"1": "q"}, corpus=tmp_path / corpus, qrels=tmp_path / "qrels.txt", run={"1": ids}
        )
        assert counts["passages_read"] == 7
        assert groups[0]["passage_ids"] == ["01", "1", *ids[2:]]
        assert groups[0]["passages"][0] == "text of 01"


def test_an_id_that_stands_for_two_texts_is_refused(tmp_path):
    (tmp_path / "corpus.tsv").write_text("p\tone\na\tx\np\ttwo\n")
    with pytest.raises(GroupsError, match=r"corpus\.tsv: the id 'p' stands for two texts, in rows 1 and 3"):
        to_groups(queries=QUERIES, corpus=tmp_path / "corpus.tsv", qrels=QRELS, run={"1": ["a"]})
