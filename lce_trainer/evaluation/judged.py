"""Human judgments: queries with the documents that answer them, graded candidates, and labelled pairs."""

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lce_trainer.errors import EvaluationError
from lce_trainer.files import (
    LABELS,
    PASSAGE_IDS,
    QUERIES,
    QUERY_IDS,
    TEXTS,
    Rows,
    by_name,
    column_of,
    find_column,
    numbers_of,
    read_rows,
    texts_of,
    with_titles,
)
from lce_trainer.qrels import ID_LISTS, Triples, read_qrels, scores_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Query:
    """A human query, the documents that answer it, and what type of query it is, where that is known."""

    query_id: str
    query: str
    doc_ids: tuple[str, ...]
    query_type: str | None = None


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


@dataclass(frozen=True)
class LabelledPairs:
    """Pairs of a query and a passage that people have labelled.

    Attributes:
        queries: The query of each.
        passages: The passage of each.
        relevant: True where the passage answers the query, shape ``(pairs,)``.
    """

    queries: list[str]
    passages: list[str]
    relevant: np.ndarray


def read_queries(path: Path) -> list[Query]:
    """Read human queries with the documents that answer them.

    Args:
        path: A file of rows (``.jsonl``, ``.parquet``, ``.csv``, …) with ``query_id``, ``query`` and ``doc_ids``, a
            list; or with ``doc_id``, where each row is one of a query's documents. A ``qtype`` or ``type`` of text
            is the type of the query; of several rows of a query the first counts.

    Raises:
        EvaluationError: Names the file and the row (counted from 1) that cannot be used.
    """
    rows = _read(path)
    lists = find_column(rows.table, ID_LISTS)
    single = None if lists is not None and _is_list(rows.table[lists].type) else find_column(rows.table, _DOC_IDS)
    names = (_QUERY_IDS, (*QUERIES, "text"), (single or lists or "doc_ids",))
    ids, texts, docs = (_values(rows, some) for some in names)
    types = _query_types(rows)
    queries: dict[str, Query] = {}
    for row, (query_id, query, doc_ids) in enumerate(zip(ids, texts, docs, strict=True)):
        query_id, query = _text(query_id, rows, row, "query_id"), _text(query, rows, row, "query")
        found = queries.get(query_id)
        if found is not None and single is None:
            raise EvaluationError(f"{rows.at(row)}: query_id {query_id!r} was given before; ids must be distinct")
        if found is not None and found.query != query:
            raise EvaluationError(f"{rows.at(row)}: query {query_id!r} has two texts")
        if single is not None:
            doc_ids = [doc_ids]
        if not isinstance(doc_ids, list) or not doc_ids:
            raise EvaluationError(f"{rows.at(row)}: doc_ids must be a list of one or more ids, not {doc_ids!r}")
        more = tuple(_text(doc_id, rows, row, "doc_ids") for doc_id in doc_ids)
        every = tuple(dict.fromkeys((*(found.doc_ids if found else ()), *more)))
        queries[query_id] = Query(query_id, query, every, found.query_type if found else types[row])
    return list(queries.values())


