"""Ranking metrics: trec_eval computes them, ``evaluate`` carries them.

A *run* holds the score of each document of each query, *qrels* the human grade of each judged document.
"""

import hashlib
import math
import tempfile
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import datasets
import evaluate
import numpy as np
import pytrec_eval

from lce_trainer.errors import EvaluationError

Run = Mapping[str, Mapping[str, float]]
Qrels = Mapping[str, Mapping[str, float]]

CUT = 10
MEASURES = {"ndcg@10": "ndcg_cut_10", "mrr@10": "recip_rank", "map@10": "map_cut_10"}
MAX_GRADE = 1000
_SOFT_STEPS = 100_000  # whole gains that the highest soft label of a query is counted in, at most


def ranking_metrics(run: Run, qrels: Qrels, relevant_from: float | None = None) -> dict[str, dict[str, float]]:
    """Return nDCG@10, MRR@10 and MAP@10 of each judged query.

    Source: NIST's trec_eval through ``pytrec_eval``.

    Grades are whole numbers up to 1,000, and nDCG takes them as gains: a passage of grade 2 is worth twice one of
    grade 1, and what is below 0 ("spam") is worth what 0 is. MRR and MAP know relevant documents and others: relevant
    is a grade from ``relevant_from`` on, by default from 1 on. MAP divides by all relevant documents, found or not.

    Soft labels, which are grades of which any is not a whole number (0.9, 0.2, 0.1; 0.5 and 0), follow the same
    rules with two differences. nDCG takes the labels themselves as gains, to five digits of the highest one's power
    of ten; trec_eval counts whole gains, so they are scaled, which does not change nDCG. And by default relevant is
    what has at least half of the highest label of all qrels, so that 0.9 is relevant and 0.2 is not.

    A judged query that the run lacks counts as 0, as ``trec_eval -c`` does; a query of the run without judgments
    is left out. trec_eval puts documents of equal score in descending order of their ids, so a naming habit can
    rank a system: here equal scores go by a hash of query and document id, which favours no name and is the same
    on every machine.

    Args:
        run: Score of each document, by query id and document id; higher is better. Ids are any strings.
        qrels: Grade of each judged document, by query id and document id.
        relevant_from: Lowest grade that counts for MAP and MRR, above 0; TREC Deep Learning uses 2.

    Returns:
        Value in [0, 1] by measure (``"ndcg@10"``, ``"mrr@10"``, ``"map@10"``) and query id, in the order of qrels.

    Raises:
        EvaluationError: There are no judgments, an id is not a string, a score or grade is not a number, or a grade
            is above 1,000; names query and document.
    """
    judged = {query_id: _grades(query_id, grades) for query_id, grades in qrels.items() if grades}
    if not judged:
        raise EvaluationError("there are no judgments: qrels must hold at least one graded document")
    soft = any(not grade.is_integer() for grades in judged.values() for grade in grades.values())
    if relevant_from is None:
        highest = max(grade for grades in judged.values() for grade in grades.values())
        relevant_from = highest / 2 if soft and highest > 0 else 1
    elif not isinstance(relevant_from, Real) or not 0 < relevant_from < math.inf:
        raise EvaluationError(f"relevant_from must be a number above 0, not {relevant_from!r}")
    gains: dict[str, dict[str, int]] = {}
    relevant: dict[str, dict[str, int]] = {}
    ranked: dict[str, dict[str, float]] = {}
    # trec_eval reads ids as C strings, which end at a NUL and hold no half of a surrogate pair: it gets numbers.
    numbers = {query_id: str(number) for number, query_id in enumerate(judged)}
    for query_id, grades in judged.items():
        number, names = numbers[query_id], {doc_id: str(i) for i, doc_id in enumerate(grades)}
        scale = _scale(max(grades.values())) if soft else 1.0
        gains[number] = {names[doc_id]: round(max(0.0, grade) * scale) for doc_id, grade in grades.items()}
        relevant[number] = {names[doc_id]: int(grade >= relevant_from) for doc_id, grade in grades.items()}
        if run.get(query_id):
            best = ranking(query_id, run[query_id])[:CUT]
            ranked[number] = {names.get(doc_id, f"unjudged {rank}"): CUT - rank for rank, doc_id in enumerate(best)}
    found: dict[str, dict[str, float]] = {}
    for judgments, measures in ((gains, {f"ndcg_cut.{CUT}"}), (relevant, {f"map_cut.{CUT}", "recip_rank"})):
        for number, values in pytrec_eval.RelevanceEvaluator(judgments, measures).evaluate(ranked).items():
            found.setdefault(number, {}).update(values)
    return {
        measure: {
            query_id: float(found[number][name]) if number in found else 0.0 for query_id, number in numbers.items()
        }
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


def _grades(query_id: str, grades: Mapping[str, float]) -> dict[str, float]:
    _check_ids(query_id, grades)
    checked = {}
    for doc_id, grade in grades.items():
        value = _number(grade)
        if value is None or value > MAX_GRADE or value == -math.inf:
            raise EvaluationError(
                f"query {query_id!r}, document {doc_id!r}: the grade is {grade!r}; grades are numbers up to "
                f"{MAX_GRADE:,}, whole ones or soft labels such as 0.9"
            )
        checked[doc_id] = value
    return checked


def _number(value: Any) -> float | None:
    """The value as a float; None if it is no number, NaN included."""
    try:
        number = float(value) if isinstance(value, (Real, np.generic)) else math.nan
    except (TypeError, ValueError, OverflowError):
        return None
    return None if math.isnan(number) else number


def _scale(highest: float) -> float:
    """The power of ten that makes whole gains of a query's soft labels, so that 0.9 stays exactly 9 times 0.1."""
    return 10.0 ** math.floor(math.log10(_SOFT_STEPS / max(highest, 1e-300))) if highest > 0 else 1.0


def ranking(query_id: str, scores: Mapping[str, float]) -> list[str]:
    """Return the documents of a query, best first; trec_eval keeps scores as float32 and would see new ties.

    Args:
        query_id: Decides with the document's id the order of equal scores, see :func:`ranking_metrics`.
        scores: Score of each document; higher is better.

    Raises:
        EvaluationError: An id is not a string, or a score is NaN or no number.
    """
    _check_ids(query_id, scores)
    values = []
    for doc_id, score in scores.items():
        value = _number(score)
        if value is None:
            raise EvaluationError(
                f"query {query_id!r}: a document's score is NaN or no number, so it cannot be ranked: {doc_id!r} has "
                f"{score!r}"
            )
        values.append(value)
    ids = list(scores)
    if len(set(values)) < len(values):
        order = sorted(range(len(ids)), key=lambda i: (-values[i], _tie_break(query_id, ids[i])))
    else:
        order = sorted(range(len(ids)), key=lambda i: -values[i])
    return [ids[i] for i in order]


def _tie_break(query_id: str, doc_id: str) -> bytes:
    return hashlib.sha256(f"{query_id}\0{doc_id}".encode("utf-8", "surrogatepass")).digest()


def _check_ids(query_id: str, documents: Mapping[str, Any]) -> None:
    for kind, name in (("query", query_id), *(("document", doc_id) for doc_id in documents)):
        if not isinstance(name, str):
            raise EvaluationError(f"{kind} id {name!r} is a {type(name).__name__}; ids must be strings")


class RankingMetrics(evaluate.Metric):  # type: ignore[misc]
    """:func:`ranking_metrics` as a metric of the Hub's ``evaluate`` library, averaged over queries.

    ``evaluate.load`` finds it in the folder ``lce_trainer/evaluation/ranking_metrics``, with no download, and under
    the name of any Hub space that holds the files of that folder.

    Example::

        metric = RankingMetrics()
        predictions = [{"query_id": "q", "doc_ids": ["a", "b"], "scores": [0.7, 0.2]}]
        references = [{"query_id": "q", "doc_ids": ["b"], "grades": [1]}]
        metric.compute(predictions=predictions, references=references)["mrr@10"]  # 0.5
    """

    def _info(self) -> evaluate.MetricInfo:
        text, texts = datasets.Value("string"), datasets.List(datasets.Value("string"))
        return evaluate.MetricInfo(
            description="nDCG@10, MRR@10 and MAP@10, computed by trec_eval and averaged over queries.",
            citation="",
            inputs_description="""
            predictions: one dict a query with query_id, doc_ids and scores.
            references: one dict a query, in the same order, with query_id, doc_ids and grades.
                Grades are whole numbers up to 1,000, or soft labels such as 0.9.
            relevant_from: lowest grade that counts for MAP and MRR; by default 1, and half of the highest soft label.
            per_query: if true, values by query id in place of means.
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
                        "grades": datasets.List(datasets.Value("float64")),
                    },
                }
            ),
            reference_urls=["https://github.com/usnistgov/trec_eval", "https://github.com/terrierteam/pytrec_eval"],
        )

    def _compute(
        self,
        predictions: Sequence[Mapping[str, Any]],
        references: Sequence[Mapping[str, Any]],
        relevant_from: float | None = None,
        per_query: bool = False,
    ) -> dict[str, Any]:
        run = _by_query(predictions, "scores")
        qrels = _by_query(references, "grades")
        values = ranking_metrics(run, qrels, relevant_from)
        if per_query:
            return dict(values)
        return {measure: math.fsum(by_query.values()) / len(by_query) for measure, by_query in values.items()}


def compute_by_query(run: Run, qrels: Qrels, relevant_from: float | None = None) -> dict[str, dict[str, float]]:
    """Return what :func:`ranking_metrics` does, by way of :class:`RankingMetrics`: what others load computes this too.

    Raises:
        EvaluationError: As :func:`ranking_metrics`, or an id is no Unicode text.
    """
    judged = {query_id: grades for query_id, grades in qrels.items() if grades}
    if not judged:
        raise EvaluationError("there are no judgments: qrels must hold at least one graded document")
    predictions, references = [], []
    for query_id, grades in judged.items():
        scores = run.get(query_id, {})
        predictions.append({"query_id": query_id, "doc_ids": list(scores), "scores": list(scores.values())})
        references.append({"query_id": query_id, "doc_ids": list(grades), "grades": list(grades.values())})
        _check_ids(query_id, {**grades, **scores})
    with tempfile.TemporaryDirectory() as folder:  # the library makes one, though all of it is kept in memory
        metric = RankingMetrics(cache_dir=folder, keep_in_memory=True)
        try:
            values: dict[str, dict[str, float]] = metric.compute(
                predictions=predictions, references=references, relevant_from=relevant_from, per_query=True
            )
        except UnicodeEncodeError as error:
            raise EvaluationError(f"the id {error.object[:60]!r} is no Unicode text") from None
    return values


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
