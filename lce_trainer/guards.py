"""What is checked before a run, and what a run says about itself.

Curves that mean something, and a warning when nothing is learned.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor
from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from lce_trainer.errors import GroupsError, TrainingError, shown
from lce_trainer.groups import check_groups, count_contradictions, validate_groups
from lce_trainer.loading import longest_input, match_padding
from lce_trainer.streaming import check_stream, is_stream
from lce_trainer.training_args import LCETrainingArguments
from lce_trainer.yes_no import answers_of

logger = logging.getLogger(__name__)

EvalDataset: TypeAlias = datasets.Dataset | Mapping[str, datasets.Dataset] | None

_BATCH = 4096  # groups whose texts are looked at at once
_COUNTS = ("pairs", "tokens", "padded_tokens", "cut_pairs")
_GROUP_SUMS = ("groups", "loss", "guessing", "gain_squared", "accuracy", "one_in_n", "margin", "spread")


def usable_groups(groups: Any, args: LCETrainingArguments) -> tuple[datasets.Dataset, dict[str, int]]:
    """Groups that can be trained on, and the counts of :func:`lce_trainer.groups.validate_groups`.

    A stream is returned as it is: its rows are looked at when they come.

    Raises:
        TrainingError: None is usable, or there is nothing to distil from.
        GroupsError: The rows are not groups.
    """
    if is_stream(groups):
        check_stream(groups, args)
        return groups, {}
    if not isinstance(groups, datasets.Dataset):
        raise TrainingError(f"train_dataset must be a datasets.Dataset of groups, not {type(groups).__name__}")
    usable, counts = validate_groups(groups)
    if not len(usable):
        raise TrainingError(
            f"none of {counts['groups_read']} groups is usable: {counts['groups_without_positive']} have no positive "
            f"and {counts['groups_without_negative']} no negative"
        )
    if args.distillation_weight:
        _check_scores(usable)
    batch = args.train_batch_size * (1 if args.split_groups else args.world_size)
    if args.dataloader_drop_last and len(usable) < batch:
        raise TrainingError(
            f"dataloader_drop_last leaves nothing of {len(usable)} groups, for a batch has {batch} on all devices: "
            "lower per_device_train_batch_size, or set dataloader_drop_last to false"
        )
    if torn := count_contradictions(usable):
        logger.warning(
            "%d of %d groups hold the same passage as a positive and with a lower label, so that it competes with "
            "itself: lce_trainer.to_groups keeps it once, with its highest label",
            *(torn, len(usable)),
        )
    return usable, counts


def _check_scores(groups: datasets.Dataset) -> None:
    """Check that no score is infinite, and that some group has two, since one alone says nothing."""
    table = groups.select_columns(["query_id", "scores"]).with_format("arrow")[:]
    lengths = pc.fill_null(pc.list_value_length(table["scores"]), 0).to_numpy()
    row, items = np.repeat(np.arange(len(lengths)), lengths), pc.list_flatten(table["scores"])
    infinite = pc.fill_null(pc.is_inf(items), False).to_numpy()
    if infinite.any():
        raise TrainingError(
            f"query {table['query_id'][int(row[infinite][0])].as_py()!r}: one of its scores is infinite, and is to be "
            "distilled from: write null for a score that is not known"
        )
    known = pc.fill_null(pc.is_finite(items), False).to_numpy()
    if not (np.bincount(row[known]) > 1).any():
        raise TrainingError(
            "distillation_weight is above 0, but no group has scores of two passages or more to learn from"
        )


def by_name(eval_dataset: EvalDataset) -> dict[str, datasets.Dataset]:
    """The evaluation sets by their names; a single one is ``eval_dataset``."""
    if eval_dataset is None:
        return {}
    return dict(eval_dataset) if isinstance(eval_dataset, Mapping) else {"eval_dataset": eval_dataset}


def check_eval(groups: Any, name: str, train: datasets.Dataset | None) -> None:
    """Check an evaluation set's rows, and warn of queries and passages that are trained on.

    Raises:
        GroupsError: The rows are not groups, or there are none.
        TrainingError: It is not a dataset.
    """
    if not isinstance(groups, datasets.Dataset):
        raise TrainingError(
            f"{name} must be a datasets.Dataset of groups, not {type(groups).__name__}; of a stream, take some: "
            "Dataset.from_list(list(stream.take(500)))"
        )
    groups = check_groups(groups, name)
    if not len(groups):
        raise GroupsError(f"{name} holds no group")
    table = groups.select_columns(["query", "passages", "labels"]).with_format("arrow")[:]
    lengths = pc.list_value_length(table["labels"]).to_numpy()
    relevant = pc.greater(pc.list_flatten(table["labels"]), 0).to_numpy()
    if empty := len(groups) - len(np.unique(np.repeat(np.arange(len(groups)), lengths)[relevant])):
        logger.warning("%s: %d of %d groups hold no positive; they count as 0", name, empty, len(groups))
    if isinstance(train, datasets.Dataset):
        _report_overlap(table, relevant, name, train)


def _report_overlap(table: pa.Table, relevant: np.ndarray, name: str, train: datasets.Dataset) -> None:
    """Warn of queries (but for case and outer spaces) and of passages (the very same text) that are trained on."""
    queries, passages = _normalized(table["query"]), pc.list_flatten(table["passages"])
    known: dict[str, list[pa.Array]] = {"queries": [], "passages": [], "positives": []}  # that the table has too
    for batch in train.select_columns(["query", "passages", "labels"]).with_format("arrow").iter(_BATCH):
        # Looking the many up among the few is quick, and what is left of them is few too.
        asked, texts = _normalized(batch["query"]), pc.list_flatten(batch["passages"])
        both = pc.is_in(texts, value_set=passages)
        positive = pc.and_(both, pc.greater(pc.list_flatten(batch["labels"]), 0))
        known["queries"] += asked.filter(pc.is_in(asked, value_set=queries)).chunks
        known["passages"] += texts.filter(both).chunks
        known["positives"] += texts.filter(positive).chunks
    values = {kind: pa.chunked_array(found, pa.string()) for kind, found in known.items()}
    shared = pc.is_in(queries, value_set=values["queries"]).to_numpy()
    seen = pc.is_in(passages, value_set=values["passages"]).to_numpy()
    told = pc.is_in(passages, value_set=values["positives"]).to_numpy() & relevant
    if shared.any():
        logger.warning(
            "%s: %d of its %d queries are also trained on, so its figures say too much",
            *(name, shared.sum(), len(shared)),
        )
    if not seen.any():
        return
    logger.warning(
        "%s: %d of its %d passages are also trained on, and %d of its %d relevant ones as positives: its figures hold "
        "for these documents, and may be lower for new ones",
        name,
        seen.sum(),
        len(seen),
        told.sum(),
        relevant.sum(),
    )


def _normalized(queries: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.utf8_trim_whitespace(pc.utf8_lower(queries))


def check_model(model: Any, tokenizer: PreTrainedTokenizerBase, args: LCETrainingArguments) -> None:
    """Check that the model is a reranker and reads ``max_length`` tokens.

    Raises:
        TrainingError: It is not, or does not.
    """
    if model.config.num_labels != 1 and answers_of(model) is None:
        raise TrainingError(f"the model has {model.config.num_labels} labels; a reranker has one: num_labels=1")
    limit = longest_input(model)
    if args.max_length > limit:
        raise TrainingError(f"max_length is {args.max_length}, but the model reads {limit} tokens at most")
    match_padding(model, tokenizer)


def check_finite(losses: Tensor, query_ids: Sequence[str], step: int, learning_rate: Callable[[], float]) -> None:
    """Stop at a loss that is no number.

    Args:
        losses: Of each group, shape ``(groups,)``.
        query_ids: Of each group.
        step: The one being made.
        learning_rate: Asked for the message.

    Raises:
        TrainingError: A loss is NaN or infinite; names the queries.
    """
    if bad := [query_id for query_id, finite in zip(query_ids, losses.isfinite().tolist(), strict=True) if not finite]:
        raise TrainingError(
            f"step {step}: the loss of queries {shown(bad)} is NaN or infinite, so the run stopped before the weights "
            f"took it in; lower learning_rate (now {learning_rate():.1e}), use bf16 in place of fp16, or look at these "
            "groups"
        )


class Tally:
    """Sums over the groups seen since the last log, on the device until they are asked for."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None
        self._counts = dict.fromkeys(_COUNTS, 0)
        self._started: float | None = None

    def start(self) -> None:
        """Start the clock of this stretch, if it is not running."""
        if self._started is None:
            self._started = time.perf_counter()

    def pause(self, seconds: float) -> None:
        """Leave out time that was not spent on training."""
        if self._started is not None:
            self._started += seconds

    def add_groups(self, scores: Tensor, mask: Tensor, target: Tensor, losses: Tensor, guessing: Tensor) -> None:
        """Take in a batch.

        Args:
            scores: Logits, shape ``(groups, width)``.
            mask: True where a score is real, same shape.
            target: Column of the positive, shape ``(groups,)``.
            losses: Of each group, nats, shape ``(groups,)``.
            guessing: The loss if all scores were equal, shape ``(groups,)``.
        """
        sizes = mask.sum(dim=1).float()
        real = scores.masked_fill(~mask, 0)
        mean = real.sum(dim=1) / sizes
        spread = (((real - mean[:, None]) * mask).square().sum(dim=1) / sizes).sqrt()
        positive = scores.gather(1, target[:, None])
        hardest = scores.masked_fill(~mask, -torch.inf).scatter(1, target[:, None], -torch.inf).amax(dim=1)
        margin = positive[:, 0] - hardest
        gain = (guessing - losses).square()
        accuracy = (margin > 0).float()
        columns = [torch.ones_like(sizes), losses, guessing, gain, accuracy, 1 / sizes, margin, spread]
        sums = torch.stack([column.float().sum() for column in columns])
        self._sums = sums if self._sums is None else self._sums + sums

    def add_counts(self, **counts: int) -> None:
        """Take in counts made on the host: ``pairs``, ``tokens``, ``padded_tokens``, ``cut_pairs``."""
        for name, count in counts.items():
            self._counts[name] += count

    def take(self, accelerator: Any) -> dict[str, float]:
        """Sums over all ranks since the last time, and start over."""
        counts = torch.tensor([float(self._counts[name]) for name in _COUNTS], device=accelerator.device)
        sums = torch.zeros(len(_GROUP_SUMS), device=accelerator.device) if self._sums is None else self._sums
        values = accelerator.reduce(torch.cat([sums, counts]), reduction="sum").tolist()
        seconds = time.perf_counter() - self._started if self._started is not None else math.nan
        self.__init__()  # type: ignore[misc]
        return {**dict(zip(_GROUP_SUMS + _COUNTS, values, strict=True)), "seconds": seconds}


