"""Groups from a stream: rows in its own order, pass after pass, the same on every rank.

``transformers`` and ``accelerate`` know neither how long a stream is nor where in it a run stopped.
So the trainer sees one endless epoch, in which it finds its place again by counting batches, and
each pass over the stream is an epoch of the sampling inside of it.
"""

import copy
import logging
import math
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import chain, count, islice
from typing import Any, TypeAlias

import datasets
import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lce_trainer.errors import GroupsError, TrainingError
from lce_trainer.training.arguments import LCETrainingArguments
from lce_trainer.training.collator import Batch, StreamPosition
from lce_trainer.training.sampling import EpochGroups
from lce_trainer.training.token_ids import token_ids

logger = logging.getLogger(__name__)

Row: TypeAlias = dict[str, Any]

_REQUIRED = ("query", "passages", "labels")


def is_stream(groups: Any) -> bool:
    """Return whether groups can only be read one after the other."""
    return isinstance(groups, (datasets.IterableDataset, IterableDataset))


def check_stream(stream: Any, args: LCETrainingArguments) -> None:
    """Check what can be checked before a stream is read.

    Raises:
        TrainingError: The settings need a length, or scores that the stream does not have.
        GroupsError: The stream names its columns, and they are not those of groups.
    """
    if args.max_steps <= 0:
        raise TrainingError("a streamed train_dataset has no length: set max_steps")
    for name in ("eval_strategy", "save_strategy", "logging_strategy"):
        if getattr(args, name) == "epoch":
            raise TrainingError(
                f"{name} is epoch, but a streamed train_dataset has no known end of an epoch: set it to steps"
            )
    columns = getattr(stream, "column_names", None)
    if columns is None:
        return
    if missing := [name for name in _REQUIRED if name not in columns]:
        raise GroupsError(
            f"a stream of groups needs the columns {', '.join(_REQUIRED)}; missing: {', '.join(missing)}; there are: "
            f"{', '.join(columns)}. lce_trainer.to_groups turns other layouts into groups, but not as a stream"
        )
    if args.distillation_weight and "scores" not in columns:
        raise TrainingError("distillation_weight is above 0, but the stream has no column scores to learn from")


def training_rows(
    groups: Any,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    args: LCETrainingArguments,
    evaluated: Iterable[datasets.Dataset] = (),
) -> "StreamedGroups | EpochGroups":
    """Return what a DataLoader reads: rows that know their epoch.

    Args:
        groups: A dataset, or a stream.
        tokenizer: Of the model.
        batch_size: Groups of a batch on one rank.
        args: How many ranks there are and how many batches make a step.
        evaluated: Evaluation sets, whose queries are searched for in a stream.
    """
    if not is_stream(groups):
        return EpochGroups(groups, token_ids(groups, tokenizer, args))
    copies = args.world_size if args.split_groups else 1
    batch = batch_size * args.world_size // copies
    evaluated_queries = frozenset(_normalized(query) for rows in evaluated for query in rows["query"])
    distil = args.distillation_weight > 0
    return StreamedGroups(
        groups, batch, args.gradient_accumulation_steps, args.dataloader_drop_last, copies, evaluated_queries, distil
    )


