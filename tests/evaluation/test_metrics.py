import math
import random
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import evaluate
import numpy as np
import pyarrow.parquet as pq
import pytest
import pytrec_eval

import lce_trainer.evaluation.metrics
from helpers.paths import SHARED_DATA
from lce_trainer.errors import EvaluationError
from lce_trainer.evaluation.metrics import RankingMetrics, compute_by_query, ranking_metrics
from lce_trainer.training.evaluate import group_metrics

TREC = SHARED_DATA / "trec-dl19"


def ranking(*doc_ids: str) -> dict[str, float]:
    return {doc_id: -float(rank) for rank, doc_id in enumerate(doc_ids)}


def test_values_by_hand():
    run = {"q": ranking("a", "b", "c", "d")}
    qrels = {"q": {"b": 3, "d": 1, "unseen": 2}}
    values = ranking_metrics(run, qrels)
    ideal = 3 / math.log2(2) + 2 / math.log2(3) + 1 / math.log2(4)
    assert values["ndcg@10"]["q"] == pytest.approx((3 / math.log2(3) + 1 / math.log2(5)) / ideal)
    assert values["mrr@10"]["q"] == 1 / 2
    assert values["map@10"]["q"] == pytest.approx((1 / 2 + 2 / 4) / 3)


def test_relevant_from_moves_map_and_mrr_but_not_ndcg():
    run = {"q": ranking("related", "perfect")}
    qrels = {"q": {"related": 1, "perfect": 3}}
    lenient, strict = ranking_metrics(run, qrels), ranking_metrics(run, qrels, relevant_from=2)
    assert lenient["mrr@10"]["q"] == 1 and strict["mrr@10"]["q"] == 1 / 2
    assert lenient["map@10"]["q"] == 1 and strict["map@10"]["q"] == 1 / 2
    assert lenient["ndcg@10"]["q"] == strict["ndcg@10"]["q"] < 1


def test_rank_eleven_is_worth_nothing():
    run = {"q": ranking(*(f"d{i}" for i in range(11)))}
    assert {measure: by["q"] for measure, by in ranking_metrics(run, {"q": {"d10": 1}}).items()} == {
        "ndcg@10": 0,
        "mrr@10": 0,
        "map@10": 0,
    }
    assert ranking_metrics(run, {"q": {"d9": 1}})["mrr@10"]["q"] == pytest.approx(1 / 10)


def test_a_judged_query_without_a_ranking_counts_as_zero_and_an_unjudged_one_not_at_all():
    values = ranking_metrics({"q1": ranking("a"), "unjudged": ranking("a")}, {"q1": {"a": 1}, "q2": {"a": 1}})
    assert values["ndcg@10"] == {"q1": 1.0, "q2": 0.0}


def test_a_group_without_a_positive_or_without_a_passage_counts_as_zero():
    scores, labels = (
        [np.array([2.0, 1.0]), np.array([2.0, 1.0]), np.array([])],
        [np.array([1, 0]), np.zeros(2), np.array([])],
    )
    metrics = group_metrics(scores, labels, 1.0, ["a", "b", "c"])
    assert metrics["ndcg@10"] == metrics["mrr@10"] == metrics["map@10"] == pytest.approx(1 / 3)
    assert metrics["loss"] == pytest.approx(math.log(1 + math.exp(-1)))
    assert group_metrics(scores[:1], labels[:1], 1.0, ["a"])["ndcg@10"] == 1


def test_a_score_that_is_no_number_is_an_error_naming_queries_by_their_ids():
    scores, labels = [np.array([1.0, 0.0]), np.array([math.nan, 0.0])], [np.array([1, 0])] * 2
    with pytest.raises(EvaluationError, match="a passage of queries 'second' has NaN"):
        group_metrics(scores, labels, 1.0, ["first", "second"])
    with pytest.raises(EvaluationError, match=rf"queries '{'x' * 80}', .* and 2 more has NaN"):
        group_metrics(scores[1:] * 10, labels[1:] * 10, 1.0, ["x" * 200] * 10)


