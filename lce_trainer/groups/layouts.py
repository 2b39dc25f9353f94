"""Rows of ranking data in any common layout into judged pairs: which layout they are in, and how to read it."""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lce_trainer.errors import GroupsError
from lce_trainer.files import PASSAGE_IDS, QUERY_IDS, TEXTS, numbers_of, with_titles
from lce_trainer.groups.pairs import Pairs, distinct
from lce_trainer.groups.schema import GROUPS_FEATURES

logger = logging.getLogger(__name__)

UNDERSTOOD = """Understood are, by column:
  query, passages, labels: groups, and under any names sentence-transformers' labeled lists;
  anchor, positive, negative or negative_1, ...: its triplets and n-tuples; with scores, one for each passage;
  query, passage, label: its labeled pairs, under any names;
  query, pos, neg, and if known pos_scores, neg_scores: FlagEmbedding;
  qry, pos, neg: luyug/Reranker;
  query, positive_passages, negative_passages: Tevatron;
  and the arguments queries=, corpus=, qrels=, run=: MS MARCO, TREC and BEIR.
Tuples under other names are read by columns=("query", "positive", "negative", ...)."""

# As sentence-transformers finds its label column.
_LABELS, _SCORES = ("label", "labels"), ("score", "scores")
_ID = re.compile(r"_?id|[pq]ids?|docids?|.*[_-]ids?|.*_idx")
_NEGATIVE = re.compile(r"(hard_?)?neg(ative)?s?(_?\d+)?")
_POSITIVES = ("pos", "positive", "positives", "positive_passages")
_NEGATIVES = ("neg", "negative", "negatives", "negative_passages", "hard_negatives")
_QUERIES = ("query", "qry", "anchor", "question")
_LIST_IDS = ("passage_ids", "doc_ids", "document_ids", "docids", "pids")


@dataclass(frozen=True)
class _Columns:
    """The columns of a table by what they can be: texts, lists of texts, and judgments."""

    texts: list[str]
    lists: list[str]
    label: str | None
    score: str | None


def row_pairs(
    table: pa.Table, columns: Sequence[str] | None = None, positive_from: float | None = None, tokenizer: Any = None
) -> Pairs:
    """Judged pairs of a table's rows, in their order; arguments as in :func:`lce_trainer.to_groups`.

    Raises:
        GroupsError: The columns are of no layout that is understood, or a row contradicts it.
    """
    if missing := [name for name in columns or () if name not in table.column_names]:
        raise GroupsError(f"no column {', '.join(missing)}; there are: {', '.join(table.column_names)}")
    if columns is None and {"query", "passages", "labels"} <= set(table.column_names):  # already groups
        table = table.select([name for name in table.column_names if name in GROUPS_FEATURES])
    chosen = table.select(columns) if columns else table
    found = _sort_out(chosen, by_name=columns is None)
    texts, lists, label = found.texts, found.lists, found.label or found.score
    negatives = texts[2:] if columns else [name for name in texts if _NEGATIVE.fullmatch(name)]
    others = [name for name in texts if name not in negatives]
    used: tuple[str, ...]
    if split := _split_columns(chosen, columns is None):
        used, pairs = split, _positives_and_negatives(table, *split, tokenizer)
    elif len(texts) == len(lists) == 1 and label and _is_list(table[label].type):
        used, pairs = (texts[0], lists[0]), _labeled_lists(table, texts[0], lists[0], found, positive_from)
    elif not lists and negatives and len(others) == 2 and (not label or _is_list(table[label].type)):
        used, pairs = (*others, *negatives), _tuples(table, others[0], (others[1], *negatives), label)
    elif not lists and len(texts) == 2 and not negatives and label and not _is_list(table[label].type):
        used, pairs = tuple(texts), _labeled_pairs(table, texts[0], texts[1], found, positive_from)
    else:
        shown = ", ".join(f"{name} ({table[name].type})" for name in chosen.column_names)
        unlabeled = len(texts) == 2 and not (lists or label or negatives)
        why = "pairs without labels hold no negatives" if unlabeled else "cannot tell what these columns hold"
        raise GroupsError(f"{why}: {shown}. {UNDERSTOOD}")
    if positive_from is not None and (split or negatives):
        raise GroupsError(
            f"positive_from={positive_from} needs labels or scores; {', '.join(used)} say what is positive"
        )
    logger.info("groups are read from %s", ", ".join(used))
    return pairs


def _sort_out(table: pa.Table, by_name: bool) -> _Columns:
    texts, lists = [], []
    judgments: dict[str, str] = {}
    for name, kind in zip(table.column_names, table.schema.types, strict=True):
        if by_name and (_ID.fullmatch(name) or name == "dataset_name"):
            continue
        if _is_text(kind):
            texts.append(name)
        elif _is_list(kind) and _is_text(kind.value_type):
            lists.append(name)
        elif _is_number(kind.value_type if _is_list(kind) else kind):
            role = "score" if name in _SCORES else "label" if name in _LABELS or not by_name else None
            if role:
                judgments.setdefault(role, name)
    return _Columns(texts, lists, judgments.get("label"), judgments.get("score"))


