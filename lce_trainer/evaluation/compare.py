"""Rerank candidates, compare systems on human judgments, say how sure the figures are."""

import logging
from collections.abc import Callable, Mapping, Sequence

import datasets
import numpy as np

from lce_trainer.errors import EvaluationError
from lce_trainer.evaluation.metrics import Qrels, Run, compute_by_query

logger = logging.getLogger(__name__)

_RESULT_FEATURES = datasets.Features(
    {
        "system": datasets.Value("string"),
        "measure": datasets.Value("string"),
        "mean": datasets.Value("float64"),
        "ci_low": datasets.Value("float64"),
        "ci_high": datasets.Value("float64"),
        "p_value": datasets.Value("float64"),
        "queries": datasets.Value("int64"),
    }
)
_CHUNK = 500  # resamples drawn at once: bounds memory at 500 × queries


def compare(
    systems: Mapping[str, Run],
    qrels: Qrels,
    *,
    baseline: str,
    relevant_from: int = 1,
    seed: int = 13,
    resamples: int = 10_000,
) -> datasets.Dataset:
    """Each system's mean metrics, how sure they are, and whether they differ from the baseline's.

    Confidence intervals are percentile bootstrap over queries, 95 %. p-values are two-sided paired randomization
    tests (Smucker, Allan & Carterette 2007, https://doi.org/10.1145/1321440.1321528): the sign of each query's
    difference is flipped at random, and p is the part of the flips whose mean difference is at least as large,
    with one added above and below so that it is never 0. All systems and measures share the draws.

    Args:
        systems: Run of each system by name, in the order of the table.
        qrels: Human grades; a judged query that a run lacks counts as 0.
        baseline: Name of the system that the others are tested against.
        relevant_from: Lowest grade that counts for MAP and MRR.
        seed: Seeds the draws.
        resamples: Bootstrap samples, and sign flips.

    Returns:
        One row a system and measure: ``system``, ``measure``, ``mean``, ``ci_low``, ``ci_high``, ``p_value``
        (null for the baseline), ``queries``.

    Raises:
        EvaluationError: No such baseline, no judgments, or a run that cannot be ranked.
    """
    if baseline not in systems:
        raise EvaluationError(f"the baseline {baseline!r} is not among the systems: {', '.join(systems) or 'none'}")
    columns, values = [], []
    for system, run in systems.items():
        missing = sum(not run.get(query_id) for query_id, grades in qrels.items() if grades)
        if missing:
            logger.warning("%s: no ranking of %d of the judged queries, which count as 0", system, missing)
        for measure, by_query in compute_by_query(run, qrels, relevant_from).items():
            columns.append((system, measure))
            values.append([by_query[query_id] for query_id in sorted(by_query)])
    found = np.array(values).T  # (queries, systems × measures)
    low, high = _bootstrap(found, seed, resamples)
    base = found[:, [columns.index((baseline, measure)) for _, measure in columns]]
    p_values = _randomization_test(found - base, seed, resamples)
    rows = [
        {
            "system": system,
            "measure": measure,
            "mean": float(found[:, i].mean()),
            "ci_low": float(low[i]),
            "ci_high": float(high[i]),
            "p_value": None if system == baseline else float(p_values[i]),
            "queries": len(found),
        }
        for i, (system, measure) in enumerate(columns)
    ]
    return datasets.Dataset.from_list(rows, features=_RESULT_FEATURES)


def _bootstrap(values: np.ndarray, seed: int, resamples: int) -> tuple[np.ndarray, np.ndarray]:
    """2.5 % and 97.5 % percentiles of the mean of each column, over resampled rows."""
    rng = np.random.default_rng([seed, 0])
    n = len(values)
    means = np.empty((resamples, values.shape[1]))
    for start in range(0, resamples, _CHUNK):
        size = min(_CHUNK, resamples - start)
        draws = rng.integers(n, size=(size, n)) + n * np.arange(size)[:, None]
        times = np.bincount(draws.ravel(), minlength=size * n).reshape(size, n)
        means[start : start + size] = times @ values / n
    low, high = np.percentile(means, [2.5, 97.5], axis=0)
    return low, high