def test_equal_scores_favour_no_way_of_naming_documents():
    """Tied, one relevant of ten: by trec_eval's own rule the last id always wins, here it wins one time in ten."""
    qrels = {f"q{i}": {"d9": 1} for i in range(500)}
    run = {f"q{i}": {f"d{j}": 1.0 for j in range(10)} for i in range(500)}
    trec = pytrec_eval.RelevanceEvaluator(qrels, {"recip_rank"}).evaluate(run)
    assert {by["recip_rank"] for by in trec.values()} == {1.0}
    first = sum(value == 1 for value in ranking_metrics(run, qrels)["mrr@10"].values())
    assert 25 < first < 80  # 50 expected, standard deviation 6.7


def test_the_order_of_dicts_changes_nothing():
    generator = random.Random(5)
    scores = {f"d{i}": float(generator.randrange(4)) for i in range(30)}
    shuffled = list(scores.items())
    generator.shuffle(shuffled)
    qrels = {"q": {"d3": 1, "d17": 2}}
    assert ranking_metrics({"q": scores}, qrels) == ranking_metrics({"q": dict(shuffled)}, qrels)


def test_scores_closer_than_float32_keep_their_order():
    run = {"q": {"worse": 1.0, "better": 1.0 + 1e-12}}
    assert ranking_metrics(run, {"q": {"better": 1}})["mrr@10"]["q"] == 1


@pytest.mark.parametrize(
    ("run", "qrels", "message"),
    [
        ({"q": {"a": 1.0}}, {}, "no judgments"),
        ({"q": {"a": 1.0}}, {"q": {}}, "no judgments"),
        ({"q": {"a": float("nan")}}, {"q": {"a": 1}}, "'q'.*NaN"),
        ({"q": {7: 1.0}}, {"q": {"7": 1}}, "document id 7 is a int"),
    ],
)
def test_what_cannot_be_ranked_is_an_error(run, qrels, message):
    with pytest.raises(EvaluationError, match=message):
        ranking_metrics(run, qrels)


FOLDER = Path(lce_trainer.evaluation.metrics.__file__).parent / "ranking_metrics"
PREDICTIONS = [
    {"query_id": "q1", "doc_ids": ["a", "b"], "scores": [2.0, 1.0]},
    {"query_id": "q2", "doc_ids": ["c", "d"], "scores": [2.0, 1.0]},
    {"query_id": "q3", "doc_ids": [], "scores": []},
]
REFERENCES = [
    {"query_id": "q1", "doc_ids": ["b"], "grades": [2]},
    {"query_id": "q2", "doc_ids": ["c"], "grades": [1]},
    {"query_id": "q3", "doc_ids": ["a"], "grades": [1]},
]


@pytest.fixture
def caches(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path))
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))  # the library puts its cache there, and imports from it
    for name in [name for name in sys.modules if name.partition(".")[0] == "evaluate_modules"]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize("load", [RankingMetrics, lambda: evaluate.load(str(FOLDER))], ids=["class", "folder"])
def test_the_evaluate_metric_averages_the_same_values_offline(load, caches):
    metric = load()
    assert metric.compute(predictions=PREDICTIONS, references=REFERENCES)["mrr@10"] == pytest.approx(1.5 / 3)
    strict = metric.compute(predictions=PREDICTIONS, references=REFERENCES, relevant_from=2)
    assert strict["mrr@10"] == pytest.approx(0.5 / 3)
    each = metric.compute(predictions=PREDICTIONS, references=REFERENCES, per_query=True)
    assert each["mrr@10"] == {"q1": 1 / 2, "q2": 1.0, "q3": 0.0}


def test_the_evaluate_metric_loads_from_a_hub_space(caches, monkeypatch):
    """The folder of the package, served as the Hub serves a space's files."""

    class Space(SimpleHTTPRequestHandler):
        def translate_path(self, path: str) -> str:
            return str(FOLDER / path.removeprefix("/spaces/user/ranking_metrics/resolve/main/"))

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Space) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/spaces/{{path}}/resolve/{{revision}}/{{name}}"
        monkeypatch.setattr(evaluate.config, "HUB_EVALUATE_URL", address)
        monkeypatch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", False)
        metric = evaluate.load("user/ranking_metrics", revision="main")
        server.shutdown()
    assert metric.compute(predictions=PREDICTIONS, references=REFERENCES)["mrr@10"] == pytest.approx(1.5 / 3)


