import json
import logging
import math
import re
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers.paths import SHARED_DATA
from lce_trainer.errors import EvaluationError
from lce_trainer.evaluation.compare import (
    _bootstrap,
    _holm,
    _randomization_test,
    choose_weight,
    compare,
    fuse,
    mean_ndcg,
    rerank,
    strongest,
)
from lce_trainer.evaluation.judged import Query, judgments, read_judged, read_queries
from lce_trainer.evaluation.metrics import ranking_metrics
from lce_trainer.evaluation.report import markdown, table, verdict

TREC = SHARED_DATA / "trec-dl19"


def runs(queries: int, *ranks: int) -> tuple[list[dict[str, dict[str, float]]], dict[str, dict[str, int]]]:
    """For each rank a run that puts the one right document of every query there."""
    systems = []
    for right in ranks:
        order = [f"d{i}" for i in range(9)]
        order.insert(right - 1, "right")
        systems.append({f"q{q}": {doc_id: -float(i) for i, doc_id in enumerate(order)} for q in range(queries)})
    return systems, {f"q{q}": {"right": 1} for q in range(queries)}


def row(results, system, measure):
    return next(row for row in results if row["system"] == system and row["measure"] == measure)


def test_a_system_that_is_always_better_is_significant_and_one_that_is_equal_is_not():
    (bm25, better, same), qrels = runs(40, 3, 1, 3)
    results = compare({"BM25": bm25, "ours": better, "copy": same}, qrels, baseline="BM25", resamples=2000)
    assert row(results, "BM25", "mrr@10")["mean"] == pytest.approx(1 / 3)
    assert row(results, "BM25", "mrr@10")["p_value"] is None
    assert row(results, "ours", "mrr@10")["mean"] == 1
    # Of two tests, so doubled.
    assert row(results, "ours", "mrr@10")["p_value"] == pytest.approx(2 / 2001)
    assert row(results, "copy", "mrr@10")["p_value"] == 1
    assert row(results, "ours", "mrr@10")["difference"] == pytest.approx(2 / 3)
    assert row(results, "BM25", "mrr@10")["difference"] is None
    alone = compare({"BM25": bm25, "ours": better, "copy": same}, qrels, baseline="BM25", tested=["ours"])
    assert row(alone, "ours", "mrr@10")["p_value"] == pytest.approx(1 / 10001)
    assert row(alone, "copy", "mrr@10")["p_value"] is None
    assert row(results, "ours", "ndcg@10")["queries"] == 40
    assert len(results) == 9


def test_the_p_value_approaches_the_exact_one_over_all_sign_flips():
    differences = np.array([0.5, -0.1, 0.3, 0.2, -0.2, 0.4, 0.05, 0.1])
    flips = np.array([abs(np.dot(signs, differences)) for signs in product((-1, 1), repeat=8)])
    exact = np.mean(flips >= abs(differences.sum()) - 1e-12)
    p = _randomization_test(differences[:, None], seed=1, resamples=40_000)[0]
    assert p == pytest.approx(exact, abs=0.01)


def test_the_interval_approaches_the_normal_one_for_many_queries():
    values = np.random.default_rng(0).uniform(size=(400, 2))
    low, high = _bootstrap(values, seed=1, resamples=5000)
    error = values.std(axis=0) / math.sqrt(400)
    assert low == pytest.approx(values.mean(axis=0) - 1.96 * error, abs=0.1 * error.max())
    assert high == pytest.approx(values.mean(axis=0) + 1.96 * error, abs=0.1 * error.max())


def test_results_depend_on_the_seed_alone_not_on_the_order_of_queries_or_systems():
    generator = np.random.default_rng(3)
    run = {f"q{i}": {f"d{j}": float(generator.normal()) for j in range(12)} for i in range(30)}
    other = {q: {d: s + float(generator.normal()) for d, s in scores.items()} for q, scores in run.items()}
    qrels = {f"q{i}": {"d4": 1} for i in range(30)}
    first = compare({"a": run, "b": other}, qrels, baseline="a", resamples=700).to_list()
    backwards = dict(reversed(qrels.items()))
    again = compare({"b": other, "a": run}, backwards, baseline="a", resamples=700).to_list()
    assert sorted(first, key=str) == sorted(again, key=str)
    assert first != compare({"a": run, "b": other}, qrels, baseline="a", resamples=700, seed=14).to_list()


