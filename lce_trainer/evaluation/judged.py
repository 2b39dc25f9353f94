"""Human judgments: queries with the documents that answer them, and candidates with graded judgments."""

import json
import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lce_trainer.errors import EvaluationError

logger = logging.getLogger(__name__)


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
