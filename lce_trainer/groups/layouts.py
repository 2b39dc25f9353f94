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
from lce_trainer.files import (
    LABELS,
    PASSAGE_IDS,
    QUERIES,
    QUERY_IDS,
    SCORES,
    TEXTS,
    as_floats,
    by_name,
    canonical,
    numbers_of,
    texts_of,
    with_titles,
)
from lce_trainer.groups.pairs import Pairs, distinct
from lce_trainer.groups.schema import GROUPS_FEATURES
from lce_trainer.qrels import ID_LISTS

logger = logging.getLogger(__name__)

UNDERSTOOD = """Understood are, by column, in any order and any case:
  query, passages, labels: groups, and under any names sentence-transformers' labeled lists;
  anchor, positive, negative or negative_1, ...: its triplets and n-tuples; with scores, one for each passage;
  query, passage, label: its labeled pairs, under any names;
  query, pos, neg, and if known pos_scores, neg_scores: FlagEmbedding;
  qry, pos, neg: luyug/Reranker;
  query, positive_passages, negative_passages: Tevatron;
  query, response, rejected_response: ms-swift;
  and the arguments queries=, corpus=, qrels=, run=: MS MARCO, TREC and BEIR.
Columns under other names are read by columns=("query", "positive", "negative", ...)."""

# Columns that are neither texts nor judgments: ids, and the index that pandas writes.
_ID = re.compile(r"_?id|[pq]ids?|docids?|.*_ids?|.*_idx|index|unnamed:_\d+|__index_level_\d+__|dataset_name|")
_NEGATIVE = re.compile(r"(hard_?)?neg(ative)?s?(_?(passage|doc|text))?(_?\d+)?|rejected(_response)?s?(_?\d+)?")
_POSITIVES = ("pos", "positive", "positives", "positive_passages", "positive_passage", "response", "chosen")
_NEGATIVES = (
    *("neg", "negative", "negatives", "negative_passages", "negative_passage", "hard_negatives", "hard_negative"),
    *("rejected_response", "rejected_responses", "rejected"),
)
_PASSAGES = (*TEXTS, "answer", "response", "sentence2", "context", "candidate", "positive")
# Beside a query, a row's id is not the passage's.
_ROW_PASSAGE_IDS = tuple(name for name in PASSAGE_IDS if name not in ("_id", "id"))
# Names of classes that say whether a passage is relevant; others may be grades, whose order nothing says.
_RELEVANT = ("relevant", "positive", "pos", "yes", "true", "related", "match", "correct")
_NOT_RELEVANT = (
    *("irrelevant", "nonrelevant", "non_relevant", "not_relevant", "unrelated", "not_related", "negative", "neg"),
    *("no", "false", "mismatch", "no_match", "incorrect"),
)
_WORDS = {**dict.fromkeys(_RELEVANT, 1.0), **dict.fromkeys(_NOT_RELEVANT, 0.0)}


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
    """Read the judged pairs of a table's rows, in their order; arguments as in :func:`lce_trainer.to_groups`.

    Raises:
        GroupsError: The columns are of no layout that is understood, or a row contradicts it.
    """
    if missing := [name for name in columns or () if name not in table.column_names]:
        raise GroupsError(f"no column {', '.join(missing)}; there are: {', '.join(table.column_names)}")
    if columns is None and table.column_names == [f"f{i}" for i in range(table.num_columns)]:
        columns = table.column_names
        logger.warning("the rows have no names of columns: they are read in their order, as with columns=")
    if columns is None:
        by_name(table, error=GroupsError)
        table = table.rename_columns([canonical(name) for name in table.column_names])
        if {"query", "passages", "labels"} <= set(table.column_names):  # already groups
            table = table.select([name for name in table.column_names if name in GROUPS_FEATURES])
    chosen = table.select(columns) if columns else table
    found = _sort_out(chosen, by_name=columns is None)
    texts, lists, label = found.texts, found.lists, found.label or found.score
    negatives = texts[2:] if columns else sorted((name for name in texts if _NEGATIVE.fullmatch(name)), key=_natural)
    others = [name for name in texts if name not in negatives]
    used: tuple[str, ...]
    if split := _split_columns(chosen, others, columns is None):
        used, pairs = split, _positives_and_negatives(table, *split, tokenizer)
    elif len(texts) == len(lists) == 1 and label and _is_list(table[label].type):
        used, pairs = (texts[0], lists[0]), _labeled_lists(table, texts[0], lists[0], found, positive_from)
    elif not lists and negatives and len(others) == 2 and (not label or _is_list(table[label].type)):
        query, positive = _query_and_passage(others, columns is None)
        used, pairs = (query, positive, *negatives), _tuples(table, query, (positive, *negatives), label)
    elif not lists and len(texts) == 2 and not negatives and label and not _is_list(table[label].type):
        query, passage = _query_and_passage(texts, columns is None)
        used, pairs = (query, passage), _labeled_pairs(table, query, passage, found, positive_from)
    else:
        described = ", ".join(f"{name} ({table[name].type})" for name in chosen.column_names)
        unlabeled = len(texts) == 2 and not (lists or label or negatives)
        why = "pairs without labels hold no negatives" if unlabeled else "cannot tell what these columns hold"
        raise GroupsError(f"{why}: {described}. {UNDERSTOOD}")
    if positive_from is not None and (split or negatives):
        raise GroupsError(
            f"positive_from={positive_from} needs labels or scores; {', '.join(used)} say what is positive"
        )
    logger.info("groups are read from %s", ", ".join(used))
    return pairs


