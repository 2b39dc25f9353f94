"""The border between making the data and learning from it: the grouped dataset.

One row is one query with its passages: ``query_id``, ``query``, ``passage_ids``, ``passages``,
``labels`` (above 0 is positive; grades allowed) and ``scores`` (the judge's, may be null).
Lists are ragged. What this package makes has positives first, and hard negatives before easy ones;
groups given to it keep their order. ``query, passages, labels`` is what sentence-transformers calls
a labeled list.
"""

import logging

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Features, List, Value
from datasets.fingerprint import update_fingerprint

from lce_trainer.compat import fingerprint, row_selection
from lce_trainer.errors import GroupsError
from lce_trainer.files import class_names

logger = logging.getLogger(__name__)

GROUPS_FEATURES = Features(
    {
        "query_id": Value("string"),
        "query": Value("string"),
        "passage_ids": List(Value("string")),
        "passages": List(Value("string")),
        "labels": List(Value("float32")),
        "scores": List(Value("float32")),
    }
)
_REQUIRED = ("query", "passages", "labels")


def check_groups(groups: datasets.Dataset, name: str = "") -> datasets.Dataset:
    """Check columns, types and rows, and nothing else: every row stays, in its order.

    Args:
        groups: Rows with at least ``query``, ``passages`` and ``labels``.
        name: Of the dataset, for the messages.

    Returns:
        The rows with exactly the columns of ``GROUPS_FEATURES``: where there are none, a query is its own
        id, passages have ids made up and scores are null. Memory-mapped columns stay so, and a
        selection of rows stays a selection: what ``arrow_table`` gives has its rows alone.

    Raises:
        GroupsError: A column is missing or of another type, or a row holds a null, a label that is
            no number, or lists of different lengths; names the row.
    """
    where = f"{name}: " if name else ""
    missing = [column for column in _REQUIRED if column not in groups.column_names]
    if missing:
        raise GroupsError(
            f"{where}groups need the columns {', '.join(_REQUIRED)}; missing: {', '.join(missing)}; there are: "
            f"{', '.join(groups.column_names)}. lce_trainer.to_groups turns other layouts into groups"
        )
    if names := class_names(groups.features["labels"]):
        raise GroupsError(f"{where}labels are classes ({', '.join(names)}), not numbers: pass the rows to to_groups")
    if groups.format["type"] == "custom":  # set_transform
        groups = datasets.Dataset.from_dict(groups[:])
    table = _with_every_column(groups.data.table, where)
    _check_rows(table, _selection(groups), where)
    return datasets.Dataset(
        table,
        info=datasets.DatasetInfo(features=GROUPS_FEATURES),
        indices_table=row_selection(groups),  # a selection of rows copies no text
        fingerprint=update_fingerprint(fingerprint(groups), "check_groups", {}),  # or it would hash every byte
    )


def validate_groups(groups: datasets.Dataset) -> tuple[datasets.Dataset, dict[str, int]]:
    """Check the schema, and drop groups that teach nothing.

    Args:
        groups: Rows with at least ``query``, ``passages`` and ``labels``; the other columns are
            filled in when absent.

    Returns:
        The usable groups with exactly the columns of ``GROUPS_FEATURES``, their passages in the
        order given, and memory-mapped if they were; and how many were read, kept, and dropped for
        having no positive or no negative, which with grades is any passage below the best one.

    Raises:
        GroupsError: As :func:`check_groups`.
    """
    checked = check_groups(groups)
    labels, rows = checked.data.table["labels"], _selection(checked)
    labels = labels if rows is None else labels.take(pa.array(rows))
    lengths = _lengths(labels)
    row = np.repeat(np.arange(len(lengths)), lengths)
    usable, counts = what_teaches(pc.list_flatten(labels).to_numpy(), row, len(lengths))
    counts = {"groups_read": len(lengths), "groups": int(usable.sum()), **counts}
    dropped = counts["groups_read"] - counts["groups"]
    if not dropped:
        return checked, counts
    logger.warning(
        "%d of %d groups dropped: %d without a positive, %d without a negative",
        dropped,
        counts["groups_read"],
        counts["groups_without_positive"],
        counts["groups_without_negative"],
    )
    return checked.select(np.flatnonzero(usable)), counts


def what_teaches(labels: np.ndarray, group: np.ndarray, groups: int) -> tuple[np.ndarray, dict[str, int]]:
    """Groups with a positive, and with a passage of a lower label for it to beat: a negative, or a lower grade.

    Args:
        labels: Of all passages, shape ``(passages,)``.
        group: That each passage is in, from 0, likewise.
        groups: How many there are.

    Returns:
        True where a group teaches something, shape ``(groups,)``; and how many lack the one or the other.
    """
    best, least = (np.full(groups, value, dtype=labels.dtype) for value in (-np.inf, np.inf))  # casts are slow in at()
    np.maximum.at(best, group, labels)
    np.minimum.at(least, group, labels)
    usable = (best > 0) & (best > least)
    return usable, {
        "groups_without_positive": int((best <= 0).sum()),
        "groups_without_negative": int(((best > 0) & ~usable).sum()),
    }


