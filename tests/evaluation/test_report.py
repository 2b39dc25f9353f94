"""Figures query by query, and by kinds of queries."""

import json

import numpy as np
import pytest

from lce_trainer.errors import EvaluationError
from lce_trainer.evaluation.compare import compare
from lce_trainer.evaluation.judged import read_queries
from lce_trainer.evaluation.report import baseline_of, by_query, details, parts, wins_and_losses

QUERIES = [("q1", "moon"), ("q2", "how does a star shine at night"), ("q3", "a b c d e f g h i j k"), ("q4", "snow")]
POOLS = [[(f"d{i}", f"text {i} of {query_id}") for i in range(12)] for query_id, _ in QUERIES]
QRELS = {"q1": {"d0": 1}, "q2": {"d2": 1}, "q3": {"d11": 1, "d10": 2}, "q4": {"elsewhere": 1}, "q5": {"d1": 1}}


def run(**first):
    """The pool's order, but with one document first."""
    scores = {}
    for query_id, _ in QUERIES:
        scores[query_id] = {f"d{i}": -float(i) for i in range(12)}
        if query_id in first:
            scores[query_id][first[query_id]] = 1.0
    return scores


SYSTEMS = {"BM25": run(), "ours": run(q1="d5", q2="d2", q3="d10")}


def table(**settings):
    return by_query(SYSTEMS, QRELS, QUERIES, POOLS, first_stage=run(), shown=["BM25", "ours"], **settings)


def test_the_mean_over_the_queries_is_the_figure_of_the_comparison():
    results = compare(SYSTEMS, QRELS, baseline="BM25", resamples=10)
    assert baseline_of(results) == "BM25"
    rows = table().to_list()
    assert [row["query_id"] for row in rows] == list(QRELS)
    for place, name in enumerate(SYSTEMS):
        mean = next(row["mean"] for row in results if row["system"] == name and row["measure"] == "ndcg@10")
        assert np.mean([row["ndcg@10"][place] for row in rows]) == pytest.approx(mean)


def test_each_query_has_its_right_passage_and_what_stood_first():
    rows = {row["query_id"]: row for row in table(types={"q1": "keyword"})}
    assert [rows[name]["first_stage_rank"] for name in QRELS] == [1, 3, 11, None, None]
    assert [rows[name]["query_type"] for name in QRELS] == ["keyword", None, None, None, None]
    assert rows["q3"]["right_passage"] == "text 10 of q3"  # of two right ones that of the higher grade
    assert rows["q3"]["right_rank"] == [11, 1]
    assert rows["q1"]["first_passage"] == ["text 0 of q1", "text 5 of q1"]
    assert rows["q1"]["first_is_right"] == [True, False]
    assert rows["q4"]["right_passage"] is None and rows["q4"]["right_rank"] == [None, None]
    assert rows["q5"]["query"] is None and rows["q5"]["first_passage"] == [None, None]
    strict = {row["query_id"]: row for row in table(relevant_from=2)}
    assert strict["q3"]["first_stage_rank"] == 11 and strict["q1"]["first_stage_rank"] is None


def test_figures_by_kind_of_query():
    found = parts(table(types={"q1": "keyword", "q2": "question", "q4": "keyword"}), "ours", "BM25")
    assert [(part.name, part.queries) for part in found["query length"]] == [
        ("1 to 3 words", 2),
        ("7 to 10 words", 1),
        ("11 and more words", 1),
        ("not known", 1),
    ]
    keyword, question, unknown = found["query type"]
    assert (keyword.name, keyword.queries, question.name, unknown.name) == ("keyword", 2, "question", "no type")
    assert question.means == pytest.approx({"BM25": 0.5, "ours": 1.0})
    assert question.difference == pytest.approx(0.5) and question.low is None
    ranks = found["rank of the first right passage in the first stage"]
    assert [part.name for part in ranks] == ["1", "2 to 3", "11 and later", "not among the candidates"]
    assert "query type" not in parts(table(), "ours", "BM25")
    with pytest.raises(EvaluationError, match="no system 'theirs', only BM25, ours"):
        parts(table(), "theirs", "BM25")


def test_an_interval_comes_with_ten_queries():
    queries = [(f"q{i}", "moon" if i < 12 else "a long query of many words") for i in range(20)]
    order = {f"d{i}": -float(i) for i in range(5)}
    systems = {
        "BM25": {query_id: order for query_id, _ in queries},
        "ours": {query_id: {**order, "d2": float(i % 3)} for i, (query_id, _) in enumerate(queries)},
    }
    qrels = {query_id: {"d2": 1} for query_id, _ in queries}
    found = by_query(systems, qrels, queries, [[]] * 20, first_stage=systems["BM25"], shown=[])
    short, long = parts(found, "ours", "BM25")["query length"]
    assert short.low < short.difference < short.high and short.difference == pytest.approx(short.means["ours"] - 0.5)
    assert long.low is None and long.high is None


def test_wins_and_losses_are_the_largest_with_what_stood_first_instead():
    (first, second), (loss,) = wins_and_losses(table(), "ours", "BM25")
    assert (first["query"], second["query"], loss["query"]) == (QUERIES[2][1], QUERIES[1][1], "moon")
    assert first["difference"] > second["difference"] == pytest.approx(0.5)
    assert (second["baseline_rank"], second["rank"], second["first"]) == (3, 1, "text 0 of q2")
    assert (loss["baseline_rank"], loss["rank"], loss["first"]) == (1, 2, "text 5 of q1")
    assert not loss["first_is_right"] and loss["right_passage"] == "text 0 of q1"
    assert [len(rows) for rows in wins_and_losses(table(), "ours", "BM25", count=1)] == [1, 1]


def test_details_as_markdown_hold_parts_and_cases_and_nothing_that_texts_could_format():
    pools = [[(doc_id, f"{text}\n# <b>a|b" + " word" * 90) for doc_id, text in pool] for pool in POOLS]
    found = by_query(SYSTEMS, QRELS, QUERIES, pools, first_stage=run(), shown=["BM25", "ours"])
    text = details(found, "ours", "BM25")
    assert "### nDCG@10 by query length\n\n| query length | queries | BM25 | ours | difference [95 % CI] |\n" in text
    assert "| 7 to 10 words | 1 | 0.500 | 1.000 | +0.500 |" in text
    assert text.index("### Largest wins of ours against BM25") < text.index("### Largest losses of ours against BM25")
    assert (
        "- +0.500 **how does a star shine at night**\n    - right, rank 3 → 1: text 2 of q2 # \\<b\\>a\\|b word" in text
    )
    assert "    - ours put first: text 5 of q1 # " in text
    assert max(map(len, text.splitlines())) < 300 and text.count(" …") == 6


@pytest.mark.parametrize(
    ("column", "values", "types"),
    [
        ("qtype", ["symptoms", " "], ["symptoms", None]),
        ("type", ["claim", None], ["claim", None]),
        ("type", [3, 4], ["3", "4"]),
        ("type", [["a"], ["b"]], [None, None]),
        ("other", ["a", "b"], [None, None]),
    ],
)
def test_the_type_of_a_query_is_a_column_of_text(column, values, types, tmp_path):
    rows = [{"query_id": f"q{i}", "query": "moon", "doc_ids": ["d"], column: value} for i, value in enumerate(values)]
    (tmp_path / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [query.query_type for query in read_queries(tmp_path / "queries.jsonl")] == types