def numeric_lists(table: pa.Table) -> pa.Table:
    """Return a table of groups from a text file with numbers for labels and scores, where they are lists of such."""
    if not {"query", "passages", "labels"} <= set(table.column_names):
        return table
    for name in ("labels", "scores"):
        kind = table[name].type if name in table.column_names else None
        if kind is not None and _is_list(kind) and _is_text(kind.value_type) and _says_numbers(table[name]):
            numbers = table[name].cast(pa.list_(pa.float64()))
            table = table.set_column(table.column_names.index(name), name, numbers)
    return table


def _sort_out(table: pa.Table, by_name: bool) -> _Columns:
    """Columns by what their names say they hold, and where these say nothing, by their values."""
    texts, lists = [], []
    judgments: dict[str, str] = {}
    known = {*QUERIES, *_PASSAGES, *_POSITIVES, *_NEGATIVES}
    for place, (name, kind) in enumerate(zip(table.column_names, table.schema.types, strict=True)):
        if by_name and _ID.fullmatch(name):
            continue
        if by_name:
            role = "score" if name in SCORES else "label" if name in LABELS else None
            text = name in known or bool(_NEGATIVE.fullmatch(name))
        else:
            role = "score" if canonical(name) in SCORES else "label"
            text = place == 0 or canonical(name) in known or bool(_NEGATIVE.fullmatch(canonical(name)))
        values = kind.value_type if _is_list(kind) else kind
        if role and not text and (by_name or _says_numbers(table[name])):
            if _is_number(values) or _is_text(values):
                judgments.setdefault(role, name)
        elif _is_list(kind) and _is_text(values):
            lists.append(name)
        elif (_is_text(kind) and (text or not _says_numbers(table[name]))) or (text and _is_number(kind)):
            texts.append(name)
    return _Columns(texts, lists, judgments.get("label"), judgments.get("score"))


def _query_and_passage(names: Sequence[str], by_name: bool) -> tuple[str, str]:
    """Which of two columns of texts holds the queries; the order of the columns says it only if no name does."""
    first, second = names
    if not by_name:
        return first, second
    queries = [name for name in names if name in QUERIES]
    passages = [name for name in names if name in _PASSAGES or name in _POSITIVES]
    if len(queries) == 2 or len(passages) == 2:
        raise GroupsError(
            f"{first} and {second} may both be {'queries' if len(queries) == 2 else 'passages'}: say which is which by "
            f"columns=, in the order query, passage"
        )
    if not queries and not passages:
        logger.warning(
            "no name says whether %s or %s holds the queries: the first is taken for them, set columns= otherwise",
            *(first, second),
        )
        return first, second
    query = queries[0] if queries else next(name for name in names if name not in passages)
    return query, second if query == first else first


