"""Rows of any file, folder or Hub dataset, by one reader; and columns by the names that people give them.

Text stays text: every value of a text file is a string, as it is written there (``1`` and ``01`` differ, ``NA`` and
``true`` are words, an id may have twenty digits). Who needs a number says so, by :func:`numbers_of`.
"""

import csv
import io
import json
import logging
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv as arrow_csv
from pyarrow import parquet

from lce_trainer.compat import row_selection
from lce_trainer.errors import DataError, LCETrainerError

logger = logging.getLogger(__name__)

ENDINGS = (".parquet", ".jsonl", ".ndjson", ".json", ".csv", ".tsv")
_PACKED = (".gz", ".zst", ".bz2")

# Columns by what they hold, spelled as canonical() spells them; where several are there, the first in the list counts.
QUERY_IDS = ("query_id", "qid", "queryid", "anchor_id", "_id", "id")
PASSAGE_IDS = ("passage_id", "doc_id", "pid", "docid", "docno", "document_id", "corpus_id", "passageid", "_id", "id")
QUERIES = ("query", "qry", "anchor", "question", "query_text", "sentence1", "queries")
TEXTS = ("text", "passage", "content", "contents", "body", "document", "doc", "passage_text", "document_text")
LABELS = ("label", "labels", "grade", "grades", "relevance", "rel")
SCORES = ("score", "scores")
_OTHERS = ("title", "rank", "positive", "positives", "negative", "negatives", "pos", "neg", "passages", "docs", "iter")
_KNOWN = frozenset((*QUERY_IDS, *PASSAGE_IDS, *QUERIES, *TEXTS, *LABELS, *SCORES, *_OTHERS))

_ROWS = 4096  # of a batch
_BLOCK = 1 << 22  # bytes of a text file that are parsed at once
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Rows:
    """Rows of one source, or a batch of them.

    Attributes:
        name: What they come from, for messages.
        table: The columns; of a text file, each value is a string. Without a header they are ``f0``, ``f1``, …
        numbers: Line that each row starts on, or its number from 1, shape ``(rows,)``.
    """

    name: str
    table: pa.Table
    numbers: np.ndarray

    def at(self, row: int) -> str:
        """Return where a row is, for a message."""
        return f"{self.name}, row {self.numbers[row]}"


class _UnreadableError(Exception):
    """Says why a file cannot be read, without its name."""


def read_rows(
    source: str | Path | datasets.Dataset,
    *,
    split: str = "train",
    config: str | None = None,
    header: Collection[str] = (),
    error: type[LCETrainerError] = DataError,
) -> Rows:
    """Read all rows of a file, a folder, a Hub dataset, or a dataset in memory.

    Args:
        source: A file that ends in ``.parquet``, ``.jsonl``, ``.json`` (an array of objects, or one a line), ``.csv``
            or ``.tsv``, packed by ``.gz`` or ``.zst`` or not; a folder of such files as the Hub keeps them; a Hub id;
            or a ``datasets.Dataset``.
        split: Split of a folder or a Hub dataset.
        config: Config of it; None for its default.
        header: Further column names by which the first line of a file is known to be a header.
        error: Raised where something cannot be read.

    Raises:
        LCETrainerError: Of the class ``error``; names the file and the line.
    """
    if isinstance(source, datasets.Dataset):
        return _numbered("rows", arrow_table(source))
    path = Path(source)
    if path.is_file():
        if kind_of(path) == ".parquet":
            return _numbered(str(path), _parquet_table(path, error))
        return _join(str(path), list(read_batches(path, header=header, error=error)), error)
    found = open_dataset(str(source), split, error=error, config=config)
    if isinstance(found, datasets.Dataset):
        return _numbered(str(source), arrow_table(found))
    return _join(str(source), [b for file in found for b in read_batches(file, header=header, error=error)], error)


