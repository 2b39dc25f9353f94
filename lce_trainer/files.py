"""Files of ranking data into Arrow tables, and their columns by the names that people give them."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv, parquet
from pyarrow import json as arrow_json

from lce_trainer.errors import GroupsError

QUERY_IDS = ("query_id", "qid", "query-id", "anchor_id", "_id", "id")
PASSAGE_IDS = ("passage_id", "doc_id", "pid", "docid", "document_id", "corpus_id", "corpus-id", "_id", "id")
TEXTS = ("text", "passage", "query", "question", "contents", "content", "body")

_BLOCK = 1 << 24  # bytes parsed at once; longer lines make it grow


def read_file(path: Path) -> pa.Table:
    """A file with named columns, chosen by its ending; ``.gz`` is unpacked.

    Raises:
        GroupsError: It has another ending, or cannot be parsed.
    """
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    try:
        if kind == "parquet":
            return parquet.read_table(path, memory_map=True)
        if kind in ("jsonl", "json"):
            return _read_json(path)
        if kind in ("csv", "tsv"):
            options = csv.ParseOptions(delimiter="," if kind == "csv" else "\t", newlines_in_values=True)
            return csv.read_csv(path, csv.ReadOptions(block_size=_BLOCK), options)
    except (pa.ArrowInvalid, ValueError) as error:
        raise GroupsError(f"{path}: {' '.join(str(error).split())}") from None
    raise GroupsError(f"{path} must end in .jsonl, .json, .parquet, .csv or .tsv, with .gz after it or without")


def read_fields(path: Path, delimiter: str | None = None) -> pa.Table:
    """A file without column names, such as a TREC run or MS MARCO's collection, all of it strings.

    Args:
        path: The file; ``.gz`` is unpacked.
        delimiter: Between fields; None for white space, as TREC's files have it. A first line
            without a number is then taken for a header, as BEIR's judgments have one.

    Returns:
        Columns ``f0``, ``f1`` and so on.

    Raises:
        GroupsError: A line has another number of fields than the first.
    """
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        first = file.readline().rstrip("\r\n")
    if not first:
        raise GroupsError(f"{path} is empty")
    header = delimiter is None and not any(map(_is_number, first.split()))
    guess = delimiter or ("\t" if "\t" in first else " ")
    width = len(first.split(guess))
    names = [f"f{i}" for i in range(width)]
    read = csv.ReadOptions(column_names=names, skip_rows=int(header), block_size=_BLOCK)
    convert = csv.ConvertOptions(column_types=dict.fromkeys(names, pa.large_string()))
    try:
        if delimiter is None and width != len(first.split()):
            raise pa.ArrowInvalid("aligned with several blanks")
        return csv.read_csv(path, read, csv.ParseOptions(delimiter=guess, quote_char=False), convert)
    except pa.ArrowInvalid as error:
        if delimiter is not None:
            raise GroupsError(f"{path}: {' '.join(str(error).split())}") from None
    return _read_aligned(path, len(first.split()), int(header))


def _read_aligned(path: Path, width: int, skip: int) -> pa.Table:
    """Fields with any white space between them."""
    read = csv.ReadOptions(column_names=["line"], skip_rows=skip, block_size=_BLOCK)
    lines = csv.read_csv(path, read, csv.ParseOptions(delimiter="\x01", quote_char=False))["line"].combine_chunks()
    fields = pc.ascii_split_whitespace(pc.ascii_trim_whitespace(lines))
    sizes = pc.list_value_length(fields).to_numpy(zero_copy_only=False)
    if (sizes != width).any():
        bad = int(np.flatnonzero(sizes != width)[0])
        raise GroupsError(f"{path} line {bad + skip + 1}: {sizes[bad]} fields where the first line has {width}")
    flat = fields.flatten()
    return pa.table([flat.take(pa.array(np.arange(i, len(flat), width))) for i in range(width)], _names(width))


def column_of(table: pa.Table, names: Sequence[str], what: str) -> pa.ChunkedArray:
    """The first of several columns that a table has.

    Raises:
        GroupsError: It has none of them.
    """
    for name in names:
        if name in table.column_names:
            return table[name]
    raise GroupsError(f"{what}: no column {' or '.join(names)}; there are: {', '.join(table.column_names)}")


def with_titles(texts: pa.ChunkedArray, titles: pa.ChunkedArray) -> pa.ChunkedArray:
    """Each text with its title, if there is one, on a line of its own before it."""
    texts, titles = texts.cast(pa.large_string()), titles.cast(pa.large_string())
    has = pc.fill_null(pc.greater(pc.binary_length(titles), 0), False)
    return pc.if_else(has, pc.binary_join_element_wise(titles, texts, pa.scalar("\n", pa.large_string())), texts)


def numbers_of(column: pa.ChunkedArray, what: str) -> np.ndarray:
    """A column as float64, shape ``(rows,)``.

    Raises:
        GroupsError: A value is no number; names the row.
    """
    try:
        values: np.ndarray = column.cast(pa.float64()).to_numpy()
    except pa.ArrowInvalid as error:
        raise GroupsError(f"{what}: {' '.join(str(error).split())}") from None
    if not np.isfinite(values).all():
        raise GroupsError(f"{what}: row {int(np.flatnonzero(~np.isfinite(values))[0])} is not a finite number")
    return values


def _read_json(path: Path) -> pa.Table:
    """Objects, one a line or all of them in one array."""
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        start = file.read(1024).lstrip()
        if start.startswith(b"["):
            file.seek(0)
            return pa.Table.from_pylist(json.load(file))
    size = _BLOCK
    while True:
        try:
            return arrow_json.read_json(path, arrow_json.ReadOptions(block_size=size))
        except pa.ArrowInvalid as error:
            # pyarrow says no other way that a line is longer than a block.
            if "straddling" not in str(error) or size >= 1 << 30:
                raise
            size *= 8


def _is_number(field: str) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return True


def _names(width: int) -> list[str]:
    return [f"f{i}" for i in range(width)]
