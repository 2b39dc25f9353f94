"""Queries, passages, judgments and runs, as TREC, MS MARCO and BEIR publish them, into judged pairs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lce_trainer.errors import GroupsError
from lce_trainer.files import (
    PASSAGE_IDS,
    QUERY_IDS,
    TEXTS,
    column_of,
    numbers_of,
    read_fields,
    read_file,
    with_titles,
)
from lce_trainer.groups.pairs import Pairs, Texts, distinct
from lce_trainer.groups.schema import arrow_table

Source: TypeAlias = str | Path | datasets.Dataset | Mapping[str, Any]
Ids: TypeAlias = tuple[pa.ChunkedArray, pa.ChunkedArray]  # of a query and of a passage, a row each

_CANDIDATES = ("passage_ids", "doc_ids", "document_ids", "docids", "pids", "candidates")
_GRADES = ("grade", "score", "label", "relevance", "rel")
_ENDINGS = (".jsonl", ".jsonl.gz", ".parquet", ".tsv", ".tsv.gz")


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
    query_ids, query_texts = _texts(queries, "queries", QUERY_IDS)
    passage_ids, passage_texts = _texts(corpus, "corpus", PASSAGE_IDS)
    size = len(passage_ids)
    counts = {"queries_read": len(query_ids), "passages_read": size}
    ids, values = _judgments(qrels)
    query, passage = _rows(ids, (query_ids, passage_ids), "judgments", counts)
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


def beir_files(folder: Path, split: str) -> dict[str, Path] | None:
    """The files of a folder in the BEIR layout; None if it has another.

    Raises:
        GroupsError: It has no judgments of that split.
    """
    files = {name: [folder / f"{name}{end}" for end in _ENDINGS] for name in ("corpus", "queries")}
    found = {name: next((file for file in some if file.is_file()), None) for name, some in files.items()}
    if found["corpus"] is None or found["queries"] is None:
        return None
    splits = {file.name.partition(".")[0]: file for file in sorted((folder / "qrels").glob("*.tsv*"))}
    if split not in splits:
        raise GroupsError(f"{folder / 'qrels'} has no {split}.tsv, only {', '.join(splits) or 'nothing'}: set split=")
    return {"corpus": found["corpus"], "queries": found["queries"], "qrels": splits[split]}


def _texts(source: Source, what: str, names: tuple[str, ...]) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    """Ids and texts of queries or passages."""
    if isinstance(source, Mapping):
        fields = [value if isinstance(value, Mapping) else {"text": value} for value in source.values()]
        columns = [[str(key) for key in source], *([value.get(name) for value in fields] for name in ("text", "title"))]
        table = pa.table([pa.array(column, pa.large_string()) for column in columns], ["_id", "text", "title"])
    else:
        table = _table(source, what, "\t")
    title: pa.ChunkedArray | None
    if table.column_names[0] == "f0":
        # MS MARCO: id and text of passages and queries; id, url, title and body of documents.
        if table.num_columns not in (2, 4):
            raise GroupsError(f"{what}: {source} must have 2 columns, id and text, not {table.num_columns}")
        ids, texts, title = table["f0"], table.column(table.num_columns - 1), None
        if table.num_columns == 4:
            title = table["f2"]
    else:
        ids, texts = column_of(table, names, what), column_of(table, TEXTS, what)
        title = table["title"] if "title" in table.column_names else None
    texts = texts.cast(pa.large_string()) if title is None else with_titles(texts, title)
    return ids.cast(pa.large_string()), texts


def _judgments(source: Source) -> tuple[Ids, np.ndarray]:
    """Query, passage and grade of each judgment."""
    if isinstance(source, Mapping):
        return _nested({query: dict(grades) for query, grades in source.items()})
    table = _table(source, "qrels", None)
    if table.column_names[0] != "f0":
        columns = [column_of(table, names, "qrels") for names in (QUERY_IDS, PASSAGE_IDS, _GRADES)]
    elif table.num_columns in (3, 4):
        columns = [table.column(i) for i in (0, table.num_columns - 2, table.num_columns - 1)]
    else:
        raise GroupsError(
            f"qrels: {source} must have 4 columns (query, 0, passage, grade) or 3 (query, passage, grade), "
            f"not {table.num_columns}"
        )
    return (columns[0], columns[1]), numbers_of(columns[2], "qrels")


def _candidates(source: Source) -> tuple[Ids, np.ndarray]:
    """Query, passage and place of each candidate; lower places are better."""
    if isinstance(source, Mapping):
        ids, place = _nested(
            {
                query: {key: -score for key, score in found.items()}
                if isinstance(found, Mapping)
                else {key: place for place, key in enumerate(found)}
                for query, found in source.items()
            }
        )
        return ids, place
    table = _table(source, "run", None)
    if table.column_names[0] == "f0":
        if table.num_columns == 6:  # trec_eval, too, goes by the score and not by the rank
            return (table["f0"], table["f2"]), -numbers_of(table["f4"], "run")
        if table.num_columns == 3:
            return (table["f0"], table["f1"]), numbers_of(table["f2"], "run")
        raise GroupsError(
            f"run: {source} must have 6 columns (query, Q0, passage, rank, score, tag) or 3 (query, passage, rank), "
            f"not {table.num_columns}"
        )
    query = column_of(table, QUERY_IDS, "run")
    lists = [name for name in _CANDIDATES if name in table.column_names]
    if lists:
        row = np.repeat(np.arange(len(query)), pc.fill_null(pc.list_value_length(table[lists[0]]), 0).to_numpy())
        return (query.take(pa.array(row)), pc.list_flatten(table[lists[0]])), np.arange(len(row), dtype=np.float64)
    if "rank" in table.column_names:
        place = numbers_of(table["rank"], "run")
    else:
        place = -numbers_of(column_of(table, ("score", "bm25_score"), "run without a column rank"), "run")
    return (query, column_of(table, PASSAGE_IDS, "run")), place


def _table(source: str | Path | datasets.Dataset, what: str, delimiter: str | None) -> pa.Table:
    """What was given, as a table; without column names it has ``f0``, ``f1`` and so on."""
    if isinstance(source, datasets.Dataset):
        return arrow_table(source)
    if not isinstance(source, (str, Path)):
        raise GroupsError(f"{what} must be a file, a datasets.Dataset or a dict, not {type(source).__name__}")
    path = Path(source)
    if not path.is_file():
        raise GroupsError(f"{what}: there is no file {path}; of a Hub dataset, pass what load_dataset returns")
    if path.name.removesuffix(".gz").endswith((".jsonl", ".json", ".parquet", ".csv")):
        return read_file(path)
    return read_fields(path, delimiter)


def _nested(source: Mapping[Any, Mapping[Any, float]]) -> tuple[Ids, np.ndarray]:
    rows = [
        (str(query), str(passage), float(value)) for query, some in source.items() for passage, value in some.items()
    ]
    columns = [[row[i] for row in rows] for i in range(3)]
    ids = [pa.chunked_array([pa.array(column, pa.large_string())]) for column in columns[:2]]
    return (ids[0], ids[1]), np.array(columns[2], dtype=np.float64)


def _rows(ids: Ids, known: Ids, what: str, counts: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of queries and passages by their ids; -1 where there is none of that id, which is counted."""
    rows = []
    counts[f"{what}_read"] = len(ids[0])
    for some, all_ids, kind in zip(ids, known, ("query", "passage"), strict=True):
        found = pc.index_in(some.cast(pa.large_string()), value_set=all_ids)
        rows.append(pc.fill_null(found, -1).to_numpy().astype(np.int64))
        counts[f"{what}_unknown_{kind}"] = int((rows[-1] < 0).sum())
        if len(some) and (rows[-1] < 0).all():
            raise GroupsError(
                f"none of the {what} names a known {kind}: they say {some[0].as_py()!r} and so on, "
                f"where the ids are {', '.join(repr(value.as_py()) for value in all_ids[:3])} and so on"
            )
    return rows[0], rows[1]


