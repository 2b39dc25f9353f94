"""Rerank candidates, compare systems on human judgments, say how sure the figures are."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence

import datasets
import numpy as np

from lce_trainer.errors import EvaluationError
from lce_trainer.evaluation.metrics import MEASURES, Qrels, Run, compute_by_query, ranking_metrics

logger = logging.getLogger(__name__)

_RESULT_FEATURES = datasets.Features(
    {
        "system": datasets.Value("string"),
        "measure": datasets.Value("string"),
        "mean": datasets.Value("float64"),
        "ci_low": datasets.Value("float64"),
        "ci_high": datasets.Value("float64"),
        "difference": datasets.Value("float64"),
        "difference_low": datasets.Value("float64"),
        "difference_high": datasets.Value("float64"),
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
    tested: Sequence[str] | None = None,
    relevant_from: int | Mapping[str, int] = 1,
    sets: Mapping[str, str] | None = None,
    seed: int = 13,
    resamples: int = 10_000,
) -> datasets.Dataset:
    """Each system's mean metrics, how sure they are, and whether they differ from the baseline's.

    Confidence intervals are percentile bootstrap over queries, 95 %. p-values are two-sided paired randomization
    tests (Smucker, Allan & Carterette 2007, https://doi.org/10.1145/1321440.1321528): the sign of each query's
    difference is flipped at random, and p is the part of the flips whose mean difference is at least as large,
    with one added above and below so that it is never 0. The p-values of a measure are corrected for the number of
    systems that are tested (Holm 1979). All systems and measures share the draws.

    Of several test sets the mean is that of the sets' means, whatever their sizes. Bootstrap samples are drawn within
    each set, and a query's difference weighs what the query weighs in the mean.

    Args:
        systems: Run of each system by name, in the order of the table.
        qrels: Human grades; a judged query that a run lacks counts as 0.
        baseline: Name of the system that the others are compared with.
        tested: Names of the systems that are tested against it; all others if None.
        relevant_from: Lowest grade that counts for MAP and MRR, of all queries or by query id.
        sets: Test set of each judged query; None if they are of one.
        seed: Seeds the draws.
        resamples: Bootstrap samples, and sign flips.

    Returns:
        One row a system and measure: ``system``, ``measure``, ``mean``, ``ci_low``, ``ci_high``, ``queries``, and
        against the baseline, null in its own row, ``difference`` with ``difference_low`` and ``difference_high``, its
        bootstrap interval, and ``p_value``, null where it is not tested.

    Raises:
        EvaluationError: No such baseline, no judgments, or a run that cannot be ranked.
    """
    if baseline not in systems:
        raise EvaluationError(f"the baseline {baseline!r} is not among the systems: {', '.join(systems) or 'none'}")
    among = [system for system in (systems if tested is None else tested) if system != baseline]
    columns, values = [], []
    for system, run in systems.items():
        missing = sum(not run.get(query_id) for query_id, grades in qrels.items() if grades)
        if missing:
            logger.warning("%s: no ranking of %d of the judged queries, which count as 0", system, missing)
        for measure, by_query in _by_query(run, qrels, relevant_from).items():
            columns.append((system, measure))
            values.append([by_query[query_id] for query_id in sorted(by_query)])
    found = np.array(values).T  # (queries, systems × measures)
    parts = _parts(sorted(query_id for query_id, grades in qrels.items() if grades), sets)
    low, high = _bootstrap(found, seed, resamples, parts)
    base = found[:, [columns.index((baseline, measure)) for _, measure in columns]]
    difference_low, difference_high = _bootstrap(found - base, seed, resamples, parts)
    p_values = _randomization_test((found - base) * _weights(parts)[:, None], seed, resamples)
    for measure in MEASURES:
        family = [i for i, (system, named) in enumerate(columns) if named == measure and system in among]
        p_values[family] = _holm(p_values[family])
    rows = [
        {
            "system": system,
            "measure": measure,
            "mean": _mean(found[:, i], parts),
            "ci_low": float(low[i]),
            "ci_high": float(high[i]),
            "difference": None if system == baseline else _mean((found - base)[:, i], parts),
            "difference_low": None if system == baseline else float(difference_low[i]),
            "difference_high": None if system == baseline else float(difference_high[i]),
            "p_value": float(p_values[i]) if system in among else None,
            "queries": len(found),
        }
        for i, (system, measure) in enumerate(columns)
    ]
    return datasets.Dataset.from_list(rows, features=_RESULT_FEATURES)


def strongest(
    systems: Mapping[str, Run], qrels: Qrels, among: Sequence[str], sets: Mapping[str, str] | None = None
) -> str:
    """Return the name of the system, among those named, with the highest mean nDCG@10; of equal ones the first."""
    return max(among, key=lambda name: mean_ndcg(systems[name], qrels, sets))


def mean_ndcg(run: Run, qrels: Qrels, sets: Mapping[str, str] | None = None) -> float:
    """Return the mean nDCG@10 over the judged queries, or over test sets, as :func:`compare` does."""
    by_query = ranking_metrics(run, qrels)["ndcg@10"]
    return _mean(np.array(list(by_query.values())), _parts(list(by_query), sets))


def _by_query(run: Run, qrels: Qrels, relevant_from: int | Mapping[str, int]) -> dict[str, dict[str, float]]:
    """Return the measures by query, each query by its own threshold of relevance."""
    if isinstance(relevant_from, int):
        return compute_by_query(run, qrels, relevant_from)
    found: dict[str, dict[str, float]] = {}
    for lowest in sorted({relevant_from[query_id] for query_id in qrels}):
        some = {query_id: grades for query_id, grades in qrels.items() if relevant_from[query_id] == lowest}
        for measure, values in compute_by_query(run, some, lowest).items():
            found.setdefault(measure, {}).update(values)
    return found


def _parts(query_ids: Sequence[str], sets: Mapping[str, str] | None) -> list[np.ndarray]:
    """Return the rows of each test set's queries; all rows in one where there are no sets."""
    if sets is None:
        return [np.arange(len(query_ids))]
    names = np.array([sets[query_id] for query_id in query_ids])
    return [np.flatnonzero(names == name) for name in sorted(set(names.tolist()))]


def _mean(values: np.ndarray, parts: Sequence[np.ndarray]) -> float:
    return float(np.mean([values[rows].mean() for rows in parts]))


def _weights(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Return how much each query counts in the mean over test sets, 1 on average, shape ``(queries,)``."""
    queries = sum(map(len, parts))
    weights = np.empty(queries)
    for rows in parts:
        weights[rows] = queries / (len(parts) * len(rows))
    return weights


def _holm(p_values: np.ndarray) -> np.ndarray:
    """Return Holm's step-down correction of the p-values of one family, shape ``(tests,)``."""
    order = np.argsort(p_values)
    corrected = np.empty_like(p_values)
    factors = len(p_values) - np.arange(len(p_values))
    corrected[order] = np.minimum(np.maximum.accumulate(p_values[order] * factors), 1.0)
    return corrected


def _bootstrap(
    values: np.ndarray, seed: int, resamples: int, parts: Sequence[np.ndarray] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """2.5 % and 97.5 % percentiles of the mean of each column, over rows that are resampled within each part."""
    rng = np.random.default_rng([seed, 0])
    means = np.zeros((resamples, values.shape[1]))
    parts = [np.arange(len(values))] if parts is None else parts
    for rows in parts:
        mine, n = values[rows], len(rows)
        for start in range(0, resamples, _CHUNK):
            size = min(_CHUNK, resamples - start)
            draws = rng.integers(n, size=(size, n)) + n * np.arange(size)[:, None]
            times = np.bincount(draws.ravel(), minlength=size * n).reshape(size, n)
            means[start : start + size] += times @ mine / n / len(parts)
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


def fuse(run_a: Run, run_b: Run, weight: float = 0.5) -> dict[str, dict[str, float]]:
    """Return the weighted mean of two runs' scores, each standardized within its query.

    A document that only one run holds takes the other's lowest score; a query that only one run holds keeps its
    order.

    Args:
        run_a: Scores by query and document.
        run_b: Likewise.
        weight: Of ``run_a``, from 0 to 1; ``run_b`` has the rest.
    """
    fused: dict[str, dict[str, float]] = {}
    for query_id in {**run_a, **run_b}:
        a, b = run_a.get(query_id, {}), run_b.get(query_id, {})
        doc_ids = list({**a, **b})
        mean = weight * _standardize(a, doc_ids) + (1 - weight) * _standardize(b, doc_ids)
        fused[query_id] = dict(zip(doc_ids, mean.tolist(), strict=True))
    return fused


def choose_weight(run_a: Run, run_b: Run, qrels: Qrels, *, cautious: bool = False) -> tuple[float, dict[float, float]]:
    """Choose the weight of :func:`fuse` that ranks best.

    nDCG@10 is smoothed over neighbouring weights, since the best of many noisy figures is too good to be true.

    Args:
        run_a: Scores by query and document, on queries that nothing is reported on.
        run_b: Likewise.
        qrels: Their judgments.
        cautious: Take the lowest weight whose figure is less than one standard error (of the difference, paired by
            query) below that of the best: few queries may like ``run_a`` more than others will.

    Returns:
        The weight of ``run_a``, and the mean nDCG@10 by weight, from 0 to 1.
    """
    weights = [round(0.05 * step, 2) for step in range(21)]
    by_query = np.array(
        [list(ranking_metrics(fuse(run_a, run_b, weight), qrels)["ndcg@10"].values()) for weight in weights]
    )
    ndcg = by_query.mean(axis=1)
    padded = np.pad(ndcg, 2, mode="edge")
    best = int(np.convolve(padded, np.ones(5) / 5, mode="valid").argmax())
    if cautious and by_query.shape[1] > 1:
        behind = by_query[best] - by_query[: best + 1]
        error = behind.std(axis=1, ddof=1) / math.sqrt(by_query.shape[1])
        best = int(np.flatnonzero(behind.mean(axis=1) <= error)[0])
    return weights[best], dict(zip(weights, ndcg.tolist(), strict=True))


def _standardize(scores: Mapping[str, float], doc_ids: Sequence[str]) -> np.ndarray:
    if not doc_ids:  # a query that neither run has a ranking for
        return np.zeros(0)
    lowest = min(scores.values(), default=0.0)
    values = np.array([scores.get(doc_id, lowest) for doc_id in doc_ids], dtype=np.float64)
    values -= values.mean()
    spread = values.std()
    return values / spread if spread > 0 else values