def read_batches(
    path: Path,
    *,
    header: Collection[str] = (),
    columns: Collection[str] | None = None,
    undecodable: list[int] | None = None,
    error: type[LCETrainerError] = DataError,
) -> Iterator[Rows]:
    """Read a file's rows a few thousand at a time, in bounded memory.

    Args:
        path: As for :func:`read_rows`.
        header: Likewise.
        columns: Columns of a parquet file that are needed; None for all.
        undecodable: If given, lines of a ``.jsonl`` file that are not UTF-8 are left out, and their numbers added
            here; otherwise they are errors.
        error: Raised where something cannot be read.

    Raises:
        LCETrainerError: As :func:`read_rows`.
    """
    kind = kind_of(path)
    try:
        if kind == ".parquet":
            yield from _parquet_batches(path, columns)
        elif kind in (".jsonl", ".ndjson", ".json"):
            yield from _json_batches(path, kind, undecodable)
        elif kind == ".tsv":
            yield from _tsv_batches(path, header)
        elif kind == ".csv":
            yield from _csv_batches(path, header)
        else:
            raise _UnreadableError(
                " must end in .jsonl, .json, .parquet, .csv or .tsv, with .gz or .zst after it or without"
            )
    except _UnreadableError as reason:
        raise error(f"{path}{'' if str(reason)[0] in ', ' else ': '}{reason}") from None
    except (OSError, EOFError, pa.ArrowException, ValueError, MemoryError, csv.Error) as reason:
        raise error(f"{path} cannot be read: {one_line(reason)}") from None


def read_fields(path: Path, delimiter: str | None = None, error: type[LCETrainerError] = DataError) -> Rows:
    """Read a file of TREC, MS MARCO or BEIR, which has no quoting and mostly no header, whatever its ending.

    Args:
        path: The file, packed or not.
        delimiter: Between fields; None for tabs where the first line has the same fields by them, else white space.
        error: Raised where something cannot be read.

    Returns:
        Strings, in columns ``f0``, ``f1``, … or as the header names them.

    Raises:
        LCETrainerError: Of the class ``error``: it is empty, not UTF-8, or a line has another number of fields than
            the first.
    """
    try:
        line = _first_line(path)
        if not line.strip():
            raise _UnreadableError("it is empty")
        if delimiter is None and len(line.split("\t")) == len(line.split()):
            delimiter = "\t"
        fields = [field.strip() for field in line.split(delimiter)]
        names = fields if _is_header(fields, (), ids=True) else None
        return _join(str(path), list(_plain_batches(path, delimiter, names, len(fields))), error)
    except _UnreadableError as reason:
        raise error(f"{path}{'' if str(reason)[0] in ', ' else ': '}{reason}") from None
    except (OSError, EOFError, pa.ArrowException, ValueError) as reason:
        raise error(f"{path} cannot be read: {one_line(reason)}") from None


def read_bytes(path: Path) -> bytes:
    """Read a file, unpacked and without a byte order mark; UTF-16 that has one becomes UTF-8.

    Raises:
        OSError: It cannot be read, or unpacked.
    """
    try:
        with _open(path) as file:
            return file.read()
    except _UnreadableError as reason:
        raise OSError(str(reason)) from None


def open_dataset(
    name: str,
    split: str = "train",
    missing: str = "no dataset",
    error: type[LCETrainerError] = DataError,
    config: str | None = None,
) -> datasets.Dataset | list[Path]:
    """Open a Hub dataset or the folder of one.

    Returns:
        The dataset; or its text files (``.csv``, ``.tsv``, ``.json``), which ``datasets`` would guess types of; or the
        files of a config of a folder.

    Raises:
        LCETrainerError: Of the class ``error``: there is none, or it lacks the split.
    """
    try:
        if (Path(name) / "state.json").is_file():
            return datasets.load_from_disk(name)
        builder = datasets.load_dataset_builder(name, config)
        files = (builder.config.data_files or {}).get(split)
        # What datasets keeps of a config of a local folder goes by its card, and stays when its files change.
        fresh = config is not None and not any("://" in str(file) for file in files or ())
        if files and all(kind_of(Path(file)) in ENDINGS[0 if fresh else 1 :] for file in files):
            local = [Path(file) for file in files]
            if any("://" in str(file) for file in files):
                local = [_fetched(str(file)) for file in files]
            return local
        return datasets.load_dataset(name, config, split=split)
    except Exception as reason:  # the Hub, the network and the dataset's own files raise all kinds
        part = f"config {config!r}, split {split!r}" if config else f"split {split!r}"
        raise error(f"{missing} {name!r}, {part}: {one_line(reason)}") from None