def _split_columns(table: pa.Table, by_name: bool) -> tuple[str, str, str] | None:
    """Query, positives and negatives, where a row holds lists of these."""
    names = table.column_names
    if not by_name:
        is_split = len(names) == 3 and _is_list(table[names[1]].type) and _is_list(table[names[2]].type)
        return tuple(names) if is_split and not _is_number(table[names[2]].type.value_type) else None
    positives = [name for name in _POSITIVES if name in names]
    negatives = [name for name in _NEGATIVES if name in names]
    queries = [name for name in _QUERIES if name in names]
    if not (positives and negatives and queries):
        return None
    if not any(_is_list(table[name].type) for name in (positives[0], negatives[0])):
        return None
    return queries[0], positives[0], negatives[0]


# ---- one layout each


def _labeled_pairs(table: pa.Table, query: str, passage: str, found: _Columns, positive_from: float | None) -> Pairs:
    labels = numbers_of(table[found.label], found.label) if found.label else None
    scores = _floats(table[found.score]) if found.score else None
    labels, scores = _grades(labels, scores, found, positive_from)
    return _pairs(_asked(table, query), (table[passage], _first(table, PASSAGE_IDS)), labels, scores)


def _labeled_lists(table: pa.Table, query: str, passages: str, found: _Columns, positive_from: float | None) -> Pairs:
    sizes = _sizes(table[passages])
    labels, scores = (_aligned(table, name, sizes, passages) if name else None for name in (found.label, found.score))
    if labels is not None and not np.isfinite(labels).all():
        raise GroupsError(
            f"row {_row_of(sizes, ~np.isfinite(labels))}: {found.label} holds what is not a finite number"
        )
    labels, scores = _grades(labels, scores, found, positive_from)
    name = next((name for name in _LIST_IDS if name in table.column_names), None)
    ids = None
    if name is not None:
        if (_sizes(table[name]) != sizes).any():
            bad = int((_sizes(table[name]) != sizes).argmax())
            raise GroupsError(f"row {bad}: {name} and {passages} differ in length")
        ids = pc.list_flatten(table[name])
    rows = np.repeat(np.arange(len(sizes)), sizes)
    return _pairs(_asked(table, query), (pc.list_flatten(table[passages]), ids), labels, scores, rows)


def _tuples(table: pa.Table, query: str, passages: Sequence[str], score: str | None) -> Pairs:
    width, height = len(passages), table.num_rows
    scores = _aligned(table, score, np.full(height, width), " and ".join(passages)) if score else None
    texts = _join([table[name] for name in passages])
    labels = np.tile(np.arange(width) == 0, height).astype(np.float32)
    # Texts lie column after column, pairs row after row.
    order = np.arange(width * height).reshape(width, height).T.ravel()
    rows = np.repeat(np.arange(height), width)
    return _pairs(_asked(table, query), (texts, None), labels, scores, rows, order)


def _positives_and_negatives(table: pa.Table, query: str, positive: str, negative: str, tokenizer: Any) -> Pairs:
    texts, ids, labels, scores, rows = [], [], [], [], []
    for name, label in ((positive, 1), (negative, 0)):
        column = table[name]
        sizes = _sizes(column) if _is_list(column.type) else np.ones(table.num_rows, dtype=np.int64)
        text, named = _texts(pc.list_flatten(column) if _is_list(column.type) else column, name, tokenizer)
        texts.append(text)
        ids.append(pa.chunked_array([pa.nulls(len(text), pa.large_string())]) if named is None else named)
        labels.append(np.full(len(text), label, dtype=np.float32))
        rows.append(np.repeat(np.arange(table.num_rows), sizes))
        score = f"{name}_scores"
        known = score in table.column_names and _is_list(table[score].type)
        scores.append(_aligned(table, score, sizes, name) if known else np.full(len(text), np.nan))
    return _pairs(
        _asked(table, query, tokenizer),
        (_join(texts), _join(ids)),
        np.concatenate(labels),
        np.concatenate(scores),
        np.concatenate(rows),
    )


def _pairs(
    query: tuple[pa.ChunkedArray, pa.ChunkedArray | None],
    passage: tuple[pa.ChunkedArray, pa.ChunkedArray | None],
    labels: np.ndarray,
    scores: np.ndarray | None,
    rows: np.ndarray | None = None,
    order: np.ndarray | None = None,
) -> Pairs:
    """Put pairs together.

    Args:
        query: Texts and ids, one a row of the table.
        passage: Texts and ids.
        labels: One a pair.
        scores: One a pair, or None.
        rows: Row of each pair's query; None if there is one pair a row.
        order: Place of each pair's passage; None if they are in order.
    """
    asked, queries = distinct(*query, "q")
    shown, passages = distinct(*passage, "p")
    asked = asked if rows is None else asked[rows]
    shown = shown if order is None else shown[order]
    unknown = np.full(len(asked), np.nan)
    given = unknown if scores is None else scores
    return Pairs(queries, passages, asked, shown, labels.astype(np.float32), given.astype(np.float32))