def judgments(queries: Sequence[Query], corpus: Collection[str]) -> tuple[dict[str, dict[str, int]], dict[str, int]]:
    """Return the qrels of the queries: each of its documents has grade 1.

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
    """Read the candidates of a first-stage retriever, with their texts, and graded judgments.

    Args:
        candidates_path: A file of rows (``.parquet``, ``.jsonl``, ``.csv``, ``.tsv``, …) of ``query_id``, ``query``,
            ``doc_id``, ``text`` and a rank (``rank``, ``bm25_rank``, …) or a score, a row a candidate.
        qrels_path: A qrels file of TREC or BEIR, or a file of rows of ``query_id``, ``doc_id``, ``grade``.

    Raises:
        EvaluationError: Names the file, and the row where one cannot be used.
    """
    qrels = grades_by_query(read_qrels(_existing(qrels_path), EvaluationError), str(qrels_path))
    rows = _read(candidates_path)
    names = (_QUERY_IDS, QUERIES, _DOC_IDS, TEXTS)
    columns = [_values(rows, some) for some in names]
    if (title := find_column(rows.table, ("title",))) is not None:
        texts = texts_of(rows.table[find_column(rows.table, TEXTS)], str(candidates_path), EvaluationError)
        titles = texts_of(rows.table[title], str(candidates_path), EvaluationError)
        columns[3] = with_titles(texts, titles).to_pylist()
    scores = scores_of(rows, str(candidates_path), EvaluationError)
    texts_by_id: dict[str, str] = {}
    ranked: dict[str, list[tuple[float, str, str]]] = {}
    for row, values in enumerate(zip(*columns, strict=True)):
        kinds = ("query_id", "query", "doc_id", "text")
        query_id, query, doc_id, text = (
            _text(value, rows, row, kind) for value, kind in zip(values, kinds, strict=True)
        )
        if texts_by_id.setdefault(query_id, query) != query:
            raise EvaluationError(f"{rows.at(row)}: query {query_id!r} has two texts")
        ranked.setdefault(query_id, []).append((-float(scores[row]), doc_id, text))
    kept = [query_id for query_id in texts_by_id if query_id in qrels]
    if not kept:
        raise EvaluationError(f"{qrels_path} judges none of the queries of {candidates_path}: do they belong together?")
    no_judgment = len(texts_by_id) - len(kept)
    for what, count in (("have no judgment", no_judgment), ("have no candidates", len(qrels) - len(kept))):
        if count:
            logger.warning("%s, %s: %d queries %s", candidates_path.name, qrels_path.name, count, what)
    pools = {query_id: sorted(ranked[query_id]) for query_id in kept}
    run: dict[str, dict[str, float]] = {query_id: {} for query_id in kept}
    for query_id in kept:
        for place, doc_id, _ in pools[query_id]:
            run[query_id].setdefault(doc_id, -place)  # a document counts as its best passage
    return Judged(
        queries=[(query_id, texts_by_id[query_id]) for query_id in kept],
        pools=[[(doc_id, text) for _, doc_id, text in pools[query_id]] for query_id in kept],
        run=run,
        qrels=qrels,
    )


def grades_by_query(judged: Triples, name: str) -> dict[str, dict[str, int]]:
    """Return grades by query id and document id.

    Args:
        judged: Judgments, from :func:`lce_trainer.qrels.read_qrels`.
        name: What they come from, for messages.

    Raises:
        EvaluationError: A grade is no whole number, or a document has two.
    """
    qrels: dict[str, dict[str, int]] = {}
    ids = (judged.queries.to_pylist(), judged.passages.to_pylist())
    for row, (query_id, doc_id, grade) in enumerate(zip(*ids, judged.values.tolist(), strict=True)):
        if grade != int(grade):
            raise EvaluationError(f"{name}, row {judged.numbers[row]}: grade must be a whole number, not {grade!r}")
        known = qrels.setdefault(query_id, {})
        if known.setdefault(doc_id, int(grade)) != int(grade):
            raise EvaluationError(
                f"{name}, row {judged.numbers[row]}: query {query_id!r}, document {doc_id!r} has the grades "
                f"{known[doc_id]} and {int(grade)}"
            )
    return qrels


def read_pairs(path: Path) -> LabelledPairs:
    """Read pairs of a query and a passage with a label.

    Args:
        path: A file of rows (``.jsonl``, ``.parquet``, ``.csv``, …) of ``query``, ``passage`` and ``label`` (or what
            else such columns are called), a label above 0 where the passage answers the query. A ``title`` stands
            before its passage. A pair that stands twice counts once.

    Raises:
        EvaluationError: Names the file, and the row where one cannot be used; a pair has two labels, or all pairs
            have the same.
    """
    rows = _read(path)
    names = (QUERIES, ("passage", *TEXTS))
    texts = [_values(rows, some) for some in names]
    if (title := find_column(rows.table, ("title",))) is not None:
        passages = texts_of(column_of(rows.table, names[1], str(path)), str(path), EvaluationError)
        texts[1] = with_titles(passages, texts_of(rows.table[title], str(path), EvaluationError)).to_pylist()
    column = column_of(rows.table, LABELS, str(path), EvaluationError)
    labels = numbers_of(column, f"{path}: label", EvaluationError, rows.numbers)
    found: dict[tuple[str, str], bool] = {}
    for row, (query, passage, label) in enumerate(zip(*texts, labels.tolist(), strict=True)):
        pair = (_text(query, rows, row, "query"), _text(passage, rows, row, "passage"))
        if found.setdefault(pair, label > 0) != (label > 0):
            raise EvaluationError(f"{rows.at(row)}: the pair was given before with another label: keep one of the two")
    relevant = np.array(list(found.values()), dtype=bool)
    if relevant.all() or not relevant.any():
        kind = "above 0" if relevant.all() else "0 or below"
        raise EvaluationError(f"{path}: all {len(relevant)} labels are {kind}: there must be both kinds to compare")
    return LabelledPairs([query for query, _ in found], [passage for _, passage in found], relevant)


_QUERY_IDS = tuple(name for name in QUERY_IDS if name != "anchor_id")
_DOC_IDS = tuple(name for name in PASSAGE_IDS if name not in ("_id", "id"))
_QUERY_TYPES = ("qtype", "query_type", "type")


def _query_types(rows: Rows) -> list[str | None]:
    """Return the type of each row's query; None where it is empty, or where there is no such column of text."""
    name = find_column(rows.table, _QUERY_TYPES)
    if name is None or not (
        pa.types.is_string(rows.table[name].type) or pa.types.is_large_string(rows.table[name].type)
    ):
        return [None] * rows.table.num_rows
    return [(value or "").strip() or None for value in rows.table[name].to_pylist()]


def _read(path: Path) -> Rows:
    rows = read_rows(_existing(path), error=EvaluationError)
    if not rows.table.num_rows:
        raise EvaluationError(f"{path} holds no rows")
    by_name(rows.table, str(path), EvaluationError)
    return rows


def _existing(path: Path) -> Path:
    if not path.exists():
        raise EvaluationError(f"no file at {path}")
    return path


def _values(rows: Rows, names: Sequence[str]) -> list[Any]:
    """The values of a column by the first of its names that is there, without a null."""
    name = find_column(rows.table, names) or names[0]
    values = rows.table[name].to_pylist() if name in rows.table.column_names else [None] * rows.table.num_rows
    for row, value in enumerate(values):
        if value is None:
            have = ", ".join(rows.table.column_names) or "nothing"
            raise EvaluationError(f"{rows.at(row)}: {names[0]!r} is missing or null; the columns are: {have}")
    return values


def _text(value: Any, rows: Rows, row: int, column: str) -> str:
    """A string that says something; a number is taken as an id."""
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if not isinstance(text, str) or not text.strip():
        raise EvaluationError(f"{rows.at(row)}: {column} must hold text, not {value!r}")
    return text


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))