def test_a_query_without_a_ranking_counts_as_zero_and_is_warned_about(caplog):
    (run,), qrels = runs(4, 1)
    del run["q2"]
    with caplog.at_level(logging.WARNING):
        results = compare({"BM25": run}, qrels, baseline="BM25", resamples=10)
    assert row(results, "BM25", "mrr@10")["mean"] == 0.75
    assert "BM25: no ranking of 1 of the judged queries, which count as 0" in caplog.text


def test_an_unknown_baseline_names_the_systems():
    (run,), qrels = runs(2, 1)
    with pytest.raises(EvaluationError, match="'bm25' is not among the systems: BM25"):
        compare({"BM25": run}, qrels, baseline="bm25")


def test_both_tables_hold_every_system_and_figure():
    (bm25, ours), qrels = runs(5, 2, 1)
    results = compare({"BM25": bm25, "a|b": ours}, qrels, baseline="BM25", resamples=99)
    lines = table(results).splitlines()
    assert len(lines) == 4
    figures = ["BM25", "0.631", "[0.631,", "0.631]", "0.500", "[0.500,", "0.500]", "0.500", "[0.500,", "0.500]"]
    assert lines[2].split() == figures
    assert "1.000 [1.000, 1.000]" in lines[3]
    assert len({line.index("[") for line in lines[2:]}) == 1, "columns are aligned"
    rows = markdown(results).splitlines()
    assert rows[0].startswith("| system | nDCG@10 [95 % CI] | p |")
    assert "a\\|b" in rows[3]
    assert len({line.replace("\\|", "").count("|") for line in rows}) == 1


def test_rerank_scores_all_pairs_in_one_call_and_a_document_by_its_best_passage():
    calls = []

    def score(pairs):
        calls.append(list(pairs))
        return np.array([len(passage) for _, passage in pairs], dtype=np.float32)

    run = rerank(
        [("q1", "red"), ("q2", "blue"), ("q3", "none")],
        [[("d1", "xx"), ("d2", "xxx"), ("d1", "xxxx")], [("d1", "x")], []],
        score,
    )
    assert run == {"q1": {"d1": 4.0, "d2": 3.0}, "q2": {"d1": 1.0}, "q3": {}}
    assert calls == [[("red", "xx"), ("red", "xxx"), ("red", "xxxx"), ("blue", "x")]]


def test_a_document_with_only_negative_scores_keeps_its_best():
    assert rerank([("q", "")], [[("d", "a"), ("d", "b")]], lambda pairs: np.array([-3.0, -2.0])) == {"q": {"d": -2.0}}


@pytest.mark.parametrize(
    ("queries", "pools", "scores", "message"),
    [
        ([("q", "")], [], [], "1 queries, but 0 pools"),
        ([("q", ""), ("q", "")], [[], []], [], "given twice"),
        ([("q", "")], [[("d", "")]], [[1.0]], r"shape \(1, 1\) for 1 pairs"),
        ([("q", "")], [[("d", "")]], [float("nan")], "'q'.*NaN"),
    ],
)
def test_what_cannot_be_reranked_is_an_error(queries, pools, scores, message):
    with pytest.raises(EvaluationError, match=message):
        rerank(queries, pools, lambda pairs: np.array(scores))


def test_fuse_weighs_both_runs_alike_whatever_their_scales():
    a = {"q": {"x": 1000.0, "y": 0.0, "z": 500.0}}
    b = {"q": {"x": 0.1, "y": 0.3, "z": 0.2}}
    assert fuse(a, b)["q"] == pytest.approx({"x": 0.0, "y": 0.0, "z": 0.0})
    assert fuse(a, a)["q"] == pytest.approx({"x": math.sqrt(1.5), "y": -math.sqrt(1.5), "z": 0.0})


@pytest.mark.filterwarnings("error")
def test_fuse_of_a_query_without_rankings_is_empty_and_warns_of_nothing():
    assert fuse({"q": {}, "r": {"x": 1.0}}, {"q": {}}) == {"q": {}, "r": {"x": 0.0}}


def test_fuse_takes_the_lowest_score_for_a_document_one_run_lacks_and_survives_equal_scores():
    fused = fuse({"q": {"x": 1.0, "y": 1.0}, "only": {"x": 2.0, "y": 1.0}}, {"q": {"x": 5.0, "y": 4.0, "new": 3.0}})
    assert fused["q"]["x"] > fused["q"]["y"] > fused["q"]["new"]
    assert fused["only"]["x"] > fused["only"]["y"]


