"""What people already have into groups: one function for every common layout of ranking data."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from datasets import LargeList, List
from datasets.fingerprint import generate_random_fingerprint

from lce_trainer.artifacts import MANIFEST, load_table
from lce_trainer.errors import GroupsError
from lce_trainer.files import arrow_table, class_names, kind_of, one_line, open_dataset, read_rows
from lce_trainer.groups.layouts import numeric_lists, row_pairs
from lce_trainer.groups.pairs import merge
from lce_trainer.groups.trec import judged_pairs
from lce_trainer.qrels import Source, beir_files

logger = logging.getLogger(__name__)


def to_groups(
    source: str | Path | datasets.Dataset | None = None,
    *,
    columns: Sequence[str] | None = None,
    positive_from: float | None = None,
    tokenizer: Any = None,
    queries: Source | None = None,
    corpus: Source | None = None,
    qrels: Source | None = None,
    run: Source | None = None,
    split: str = "train",
    skip: int = 0,
    depth: int | None = 100,
    negatives: int | None = None,
    seed: int = 42,
    add_positives: bool = True,
) -> tuple[datasets.Dataset, dict[str, int]]:
    """Turn ranking data of any common layout into groups.

    Rows with the same query become one group: their positives unite, and a passage that is a
    positive in one row is no negative of that query in another. Passages keep the order they came
    in, positives first, so negatives of a run stand with the hardest first. The groups are held in
    memory. An unknown layout is an error that lists those that are understood.

    Args:
        source: Rows: a ``datasets.Dataset``, or the name of a ``.jsonl``, ``.json``, ``.parquet``,
            ``.csv`` or ``.tsv`` file (with ``.gz`` or without), of a folder or of a Hub dataset. Or a
            folder in the BEIR layout (``corpus.jsonl``, ``queries.jsonl``, ``qrels/SPLIT.tsv``).
        columns: The columns to read, under any names, in sentence-transformers' order: query,
            positive, negatives; or query, passage or passages, label or labels.
        positive_from: Lowest label, grade or score of a positive; lower ones become 0. If None,
            what is above 0 is positive.
        tokenizer: Turns token ids, which luyug/Reranker keeps, back into texts.
        queries: Texts by id: a ``.tsv`` file of ids and texts, a ``.jsonl`` or ``.parquet`` file or a
            dataset with columns such as ``_id`` and ``text``, or a dict.
        corpus: Passages, in the same ways; a ``title`` is put before its text.
        qrels: Judgments: a TREC or BEIR file, a dataset with one a row, or a dict of dicts.
        run: Candidates: a TREC run, a file of MS MARCO's three columns (query, passage, rank), a
            dataset with one a row or with lists of passage ids, or a dict. Those that are not
            positives are the negatives; without a run, the passages judged not to be positives are.
        split: Of a Hub dataset, and of the judgments in a BEIR folder.
        skip: Candidates at the top of each query's run to leave out, as likely unjudged positives.
        depth: Candidates of each query's run to look at; None for all.
        negatives: Of these, draw so many a query; None for all.
        seed: Of that draw.
        add_positives: False leaves out positives that the run does not bring, and keeps groups that
            teach nothing: for an ``eval_dataset`` that ranks what the retriever finds. Its figures are
            of that alone: nDCG and MAP know no positive that is not there, and a query for which
            the run brings nothing is no group, but counted in ``queries_without_candidates``.

    Returns:
        The groups, with the columns of ``GROUPS_FEATURES``; and counts of what was read, merged and
        left out, and why, which are also logged.

    Raises:
        GroupsError: The layout is unknown, or what is there contradicts it; names file and row.
    """
    judged: dict[str, Any] = {"queries": queries, "corpus": corpus, "qrels": qrels}
    if isinstance(source, (str, Path)) and (found := beir_files(Path(source), split, GroupsError)):
        judged = {**found, **{name: value for name, value in judged.items() if value is not None}}
        source = None
    if source is None:
        if missing := [name for name, value in judged.items() if value is None]:
            raise GroupsError(
                f"pass rows, or judgments with queries=, corpus= and qrels=; missing: {', '.join(missing)}"
            )
        if columns or tokenizer is not None:
            raise GroupsError("columns= and tokenizer= are for rows, not for judgments")
        pairs, counts = judged_pairs(
            **judged,
            run=run,
            positive_from=positive_from,
            skip=skip,
            depth=depth,
            negatives=negatives,
            seed=seed,
            add_positives=add_positives,
        )
    else:
        if extra := [name for name, value in {**judged, "run": run}.items() if value is not None]:
            raise GroupsError(f"{', '.join(extra)} cannot be joined to rows: pass the one or the other")
        rows = source if isinstance(source, datasets.Dataset) else _read(source, split, columns or ())
        try:
            pairs = row_pairs(arrow_table(rows), columns, positive_from, tokenizer)
        except GroupsError as error:
            raise error if rows is source else GroupsError(f"{source}: {error}") from None
        counts = {"rows_read": len(rows)}
    groups, merged = merge(pairs, keep_all=not add_positives)
    counts |= merged
    _report(counts)
    return groups, counts


def _read(source: Any, split: str, header: Sequence[str]) -> datasets.Dataset:
    """Read the rows of a file, a folder or a Hub dataset, whatever their columns.

    Raises:
        GroupsError: There is nothing of that name, or it cannot be read.
    """
    if isinstance(source, Mapping):
        raise GroupsError(f"pass one split of {', '.join(map(str, source))}, not all of them")
    if not isinstance(source, (str, Path)):
        raise GroupsError(
            f"rows must be a datasets.Dataset or the name of a file or dataset, not {type(source).__name__}"
        )
    path = Path(source)
    if (path / MANIFEST).is_file():
        return load_table(path, "groups", split)
    if not path.is_file():
        found = open_dataset(str(source), split, "no groups at", GroupsError)
        if isinstance(found, datasets.Dataset):
            return found
    elif kind_of(path) == ".parquet":
        try:
            rows = datasets.Dataset.from_parquet(str(path))
            rows.data.table.validate(full=True)  # a damaged file may hold bytes that are no text
            return rows
        except Exception as error:  # a damaged file makes datasets raise all kinds
            raise GroupsError(f"no groups at {str(source)!r}: {one_line(error)}") from None
    found_rows = read_rows(source, split=split, header=header, error=GroupsError)
    try:
        return datasets.Dataset(numeric_lists(found_rows.table), fingerprint=generate_random_fingerprint())
    except Exception:  # names with NUL, for one
        names = ", ".join(map(repr, found_rows.table.column_names))
        raise GroupsError(f"{found_rows.name}: no rows of groups have such columns: {names}") from None


def _report(counts: Mapping[str, int]) -> None:
    lost = ("pairs_empty", "queries_without_candidates", "groups_without_positive", "groups_without_negative")
    summary = ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in counts.items() if count)
    warn = any(count and (name in lost or "_unknown_" in name) for name, count in counts.items())
    logger.log(logging.WARNING if warn else logging.INFO, "groups: %s", summary or "nothing to read")


def load_groups(source: str, split: str = "train") -> datasets.Dataset:
    """Groups from an artifact's folder, a file, a folder or a Hub dataset id.

    What is not in the grouped columns is turned into groups, see :func:`to_groups`.

    Raises:
        GroupsError: There is nothing of that name, or it cannot be read as groups.
    """
    if beir_files(Path(source), split, GroupsError):
        return to_groups(source, split=split)[0]
    table = _read(source, split, ())
    return table if is_grouped(table) else to_groups(table)[0]


def is_grouped(table: datasets.Dataset) -> bool:
    """Whether a table has the columns of groups and needs no conversion; its rows are not looked at."""
    lists = [table.features.get(name) for name in ("passages", "labels")]
    grouped = "query" in table.column_names and all(isinstance(feature, (List, LargeList)) for feature in lists)
    return grouped and not class_names(lists[1])