def splits_of(name: str, config: str, error: type[LCETrainerError] = DataError) -> list[str]:
    """Return the splits of a config of a Hub dataset, or of the folder of one, in order.

    Raises:
        LCETrainerError: Of the class ``error``: there is no such dataset or config.
    """
    try:
        return [str(split) for split in datasets.get_dataset_split_names(name, config)]
    except Exception as reason:  # as in open_dataset
        raise error(f"no dataset {name!r}, config {config!r}: {one_line(reason)}") from None


def configs_of(name: str, error: type[LCETrainerError] = DataError) -> list[str]:
    """Return the configs of a Hub dataset, or of the folder of one.

    Raises:
        LCETrainerError: Of the class ``error``: there is no such dataset.
    """
    try:
        return [str(config) for config in datasets.get_dataset_config_names(name)]
    except Exception as reason:  # as in open_dataset
        raise error(f"no dataset {name!r}: {one_line(reason)}") from None


def kind_of(path: Path) -> str:
    """Return a file's ending, in small letters, without that of its packing."""
    name = path.name.lower()
    for packed in _PACKED:
        name = name.removesuffix(packed)
    return Path(name).suffix


def is_hub_id(source: str) -> bool:
    """Whether a name that is no path here may be that of a Hub dataset."""
    return kind_of(Path(source)) not in ENDINGS and not source.startswith((".", "/", "~")) and source.count("/") <= 1


# ---- columns


def canonical(name: str) -> str:
    """Return a column's name in small letters, with ``_`` for what parts its words."""
    return re.sub(r"[\s\-.]+", "_", name.strip().lower())


def by_name(table: pa.Table, what: str = "", error: type[LCETrainerError] = DataError) -> dict[str, str]:
    """Return the columns of a table by their canonical names.

    Raises:
        LCETrainerError: Of the class ``error``: two columns have the same one.
    """
    found: dict[str, str] = {}
    for name in table.column_names:
        if (twin := found.setdefault(canonical(name), name)) != name or table.column_names.count(name) > 1:
            raise error(f"{what + ': ' if what else ''}columns {twin!r} and {name!r} have one name: rename one of them")
    return found


def find_column(table: pa.Table, names: Sequence[str]) -> str | None:
    """Return the column that has the first of several names, in any spelling; None if there is none."""
    have = {canonical(name): name for name in reversed(table.column_names)}
    return next((have[name] for name in names if name in have), None)


def column_of(
    table: pa.Table, names: Sequence[str], what: str, error: type[LCETrainerError] = DataError
) -> pa.ChunkedArray:
    """Return the column that has the first of several names, in any spelling.

    Raises:
        LCETrainerError: Of the class ``error``: it has none of them.
    """
    name = find_column(table, names)
    if name is None:
        wanted = " or ".join(names[:4]) + (" or the like" if len(names) > 4 else "")
        raise error(f"{what}: no column {wanted}; there are: {', '.join(table.column_names)}")
    return table[name]


