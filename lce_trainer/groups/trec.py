"""Queries, passages, judgments and runs, as TREC, MS MARCO and BEIR publish them, into judged pairs."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lce_trainer.errors import GroupsError
from lce_trainer.files import PASSAGE_IDS, QUERY_IDS
from lce_trainer.groups.pairs import Pairs, Texts, distinct
from lce_trainer.qrels import Source, Triples, read_qrels, read_run, read_texts


def judged_pairs(
    queries: Source,
    corpus: Source,
    qrels: Source,
    run: Source | None,
    *,
    positive_from: float | None = None,
    skip: int = 0,
    depth: int | None = None,
    negatives: int | None = None,
    seed: int = 42,
    add_positives: bool = True,
) -> tuple[Pairs, dict[str, int]]:
    """Positives from the judgments, competitors from the run; arguments as in :func:`lce_trainer.to_groups`.

    Returns:
        Pairs, a query's positives before its candidates and these in the order of the run; and how
        much was read and left out, and why.

    Raises:
        GroupsError: A file or dataset is not what it should be, or none of its ids is known.
    """
    query_ids, query_texts = read_texts(queries, "queries", QUERY_IDS, GroupsError)
    passage_ids, passage_texts = read_texts(corpus, "corpus", PASSAGE_IDS, GroupsError)
    size = len(passage_ids)
    counts = {"queries_read": len(query_ids), "passages_read": size}
    judgments = read_qrels(qrels, GroupsError)
    query, passage = _rows(judgments, (query_ids, passage_ids), "judgments", counts)
    values = judgments.values
    known = (query >= 0) & (passage >= 0)
    query, passage, values = query[known], passage[known], values[known]
    positive = values > 0 if positive_from is None else values >= positive_from
    grades = np.where(positive, values, 0)
    judged = np.zeros(len(query_ids), dtype=bool)
    judged[query[positive] if add_positives else query] = True
    counts["queries_without_judgment" if not add_positives else "queries_without_positive"] = int((~judged).sum())
    if run is not None:
        query, passage, grades = query[positive], passage[positive], grades[positive]
        found, brought = _window(run, (query_ids, passage_ids), judged, (skip, depth), counts)
        counts["queries_without_candidates"] = len(np.setdiff1d(np.flatnonzero(judged), found))
        graded = _look_up(found * size + brought, query * size + passage, grades)
        taken = graded == 0
        counts["candidates_positive"] = int((~taken).sum())
        if negatives is not None:
            chance = np.random.default_rng(seed).random(len(found))
            counts["candidates_not_drawn"] = int(taken.sum())
            taken[taken] = _places(found[taken], chance[taken]) < negatives
            counts["candidates_not_drawn"] -= int(taken.sum())
        if add_positives:
            query, passage = np.append(query, found[taken]), np.append(passage, brought[taken])
            grades = np.append(grades, graded[taken])
        else:
            taken |= graded > 0
            query, passage, grades = found[taken], brought[taken], graded[taken]
    query, known_queries = _texts_of(query, query_ids, query_texts, "q")
    passage, known_passages = _texts_of(passage, passage_ids, passage_texts, "p")
    unknown = np.full(len(query), np.nan, dtype=np.float32)
    return Pairs(known_queries, known_passages, query, passage, grades.astype(np.float32), unknown), counts


def _rows(
    triples: Triples, known: tuple[pa.ChunkedArray, pa.ChunkedArray], what: str, counts: dict[str, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of queries and passages by their ids; -1 where there is none of that id, which is counted."""
    rows = []
    counts[f"{what}_read"] = len(triples.values)
    for some, all_ids, kind in zip((triples.queries, triples.passages), known, ("query", "passage"), strict=True):
        found = pc.index_in(some, value_set=all_ids)
        rows.append(pc.fill_null(found, -1).to_numpy().astype(np.int64))
        counts[f"{what}_unknown_{kind}"] = int((rows[-1] < 0).sum())
        if len(some) and (rows[-1] < 0).all():
            raise GroupsError(
                f"none of the {what} names a known {kind}: they say {some[0].as_py()!r} and so on, "
                f"where the ids are {', '.join(repr(value.as_py()) for value in all_ids[:3])} and so on"
            )
    return rows[0], rows[1]


def _window(
    run: Source,
    known: tuple[pa.ChunkedArray, pa.ChunkedArray],
    judged: np.ndarray,
    window: tuple[int, int | None],
    counts: dict[str, int],
) -> tuple[np.ndarray, np.ndarray]:
    """Candidates of judged queries between ``skip`` and ``depth``, in the order of the run."""
    candidates = read_run(run, GroupsError)
    query, passage = _rows(candidates, known, "candidates", counts)
    # Where the corpus lacks a passage, its id still takes a place in the run.
    names = pc.index_in(candidates.passages, value_set=candidates.passages.unique()).to_numpy().astype(np.int64)
    wanted = (query >= 0) & judged[query]
    counts["candidates_of_other_queries"] = int(((query >= 0) & ~wanted).sum())
    query, passage, names, scores = (values[wanted] for values in (query, passage, names, candidates.values))
    order = np.lexsort((-scores, query))
    query, passage, names = query[order], passage[order], names[order]
    pair = query * max(int(names.max(initial=0)) + 1, 1) + names
    first = np.zeros(len(pair), dtype=bool)
    first[np.unique(pair, return_index=True)[1]] = True
    counts["candidates_repeated"] = int((~first).sum())
    query, passage = query[first], passage[first]
    rank = _places(query, np.arange(len(query)))
    inside = rank >= window[0]
    if window[1] is not None:
        inside &= rank < window[1]
    counts["candidates_outside_window"] = int((~inside).sum())
    inside &= passage >= 0
    return query[inside], passage[inside]


def _places(groups: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Place of each item in its group, from 0, by its key."""
    order = np.lexsort((key, groups))
    starts = np.flatnonzero(np.diff(groups[order], prepend=-1))
    sizes = np.diff(np.append(starts, len(groups)))
    places = np.empty(len(groups), dtype=np.int64)
    places[order] = np.arange(len(groups)) - np.repeat(starts, sizes)
    return places


def _look_up(keys: np.ndarray, known: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return the highest value of each key, 0 where it is not known."""
    order = np.lexsort((-values, known))
    known, values = np.append(known[order], -1), np.append(values[order], 0.0)
    at = np.searchsorted(known[:-1], keys)
    return np.where(known[at] == keys, values[at], 0.0)


def _texts_of(rows: np.ndarray, ids: pa.ChunkedArray, texts: pa.ChunkedArray, prefix: str) -> tuple[np.ndarray, Texts]:
    """The distinct texts among some rows, and the place of each row's among them."""
    used, back = np.unique(rows, return_inverse=True)
    codes, values = distinct(texts.take(pa.array(used)), ids.take(pa.array(used)), prefix)
    return codes[back], values
