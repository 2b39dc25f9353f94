"""Judged pairs of a query and a passage into groups: what every layout of ranking data comes down to."""

from dataclasses import dataclass
from itertools import pairwise

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets.fingerprint import generate_random_fingerprint

from lce_trainer.groups.schema import GROUPS_FEATURES, what_teaches

# Arrow's strings are addressed by 32 bits: a chunk of a column holds less text than this.
_CHUNK_BYTES = 1 << 30


@dataclass(frozen=True)
class Texts:
    """Distinct texts, in the order they first came, and the id of each."""

    values: pa.LargeStringArray
    ids: pa.StringArray

    def __len__(self) -> int:
        return len(self.values)


@dataclass(frozen=True)
class Pairs:
    """Judgments, in the order they came, which is the order that passages keep in their group.

    Attributes:
        queries: Distinct queries.
        passages: Distinct passages.
        query: Row of each pair's query, shape ``(pairs,)``; -1 where it is missing or blank.
        passage: Row of its passage, likewise.
        labels: Above 0 is positive, shape ``(pairs,)``, float32.
        scores: A teacher's, NaN where unknown, shape ``(pairs,)``, float32.
    """

    queries: Texts
    passages: Texts
    query: np.ndarray
    passage: np.ndarray
    labels: np.ndarray
    scores: np.ndarray


def distinct(texts: pa.ChunkedArray, ids: pa.ChunkedArray | None, prefix: str) -> tuple[np.ndarray, Texts]:
    """Each text's row among the distinct ones; -1 where it is null or blank.

    Args:
        texts: Strings.
        ids: One a text; a text's first one names it. Made up of ``prefix`` and a number where null.
        prefix: Of ids made up.
    """
    encoded = texts.cast(pa.large_string()).dictionary_encode().unify_dictionaries()
    parts = [chunk.indices.fill_null(-1).to_numpy(zero_copy_only=False) for chunk in encoded.chunks]
    codes = np.concatenate(parts or [np.zeros(0, dtype=np.int32)])
    values = encoded.chunk(0).dictionary if parts else pa.array([], pa.large_string())
    blank = np.asarray(pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(values)), 0))
    numbers = pa.array(np.arange(len(values))).cast(pa.string())
    names = pc.binary_join_element_wise(pa.scalar(prefix), numbers, "")
    if ids is not None:
        first = np.zeros(len(values), dtype=np.int64)
        known = np.flatnonzero(codes >= 0)[::-1]
        first[codes[known]] = known  # the last to be written is the first there was
        names = pc.coalesce(ids.take(pa.array(first)).combine_chunks().cast(pa.string()), names)
    return np.where((codes >= 0) & ~np.append(blank, False)[codes], codes, -1), Texts(values, names)


def merge(pairs: Pairs, keep_all: bool = False) -> tuple[datasets.Dataset, dict[str, int]]:
    """One group a query: positives first, otherwise in the order the pairs came.

    A pair that came several times has its highest label and its highest score, so a passage that is
    a positive of a query anywhere is nowhere its negative.

    Args:
        pairs: Judgments, in any order.
        keep_all: Also keep groups without a positive or without a negative, for an evaluation.

    Returns:
        Groups in the order their queries first came, in memory, with the columns of
        ``GROUPS_FEATURES``; and how many pairs and groups were read, merged and left out.
    """
    at = np.flatnonzero((pairs.query >= 0) & (pairs.passage >= 0))
    key = pairs.query[at].astype(np.int64) * max(len(pairs.passages), 1) + pairs.passage[at]
    order = np.argsort(key, kind="stable")
    starts = np.flatnonzero(np.diff(key[order], prepend=-1))
    at = at[order]
    label = np.maximum.reduceat(pairs.labels[at], starts) if len(at) else pairs.labels[at]
    lowest = np.minimum.reduceat(pairs.labels[at], starts) if len(at) else label
    score = np.fmax.reduceat(pairs.scores[at], starts) if len(at) else pairs.scores[at]
    first = at[starts]
    query, passage, positive = pairs.query[first], pairs.passage[first], label > 0
    order = np.lexsort((first, ~positive, query))
    sizes = np.bincount(query, minlength=len(pairs.queries))
    usable, useless = what_teaches(label, query, len(pairs.queries))
    kept = sizes > 0 if keep_all else usable
    counts = {
        "pairs_read": len(pairs.query),
        "pairs_empty": len(pairs.query) - len(at),
        "pairs_repeated": len(at) - len(starts),
        "negatives_also_positive": int((positive & (lowest <= 0)).sum()),
        "groups_read": len(pairs.queries),
        "groups": int(kept.sum()),
        **useless,
    }
    order = order[kept[query[order]]]
    table = _table(pairs, np.flatnonzero(kept), sizes[kept], passage[order], label[order], score[order])
    features = datasets.DatasetInfo(features=GROUPS_FEATURES)
    return datasets.Dataset(table, info=features, fingerprint=generate_random_fingerprint()), counts


def _table(
    pairs: Pairs, queries: np.ndarray, sizes: np.ndarray, passage: np.ndarray, label: np.ndarray, score: np.ndarray
) -> pa.Table:
    """Lay pairs out as lists, in chunks that Arrow can address.

    Args:
        pairs: For their texts.
        queries: Row of each group's query, shape ``(groups,)``.
        sizes: Pairs of each group, shape ``(groups,)``.
        passage: Row of each pair's passage, group after group, shape ``(kept,)``.
        label: Likewise.
        score: Likewise; a group that knows none has null for a list.
    """
    schema = GROUPS_FEATURES.arrow_schema
    ends = np.concatenate([[0], np.cumsum(sizes)])
    text = pc.binary_length(pairs.passages.values).to_numpy(zero_copy_only=False)
    full = np.cumsum(text[passage])[ends[1:] - 1] // _CHUNK_BYTES
    cuts = np.concatenate([[0], np.flatnonzero(np.diff(full)) + 1, [len(queries)]])
    batches = []
    for start, end in pairwise(cuts):
        rows, inside = pa.array(queries[start:end]), slice(ends[start], ends[end])
        offsets = ends[start : end + 1] - ends[start]
        taken, known = pa.array(passage[inside]), ~np.isnan(score[inside])
        group = np.repeat(np.arange(end - start), sizes[start:end])
        scored = np.bincount(group, weights=known, minlength=end - start) > 0
        columns = {
            "query_id": pairs.queries.ids.take(rows),
            "query": pairs.queries.values.take(rows).cast(pa.string()),
            "passage_ids": _lists(offsets, pairs.passages.ids.take(taken)),
            "passages": _lists(offsets, pairs.passages.values.take(taken).cast(pa.string())),
            "labels": _lists(offsets, pa.array(label[inside], pa.float32())),
            "scores": _scores(sizes[start:end], scored, score[inside][scored[group]]),
        }
        batches.append(pa.table({name: columns[name] for name in schema.names}, schema=schema))
    return pa.concat_tables(batches)


def _lists(offsets: np.ndarray, values: pa.Array) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values)


def _scores(sizes: np.ndarray, scored: np.ndarray, values: np.ndarray) -> pa.ListArray:
    ends = np.cumsum(np.where(scored, sizes, 0))
    flat = pa.array(values, pa.float32(), mask=np.isnan(values))
    lists = _lists(np.concatenate([[0], ends]), flat)
    return pc.if_else(pa.array(scored), lists, pa.scalar(None, lists.type))