def texts_of(column: pa.ChunkedArray, what: str, error: type[LCETrainerError] = DataError) -> pa.ChunkedArray:
    """Return a column of texts or ids as strings; whole numbers become their digits.

    Raises:
        LCETrainerError: Of the class ``error``: it holds lists, objects, or numbers that are not whole.
    """
    kind = column.type
    if pa.types.is_dictionary(kind):
        column, kind = column.cast(kind.value_type), kind.value_type
    if pa.types.is_floating(kind):
        # pandas makes floats of whole numbers as soon as one is missing.
        values = column.cast(pa.float64())
        if not pc.all(
            pc.and_(pc.equal(pc.floor(values), values), pc.less(pc.abs(values), 2.0**53)), min_count=0
        ).as_py():
            raise error(f"{what}: {kind} is no text: write texts and ids as strings")
        column = values.cast(pa.int64())
    elif pa.types.is_nested(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        raise error(f"{what} must hold texts, not {kind}")
    return column.cast(pa.large_string())


def numbers_of(
    column: pa.ChunkedArray,
    what: str,
    error: type[LCETrainerError] = DataError,
    numbers: np.ndarray | None = None,
) -> np.ndarray:
    """Return a column of numbers, or of text that says numbers, as float64, shape ``(rows,)``.

    Args:
        column: Numbers, or strings.
        what: It is, for messages.
        error: Raised where a value is no number.
        numbers: Of the rows, for messages; None counts from 0.

    Raises:
        LCETrainerError: Of the class ``error``: a value is no finite number; names the row.
    """
    try:
        values: np.ndarray = as_floats(column).to_numpy()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as reason:
        bad = (row for row, value in enumerate(column.to_pylist()) if not _is_number(value))
        if (row := next(bad, None)) is None:
            raise error(f"{what}: {one_line(reason)}") from None
        value = str(column[row].as_py())[:60]
        number = row if numbers is None else numbers[row]
        raise error(f"{what}: row {number} is {value!r}, which is not a finite number") from None
    if not np.isfinite(values).all():
        row = int(np.flatnonzero(~np.isfinite(values))[0])
        raise error(f"{what}: row {row if numbers is None else numbers[row]} is not a finite number")
    return values


def as_floats(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Cast numbers, or text that says numbers, to float64; raises what pyarrow raises."""
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        column = pc.utf8_trim_whitespace(column)
    elif pa.types.is_boolean(column.type):
        column = column.cast(pa.int8())
    return column.cast(pa.float64())


def with_titles(texts: pa.ChunkedArray, titles: pa.ChunkedArray) -> pa.ChunkedArray:
    """Put each text's title, if there is one, on a line of its own before it."""
    texts, titles = texts.cast(pa.large_string()), titles.cast(pa.large_string())
    has = pc.fill_null(pc.greater(pc.binary_length(titles), 0), False)
    return pc.if_else(has, pc.binary_join_element_wise(titles, texts, pa.scalar("\n", pa.large_string())), texts)


def arrow_table(table: datasets.Dataset) -> pa.Table:
    """Return the rows of a dataset, a selection or transform of it applied, and class labels by their names."""
    features = table.features or {}
    if table.format["type"] == "custom":  # set_transform
        table = datasets.Dataset.from_dict(table[:])
    rows = table.flatten_indices().data.table if row_selection(table) is not None else table.data.table
    for name, feature in features.items():
        if name in rows.column_names and (classes := class_names(feature)):
            column = pa.chunked_array([_class_words(chunk, classes) for chunk in rows[name].chunks] or [[]])
            rows = rows.set_column(rows.column_names.index(name), name, column)
    return rows


def class_names(feature: Any) -> list[str] | None:
    """Return the names of the classes that a feature, or each item of its lists, is one of; None if it has none."""
    inner = getattr(feature, "feature", feature)
    return list(inner.names) if isinstance(inner, datasets.ClassLabel) else None


def _class_words(numbers: pa.Array, names: list[str]) -> pa.Array:
    if not pa.types.is_integer(numbers.type):
        words = _class_words(numbers.flatten(), names)
        lists = pc.fill_null(pc.list_value_length(numbers), 0).to_numpy(zero_copy_only=False)
        ends = np.concatenate([[0], np.cumsum(lists)])
        return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), words, mask=pc.is_null(numbers))
    known = pc.and_(pc.greater_equal(numbers, 0), pc.less(numbers, len(names)))  # -1 stands for no class
    return pa.array(names, pa.string()).take(pc.if_else(known, numbers, pa.scalar(None, numbers.type)))


def one_line(error: BaseException) -> str:
    """Return an error's message on one line."""
    return " ".join(str(error).split()) or type(error).__name__


# ---- one format each


def _parquet_table(path: Path, error: type[LCETrainerError]) -> pa.Table:
    try:
        with _open(path):
            table = parquet.read_table(path, memory_map=True)
        table.validate(full=True)  # a damaged file may hold bytes that are no text
        return table
    except (OSError, pa.ArrowException, ValueError, MemoryError, _UnreadableError) as reason:
        raise error(f"{path} cannot be read: {one_line(reason)}") from None


def _parquet_batches(path: Path, columns: Collection[str] | None) -> Iterator[Rows]:
    with _open(path):
        file = parquet.ParquetFile(path)
    wanted = None if columns is None else [name for name in file.schema_arrow.names if name in columns]
    start = 1
    for batch in file.iter_batches(_ROWS, columns=wanted):
        batch.validate(full=True)
        yield Rows(str(path), pa.Table.from_batches([batch]), np.arange(start, start + batch.num_rows))
        start += batch.num_rows


