"""Rerank candidates, compare systems on human judgments, say how sure the figures are."""

import json
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lce_trainer.errors import EvaluationError
from lce_trainer.metrics import MEASURES, Qrels, Run, ranking_metrics

logger = logging.getLogger(__name__)

_NAMES = {"ndcg@10": "nDCG@10", "mrr@10": "MRR@10", "map@10": "MAP@10"}
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


@dataclass(frozen=True)
class Query:
    """A human query and the documents that answer it."""

    query_id: str
    query: str
    doc_ids: tuple[str, ...]


@dataclass(frozen=True)
class Judged:
    """Candidates of a first-stage retriever with graded judgments, as TREC publishes them.

    Attributes:
        queries: ``(query_id, query)`` of each query that has candidates and judgments.
        pools: Its ``(doc_id, text)``, best first, in the order of ``queries``.
        run: The retriever's own scores.
        qrels: Grades by query id and document id.
    """

    queries: list[tuple[str, str]]
    pools: list[list[tuple[str, str]]]
    run: dict[str, dict[str, float]]
    qrels: dict[str, dict[str, int]]


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
        for measure, by_query in ranking_metrics(run, qrels, relevant_from).items():
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


def table(results: datasets.Dataset) -> str:
    """What :func:`compare` found, as aligned plain text."""
    rows = _cells(results)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def markdown(results: datasets.Dataset) -> str:
    """What :func:`compare` found, as a Markdown table."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in _cells(results)]
    rows.insert(1, ["---"] + ["---:"] * (len(rows[0]) - 1))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _cells(results: datasets.Dataset) -> list[list[str]]:
    rows: list[dict[str, Any]] = results.to_list()
    by_system: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        by_system.setdefault(row["system"], {})[row["measure"]] = row
    cells = [["system"] + [title for measure in MEASURES for title in (f"{_NAMES[measure]} [95 % CI]", "p")]]
    for system, by_measure in by_system.items():
        line = [system]
        for measure in MEASURES:
            row = by_measure[measure]
            line.append(f"{row['mean']:.3f} [{row['ci_low']:.3f}, {row['ci_high']:.3f}]")
            line.append("" if row["p_value"] is None else f"{row['p_value']:.4f}")
        cells.append(line)
    return cells


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


def read_queries(path: Path) -> list[Query]:
    """Human queries with the documents that answer them.

    Args:
        path: ``.jsonl`` or ``.parquet`` with ``query_id``, ``query`` and ``doc_ids``, a list.

    Raises:
        EvaluationError: Names the file and the row (counted from 1) that cannot be used.
    """
    queries: dict[str, Query] = {}
    for number, row in _read_rows(path, ("query_id", "query", "doc_ids")):
        query_id = _text(row["query_id"], path, number, "query_id")
        if query_id in queries:
            raise EvaluationError(f"{path}, row {number}: query_id {query_id!r} was given before; ids must be distinct")
        doc_ids = row["doc_ids"]
        if not isinstance(doc_ids, list) or not doc_ids:
            raise EvaluationError(f"{path}, row {number}: doc_ids must be a list of one or more ids, not {doc_ids!r}")
        queries[query_id] = Query(
            query_id,
            _text(row["query"], path, number, "query"),
            tuple(_text(doc_id, path, number, "doc_ids") for doc_id in doc_ids),
        )
    return list(queries.values())


def judgments(queries: Sequence[Query], corpus: Collection[str]) -> tuple[dict[str, dict[str, int]], dict[str, int]]:
    """Qrels of the queries: each of its documents has grade 1.

    A judged document that the corpus lacks stays in the qrels, where no system can find it: leaving it out would
    make every figure look better than a searcher's experience. It is counted and warned about.

    Args:
        queries: From :func:`read_queries`.
        corpus: Document ids of the corpus; make it a set.

    Returns:
        Qrels, and counts: ``judged_queries``, ``judged_documents``, ``judged_documents_missing``.

    Raises:
        EvaluationError: There is no query, or the corpus holds none of the judged documents.
    """
    if not queries:
        raise EvaluationError("there are no judged queries to measure on")
    qrels = {query.query_id: dict.fromkeys(query.doc_ids, 1) for query in queries}
    judged = [doc_id for grades in qrels.values() for doc_id in grades]
    missing = [doc_id for doc_id in judged if doc_id not in corpus]
    if len(missing) == len(judged):
        raise EvaluationError(
            f"none of the {len(judged)} judged documents is in the corpus ({missing[0]!r} is not, for one): "
            "do the queries belong to it, and is its id column the right one?"
        )
    if missing:
        logger.warning(
            "%d of %d judged documents are not in the corpus (%r, for one): no system can find them",
            len(missing),
            len(judged),
            missing[0],
        )
    counts = {
        "judged_queries": len(qrels),
        "judged_documents": len(judged),
        "judged_documents_missing": len(missing),
    }
    return qrels, counts


def read_judged(candidates_path: Path, qrels_path: Path) -> Judged:
    """Candidates and graded judgments in TREC Deep Learning's style.

    Args:
        candidates_path: ``.parquet`` or ``.jsonl`` of ``query_id``, ``query``, ``doc_id``, ``text`` and
            ``bm25_rank``, a row a candidate.
        qrels_path: The same of ``query_id``, ``doc_id``, ``grade``.

    Raises:
        EvaluationError: Names the file, and the row where one cannot be used.
    """
    qrels: dict[str, dict[str, int]] = {}
    for number, row in _read_rows(qrels_path, ("query_id", "doc_id", "grade")):
        if not isinstance(row["grade"], int):
            raise EvaluationError(f"{qrels_path}, row {number}: grade must be a whole number, not {row['grade']!r}")
        query_id = _text(row["query_id"], qrels_path, number, "query_id")
        qrels.setdefault(query_id, {})[_text(row["doc_id"], qrels_path, number, "doc_id")] = row["grade"]
    texts: dict[str, str] = {}
    ranked: dict[str, list[tuple[float, str, str]]] = {}
    columns = ("query_id", "query", "doc_id", "text", "bm25_rank")
    for number, row in _read_rows(candidates_path, columns):
        query_id, query, doc_id, text = (_text(row[name], candidates_path, number, name) for name in columns[:4])
        if not isinstance(row["bm25_rank"], (int, float)):
            raise EvaluationError(f"{candidates_path}, row {number}: bm25_rank is {row['bm25_rank']!r}, not a number")
        if texts.setdefault(query_id, query) != query:
            raise EvaluationError(f"{candidates_path}, row {number}: query {query_id!r} has two texts")
        ranked.setdefault(query_id, []).append((row["bm25_rank"], doc_id, text))
    kept = [query_id for query_id in texts if query_id in qrels]
    if not kept:
        raise EvaluationError(f"{qrels_path} judges none of the queries of {candidates_path}: do they belong together?")
    for what, count in (("have no judgment", len(texts) - len(kept)), ("have no candidates", len(qrels) - len(kept))):
        if count:
            logger.warning("%s, %s: %d queries %s", candidates_path.name, qrels_path.name, count, what)
    pools = {query_id: sorted(ranked[query_id]) for query_id in kept}
    return Judged(
        queries=[(query_id, texts[query_id]) for query_id in kept],
        pools=[[(doc_id, text) for _, doc_id, text in pools[query_id]] for query_id in kept],
        run={query_id: {doc_id: -float(rank) for rank, doc_id, _ in pools[query_id]} for query_id in kept},
        qrels=qrels,
    )


def _read_rows(path: Path, columns: Sequence[str]) -> list[tuple[int, dict[str, Any]]]:
    """Rows with their numbers, from 1; each holds every column."""
    if not path.is_file():
        raise EvaluationError(f"no file at {path}")
    try:
        if path.suffix == ".jsonl":
            # not splitlines(): JSON strings may hold U+2028 and its like as they are
            lines = enumerate(path.read_text("utf-8-sig").split("\n"), start=1)
            rows = [(number, _json_row(line, path, number)) for number, line in lines if line.strip()]
        elif path.suffix == ".parquet":
            rows = list(enumerate(pq.read_table(path).to_pylist(), start=1))
        else:
            raise EvaluationError(f"{path}: expected a .jsonl or .parquet file, not {path.suffix or 'no suffix'!r}")
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        raise EvaluationError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    if not rows:
        raise EvaluationError(f"{path} holds no rows")
    for number, row in rows:
        for column in columns:
            if row.get(column) is None:
                have = ", ".join(map(str, row)) or "nothing"
                raise EvaluationError(f"{path}, row {number}: {column!r} is missing or null; the row has {have}")
    return rows


def _json_row(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise EvaluationError(f"{path}, row {number} is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise EvaluationError(f"{path}, row {number} must be a JSON object, not {line[:60]!r}")
    return row


def _text(value: Any, path: Path, number: int, column: str) -> str:
    """A string that says something; a number is taken as an id."""
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if not isinstance(text, str) or not text.strip():
        raise EvaluationError(f"{path}, row {number}: {column} must hold text, not {value!r}")
    return text