def _split_columns(table: pa.Table, texts: Sequence[str], by_name: bool) -> tuple[str, str, str] | None:
    """Query, positives and negatives, where a row holds lists of these."""
    names = table.column_names
    if not by_name:
        is_split = len(names) == 3 and _is_list(table[names[1]].type) and _is_list(table[names[2]].type)
        return tuple(names) if is_split and not _says_numbers(table[names[2]]) else None
    positives = [name for name in _POSITIVES if name in names]
    negatives = [name for name in _NEGATIVES if name in names]
    queries = [name for name in QUERIES if name in names]
    if not (positives and negatives):
        return None
    if not any(_is_list(table[name].type) for name in (*positives, *negatives)):
        return None
    for several in (queries, positives, negatives):
        if len(several) > 1:
            raise GroupsError(f"{' and '.join(several)} may be the same thing: say which to read by columns=")
    left = [name for name in texts if name not in (*positives, *negatives)]
    if not queries and len(left) != 1:
        return None
    return (queries or left)[0], positives[0], negatives[0]


def _natural(name: str) -> tuple[str, int]:
    """``negative_2`` before ``negative_10``, wherever the columns stand."""
    stem = name.rstrip("0123456789")
    return stem, int(name[len(stem) :] or 0)


# ---- one layout each


def _labeled_pairs(table: pa.Table, query: str, passage: str, found: _Columns, positive_from: float | None) -> Pairs:
    labels = _labels_of(table[found.label], found.label) if found.label else None
    scores = numbers_of(table[found.score], found.score, GroupsError) if found.score else None
    labels, scores = _grades(labels, scores, found, positive_from)
    return _pairs(
        _queries(table, query),
        (texts_of(table[passage], passage, GroupsError), _ids(table, _ROW_PASSAGE_IDS)),
        labels,
        scores,
    )


def _labeled_lists(table: pa.Table, query: str, passages: str, found: _Columns, positive_from: float | None) -> Pairs:
    sizes = _sizes(table[passages])
    labels, scores = (
        _aligned(table, name, sizes, passages, name == found.label) if name else None
        for name in (found.label, found.score)
    )
    if labels is not None and not np.isfinite(labels).all():
        raise GroupsError(
            f"row {_row_of(sizes, ~np.isfinite(labels))}: {found.label} holds what is not a finite number"
        )
    labels, scores = _grades(labels, scores, found, positive_from)
    name = next((name for name in ID_LISTS if name in table.column_names), None)
    ids = None
    if name is not None:
        if (_sizes(table[name]) != sizes).any():
            bad = int((_sizes(table[name]) != sizes).argmax())
            raise GroupsError(f"row {bad}: {name} and {passages} differ in length")
        ids = texts_of(pc.list_flatten(table[name]), name, GroupsError)
    rows = np.repeat(np.arange(len(sizes)), sizes)
    return _pairs(_queries(table, query), (pc.list_flatten(table[passages]), ids), labels, scores, rows)


def _tuples(table: pa.Table, query: str, passages: Sequence[str], score: str | None) -> Pairs:
    width, height = len(passages), table.num_rows
    scores = _aligned(table, score, np.full(height, width), " and ".join(passages)) if score else None
    texts = _join([table[name] for name in passages])
    labels = np.tile(np.arange(width) == 0, height).astype(np.float32)
    # Texts lie column after column, pairs row after row.
    order = np.arange(width * height).reshape(width, height).T.ravel()
    rows = np.repeat(np.arange(height), width)
    return _pairs(_queries(table, query), (texts, None), labels, scores, rows, order)


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
        _queries(table, query, tokenizer),
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
    query_rows, queries = distinct(*query, "q")
    passage_rows, passages = distinct(*passage, "p")
    query_rows = query_rows if rows is None else query_rows[rows]
    passage_rows = passage_rows if order is None else passage_rows[order]
    scores = np.full(len(query_rows), np.nan) if scores is None else scores
    return Pairs(queries, passages, query_rows, passage_rows, labels.astype(np.float32), scores.astype(np.float32))


def _queries(table: pa.Table, name: str, tokenizer: Any = None) -> tuple[pa.ChunkedArray, pa.ChunkedArray | None]:
    """Return queries and their ids."""
    texts, ids = _texts(table[name], name, tokenizer)
    return texts, _ids(table, QUERY_IDS) if ids is None else ids