class StreamedGroups(IterableDataset[Row | None]):
    """The usable rows of a stream without end, each with its ``epoch``: the pass it comes from.

    The last step of a pass is filled up with None, so that no step mixes two passes. Every rank and
    every worker reads the whole stream, and uses its part of each step.
    """

    def __init__(
        self,
        stream: Iterable[Row],
        batch: int,
        batches: int,
        drop_last: bool = False,
        copies: int = 1,
        evaluated_queries: Collection[str] = (),
        distil: bool = False,
    ) -> None:
        """Describe the steps.

        Args:
            stream: Starts over each time it is iterated, on every rank in the same order; one that
                has a ``set_epoch`` gets the number of the pass.
            batch: Groups of a batch, over all ranks.
            batches: Batches accumulated in a step.
            drop_last: Drop the last groups of a pass instead of filling up.
            copies: Each batch comes so many times in a row, because ranks that share every group need equal ones.
            evaluated_queries: As in :func:`usable_rows`.
            distil: As in :func:`usable_rows`.
        """
        self.stream = stream
        self.evaluated_queries = evaluated_queries
        self.distil = distil
        self.batch = batch
        self.step = batch * batches
        self.drop_last = drop_last
        self.copies = copies
        self.over = False

    def set_epoch(self, epoch: int) -> None:
        """Set the trainer's epoch: there is one, so a second is that of a resumed run that was over."""
        self.over = epoch > 0

    def __iter__(self) -> Iterator[Row | None]:
        worker = get_worker_info()
        # The epoch of a stream of the datasets library lies in memory that its workers share.
        stream = self.stream if worker is None else copy.deepcopy(self.stream)
        batches = chain.from_iterable(self._batches(stream, epoch) for epoch in (() if self.over else count()))
        # A DataLoader gets a batch from each worker in turn.
        for batch in islice(batches, worker.id if worker else 0, None, worker.num_workers if worker else 1):
            yield from batch * self.copies

    def _batches(self, stream: Iterable[Row], epoch: int) -> Iterator[list[Row | None]]:
        """Yield the batches of one pass, in whole steps."""
        rows = usable_rows(stream, epoch, self.evaluated_queries, self.distil)
        steps = 0
        while step := list(islice(rows, self.step)):
            if len(step) < self.step and self.drop_last:
                break
            steps += 1
            places = [*step, *[None] * (self.step - len(step))]
            for start in range(0, self.step, self.batch):
                batch = places[start : start + self.batch]
                digest = zlib.crc32("\0".join(row["query_id"] for row in batch if row).encode())
                yield [row and {**row, "stream_position": row["stream_position"].with_digest(digest)} for row in batch]
        if not steps:
            raise TrainingError(f"the stream holds less than one step of {self.step} groups: no dataloader_drop_last")


def usable_rows(
    stream: Iterable[Row], epoch: int, evaluated_queries: Collection[str] = (), distil: bool = False
) -> Iterator[Row]:
    """Yield the groups of one pass that have a positive and a negative.

    Args:
        stream: Rows.
        epoch: Of the pass.
        evaluated_queries: Queries that are evaluated on, lower-cased and without outer spaces; they are counted.
        distil: Whether the scores will be used, and must not be infinite.

    Returns:
        Rows with their ``epoch`` and their ``stream_position``, a :class:`StreamPosition`.

    Raises:
        GroupsError: A row is no group.
        TrainingError: None of them is usable.
    """
    if hasattr(stream, "set_epoch"):
        stream.set_epoch(epoch)
    read = no_positive = no_negative = shared = 0
    held: Row | None = None

    def position() -> StreamPosition:
        return StreamPosition(epoch, read, no_positive, no_negative, shared)

    for row in _rows(stream):
        group = _group(row, read, distil)
        read += 1
        shared += bool(evaluated_queries) and _normalized(group["query"]) in evaluated_queries
        best = max(group["labels"], default=0)
        if best <= 0:
            no_positive += 1
        elif best == min(group["labels"]):
            no_negative += 1
        else:
            if held is not None:
                yield held
            held = {**group, "epoch": epoch, "stream_position": position()}
    if held is None and not read:
        again = f" on pass {epoch + 1}: it must start over each time it is iterated" if epoch else ""
        raise TrainingError(f"the stream gave no row{again}")
    if held is None:
        raise TrainingError(
            f"none of {read} groups of the stream is usable: {no_positive} have no positive and {no_negative} no "
            "negative"
        )
    # The last one also counts those after it.
    yield {**held, "stream_position": position()}


def _normalized(query: str) -> str:
    return query.lower().strip()


def _rows(stream: Iterable[Row]) -> Iterator[Row]:
    if not isinstance(stream, datasets.IterableDataset):
        yield from stream
        return
    # Iterated by rows inside a DataLoader's worker, it would give this worker's files only.
    for batch in stream.iter(batch_size=64):
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))


