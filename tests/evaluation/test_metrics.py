import math
import random

import evaluate
import numpy as np
import pyarrow.parquet as pq
import pytest
import pytrec_eval

import lce_trainer.evaluation.metrics
from helpers.paths import SHARED_DATA
from lce_trainer.errors import EvaluationError
from lce_trainer.evaluation.metrics import RankingMetrics, metric_rows, ranking_metrics
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


@pytest.mark.parametrize("load", [RankingMetrics, lambda: evaluate.load(lce_trainer.evaluation.metrics.__file__)])
def test_the_evaluate_metric_averages_the_same_values_offline(load, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path))
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    run = {"q1": ranking("a", "b"), "q2": ranking("c", "d")}
    qrels = {"q1": {"b": 2}, "q2": {"c": 1}, "q3": {"a": 1}}
    predictions, references = metric_rows(run, qrels)
    metric = load()
    assert metric.compute(predictions=predictions, references=references)["mrr@10"] == pytest.approx(1.5 / 3)
    strict = metric.compute(predictions=predictions, references=references, relevant_from=2)
    assert strict["mrr@10"] == pytest.approx(0.5 / 3)


def test_the_evaluate_metric_refuses_a_query_given_twice(tmp_path):
    predictions, references = metric_rows({"q": ranking("a")}, {"q": {"a": 1}})
    with pytest.raises(EvaluationError, match="'q' is given twice"):
        RankingMetrics(cache_dir=str(tmp_path)).compute(predictions=predictions * 2, references=references * 2)


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