def _asked(table: pa.Table, name: str, tokenizer: Any = None) -> tuple[pa.ChunkedArray, pa.ChunkedArray | None]:
    """Queries and their ids."""
    texts, ids = _texts(table[name], name, tokenizer)
    return texts, _first(table, QUERY_IDS) if ids is None else ids


def _texts(items: pa.ChunkedArray, name: str, tokenizer: Any) -> tuple[pa.ChunkedArray, pa.ChunkedArray | None]:
    """Texts, and ids if there are any, of strings, of objects that hold them, or of token ids."""
    kind = items.type
    if pa.types.is_struct(kind):
        fields = [field.name for field in kind]
        text = next((field for field in TEXTS if field in fields), None)
        if text is None:
            raise GroupsError(f"{name} holds objects without {' or '.join(TEXTS)}; they have: {', '.join(fields)}")
        texts, _ = _texts(pc.struct_field(items, text), f"{name}.{text}", tokenizer)
        if "title" in fields:
            texts = with_titles(texts, pc.struct_field(items, "title"))
        named = next((field for field in (*PASSAGE_IDS, *QUERY_IDS) if field in fields), None)
        return texts, None if named is None else pc.struct_field(items, named)
    if _is_list(kind) and pa.types.is_integer(kind.value_type):
        if tokenizer is None:
            raise GroupsError(
                f"{name} holds token ids; pass the tokenizer that made them, as to_groups(..., tokenizer="
                "AutoTokenizer.from_pretrained(...)), to have the texts back"
            )
        texts = tokenizer.batch_decode([ids or [] for ids in items.to_pylist()], skip_special_tokens=True)
        return pa.chunked_array([pa.array(texts, pa.large_string())]), None
    if not (_is_text(kind) or pa.types.is_null(kind)):
        raise GroupsError(f"{name} must hold texts, not {kind}. {UNDERSTOOD}")
    return items.cast(pa.large_string()), None


def _grades(
    labels: np.ndarray | None, scores: np.ndarray | None, found: _Columns, positive_from: float | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Grades and teacher's scores out of what a dataset says of its pairs."""
    if labels is not None:
        return labels if positive_from is None else np.where(labels >= positive_from, labels, 0), scores
    assert scores is not None
    if positive_from is not None:
        return np.greater_equal(scores, positive_from).astype(np.float32), scores
    if np.isin(scores, (0, 1)).all():
        return scores, None
    raise GroupsError(
        f"{found.score} holds numbers from {np.nanmin(scores):g} to {np.nanmax(scores):g}, and no column label says "
        "which are positives: set positive_from= to the lowest of them; the scores are then the teacher's"
    )


# ---- columns


def _aligned(table: pa.Table, name: str, sizes: np.ndarray, to: str) -> np.ndarray:
    """The numbers of a list column, NaN for null; one list has as many as ``sizes`` says, or is null."""
    column = table[name]
    if not _is_list(column.type):
        raise GroupsError(f"{name} must be a list for each row, one number for each of {to}, not {column.type}")
    have = pc.list_value_length(column)
    missing = np.asarray(pc.is_null(have))
    lengths = pc.fill_null(have, 0).to_numpy()
    bad = ~missing & (lengths != sizes)
    if bad.any():
        row = int(bad.argmax())
        raise GroupsError(f"row {row}: {lengths[row]} {name} for {sizes[row]} of {to}")
    values = np.full(int(sizes.sum()), np.nan)
    values[~np.repeat(missing, sizes)] = _floats(pc.list_flatten(column))
    return values


def _floats(column: pa.ChunkedArray) -> np.ndarray:
    values: np.ndarray = column.cast(pa.float64()).to_numpy()
    return values


def _sizes(column: pa.ChunkedArray) -> np.ndarray:
    sizes: np.ndarray = pc.fill_null(pc.list_value_length(column), 0).to_numpy().astype(np.int64)
    return sizes


def _row_of(sizes: np.ndarray, bad: np.ndarray) -> int:
    return int(np.searchsorted(np.cumsum(sizes), bad.argmax(), side="right"))


def _first(table: pa.Table, names: Sequence[str]) -> pa.ChunkedArray | None:
    return next((table[name] for name in names if name in table.column_names), None)


def _join(parts: Sequence[pa.ChunkedArray]) -> pa.ChunkedArray:
    chunks = [chunk for part in parts for chunk in part.cast(pa.large_string()).chunks]
    return pa.chunked_array(chunks, pa.large_string())


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind))