def _group(row: Mapping[str, Any], number: int, distil: bool) -> Row:
    """Return a row as a group.

    Raises:
        GroupsError: It is not one; the message has the reason.
    """
    where = f"row {number} of the stream"
    if missing := [name for name in _REQUIRED if row.get(name) is None]:
        raise GroupsError(f"{where} has no {', '.join(missing)}; it has: {', '.join(row)}")
    if (query_id := row.get("query_id", row["query"])) is None:
        raise GroupsError(f"{where}: query_id is null")
    query, passages = row["query"], list(row["passages"])
    if not isinstance(query, str) or not all(isinstance(text, str) for text in passages):
        raise GroupsError(f"{where}: query and passages must be texts")
    try:
        labels = np.asarray(row["labels"], dtype=np.float32)
    except (TypeError, ValueError):
        labels = np.array([np.nan])
    if not np.isfinite(labels).all() or labels.ndim != 1:
        raise GroupsError(f"{where}: a label is not a finite number")
    scores = row.get("scores")
    for name, have in (("labels", len(labels)), ("scores", len(passages) if scores is None else len(scores))):
        if have != len(passages):
            raise GroupsError(f"{where}: {have} {name} for {len(passages)} passages")
    if distil and any(score is not None and math.isinf(score) for score in scores or []):
        raise GroupsError(f"{where}: a score is infinite: write null for one that is not known")
    return {
        "query_id": str(query_id),
        "query": query,
        "passages": passages,
        "labels": labels.tolist(),
        "scores": scores,
    }


class StreamMonitor(TrainerCallback):  # type: ignore[misc]
    """Logs after each pass over a stream what was dropped, and checks that all ranks read the same.

    Attributes:
        counts: Groups of the pass so far, as :func:`lce_trainer.groups.schema.validate_groups` counts them.
    """

    def __init__(self) -> None:
        self.epoch = -1
        self.counts: dict[str, int] = {}
        self.has_warned = False

    def update(self, batches: list[Batch], accelerator: Any) -> dict[str, int]:
        """Add a step, and return the counts of the pass.

        Args:
            batches: This rank's.
            accelerator: Joins the ranks.

        Raises:
            TrainingError: The ranks read different rows.
        """
        positions = [batch.stream_position for batch in batches]
        nowhere = StreamPosition(*[-1] * 6)
        last = next((position for position in reversed(positions) if position), nowhere)
        first = (positions[0] if positions else None) or nowhere
        own = last.with_digest(first.digest)
        ranks = accelerator.gather(torch.tensor([own], device=accelerator.device)).tolist()
        if len({digest for *_, digest in ranks} - {-1}) > 1:
            raise TrainingError(
                "the ranks read different rows of the stream: pass it whole, not split by node, and shuffle it with a "
                "seed"
            )
        epoch, read, no_positive, no_negative, shared, _ = max(ranks)
        if epoch < 0:
            return self.counts
        if shared and not self.has_warned:
            self.has_warned = True
            logger.warning(
                "%d of the first %d groups of the stream have queries that are also evaluated on, so those figures "
                "are too high",
                *(shared, read),
            )
        if epoch != self.epoch:
            self.report()
        self.epoch = epoch
        self.counts = {
            "groups_read": read,
            "groups": read - no_positive - no_negative,
            "groups_without_positive": no_positive,
            "groups_without_negative": no_negative,
        }
        return self.counts

    def report(self) -> None:
        """Log the counts of the pass."""
        if not self.counts:
            return
        dropped = self.counts["groups_read"] - self.counts["groups"]
        logger.log(
            logging.WARNING if dropped else logging.INFO,
            "pass %d over the stream: %d groups read, %d dropped: %d without a positive, %d without a negative",
            self.epoch + 1,
            self.counts["groups_read"],
            dropped,
            self.counts["groups_without_positive"],
            self.counts["groups_without_negative"],
        )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget an earlier run."""
        self.__init__()  # type: ignore[misc]

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Log the counts of the last pass, which may not be over."""
        self.report()