def test_the_evaluate_metric_refuses_a_query_given_twice(caches):
    with pytest.raises(EvaluationError, match="'q1' is given twice"):
        RankingMetrics().compute(predictions=PREDICTIONS[:1] * 2, references=REFERENCES[:1] * 2)


def test_by_way_of_the_evaluate_metric_the_values_are_the_same():
    generator = random.Random(3)
    run = {f"q{i}": {f"d{j}": float(generator.randrange(5)) for j in range(20)} for i in range(20)}
    qrels = {f"q{i}": {f"d{j}": generator.randrange(4) for j in range(15)} for i in range(25)}
    assert compute_by_query(run, qrels, 2) == ranking_metrics(run, qrels, 2)
    with pytest.raises(EvaluationError, match=r"the id 'd\\ud83d' is no Unicode text"):
        compute_by_query({"q": {"d\ud83d": 1.0}}, {"q": {"a": 1}})


def test_soft_labels_are_gains_as_they_are_and_half_of_the_highest_is_relevant():
    labels = {"a": 0.9, "b": 0.2, "c": 0.1}
    best, worst = ({"q": ranking(*order)} for order in ("abc", "cba"))
    ideal = 0.9 + 0.2 / math.log2(3) + 0.1 / 2
    values = {name: by["q"] for name, by in ranking_metrics(worst, {"q": labels}).items()}
    assert values["ndcg@10"] == pytest.approx((0.1 + 0.2 / math.log2(3) + 0.9 / 2) / ideal, abs=1e-9)
    assert values["mrr@10"] == values["map@10"] == pytest.approx(1 / 3)
    assert {by["q"] for by in ranking_metrics(best, {"q": labels}).values()} == {1.0}
    half = ranking_metrics({"q": ranking("no", "yes")}, {"q": {"yes": 0.5, "no": 0}})
    assert half["mrr@10"]["q"] == half["map@10"]["q"] == 1 / 2
    assert half["ndcg@10"]["q"] == pytest.approx(1 / math.log2(3))
    assert ranking_metrics(worst, {"q": labels}, relevant_from=0.2)["mrr@10"]["q"] == 1 / 2
    float32 = {name: float(np.float32(label)) for name, label in labels.items()}
    assert ranking_metrics(worst, {"q": float32}) == ranking_metrics(worst, {"q": labels})


def test_soft_labels_of_groups_do_not_make_the_worst_order_the_best():
    labels = [np.array([0.9, 0.2, 0.1], dtype=np.float32)]
    worst = group_metrics([np.array([1.0, 2.0, 3.0])], labels, 1.0, ["q"])
    assert worst["mrr@10"] == worst["map@10"] == pytest.approx(1 / 3)
    ideal = 0.9 + 0.2 / math.log2(3) + 0.1 / 2
    assert worst["ndcg@10"] == pytest.approx((0.1 + 0.2 / math.log2(3) + 0.9 / 2) / ideal, abs=1e-6)
    assert group_metrics([np.array([3.0, 2.0, 1.0])], labels, 1.0, ["q"])["mrr@10"] == 1


def test_labels_on_a_scale_without_a_zero_are_relevant_from_its_middle_on():
    """From 1 to 5: 3, 4 and 5 are at least half of 5."""
    labels = [np.array([1.0, 2.0, 3.0, 4.0, 5.0])]
    rising = group_metrics([np.array([5.0, 4.0, 3.0, 2.0, 1.0])], labels, 1.0, ["q"])
    assert rising["mrr@10"] == pytest.approx(1 / 3)
    assert rising["map@10"] == pytest.approx((1 / 3 + 2 / 4 + 3 / 5) / 3)
    orders = ((1, 2, 3, 4, 5), (5, 4, 3, 2, 1))
    gains = [sum(gain / math.log2(rank + 2) for rank, gain in enumerate(order)) for order in orders]
    assert rising["ndcg@10"] == pytest.approx(gains[0] / gains[1])


def test_whole_labels_of_groups_with_a_negative_are_relevant_from_one_on():
    labels = [np.array([1.0, 0.0, 3.0])]
    assert group_metrics([np.array([3.0, 2.0, 1.0])], labels, 1.0, ["q"])["mrr@10"] == 1