def curves(sums: dict[str, float]) -> dict[str, float]:
    """What goes into the log: means over groups, and the speed."""
    groups = max(sums["groups"], 1)
    return {
        "loss_if_guessing": sums["guessing"] / groups,
        "accuracy@1": sums["accuracy"] / groups,
        "margin": sums["margin"] / groups,
        "score_spread": sums["spread"] / groups,
        "pairs_per_second": sums["pairs"] / sums["seconds"],
        "tokens_per_second": sums["tokens"] / sums["seconds"],
        "padding": 1 - sums["tokens"] / max(sums["padded_tokens"], 1),
        "cut_pairs": sums["cut_pairs"] / max(sums["pairs"], 1),
    }


class LearningWatch(TrainerCallback):  # type: ignore[misc]
    """Says whether anything is being learned: the loss against what equal scores would cost.

    With one positive among n passages that is ln(n). The first log is compared at once; after the
    warmup, and 64 groups or more, comes the verdict, over the logs of the second half so far.
    """

    least_groups = 64
    unlogged_steps = 50  # after which a run without logs is looked at; chosen by us

    def __init__(self, take: Callable[[], dict[str, float]]) -> None:
        """Take what gives the sums since the last time, as :meth:`Tally.take`; asked on all ranks at once."""
        self.take = take
        self.seen: list[dict[str, float]] = []
        self.verdict: bool | None = None
        self.collapsed = False

    def look(self, step: int) -> dict[str, float]:
        """Take in, and return, the sums since the last time."""
        sums = self.take()
        if sums["groups"]:
            self._see(step, sums)
        return sums

    def _see(self, step: int, sums: dict[str, float]) -> None:
        groups = sums["groups"]
        if not self.seen:
            logger.info(
                "step %d: loss %.3f where guessing costs %.3f, accuracy@1 %.2f where guessing has %.2f",
                step,
                sums["loss"] / groups,
                sums["guessing"] / groups,
                sums["accuracy"] / groups,
                sums["one_in_n"] / groups,
            )
        self.seen.append(sums)
        if sums["spread"] / groups < 1e-5 and not self.collapsed:
            self.collapsed = True
            logger.warning(
                "step %d: all passages of a query get the same score (spread %.1e): the model has collapsed; "
                "lower learning_rate, or start from another model",
                step,
                sums["spread"] / groups,
            )

    def judge(self, step: int, learning_rate: float) -> None:
        """Say once that nothing is being learned, and once that something is."""
        recent = self.seen[len(self.seen) // 2 :]
        total = {name: sum(sums[name] for sums in recent) for name in _GROUP_SUMS}
        groups = total["groups"]
        if self.verdict or not groups:
            return
        gain = (total["guessing"] - total["loss"]) / groups
        error = math.sqrt(max(total["gain_squared"] / groups - gain**2, 0.0) / groups)
        learning = gain > max(2 * error, 0.01)
        if learning or self.verdict is None:
            figures = (
                f"step {step}: loss {total['loss'] / groups:.3f} where guessing costs "
                f"{total['guessing'] / groups:.3f}, accuracy@1 {total['accuracy'] / groups:.2f} where guessing has "
                f"{total['one_in_n'] / groups:.2f}, over {groups:.0f} groups"
            )
            if learning:
                logger.info("learning: %s", figures)
            else:
                logger.warning(
                    "nothing is being learned yet: %s. Likely causes: too few groups so far for a new head (a base "
                    "that was never a reranker needs about 10,000 pairs), a learning_rate too low or too high "
                    "(now %.1e), passages cut before what answers the query (see cut_pairs), or labels that do not "
                    "depend on the query (see the labeling report)",
                    figures,
                    learning_rate,
                )
        self.verdict = learning

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget an earlier run."""
        self.__init__(self.take)  # type: ignore[misc]

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Look and judge where nothing is logged."""
        if args.logging_strategy == "no" and state.global_step % self.unlogged_steps == 0:
            self.look(state.global_step)
            self._judge_in_time(args, state, args.learning_rate)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Judge after the warmup."""
        if logs and "loss_if_guessing" in logs:
            self._judge_in_time(args, state, logs["learning_rate"])

    def _judge_in_time(self, args: TrainingArguments, state: TrainerState, learning_rate: float) -> None:
        enough = sum(sums["groups"] for sums in self.seen) >= 2 * self.least_groups
        if enough and state.global_step >= args.get_warmup_steps(state.max_steps):
            self.judge(state.global_step, learning_rate)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """What came after the last log counts too, and a run too short for a verdict gets one at its end."""
        self.look(state.global_step)
        if self.verdict is None:
            self.judge(state.global_step, args.learning_rate)