def _texts(items: pa.ChunkedArray, name: str, tokenizer: Any) -> tuple[pa.ChunkedArray, pa.ChunkedArray | None]:
    """Texts, and ids if there are any, of strings, of objects that hold them, or of token ids."""
    kind = items.type
    if pa.types.is_struct(kind):
        fields = [field.name for field in kind]
        text = next((field for field in (*TEXTS, *QUERIES) if field in fields), None)
        if text is None:
            known = " or ".join((*TEXTS, *QUERIES))
            raise GroupsError(f"{name} holds objects without {known}; they have: {', '.join(fields)}")
        texts, _ = _texts(pc.struct_field(items, text), f"{name}.{text}", tokenizer)
        if "title" in fields:
            texts = with_titles(texts, pc.struct_field(items, "title"))
        named = next((field for field in (*PASSAGE_IDS, *QUERY_IDS) if field in fields), None)
        return texts, None if named is None else texts_of(pc.struct_field(items, named), f"{name}.{named}", GroupsError)
    if _is_list(kind) and _says_numbers(items):
        if tokenizer is None:
            raise GroupsError(
                f"{name} holds token ids; pass the tokenizer that made them, as to_groups(..., tokenizer="
                "AutoTokenizer.from_pretrained(...)), to have the texts back"
            )
        texts = tokenizer.batch_decode(
            [[int(i) for i in ids or ()] for ids in items.to_pylist()], skip_special_tokens=True
        )
        return pa.chunked_array([pa.array(texts, pa.large_string())]), None
    if not (_is_text(kind) or _is_number(kind) or pa.types.is_null(kind)):
        raise GroupsError(f"{name} must hold texts, not {kind}. {UNDERSTOOD}")
    return texts_of(items, name, GroupsError), None


def _labels_of(column: pa.ChunkedArray, name: str) -> np.ndarray:
    """Labels as numbers; a word is understood, and never taken by its place among the classes."""
    if _is_text(column.type):
        known = {
            word: number for word in column.unique().to_pylist() if (number := _WORDS.get(_word(word))) is not None
        }
        if known:
            number = pa.array([str(known[word]) for word in known])
            place = pc.index_in(column, value_set=pa.array(list(known)))
            column = pc.coalesce(number.take(place), column.cast(pa.string()))
        odd = [value for value in column.unique().to_pylist() if value is not None and not _floats_or_none(value)]
        if odd:
            raise GroupsError(
                f"{name} holds {', '.join(repr(value[:40]) for value in odd[:5])}: labels are numbers, of which those "
                f"above 0 are positive, or words such as {', '.join(_RELEVANT[:3])} and "
                f"{', '.join(_NOT_RELEVANT[:3])}; turn others into numbers"
            )
    return numbers_of(column, name, GroupsError)


def _word(value: Any) -> str:
    return canonical(str(value)) if value is not None else ""


def _floats_or_none(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


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


def _aligned(table: pa.Table, name: str, sizes: np.ndarray, to: str, labels: bool = False) -> np.ndarray:
    """Return the numbers of a list column, NaN for null; one list has as many as ``sizes`` says, or is null."""
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
    items = pc.list_flatten(column)
    if labels and _is_text(items.type) and not items.null_count:
        numbers = _labels_of(items, name)
    else:
        try:
            numbers = as_floats(items).to_numpy()
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise GroupsError(f"{name}: {' '.join(str(error).split())}") from None
    values[~np.repeat(missing, sizes)] = numbers
    return values


def _sizes(column: pa.ChunkedArray) -> np.ndarray:
    sizes: np.ndarray = pc.fill_null(pc.list_value_length(column), 0).to_numpy().astype(np.int64)
    return sizes


def _row_of(sizes: np.ndarray, bad: np.ndarray) -> int:
    return int(np.searchsorted(np.cumsum(sizes), bad.argmax(), side="right"))


def _ids(table: pa.Table, names: Sequence[str]) -> pa.ChunkedArray | None:
    """The column of ids that has the first of several names."""
    have = {canonical(name): name for name in table.column_names}
    name = next((have[name] for name in names if name in have), None)
    return None if name is None else texts_of(table[name], name, GroupsError)


def _join(parts: Sequence[pa.ChunkedArray]) -> pa.ChunkedArray:
    chunks = [chunk for part in parts for chunk in part.cast(pa.large_string()).chunks]
    return pa.chunked_array(chunks, pa.large_string())


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _says_numbers(column: pa.ChunkedArray) -> bool:
    """Whether a column, or the lists of one, holds numbers, or texts that all say one."""
    if _is_list(column.type):
        column = pc.list_flatten(column)
    if _is_number(column.type):
        return True
    if not _is_text(column.type) or len(column) == column.null_count:
        return False
    try:
        as_floats(column)
    except pa.ArrowInvalid:
        return False
    return True


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind))