def _randomization_test(differences: np.ndarray, seed: int, resamples: int) -> np.ndarray:
    """Two-sided p of the mean of each column being 0, under random signs of its rows."""
    rng = np.random.default_rng([seed, 1])
    observed = np.abs(differences.sum(axis=0)) - 1e-9  # sums of the same numbers differ by rounding
    as_large = np.zeros(differences.shape[1], dtype=np.int64)
    for start in range(0, resamples, _CHUNK):
        size = min(_CHUNK, resamples - start)
        signs = rng.integers(2, size=(size, len(differences)), dtype=np.int8) * 2.0 - 1.0
        as_large += (np.abs(signs @ differences) >= observed).sum(axis=0)
    p_values: np.ndarray = (as_large + 1) / (resamples + 1)
    return p_values


def rerank(
    queries: Sequence[tuple[str, str]],
    pools: Sequence[Sequence[tuple[str, str]]],
    score: Callable[[Sequence[tuple[str, str]]], np.ndarray],
) -> dict[str, dict[str, float]]:
    """Score every query against its own pool, all pairs in one call so that the scorer can batch by length.

    Args:
        queries: ``(query_id, query)``.
        pools: ``(doc_id, passage)`` of each query; a document may bring several passages, its best one counts
            (MaxP, Dai & Callan 2019, https://arxiv.org/abs/1905.09217).
        score: Takes ``(query, passage)`` pairs, returns their scores, shape ``(pairs,)``.

    Raises:
        EvaluationError: The lengths differ, a query id repeats, or a score is NaN.
    """
    if len(queries) != len(pools):
        raise EvaluationError(f"{len(queries)} queries, but {len(pools)} pools: give one pool a query")
    run: dict[str, dict[str, float]] = {query_id: {} for query_id, _ in queries}
    if len(run) != len(queries):
        raise EvaluationError("a query id is given twice: ids must be distinct")
    pairs = [(query, text) for (_, query), pool in zip(queries, pools, strict=True) for _, text in pool]
    scores = np.asarray(score(pairs), dtype=np.float64) if pairs else np.empty(0)
    if scores.shape != (len(pairs),):
        raise EvaluationError(f"the scorer returned shape {scores.shape} for {len(pairs)} pairs")
    at = 0
    for (query_id, _), pool in zip(queries, pools, strict=True):
        mine = scores[at : at + len(pool)]
        if np.isnan(mine).any():
            raise EvaluationError(f"query {query_id!r}: a passage's score is NaN; was the model trained to the end?")
        best = run[query_id]
        for (doc_id, _), value in zip(pool, mine.tolist(), strict=True):
            best[doc_id] = max(value, best.get(doc_id, value))
        at += len(pool)
    return run


def fuse(run_a: Run, run_b: Run) -> dict[str, dict[str, float]]:
    """Mean of two runs' scores, standardized within each query.

    A document that only one run holds takes the other's lowest score; a query that only one run holds keeps its
    order.
    """
    fused: dict[str, dict[str, float]] = {}
    for query_id in {**run_a, **run_b}:
        a, b = run_a.get(query_id, {}), run_b.get(query_id, {})
        doc_ids = list({**a, **b})
        mean = (_standardize(a, doc_ids) + _standardize(b, doc_ids)) / 2
        fused[query_id] = dict(zip(doc_ids, mean.tolist(), strict=True))
    return fused


def _standardize(scores: Mapping[str, float], doc_ids: Sequence[str]) -> np.ndarray:
    if not doc_ids:  # a query that neither run has a ranking for
        return np.zeros(0)
    lowest = min(scores.values(), default=0.0)
    values = np.array([scores.get(doc_id, lowest) for doc_id in doc_ids], dtype=np.float64)
    values -= values.mean()
    spread = values.std()
    return values / spread if spread > 0 else values
