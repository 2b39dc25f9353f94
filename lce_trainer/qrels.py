"""Judgments (qrels), runs and texts by id, in the files of TREC, MS MARCO and BEIR, in tables and in dicts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lce_trainer.errors import DataError, LCETrainerError
from lce_trainer.files import (
    ENDINGS,
    LABELS,
    PASSAGE_IDS,
    QUERIES,
    QUERY_IDS,
    SCORES,
    TEXTS,
    Rows,
    by_name,
    column_of,
    find_column,
    is_hub_id,
    kind_of,
    numbers_of,
    read_fields,
    read_rows,
    texts_of,
    with_titles,
)

_BEIR_ENDINGS = tuple(f"{end}{packed}" for end in (".jsonl", ".parquet", ".tsv") for packed in ("", ".gz", ".zst"))

Source: TypeAlias = str | Path | datasets.Dataset | Mapping[str, Any]

ID_LISTS = ("passage_ids", "doc_ids", "document_ids", "docids", "pids", "candidates", "corpus_ids")


@dataclass(frozen=True)
class Triples:
    """Query, passage and value, one a row: a grade in qrels, in a run a score.

    Attributes:
        name: What they come from, for messages.
        queries: Ids of queries.
        passages: Ids of passages.
        values: Grades or scores, of which higher ones are better, float64, shape ``(rows,)``.
        numbers: Of the rows they come from, for messages, likewise.
    """

    name: str
    queries: pa.ChunkedArray
    passages: pa.ChunkedArray
    values: np.ndarray
    numbers: np.ndarray


def read_qrels(source: Source, error: type[LCETrainerError] = DataError) -> Triples:
    """Read judgments.

    Args:
        source: A file in TREC's form (query, 0, passage, grade) or BEIR's (query, passage, grade), with a header or
            without; a file or dataset with named columns, one judgment a row or a list of relevant passages a row;
            or a dict of dicts.
        error: Raised where they cannot be read.

    Raises:
        LCETrainerError: Of the class ``error``: it is no such thing; names the file, and the row.
    """
    if isinstance(source, Mapping):
        return _nested("qrels", {query: dict(grades) for query, grades in source.items()}, error)
    rows = _rows(source, "qrels", None, error)
    table, name = rows.table, f"qrels: {rows.name}" if rows.name != "rows" else "qrels"
    if nested := _json_dict(rows):
        return _nested(name, nested, error)
    if not _is_plain(table):
        by_name(table, name, error)
        if _lists(table) and find_column(table, PASSAGE_IDS) is None:
            return _unfolded(rows, name, error, ranked=False)
        columns = [column_of(table, names, name, error) for names in (QUERY_IDS, PASSAGE_IDS, (*LABELS, *SCORES))]
    elif table.num_columns in (3, 4):
        columns = [table.column(i) for i in (0, table.num_columns - 2, table.num_columns - 1)]
    else:
        raise error(
            f"{name} must have 4 columns (query, 0, passage, grade) or 3 (query, passage, grade), "
            f"not {table.num_columns}"
        )
    return _triples(rows, name, columns[0], columns[1], numbers_of(columns[2], name, error, rows.numbers), error)


def read_run(source: Source, error: type[LCETrainerError] = DataError) -> Triples:
    """Read candidates.

    Args:
        source: A file in TREC's form (query, Q0, passage, rank, score, tag), which goes by the score; or of three
            columns: query, passage, and a score, or MS MARCO's rank, which counts from 1 in each query. A file or
            dataset with named columns, one candidate a row or a list of passage ids, best first, a row. Or a dict of
            lists of ids, or of dicts of scores.
        error: Raised where they cannot be read.

    Raises:
        LCETrainerError: Of the class ``error``: it is no such thing, or a third column may be ranks or scores.
    """
    if isinstance(source, Mapping):
        return _nested("run", source, error)
    rows = _rows(source, "run", None, error)
    table, name = rows.table, f"run: {rows.name}" if rows.name != "rows" else "run"
    if nested := _json_dict(rows):
        return _nested(name, nested, error)
    if not _is_plain(table):
        by_name(table, name, error)
        if _lists(table) and find_column(table, PASSAGE_IDS) is None:
            return _unfolded(rows, name, error, ranked=True)
        queries, passages = (column_of(table, names, name, error) for names in (QUERY_IDS, PASSAGE_IDS))
        return _triples(rows, name, queries, passages, scores_of(rows, name, error), error)
    if table.num_columns == 6:  # trec_eval, too, goes by the score and not by the rank
        return _triples(rows, name, table["f0"], table["f2"], numbers_of(table["f4"], name, error, rows.numbers), error)
    if table.num_columns == 3:
        values = numbers_of(table["f2"], name, error, rows.numbers)
        return _triples(rows, name, table["f0"], table["f1"], _ranks_or_scores(table["f0"], values, name, error), error)
    raise error(
        f"{name} must have 6 columns (query, Q0, passage, rank, score, tag) or 3 (query, passage, rank or score), "
        f"not {table.num_columns}"
    )


def scores_of(rows: Rows, what: str, error: type[LCETrainerError] = DataError) -> np.ndarray:
    """Return the scores of a run's rows, by its column of ranks or of scores; higher is better.

    Raises:
        LCETrainerError: Of the class ``error``: there is neither, or they contradict each other.
    """
    names = by_name(rows.table, what, error)
    ranks = [name for key, name in names.items() if key == "rank" or key.endswith("_rank")]
    scores = [name for key, name in names.items() if key in SCORES or key.endswith("_score")]
    for found in (ranks, scores):
        if len(found) > 1:
            raise error(f"{what}: {' and '.join(found)} both order the candidates: leave one of them")
    if not ranks and not scores:
        have = ", ".join(rows.table.column_names)
        raise error(f"{what}: run without a column rank: no column score either; there are: {have}")
    if not ranks:
        return numbers_of(rows.table[scores[0]], f"{what}: {scores[0]}", error, rows.numbers)
    places = numbers_of(rows.table[ranks[0]], f"{what}: {ranks[0]}", error, rows.numbers)
    if scores:
        values = numbers_of(rows.table[scores[0]], f"{what}: {scores[0]}", error, rows.numbers)
        query = _codes(column_of(rows.table, QUERY_IDS, what, error))
        order = np.lexsort((places, query))
        torn = (np.diff(query[order]) == 0) & (np.diff(values[order]) > 0) & (np.diff(places[order]) > 0)
        if torn.any():
            at = rows.at(int(order[1:][torn][0]))
            raise error(f"{at}: {ranks[0]} and {scores[0]} order the candidates differently: leave one of them")
    return -places


def read_texts(
    source: Source, what: str, names: Sequence[str], error: type[LCETrainerError] = DataError
) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    """Read the ids and texts of queries or passages.

    Args:
        source: A file of ids and texts parted by tabs, or of MS MARCO's documents (id, URL, title, body); a file or
            dataset with named columns; or a dict. A title is put before its text.
        what: They are, for messages.
        names: That their ids go by.
        error: Raised where they cannot be read.

    Raises:
        LCETrainerError: Of the class ``error``: it is no such thing, an id is missing, or stands for two texts.
    """
    if isinstance(source, Mapping):
        fields = [value if isinstance(value, Mapping) else {"text": value} for value in source.values()]
        columns = [[str(key) for key in source], *([value.get(name) for value in fields] for name in ("text", "title"))]
        try:
            table = pa.table([pa.array(column, pa.large_string()) for column in columns], ["_id", "text", "title"])
        except (pa.ArrowInvalid, pa.ArrowTypeError, UnicodeEncodeError) as reason:
            raise error(f"{what}: each value must be a text, or a dict with one: {reason}") from None
        rows = Rows(what, table, np.arange(len(table)))
    else:
        rows = _rows(source, what, "\t", error)
    table, name = rows.table, f"{what}: {rows.name}" if rows.name not in ("rows", what) else what
    title: pa.ChunkedArray | None = None
    if _is_plain(table):
        # MS MARCO: id and text of passages and queries; id, url, title and body of documents.
        if table.num_columns not in (2, 4):
            raise error(f"{name} must have 2 columns, id and text, not {table.num_columns}")
        ids, texts = table["f0"], table.column(table.num_columns - 1)
        if table.num_columns == 4:
            title = table["f2"]
    else:
        by_name(table, name, error)
        texts_in = (*TEXTS, *QUERIES) if names is PASSAGE_IDS else (*QUERIES, *TEXTS)
        ids, texts = column_of(table, names, name, error), column_of(table, texts_in, name, error)
        at = find_column(table, ("title",))
        title = table[at] if at is not None else None
    ids, texts = texts_of(ids, name, error), texts_of(texts, name, error)
    if title is not None:
        texts = with_titles(texts, texts_of(title, name, error))
    if ids.null_count:
        raise error(f"{name}: row {rows.numbers[int(np.asarray(pc.is_null(ids)).argmax())]} has no id")
    _check_ids(rows, ids, texts, name, error)
    return ids, texts


def _check_ids(
    rows: Rows, ids: pa.ChunkedArray, texts: pa.ChunkedArray, what: str, error: type[LCETrainerError]
) -> None:
    """Refuse an id that stands for two texts; the same one twice does no harm."""
    codes = _codes(ids)
    if len(codes) == 0 or int(codes.max()) + 1 == len(codes):
        return
    order = np.argsort(codes, kind="stable")
    repeats = np.flatnonzero(np.diff(codes[order]) == 0)
    first, second = order[repeats], order[repeats + 1]
    same = pc.fill_null(pc.equal(texts.take(pa.array(first)), texts.take(pa.array(second))), True)
    if not pc.all(same).as_py():
        bad = int(np.flatnonzero(~np.asarray(same))[0])
        one, two = rows.numbers[first[bad]], rows.numbers[second[bad]]
        raise error(f"{what}: the id {ids[int(first[bad])].as_py()!r} stands for two texts, in rows {one} and {two}")


def _rows(source: Any, what: str, delimiter: str | None, error: type[LCETrainerError]) -> Rows:
    if isinstance(source, datasets.Dataset):
        return read_rows(source, error=error)
    if not isinstance(source, (str, Path)):
        raise error(f"{what} must be a file, a datasets.Dataset or a dict, not {type(source).__name__}")
    path = Path(source)
    if not path.is_file():
        if path.is_dir() or is_hub_id(str(source)):
            return read_rows(source, error=error)
        raise error(f"{what}: there is no file {path}")
    if kind_of(path) in ENDINGS and kind_of(path) != ".tsv":
        return read_rows(path, error=error)
    return read_fields(path, delimiter, error)


def _is_plain(table: pa.Table) -> bool:
    """Whether a table's columns had no names."""
    names: list[str] = table.column_names
    return bool(names) and names == [f"f{i}" for i in range(table.num_columns)]