def write(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_queries_read_the_same_from_jsonl_and_parquet(tmp_path, suffix):
    rows = [
        {"query_id": "1", "query": "strip\u2028white space", "doc_ids": ["str.strip", "str.lstrip"], "more": 1},
        {"query_id": "2", "query": "sort", "doc_ids": ["sorted"], "more": 2},
    ]
    assert read_queries(write(tmp_path / f"queries.{suffix}", rows)) == [
        Query("1", "strip\u2028white space", ("str.strip", "str.lstrip")),
        Query("2", "sort", ("sorted",)),
    ]


def test_numbers_are_ids(tmp_path):
    path = write(tmp_path / "q.jsonl", [{"query_id": 1, "query": "sort", "doc_ids": [7]}])
    assert read_queries(path) == [Query("1", "sort", ("7",))]


GOOD = {"query_id": "1", "query": "sort", "doc_ids": ["sorted"]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no rows"),
        ("{not json", "line 1 is not JSON"),
        ("[1]", "line 1: expected an object"),
        (json.dumps(GOOD) + "\n\n" + json.dumps({"query_id": "2"}), "row 3: 'query' is missing or null"),
        (json.dumps(GOOD) + "\n" + json.dumps(GOOD), "row 2: query_id '1' was given before"),
        (json.dumps({**GOOD, "doc_ids": []}), "row 1: doc_ids must be a list"),
        (json.dumps({**GOOD, "doc_ids": "sorted"}), "row 1: doc_ids must be a list"),
        (json.dumps({**GOOD, "query": "  "}), "row 1: query must hold text"),
        (json.dumps({**GOOD, "doc_ids": [None]}), "row 1: doc_ids must hold text"),
    ],
)
def test_bad_queries_name_the_file_and_the_row(tmp_path, text, message):
    path = tmp_path / "queries.jsonl"
    path.write_text(text)
    with pytest.raises(EvaluationError, match=message) as error:
        read_queries(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(("name", "content"), [("q.csv", b"a"), ("q.parquet", b"PAR0"), ("q.jsonl", b"\xff\xfe\xfa")])
def test_a_file_that_cannot_be_read_is_a_one_line_error(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    for path in (tmp_path / name, tmp_path / "missing.jsonl"):
        with pytest.raises(EvaluationError, match=path.name) as error:
            read_queries(path)
        assert "\n" not in str(error.value)


def test_a_judged_document_outside_the_corpus_stays_counts_and_warns(caplog):
    queries = [Query("1", "a", ("x", "y")), Query("2", "b", ("z",))]
    with caplog.at_level(logging.WARNING):
        qrels, counts = judgments(queries, {"x", "z", "other"})
    assert qrels == {"1": {"x": 1, "y": 1}, "2": {"z": 1}}
    assert counts == {"judged_queries": 2, "judged_documents": 3, "judged_documents_missing": 1}
    assert "1 of 3 judged documents are not in the corpus ('y', for one)" in caplog.text


def test_judgments_of_another_corpus_are_an_error():
    with pytest.raises(EvaluationError, match="none of the 1 judged documents is in the corpus"):
        judgments([Query("1", "a", ("x",))], {"d1"})


def candidate(query_id: str, doc_id: str, rank: int, **changes) -> dict:
    base = {"query_id": query_id, "query": f"text of {query_id}", "doc_id": doc_id, "text": f"about {doc_id}"}
    return {**base, "bm25_rank": rank, **changes}


def test_judged_candidates_come_in_rank_order_and_unjudged_queries_are_left_out(tmp_path, caplog):
    candidates = [candidate("q1", "b", 2), candidate("q1", "a", 1), candidate("q9", "a", 1)]
    qrels = [{"query_id": "q1", "doc_id": "a", "grade": 3}, {"query_id": "q2", "doc_id": "a", "grade": 0}]
    with caplog.at_level(logging.WARNING):
        judged = read_judged(write(tmp_path / "c.parquet", candidates), write(tmp_path / "q.parquet", qrels))
    assert judged.queries == [("q1", "text of q1")]
    assert judged.pools == [[("a", "about a"), ("b", "about b")]]
    assert judged.run == {"q1": {"a": -1.0, "b": -2.0}}
    assert judged.qrels == {"q1": {"a": 3}, "q2": {"a": 0}}
    assert "1 queries have no judgment" in caplog.text and "1 queries have no candidates" in caplog.text


@pytest.mark.parametrize(
    ("candidates", "qrels", "message"),
    [
        ([candidate("q1", "a", 1)], [{"query_id": "q2", "doc_id": "a", "grade": 1}], "judges none of the queries"),
        ([candidate("q1", "a", 1)], [{"query_id": "q1", "doc_id": "a", "grade": 0.5}], "row 1: grade must be a whole"),
        (
            [candidate("q1", "a", 1)],
            [{"query_id": "q1", "doc_id": "a"}],
            "no column label .* there are: query_id, doc_id",
        ),
        (
            [candidate("q1", "a", 1), candidate("q1", "b", 2, query="another")],
            [{"query_id": "q1", "doc_id": "a", "grade": 1}],
            "row 2: query 'q1' has two texts",
        ),
    ],
)
def test_bad_judgments_name_the_row(tmp_path, candidates, qrels, message):
    with pytest.raises(EvaluationError, match=message):
        read_judged(write(tmp_path / "c.parquet", candidates), write(tmp_path / "q.parquet", qrels))


@pytest.mark.skipif(not TREC.is_dir(), reason="needs shared/data/trec-dl19 beside the project")
def test_reranking_trec_dl_2019_in_bm25_order_gives_bm25s_figure():
    judged = read_judged(TREC / "candidates.parquet", TREC / "qrels.parquet")
    assert len(judged.queries) == 43
    ranks = np.concatenate([-np.arange(len(pool)) for pool in judged.pools])
    run = rerank(judged.queries, judged.pools, lambda pairs: ranks)
    results = compare({"BM25": judged.run, "same": run}, judged.qrels, baseline="BM25", relevant_from=2, resamples=100)
    assert round(row(results, "same", "ndcg@10")["mean"], 3) == 0.506
    assert row(results, "same", "ndcg@10")["p_value"] == 1
    assert ranking_metrics(run, judged.qrels, 2) == ranking_metrics(judged.run, judged.qrels, 2)


def test_holms_correction_is_the_textbook_one():
    corrected = _holm(np.array([0.01, 0.04, 0.03, 0.005]))
    assert corrected == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert _holm(np.array([0.9, 0.8])) == pytest.approx([1.0, 1.0])


def test_a_weight_of_two_runs_is_chosen_by_the_judgments():
    good = {f"q{i}": {"a": 1.0, "b": 0.0, "c": 0.5} for i in range(20)}
    bad = {f"q{i}": {"a": 0.0, "b": 1.0, "c": 0.5} for i in range(20)}
    qrels = {f"q{i}": {"a": 1} for i in range(20)}
    weight, ndcg = choose_weight(good, bad, qrels)
    assert weight > 0.5
    assert ndcg[1.0] == 1.0 > ndcg[0.0]
    assert strongest({"good": good, "bad": bad}, qrels, ["bad", "good"]) == "good"
    # A clear gain is taken with as little of it as does as well, one within the spread of few queries not at all.
    assert 0 < choose_weight(good, bad, qrels, cautious=True)[0] <= weight
    mixed = {name: dict(good[name]) if place < 11 else dict(bad[name]) for place, name in enumerate(good)}
    other = {name: dict(bad[name]) if place < 11 else dict(good[name]) for place, name in enumerate(good)}
    assert choose_weight(mixed, other, qrels)[0] > 0.5
    assert choose_weight(mixed, other, qrels, cautious=True)[0] == 0.0


def test_the_verdict_names_the_best_of_the_others_and_how_sure_it_is():
    (bm25, better, same), qrels = runs(40, 3, 1, 3)
    results = compare({"BM25": bm25, "ours": better, "copy": same}, qrels, baseline="BM25", tested=["ours", "copy"])
    assert re.fullmatch(
        r"BETTER: ours against BM25, nDCG@10 \+0\.\d{3} \[\+.*\], p 0\.0002, 40 queries", verdict(results, "ours")
    )
    assert verdict(results, "copy").startswith("NO DIFFERENCE SHOWN: copy against BM25, nDCG@10 +0.000")
    results = compare({"BM25": bm25, "ours": better}, qrels, baseline="ours", tested=["BM25"])
    assert verdict(results, "BM25").startswith("WORSE: BM25 against ours, nDCG@10 -0.")


def test_judgments_and_runs_are_read_in_every_usual_form(tmp_path):
    rows = [("q1", "a", 3), ("q1", "b", 0), ("q1", "01", 1)]
    forms = {
        "qrels.txt": "".join(f"{q} 0 {d} {g}\n" for q, d, g in rows),
        "beir.tsv": "query-id\tcorpus-id\tscore\n" + "".join(f"{q}\t{d}\t{g}\n" for q, d, g in rows),
        "qrels.csv": "Grade;Doc_ID;Query_ID\n" + "".join(f"{g};{d};{q}\n" for q, d, g in rows),
        "qrels.json": json.dumps({"q1": {d: g for _, d, g in rows}}),
    }
    header = "score,text,doc_id,query,query_id"
    run = [header, "1.5,about b,b,why,q1", '9,"about ""a""",a,why,q1', "3,about 01,01,why,q1"]
    (tmp_path / "run.csv").write_text("\n".join(run))
    for name, text in forms.items():
        (tmp_path / name).write_text(text)
        judged = read_judged(tmp_path / "run.csv", tmp_path / name)
        assert judged.qrels == {"q1": {"a": 3, "b": 0, "01": 1}}
        assert judged.pools == [[("a", 'about "a"'), ("01", "about 01"), ("b", "about b")]]
        assert judged.run == {"q1": {"a": 9.0, "01": 3.0, "b": 1.5}}
    (tmp_path / "twice.txt").write_text("q1 0 a 1\nq1 0 a 2\n")
    with pytest.raises(EvaluationError, match="row 2: query 'q1', document 'a' has the grades 1 and 2"):
        read_judged(tmp_path / "run.csv", tmp_path / "twice.txt")


def test_queries_with_one_document_a_row_are_united(tmp_path):
    (tmp_path / "q.tsv").write_text("query_id\tquery\tdoc_id\n1\tmoon\t007\n1\tmoon\t7\n2\t1999\tx\n")
    assert read_queries(tmp_path / "q.tsv") == [Query("1", "moon", ("007", "7")), Query("2", "1999", ("x",))]


def test_the_mean_over_test_sets_counts_each_set_alike_and_resamples_within_it():
    qrels = {f"a{i}": {"right": 1} for i in range(20)} | {f"b{i}": {"right": 1} for i in range(4)}
    sets = {query_id: query_id[0] for query_id in qrels}
    good, bad = {"right": 2.0, "wrong": 1.0}, {"right": 1.0, "wrong": 2.0}
    half = {query_id: good if query_id[0] == "a" else bad for query_id in qrels}
    best = dict.fromkeys(qrels, good)
    results = compare({"best": best, "half": half}, qrels, baseline="best", sets=sets, resamples=200)
    rows = {row["system"]: row for row in results.to_list() if row["measure"] == "mrr@10"}
    # Within a set all queries are alike, so that no sample differs; over all queries the mean would be 22/24.
    assert [rows["half"][key] for key in ("mean", "ci_low", "ci_high")] == pytest.approx([0.75] * 3)
    assert rows["half"]["difference"] == pytest.approx(-0.25) and rows["half"]["queries"] == 24
    assert rows["half"]["difference_low"] == pytest.approx(-0.25)
    one = compare({"best": best, "half": half}, qrels, baseline="best", sets=dict.fromkeys(qrels, "x"), resamples=200)
    assert one.to_list() == compare({"best": best, "half": half}, qrels, baseline="best", resamples=200).to_list()
    assert mean_ndcg(half, qrels, sets) == pytest.approx((1 + 1 / np.log2(3)) / 2)


def test_the_grades_that_are_relevant_may_differ_by_query():
    qrels = {"a": {"x": 1, "y": 2}, "b": {"x": 1}}
    run = {"a": {"x": 2.0, "y": 1.0}, "b": {"x": 1.0}}
    results = compare({"only": run}, qrels, baseline="only", relevant_from={"a": 2, "b": 1}, resamples=10)
    assert {row["measure"]: row["mean"] for row in results.to_list()}["mrr@10"] == pytest.approx((1 / 2 + 1) / 2)
