"""The border between making the data and learning from it: the grouped dataset.

One row is one query with its passages: ``query_id``, ``query``, ``passage_ids``, ``passages``,
``labels`` (above 0 is positive; grades allowed) and ``scores`` (the judge's, may be null).
Lists are ragged and positives come first. ``query, passages, labels`` is what
sentence-transformers calls a labeled list.
"""

import logging
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Features, List, Value

from lce_trainer.artifacts import MANIFEST, load_table
from lce_trainer.errors import GroupsError

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


def load_groups(source: str, split: str = "train") -> datasets.Dataset:
    """Groups from an artifact's folder, a parquet file, or a Hub dataset id.

    Raises:
        GroupsError: There is nothing of that name, or it does not hold groups.
    """
    path = Path(source)
    try:
        if (path / MANIFEST).is_file():
            table = load_table(path, "groups", split)
        elif path.is_file():
            table = datasets.Dataset.from_parquet(source)
        else:
            table = datasets.load_dataset(source, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise GroupsError(f"no groups at {source!r}: {' '.join(str(error).split())}") from None
    return table


def validate_groups(groups: datasets.Dataset) -> tuple[datasets.Dataset, dict[str, int]]:
    """Check the schema, put positives first, and drop groups that teach nothing.

    Args:
        groups: Rows with at least ``query``, ``passages`` and ``labels``; the other columns are
            filled in when absent.

    Returns:
        The usable groups with exactly the columns of ``GROUPS_FEATURES``, and how many were read,
        kept, and dropped for having no positive or no negative.

    Raises:
        GroupsError: A column is missing, or a row's lists differ in length or hold nulls.
    """
    missing = [name for name in _REQUIRED if name not in groups.column_names]
    if missing:
        raise GroupsError(
            f"groups need the columns {', '.join(_REQUIRED)}; missing: {', '.join(missing)}; "
            f"there are: {', '.join(groups.column_names)}"
        )
    table = _with_every_column(groups)
    _check_rows(table)
    labels = table["labels"].combine_chunks()
    positive = np.asarray(pc.greater(labels.flatten(), 0))
    lengths = pc.list_value_length(labels).to_numpy(zero_copy_only=False)
    row = np.repeat(np.arange(len(lengths)), lengths)
    positives = np.bincount(row, weights=positive, minlength=len(lengths)).astype(int)
    usable = (positives > 0) & (positives < lengths)
    counts = {
        "groups_read": len(lengths),
        "groups": int(usable.sum()),
        "groups_without_positive": int((positives == 0).sum()),
        "groups_without_negative": int(((positives > 0) & (positives == lengths)).sum()),
    }
    dropped = counts["groups_read"] - counts["groups"]
    if dropped:
        logger.warning(
            "%d of %d groups dropped: %d without a positive, %d without a negative",
            dropped,
            counts["groups_read"],
            counts["groups_without_positive"],
            counts["groups_without_negative"],
        )
    # A stable sort by (row, is negative) keeps the order inside positives and inside negatives.
    order = np.lexsort((~positive, row))
    if not np.array_equal(order, np.arange(len(order))):
        table = _reorder(table, order)
    kept = datasets.Dataset(table.filter(pa.array(usable))) if dropped else datasets.Dataset(table)
    return kept.cast(GROUPS_FEATURES), counts


def _with_every_column(groups: datasets.Dataset) -> pa.Table:
    """Columns in schema order and types; ids are made up and scores are null where there are none."""
    table = groups.flatten_indices().data.table if groups._indices is not None else groups.data.table
    schema = GROUPS_FEATURES.arrow_schema
    columns: dict[str, pa.ChunkedArray | pa.Array] = {}
    for name in (*_REQUIRED, *schema.names):
        if name in table.column_names:
            try:
                columns[name] = table[name].cast(schema.field(name).type)
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
                raise GroupsError(
                    f"column {name!r} must be {schema.field(name).type}, not {table[name].type}"
                ) from None
    rows = range(table.num_rows)
    lengths = pc.list_value_length(columns["passages"]).to_pylist()
    columns.setdefault("query_id", pa.array([f"q{i}" for i in rows], pa.string()))
    ids = ([f"q{i}-{j}" for j in range(n or 0)] for i, n in zip(rows, lengths, strict=True))
    columns.setdefault("passage_ids", pa.array(ids, schema.field("passage_ids").type))
    columns.setdefault("scores", pa.nulls(table.num_rows, schema.field("scores").type))
    return pa.table({name: columns[name] for name in schema.names})


def _check_rows(table: pa.Table) -> None:
    lengths = pc.list_value_length(table["passages"])
    for name in ("query_id", "query", "passage_ids", "passages", "labels"):
        column = table[name]
        if column.null_count:
            raise GroupsError(f"row {pc.index(pc.is_null(column), True).as_py()}: {name} is null")
        if name in ("passage_ids", "passages", "labels") and pc.list_flatten(column).null_count:
            bad = next(i for i, items in enumerate(column.to_pylist()) if None in items)
            raise GroupsError(f"row {bad}: {name} holds a null")
    for name in ("passage_ids", "labels", "scores"):
        # A null list of scores means the group was never judged: nothing to compare.
        same = pc.fill_null(pc.equal(pc.list_value_length(table[name]), lengths), True)
        if not pc.all(same).as_py():
            bad = pc.index(same, False).as_py()
            have, want = len(table[name][bad].as_py()), lengths[bad].as_py()
            raise GroupsError(f"row {bad}: {have} {name} for {want} passages")


def _reorder(table: pa.Table, order: np.ndarray) -> pa.Table:
    """Apply one order of all list items to every list column; rows keep their items."""
    columns = {}
    for name in table.column_names:
        column = table[name].combine_chunks()
        if not pa.types.is_list(column.type):
            columns[name] = column
            continue
        if column.null_count:
            # Rows without scores hold no items, so an order over all items does not fit: pad them.
            lengths = pc.list_value_length(table["passages"]).to_pylist()
            items = [
                value if value is not None else [None] * n for value, n in zip(column.to_pylist(), lengths, strict=True)
            ]
            padded = pa.array(items, type=column.type)
            moved = pa.ListArray.from_arrays(padded.offsets, padded.flatten().take(pa.array(order)))
            columns[name] = pc.if_else(pc.is_valid(column), moved, pa.scalar(None, type=column.type))
        else:
            flat = column.flatten().take(pa.array(order))
            offsets = np.concatenate([[0], np.cumsum(pc.list_value_length(column).to_numpy(zero_copy_only=False))])
            columns[name] = pa.ListArray.from_arrays(pa.array(offsets, type=pa.int32()), flat)
    return pa.table(columns)