def _json_batches(path: Path, kind: str, undecodable: list[int] | None) -> Iterator[Rows]:
    """Objects, one a line; or one after the other, in an array or not, on any number of lines."""
    objects = _json_lines(path, undecodable) if kind != ".json" or _is_json_lines(path) else _json_values(path)
    while some := list(islice(objects, _ROWS)):
        numbers = np.array([number for number, _ in some])
        names = dict.fromkeys(name for _, row in some for name in row)
        columns = {
            _LINE_BREAK.sub(" ", name): _text_array([row.get(name) for _, row in some], name, numbers) for name in names
        }
        if len(columns) < len(names):
            raise _UnreadableError(f", row {numbers[0]}: names of columns that differ by line breaks alone")
        # Rows without any column are rows, too.
        table = pa.table(columns) if columns else pa.table({"": pa.nulls(len(some))})
        yield Rows(str(path), table, numbers)


def _json_lines(path: Path, undecodable: list[int] | None) -> Iterator[tuple[int, dict[str, Any]]]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as reason:
                if undecodable is None:
                    raise _not_utf8(number, reason) from None
                undecodable.append(number)
                continue
            yield number, _json_object(text, number)


def _json_values(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Objects of a file that is an array of them, or that has them one after the other."""
    with _open(path) as file:
        decoder = _DECODER
        text, at, line, size = "", 0, 1, 1 << 20
        array, comma = None, False
        reader = io.TextIOWrapper(file, encoding="utf-8", newline="\n")
        done = False
        while True:
            at, line = _skip_space(text, at, line)
            if at < len(text) and array is None:
                array = text[at] == "["
                at += array
                continue
            if at < len(text) and array and text[at] == "]":
                if rest := (text[at + 1 :] + reader.read()).strip():
                    raise _UnreadableError(f", line {line} is not JSON: {rest[:40]!r} after the end of the array")
                return
            if at < len(text) and array and comma:
                if text[at] != ",":
                    raise _UnreadableError(
                        f", line {line} is not JSON: a comma is missing before {text[at : at + 40]!r}"
                    )
                at, comma = at + 1, False
                continue
            if at < len(text):
                try:
                    value, end = decoder.raw_decode(text, at)
                except (ValueError, RecursionError) as reason:
                    if done:
                        raise _UnreadableError(f", line {line} is not JSON: {one_line(reason)}") from None
                else:
                    if end < len(text) or done:
                        yield line, _checked_object(value, line)
                        line += text.count("\n", at, end)
                        at, comma = end, True
                        continue
            elif done:
                if array:
                    raise _UnreadableError(f", line {line} is not JSON: the array does not end")
                return
            try:
                more = reader.read(size)
            except UnicodeDecodeError:
                raise _first_not_utf8(path) from None
            done = not more
            size = max(size, len(text) - at)  # a value longer than what was read is not decoded again and again
            text, at = text[at:] + more, 0


def _skip_space(text: str, at: int, line: int) -> tuple[int, int]:
    found = _SPACE.match(text, at)
    end = found.end() if found else at
    return end, line + text.count("\n", at, end)


_LINE_BREAK = re.compile(r"[\r\n\v\f\x1c-\x1e\x85\u2028\u2029]+")
_SPACE = re.compile(r"[ \t\r\n]*")


def _is_json_lines(path: Path) -> bool:
    with _open(path) as file:
        line = next((line for line in file if line.strip()), b"")
    if line.lstrip().startswith(b"["):
        return False
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return not line.strip().startswith(b"{")  # an object over several lines
    return True


def _json_object(text: str, number: int) -> dict[str, Any]:
    try:
        value = _DECODER.decode(text)
    except (ValueError, RecursionError) as reason:
        raise _UnreadableError(f", line {number} is not JSON: {one_line(reason)}") from None
    return _checked_object(value, number)


def _checked_object(value: Any, number: int) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _UnreadableError(f", line {number}: expected an object with named values, not {str(value)[:60]!r}")
    return value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is given twice in one object")
    return found


# Numbers stay as they are written: 1.0, 1e5 and an id of twenty digits.
_DECODER = json.JSONDecoder(
    parse_int=str, parse_float=str, parse_constant=str, object_pairs_hook=_without_repeats, strict=False
)


def _text_array(values: list[Any], name: str, numbers: np.ndarray) -> pa.Array:
    """Values of a JSON column, in which every scalar is a string."""
    try:
        array = pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, UnicodeEncodeError):
        values = [_as_text(value) for value in values]
        try:
            array = pa.array(values)
        except (pa.ArrowInvalid, pa.ArrowTypeError) as reason:
            kinds = [type(value) for value in values]
            known = next(kind for kind in kinds if kind is not type(None))
            row = next((row for row, kind in enumerate(kinds) if kind not in (known, type(None))), 0)
            raise _UnreadableError(
                f", row {numbers[row]}: {name!r} does not hold the same kind of value in each row ({one_line(reason)})"
            ) from None
    if array.type == _text_type(array.type):
        return array
    return pa.array([_as_text(value) for value in values], _text_type(array.type))


def _as_text(value: Any) -> Any:
    if isinstance(value, str):
        return _SURROGATE.sub("", value)  # half a character, which no text can hold
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return [_as_text(item) for item in value]
    if isinstance(value, dict):
        return {_as_text(key): _as_text(item) for key, item in value.items()}
    return value


def _text_type(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_boolean(kind):
        return pa.string()
    if pa.types.is_list(kind):
        return pa.list_(_text_type(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_text_type(field.type)) for field in kind])
    return kind


def _csv_batches(path: Path, header: Collection[str]) -> Iterator[Rows]:
    delimiter = _csv_delimiter(path, header)
    unescape = False
    if _holds(path, b'\\"'):
        # Spark and MySQL write \" for a quote in a quoted field, others "". Only one of them makes sense of the file.
        try:
            for _ in _quoted_rows(path, delimiter):
                pass
        except _UnreadableError:
            unescape = True
    yield from _named(str(path), _quoted_rows(path, delimiter, unescape), header)


def _csv_delimiter(path: Path, header: Collection[str]) -> str:
    """The delimiter that splits the header into the most names that are known."""
    line = _first_line(path)
    found = {}
    for delimiter in ",;\t|":
        try:
            fields = next(csv.reader([line], delimiter=delimiter, strict=True), [])
        except csv.Error:
            fields = next(csv.reader([line], delimiter=delimiter), [])
        if len(fields) > 1:
            found[delimiter] = (sum(canonical(field) in _KNOWN or field in header for field in fields), fields)
    if len(found) < 2:
        return next(iter(found), ",")
    best = max(known for known, _ in found.values())
    top = [delimiter for delimiter, (known, _) in found.items() if known == best]
    if "," in top and not best:
        return ","
    if len(top) > 1:
        raise _UnreadableError(f", line 1 may be split at {' or '.join(map(repr, top))}: {line.strip()[:80]!r}")
    return top[0]


def _quoted_rows(path: Path, delimiter: str, unescape: bool = False) -> Iterator[tuple[int, list[str]]]:
    """Rows of a CSV file with the line that each starts on, quoted as RFC 4180 says."""
    limit = csv.field_size_limit(2**31 - 1)  # else no field over 128 KiB
    with _open(path) as file:
        lines = _lines(file)
        if unescape:
            lines = (re.sub(r'\\(["\\])', lambda found: '""' if found[1] == '"' else found[0], line) for line in lines)
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        try:
            while True:
                start = reader.line_num + 1
                fields = next(reader, None)
                if fields is None:
                    return
                if fields:
                    yield start, fields
        except csv.Error as reason:
            raise _UnreadableError(f", line {start}: {one_line(reason)}") from None
        finally:
            csv.field_size_limit(limit)


def _named(name: str, rows: Iterator[tuple[int, list[str]]], header: Collection[str]) -> Iterator[Rows]:
    """Batches of rows whose first one may be a header."""
    start, first = next(rows, (1, []))
    names = [_LINE_BREAK.sub(" ", field.strip()) for field in first]
    if not any(names):
        return
    named = _is_header(names, header)
    if named and (twice := [field for field in names if field and names.count(field) > 1]):
        raise _UnreadableError(f", line 1: the header has {twice[0]!r} twice")
    if not named:
        names = [f"f{i}" for i in range(len(first))]
    pending: Iterable[tuple[int, list[str]]] = [] if named else [(start, first)]
    while True:
        some = [*pending, *islice(rows, _ROWS)]
        pending = []
        if not some:
            return
        for number, fields in some:
            if len(fields) != len(names):
                raise _UnreadableError(_wrong_width(number, len(fields), len(names)))
        columns = [pa.array(column, pa.large_string()) for column in zip(*(fields for _, fields in some), strict=True)]
        yield Rows(name, pa.table(columns, names), np.array([number for number, _ in some]))


def _tsv_batches(path: Path, header: Collection[str]) -> Iterator[Rows]:
    """Rows parted by tabs; with quoting only where a header and every quote in the file say so."""
    line = _first_line(path)
    if not line.strip():
        return
    names = [name.strip() for name in line.split("\t")]
    if _is_header([name.strip('"') for name in names], header) and _is_quoted(path):
        yield from _named(str(path), _quoted_rows(path, "\t"), header)
        return
    named = _is_header(names, header)
    if named and (twice := [name for name in names if name and names.count(name) > 1]):
        raise _UnreadableError(f", line 1: the header has {twice[0]!r} twice")
    yield from _plain_batches(path, "\t", names if named else None, len(names))


_QUOTED = re.compile(r'"((?:[^"]|"")*)"(?=\t|\r?\n|\r?\Z)')
_OPENS = re.compile(r'(?:^|(?<=\t))"')


def _is_quoted(path: Path) -> bool:
    """Whether a TSV file quotes its fields as CSV files do: all of them, or those alone that need it.

    MS MARCO, TREC and BEIR quote nothing, so a field may start with a quote that nothing closes.
    """
    every = None
    any_quoted = False
    with _open(path) as file:
        held = ""
        for line in _lines(file):
            text = held + line
            if every is None:
                every = all(_QUOTED.fullmatch(name) for name in line.rstrip("\r\n").split("\t"))
            if '"' not in text:
                continue
            held = ""
            at = 0
            while opened := _OPENS.search(text, at):
                closed = _QUOTED.match(text, opened.start())
                if closed is None:
                    if text.count('"', opened.start()) % 2 == 0 or len(text) > 1 << 20:
                        return False
                    held = text  # the field may go on in the next line
                    break
                if not (every or '""' in closed[1] or "\t" in closed[1] or "\n" in closed[1]):
                    return False
                any_quoted = True
                at = closed.end()
    return any_quoted and not held


def _plain_batches(path: Path, delimiter: str | None, names: list[str] | None, width: int) -> Iterator[Rows]:
    """Rows of fields without quoting, by pyarrow where it reads them as they are written."""
    columns = names or [f"f{i}" for i in range(width)]
    convert = arrow_csv.ConvertOptions(column_types=dict.fromkeys(columns, pa.large_string()))
    read = arrow_csv.ReadOptions(column_names=columns, block_size=_BLOCK << 2)
    number = 1
    skip = names is not None
    with _open(path) as file:
        while block := file.read(_BLOCK):
            block += file.readline()
            lines = block.count(b"\n") + (not block.endswith(b"\n"))
            table = None
            plain = delimiter is not None and len(delimiter) == 1 and width > 1
            if plain and not skip and not re.search(rb"\r(?!\n)|\n\r?\n|\A\r?\n|\x00", block):
                parse = arrow_csv.ParseOptions(delimiter=delimiter, quote_char=False)
                try:
                    table = arrow_csv.read_csv(io.BytesIO(block), read, parse, convert)
                    numbers = np.arange(number, number + table.num_rows)
                except pa.ArrowInvalid:
                    table = None  # which line, and why, is found below
            if table is None:
                rows = []
                for at, raw in enumerate(block.removesuffix(b"\n").split(b"\n"), number):
                    text = _decoded(raw, at).removesuffix("\r")
                    if not (text.strip() if delimiter is None else text):
                        continue
                    fields = text.split(delimiter)
                    if len(fields) != width:
                        raise _UnreadableError(_wrong_width(at, len(fields), width))
                    rows.append((at, fields))
                rows = rows[1:] if skip else rows
                skip = False
                numbers = np.array([at for at, _ in rows], dtype=np.int64)
                values = zip(*(fields for _, fields in rows), strict=True) if rows else [()] * width
                table = pa.table([pa.array(column, pa.large_string()) for column in values], columns)
            yield Rows(str(path), table, numbers)
            number += lines


def _wrong_width(line: int, have: int, want: int) -> str:
    return f", line {line}: {have} fields where the first line has {want}"


def _is_header(fields: Sequence[str], header: Collection[str], ids: bool = False) -> bool:
    """Whether a first line names columns: by names that are known, or that can be nothing else.

    Args:
        fields: Of the line.
        header: Further names that are known.
        ids: Whether ids stand in the file, so that a word, or one with digits, may be one.
    """
    if any(field in header for field in fields):
        return True
    known = [canonical(field) in _KNOWN or bool(_NUMBERED.fullmatch(canonical(field))) for field in fields]
    others = [field for field, is_known in zip(fields, known, strict=True) if field and not is_known]
    if ids and (not any(known) or any(re.search(r"\d", field) for field in others)):
        return False
    return not any(_is_number(field) or len(field) > 60 or not _NAME.fullmatch(field) for field in others)


_NAME = re.compile(r"\w+(?:[ .-]\w+){0,2}")
_NUMBERED = re.compile(r"(hard_)?neg(ative)?s?_?\d+|sentence_?[\dab]|rejected(_response)?_?\d+")


def _is_number(field: Any) -> bool:
    try:
        float(field)
    except (ValueError, TypeError):
        return False
    return True


# ---- bytes


def _open(path: Path) -> io.BufferedReader:
    """Open a file, unpacked, as UTF-8 without a byte order mark.

    Raises:
        _UnreadableError: It is a pointer of git-lfs, or UTF-16 that does not say so.
    """
    file = io.BufferedReader(pa.input_stream(str(path), compression="detect"), 1 << 20)
    head = file.peek(1024)[:1024]
    if head.startswith(b"version https://git-lfs"):
        raise _UnreadableError("it is a pointer of git-lfs and not the file: run git lfs pull in its folder")
    for mark, encoding in ((b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16")):
        if head.startswith(mark):
            try:
                return io.BufferedReader(io.BytesIO(file.read().decode(encoding).encode()))
            except UnicodeError as reason:
                raise _UnreadableError(f"it starts as UTF-16 and is not: {one_line(reason)}") from None
    if head.startswith(b"\xef\xbb\xbf"):
        file.read(3)
    elif head[:4] != b"PAR1" and head.count(b"\x00") * 4 > len(head):
        raise _UnreadableError("it looks like UTF-16 without a byte order mark: save it as UTF-8")
    return file


def _first_line(path: Path) -> str:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                return _decoded(line, number).rstrip("\r\n")
    return ""


def _lines(file: io.BufferedReader) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        yield _decoded(line, number)


def _decoded(line: bytes, number: int) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as reason:
        raise _not_utf8(number, reason) from None


def _not_utf8(number: int, reason: UnicodeDecodeError) -> _UnreadableError:
    return _UnreadableError(
        f", line {number} is not UTF-8 (byte 0x{reason.object[reason.start]:02x}): save the file as UTF-8, "
        f"as with iconv -f latin1 -t utf-8 if it is Latin-1"
    )


def _first_not_utf8(path: Path) -> _UnreadableError:
    with _open(path) as file:
        try:
            for _ in _lines(file):
                pass
        except _UnreadableError as reason:
            return reason
    return _UnreadableError("it is not UTF-8")


def _holds(path: Path, what: bytes) -> bool:
    with _open(path) as file:
        before = b""
        while block := file.read(_BLOCK):
            if what in before + block:
                return True
            before = block[-len(what) :]
    return False


# ---- tables


def _numbered(name: str, table: pa.Table) -> Rows:
    return Rows(name, table, np.arange(1, table.num_rows + 1))


def _join(name: str, batches: list[Rows], error: type[LCETrainerError]) -> Rows:
    if not batches:
        return _numbered(name, pa.table({}))
    try:
        table = pa.concat_tables([batch.table for batch in batches], promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as reason:
        raise error(f"{name}: a column does not hold the same kind of value in each row: {one_line(reason)}") from None
    return Rows(name, table, np.concatenate([batch.numbers for batch in batches]))


def _fetched(url: str) -> Path:
    """Download a file of a Hub dataset, and give it its ending again, by which it is read."""
    local = Path(datasets.DownloadManager().download(url))
    named = local.with_name(f"{local.name}-{Path(url).name}")
    if not named.exists():
        named.symlink_to(local)
    return named