def _window(
    run: Source, known: Ids, judged: np.ndarray, window: tuple[int, int | None], counts: dict[str, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Candidates of judged queries between ``skip`` and ``depth``, in the order of the run."""
    ids, place = _candidates(run)
    query, passage = _rows(ids, known, "candidates", counts)
    wanted = (query >= 0) & judged[query]
    counts["candidates_of_other_queries"] = int(((query >= 0) & ~wanted).sum())
    query, passage, place = query[wanted], passage[wanted], place[wanted]
    order = np.lexsort((place, query))
    query, passage = query[order], passage[order]
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
    """The value of each key, 0 where it is not known."""
    order = np.argsort(known, kind="stable")
    known, values = np.append(known[order], -1), np.append(values[order], 0.0)
    at = np.searchsorted(known[:-1], keys)
    return np.where(known[at] == keys, values[at], 0.0)


def _texts_of(rows: np.ndarray, ids: pa.ChunkedArray, texts: pa.ChunkedArray, prefix: str) -> tuple[np.ndarray, Texts]:
    """The distinct texts among some rows, and the place of each row's among them."""
    used, back = np.unique(rows, return_inverse=True)
    codes, values = distinct(texts.take(pa.array(used)), ids.take(pa.array(used)), prefix)
    return codes[back], values