def _lists(table: pa.Table) -> str | None:
    """The column that holds lists of ids."""
    name = find_column(table, ID_LISTS)
    kind = None if name is None else table[name].type
    return name if kind is not None and (pa.types.is_list(kind) or pa.types.is_large_list(kind)) else None


def _unfolded(rows: Rows, what: str, error: type[LCETrainerError], ranked: bool) -> Triples:
    """One row for each item of the lists of ids; valued by its place in the list, or 1."""
    column = rows.table[_lists(rows.table) or ""]
    sizes = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
    row = np.repeat(np.arange(len(sizes)), sizes)
    place = np.arange(len(row)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    values = -place.astype(np.float64) if ranked else np.ones(len(row))
    queries = column_of(rows.table, QUERY_IDS, what, error).take(pa.array(row))
    items = Rows(rows.name, rows.table, rows.numbers[row])
    return _triples(items, what, queries, pc.list_flatten(column), values, error)


def _triples(
    rows: Rows,
    what: str,
    queries: pa.ChunkedArray,
    passages: pa.ChunkedArray,
    values: np.ndarray,
    error: type[LCETrainerError],
) -> Triples:
    queries, passages = texts_of(queries, what, error), texts_of(passages, what, error)
    for column, kind in ((queries, "query"), (passages, "passage")):
        if column.null_count:
            raise error(f"{what}: row {rows.numbers[int(np.asarray(pc.is_null(column)).argmax())]}: no id of a {kind}")
    return Triples(what, queries, passages, values, rows.numbers)


def _ranks_or_scores(
    queries: pa.ChunkedArray, values: np.ndarray, what: str, error: type[LCETrainerError]
) -> np.ndarray:
    """Scores by the third column of a run, which is MS MARCO's rank or a score; only what can be one of them is read.

    Ranks are 1 to n in each query. Whole numbers, all different, that are not, are ranks of which some were
    left out, or scores.
    """
    query = _codes(queries)
    order = np.lexsort((values, query))
    same = np.diff(query[order]) == 0
    starts = np.flatnonzero(np.append(True, ~same)) if len(values) else np.zeros(0, dtype=np.int64)
    place = np.arange(len(values)) - np.repeat(starts, np.diff(np.append(starts, len(values))))
    step = np.diff(values[order])[same]
    whole = bool((values == np.floor(values)).all() and (values >= 0).all())
    if len(step) == 0 or not whole or (step == 0).any():
        return values
    by_file = np.argsort(query, kind="stable")
    steps = np.diff(values[by_file])[np.diff(query[by_file]) == 0]
    ranks = bool((values[order] == place + 1).all())
    falling, rising = bool((steps < 0).all()), bool((steps > 0).all())
    if ranks and not falling:
        return -values
    if falling and not ranks:
        return values
    seen = f"whole numbers from {values.min():g} to {values.max():g}"
    order_seen = "falling" if falling else "rising" if rising else "in no order"
    raise error(
        f"{what}: the third column holds {seen}, {order_seen} within a query, which may be ranks or scores: give the "
        f"file a header (query_id, doc_id, and rank or score), or TREC's 6 columns"
    )


def _codes(ids: pa.ChunkedArray) -> np.ndarray:
    """Number of each id among the distinct ones."""
    encoded = ids.combine_chunks().dictionary_encode()
    encoded = encoded.combine_chunks() if isinstance(encoded, pa.ChunkedArray) else encoded
    codes: np.ndarray = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    return codes


def _json_dict(rows: Rows) -> dict[str, Any] | None:
    """What a file of one JSON object holds, as ranx and pytrec_eval write it: an object or a list for each query."""
    table = rows.table
    if table.num_rows != 1 or not table.num_columns or find_column(table, QUERY_IDS) is not None:
        return None
    kinds = table.schema.types
    if not all(pa.types.is_struct(kind) for kind in kinds) and not all(pa.types.is_list(kind) for kind in kinds):
        return None
    (found,) = table.to_pylist()
    return {query: _without_nulls(some) for query, some in found.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: item for key, item in value.items() if item is not None}
    return value


def _nested(name: str, source: Mapping[Any, Any], error: type[LCETrainerError]) -> Triples:
    """Dicts of values, or lists of ids of which the first is the best."""
    rows: list[tuple[str, str, float]] = []
    try:
        for query, some in source.items():
            items = some.items() if isinstance(some, Mapping) else ((key, -place) for place, key in enumerate(some))
            rows += [(str(query), str(passage), float(value)) for passage, value in items]
        columns = [pa.chunked_array([pa.array([row[i] for row in rows], pa.large_string())]) for i in range(2)]
    except (TypeError, ValueError) as reason:
        raise error(
            f"{name}: each query must have a dict of numbers by passage, or a list of passages: {reason}"
        ) from None
    values = np.array([row[2] for row in rows], dtype=np.float64)
    if not np.isfinite(values).all():
        bad = rows[int(np.flatnonzero(~np.isfinite(values))[0])]
        raise error(f"{name}: query {bad[0]!r}, passage {bad[1]!r}: {bad[2]} is not a finite number")
    return Triples(name, columns[0], columns[1], values, np.arange(len(values)))


def beir_files(folder: Path, split: str, error: type[LCETrainerError]) -> dict[str, Path] | None:
    """Return the files of a folder in the BEIR layout; None if it has another.

    Raises:
        LCETrainerError: An ``error``: it has no judgments of that split.
    """
    files = {name: [folder / f"{name}{end}" for end in _BEIR_ENDINGS] for name in ("corpus", "queries")}
    found = {name: next((file for file in some if file.is_file()), None) for name, some in files.items()}
    if found["corpus"] is None or found["queries"] is None:
        return None
    splits = {file.name.partition(".")[0]: file for file in sorted((folder / "qrels").glob("*.tsv*"))}
    if split not in splits:
        raise error(f"{folder / 'qrels'} has no {split}.tsv, only {', '.join(splits) or 'nothing'}: set split=")
    return {"corpus": found["corpus"], "queries": found["queries"], "qrels": splits[split]}