def count_contradictions(groups: datasets.Dataset) -> int:
    """Groups in which one text is a positive and also has a lower label."""
    count = 0
    # Few at a time: they may hold long documents, and their distinct texts are copied.
    for batch in groups.select_columns(["passages", "labels"]).with_format("arrow").iter(64):
        passages = batch["passages"].combine_chunks()
        lengths = passages.value_lengths().to_numpy()
        texts = passages.flatten().dictionary_encode()
        text = np.repeat(np.arange(len(lengths)), lengths) * len(texts) + texts.indices.to_numpy()
        label = pc.list_flatten(batch["labels"]).to_numpy()
        order = np.lexsort((label, text))
        text, label = text[order], label[order]
        torn = (np.diff(text) == 0) & (np.diff(label) > 0) & (label[1:] > 0)
        count += len(np.unique(text[1:][torn] // max(len(texts), 1)))
    return count


def _selection(table: datasets.Dataset) -> np.ndarray | None:
    """Rows of the underlying table that a dataset consists of; None if all, in their order."""
    selected = row_selection(table)
    return None if selected is None else selected.column(0).to_numpy()


def _with_every_column(table: pa.Table, where: str) -> pa.Table:
    """Columns in schema order and types; those that are missing are filled in."""
    schema = GROUPS_FEATURES.arrow_schema
    columns: dict[str, pa.ChunkedArray | pa.Array] = {}
    for name in (*_REQUIRED, *schema.names):
        if name in table.column_names:
            try:
                columns[name] = table[name].cast(schema.field(name).type)
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
                raise GroupsError(
                    f"{where}column {name!r} must be {schema.field(name).type}, not {table[name].type}"
                ) from None
    # A name that shuffling and streaming leave as it is: the draw of a query's negatives goes by it.
    columns.setdefault("query_id", columns["query"])
    if "passage_ids" not in columns:
        lengths = pc.list_value_length(columns["passages"]).to_pylist()
        ids = ([f"q{i}-{j}" for j in range(n or 0)] for i, n in enumerate(lengths))
        columns["passage_ids"] = pa.array(ids, schema.field("passage_ids").type)
    columns.setdefault("scores", pa.nulls(table.num_rows, schema.field("scores").type))
    return pa.table({name: columns[name] for name in schema.names})


def _check_rows(table: pa.Table, rows: np.ndarray | None, where: str) -> None:
    """Of a table's rows, or of those selected, which are numbered as the selection numbers them."""

    def refuse(bad: np.ndarray, name: str, what: str) -> None:
        chosen = bad if rows is None else bad[rows]
        if chosen.any():
            row = int(chosen.argmax())
            there = row if rows is None else int(rows[row])
            have, want = lengths.get(name, lengths["passages"])[there], lengths["passages"][there]
            raise GroupsError(f"{where}row {row}: {what.format(name=name, have=have, want=want)}")

    lengths = {name: _lengths(table[name]) for name in ("passages", "passage_ids", "labels", "scores")}
    for name in ("query", "query_id", "passage_ids", "passages", "labels"):
        column = table[name]
        if column.null_count:
            refuse(pc.is_null(column).to_numpy(), name, "{name} is null")
        if name in lengths:
            items = pc.list_flatten(column)
            if items.null_count:
                refuse(_rows_with(pc.is_null(items), lengths[name]), name, "{name} holds a null")
            if name == "labels" and not pc.all(pc.is_finite(items), min_count=0).as_py():
                bad = _rows_with(pc.invert(pc.fill_null(pc.is_finite(items), False)), lengths[name])
                refuse(bad, name, "a label is not a finite number")
    for name in ("passage_ids", "labels", "scores"):
        # A null list of scores means the group was never judged: nothing to compare.
        bad = pc.is_valid(table[name]).to_numpy() & (lengths[name] != lengths["passages"])
        refuse(bad, name, "{have} {name} for {want} passages")


def _lengths(column: pa.ChunkedArray) -> np.ndarray:
    """Items of each list, 0 where it is null."""
    lengths: np.ndarray = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
    return lengths


def _rows_with(bad: pa.ChunkedArray, lengths: np.ndarray) -> np.ndarray:
    """Which rows hold an item that is bad, by the items of all lists, one after the other."""
    row = np.repeat(np.arange(len(lengths)), lengths)
    return np.bincount(row[bad.to_numpy()], minlength=len(lengths)) > 0
