"""Ranking metrics: trec_eval computes them, ``evaluate`` carries them.

A *run* holds the score of each document of each query, *qrels* the human grade of each judged document.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
import pytrec_eval

from lce_trainer.errors import EvaluationError

Run = Mapping[str, Mapping[str, float]]
Qrels = Mapping[str, Mapping[str, int]]

CUT = 10
MEASURES = {"ndcg@10": "ndcg_cut_10", "mrr@10": "recip_rank", "map@10": "map_cut_10"}


def ranking_metrics(run: Run, qrels: Qrels, relevant_from: int = 1) -> dict[str, dict[str, float]]:
    """nDCG@10, MRR@10 and MAP@10 of each judged query.

    Source: NIST's trec_eval through ``pytrec_eval``. nDCG uses the grades as gains. MAP and MRR count a document
    as relevant from ``relevant_from`` on; MAP divides by all relevant documents, found or not.

    A judged query that the run lacks counts as 0, as ``trec_eval -c`` does; a query of the run without judgments
    is left out. trec_eval puts documents of equal score in descending order of their ids, so a naming habit can
    rank a system: here equal scores go by a hash of query and document id, which favours no name and is the same
    on every machine.

    Args:
        run: Score of each document, by query id and document id; higher is better.
        qrels: Grade of each judged document, by query id and document id.
        relevant_from: Lowest grade that counts for MAP and MRR; TREC Deep Learning uses 2.

    Returns:
        Value in [0, 1] by measure (``"ndcg@10"``, ``"mrr@10"``, ``"map@10"``) and query id, in the order of qrels.

    Raises:
        EvaluationError: There are no judgments, an id is not a string, or a score is not a number.
    """
    judged = {query_id: _grades(query_id, grades) for query_id, grades in qrels.items() if grades}
    if not judged:
        raise EvaluationError("there are no judgments: qrels must hold at least one graded document")
    best = {query_id: _first(query_id, run[query_id]) for query_id in judged if run.get(query_id)}
    evaluator = pytrec_eval.RelevanceEvaluator(
        judged, {f"ndcg_cut.{CUT}", f"map_cut.{CUT}", "recip_rank"}, relevance_level=relevant_from
    )
    found = evaluator.evaluate(best)
    return {
        measure: {query_id: float(found[query_id][name]) if query_id in found else 0.0 for query_id in judged}
        for measure, name in MEASURES.items()
    }


def mean_over_sets(metrics: Mapping[str, float], names: Sequence[str], prefix: str) -> dict[str, float]:
    """Plain means over evaluation sets, as ``PREFIX_ndcg@10``, of what is there as ``PREFIX_NAME_ndcg@10``.

    Empty where a measure has its mean already, or lacks a set.
    """
    means = {}
    for measure in (*MEASURES, "loss"):
        keys = [f"{prefix}_{name}_{measure}" for name in names]
        if f"{prefix}_{measure}" not in metrics and all(key in metrics for key in keys):
            means[f"{prefix}_{measure}"] = float(np.mean([metrics[key] for key in keys]))
    return means


def _grades(query_id: str, grades: Mapping[str, int]) -> dict[str, int]:
    _check_ids(query_id, grades)
    # trec_eval indexes its table of gains with the grade: below zero ("spam") is worth what zero is
    return {doc_id: max(0, int(grade)) for doc_id, grade in grades.items()}


def _first(query_id: str, scores: Mapping[str, float]) -> dict[str, float]:
    """The best documents, ranks in place of scores: trec_eval keeps scores as float32 and would see new ties."""
    _check_ids(query_id, scores)
    values = [float(score) for score in scores.values()]
    if any(map(math.isnan, values)):
        raise EvaluationError(f"query {query_id!r}: a document's score is NaN, so it cannot be ranked")
    ids = list(scores)
    if len(set(values)) < len(values):
        order = sorted(range(len(ids)), key=lambda i: (-values[i], _tie_break(query_id, ids[i])))
    else:
        order = sorted(range(len(ids)), key=lambda i: -values[i])
    return {ids[i]: float(CUT - rank) for rank, i in enumerate(order[:CUT])}


def _tie_break(query_id: str, doc_id: str) -> bytes:
    return hashlib.sha256(f"{query_id}\0{doc_id}".encode()).digest()


def _check_ids(query_id: str, documents: Mapping[str, Any]) -> None:
    for kind, name in (("query", query_id), *(("document", doc_id) for doc_id in documents)):
        if not isinstance(name, str):
            raise EvaluationError(f"{kind} id {name!r} is a {type(name).__name__}; ids must be strings")


class RankingMetrics(evaluate.Metric):  # type: ignore[misc]
    """:func:`ranking_metrics` as a metric of the Hub's ``evaluate`` library, averaged over queries.

    Needs no download: instantiate the class, or ``evaluate.load(lce_trainer.evaluation.metrics.__file__)``.

    Example::

        metric = RankingMetrics()
        predictions, references = metric_rows(run, qrels)
        metric.compute(predictions=predictions, references=references, relevant_from=2)
    """

    def _info(self) -> evaluate.MetricInfo:
        text, texts = datasets.Value("string"), datasets.List(datasets.Value("string"))
        return evaluate.MetricInfo(
            description="nDCG@10, MRR@10 and MAP@10, computed by trec_eval and averaged over queries.",
            citation="",
            inputs_description="""
            predictions: one dict a query with query_id, doc_ids and scores.
            references: one dict a query, in the same order, with query_id, doc_ids and grades.
            relevant_from: lowest grade that counts for MAP and MRR, 1 by default.
            """,
            features=datasets.Features(
                {
                    "predictions": {
                        "query_id": text,
                        "doc_ids": texts,
                        "scores": datasets.List(datasets.Value("float64")),
                    },
                    "references": {
                        "query_id": text,
                        "doc_ids": texts,
                        "grades": datasets.List(datasets.Value("int64")),
                    },
                }
            ),
            reference_urls=["https://github.com/usnistgov/trec_eval", "https://github.com/terrierteam/pytrec_eval"],
        )

    def _compute(
        self, predictions: Sequence[Mapping[str, Any]], references: Sequence[Mapping[str, Any]], relevant_from: int = 1
    ) -> dict[str, float]:
        run = _by_query(predictions, "scores")
        qrels = _by_query(references, "grades")
        values = ranking_metrics(run, qrels, relevant_from)
        return {measure: math.fsum(by_query.values()) / len(by_query) for measure, by_query in values.items()}


def metric_rows(run: Run, qrels: Qrels) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A run and qrels as the rows that :class:`RankingMetrics` takes.

    Returns:
        Predictions and references, one row a judged query; a query that the run lacks has no documents.
    """
    predictions, references = [], []
    for query_id, grades in qrels.items():
        scores = run.get(query_id, {})
        predictions.append({"query_id": query_id, "doc_ids": list(scores), "scores": list(scores.values())})
        references.append({"query_id": query_id, "doc_ids": list(grades), "grades": list(grades.values())})
    return predictions, references


def _by_query(rows: Sequence[Mapping[str, Any]], column: str) -> dict[str, dict[str, Any]]:
    by_query: dict[str, dict[str, Any]] = {}
    for row in rows:
        query_id, doc_ids, values = row["query_id"], row["doc_ids"], row[column]
        if query_id in by_query:
            raise EvaluationError(f"query {query_id!r} is given twice: one row a query")
        if len(doc_ids) != len(values):
            raise EvaluationError(f"query {query_id!r}: {len(doc_ids)} doc_ids, but {len(values)} {column}")
        by_query[query_id] = dict(zip(doc_ids, values, strict=True))
    return by_query