@pytest.mark.parametrize("name", ["a\0b", "half \ud83d an emoji", "", " ", "é" * 400, "\n"], ids=range(6))
def test_an_id_is_any_string(name):
    run = {name: {name: 2.0, f"{name}x": 1.0, "other": 0.0}}
    values = ranking_metrics(run, {name: {f"{name}x": 1}})
    assert values["mrr@10"] == {name: 1 / 2} and values["map@10"] == {name: 1 / 2}
    tied = {name: {name: 1.0, f"{name}x": 1.0}}
    assert ranking_metrics(tied, {name: {name: 1}})["mrr@10"][name] in (1.0, 1 / 2)


@pytest.mark.parametrize("grade", [3e9, 1001, math.nan, math.inf, -math.inf, None, "1", [1], 1 + 2j, 10**400])
def test_a_grade_that_the_metrics_do_not_take_is_an_error_naming_query_and_document(grade):
    message = r"query 'q7', document 'd3': the grade is .*; grades are numbers up to 1,000"
    with pytest.raises(EvaluationError, match=message):
        ranking_metrics({"q7": {"d3": 1.0}}, {"q7": {"d3": grade, "d4": 1}})


@pytest.mark.parametrize("label", [3e9, math.nan])
def test_a_label_of_a_group_that_the_metrics_do_not_take_is_an_error_naming_the_query(label):
    with pytest.raises(EvaluationError, match="query 'second', document '0': the grade is"):
        group_metrics([np.zeros(2)] * 2, [np.array([1.0, 0.0]), np.array([label, 0.0])], 1.0, ["first", "second"])


def test_every_kind_of_whole_number_is_a_grade():
    for grade in (1, True, 1.0, np.int64(1), np.float32(1), np.bool_(True), 1000):
        assert ranking_metrics({"q": {"a": 1.0}}, {"q": {"a": grade}})["ndcg@10"] == {"q": 1.0}
    spam = ranking_metrics({"q": ranking("spam", "good")}, {"q": {"spam": -2, "good": 1}})
    assert spam["ndcg@10"]["q"] == pytest.approx(1 / math.log2(3)) and spam["mrr@10"]["q"] == 1 / 2


@pytest.mark.parametrize("relevant_from", [0, -1, math.nan, math.inf, "2"])
def test_a_threshold_that_makes_no_difference_is_an_error(relevant_from):
    with pytest.raises(EvaluationError, match="relevant_from must be a number above 0"):
        ranking_metrics({"q": {"a": 1.0}}, {"q": {"a": 1}}, relevant_from)


@pytest.mark.parametrize("score", [None, "high", [1.0]])
def test_a_score_that_is_no_number_is_an_error(score):
    with pytest.raises(EvaluationError, match="query 'q': a document's score is NaN or no number"):
        ranking_metrics({"q": {"a": score}}, {"q": {"a": 1}})


@pytest.mark.skipif(not TREC.is_dir(), reason="needs shared/data/trec-dl19 beside the project")
def test_bm25_on_trec_dl_2019_reads_as_published():
    run: dict[str, dict[str, float]] = {}
    for row in pq.read_table(TREC / "candidates.parquet").to_pylist():
        run.setdefault(row["query_id"], {})[row["doc_id"]] = row["bm25_score"]
    qrels: dict[str, dict[str, int]] = {}
    for row in pq.read_table(TREC / "qrels.parquet").to_pylist():
        qrels.setdefault(row["query_id"], {})[row["doc_id"]] = row["grade"]
    values = ranking_metrics(run, qrels, relevant_from=2)["ndcg@10"]
    assert len(values) == 43
    assert round(sum(values.values()) / 43, 3) == 0.506


@pytest.mark.parametrize("grade", [1.9e-290, 5e-324, 0.5])
def test_a_tiny_grade_beside_a_huge_negative_one_is_measured(grade):
    qrels = {"q": {"a": grade, "b": -1.8e14}}
    values = ranking_metrics({"q": {"a": 1.0, "b": 0.0}}, qrels)
    assert all(0 <= value <= 1 for by_query in values.values() for value in by_query.values())
    assert values["mrr@10"]["q"] == 1.0
