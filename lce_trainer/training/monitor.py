"""What a run logs about itself: curves that mean something, and a warning when nothing is learned."""

import logging
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

logger = logging.getLogger(__name__)

_COUNTS = ("pairs", "tokens", "padded_tokens", "cut_pairs")
_GROUP_SUMS = ("groups", "loss", "guessing", "gain_squared", "accuracy", "one_in_n", "margin", "spread")


class StepSums:
    """Sums over the groups trained on since the last log, on the device until they are collected."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None
        self._counts = dict.fromkeys(_COUNTS, 0)
        self._started: float | None = None

    def start(self) -> None:
        """Start the clock of this stretch, if it is not running."""
        if self._started is None:
            self._started = time.perf_counter()

    def exclude_time(self, seconds: float) -> None:
        """Subtract time that was not spent on training."""
        if self._started is not None:
            self._started += seconds

    def add_groups(self, scores: Tensor, mask: Tensor, target: Tensor, losses: Tensor, guessing: Tensor) -> None:
        """Add a batch.

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
        """Add counts made on the host: ``pairs``, ``tokens``, ``padded_tokens``, ``cut_pairs``."""
        for name, count in counts.items():
            self._counts[name] += count

    def collect(self, accelerator: Any) -> dict[str, float]:
        """Return the sums over all ranks since the last call, and reset them; all ranks must call this."""
        counts = torch.tensor([float(self._counts[name]) for name in _COUNTS], device=accelerator.device)
        sums = torch.zeros(len(_GROUP_SUMS), device=accelerator.device) if self._sums is None else self._sums
        values = accelerator.reduce(torch.cat([sums, counts]), reduction="sum").tolist()
        seconds = time.perf_counter() - self._started if self._started is not None else math.nan
        self.__init__()  # type: ignore[misc]
        return {**dict(zip(_GROUP_SUMS + _COUNTS, values, strict=True)), "seconds": seconds}


def curves(sums: dict[str, float]) -> dict[str, float]:
    """Return what goes into the log: means over groups, and the speed."""
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


class LearningMonitor(TrainerCallback):  # type: ignore[misc]
    """Logs whether anything is being learned: the loss against what equal scores would cost.

    With one positive among n passages that is ln(n). The first log is compared at once; after the
    learning rate's warmup, and 64 groups or more, comes the verdict, over the logs of the second half so far.
    """

    least_groups = 64
    unlogged_steps = 50  # after which a run without logs is checked; chosen by us

    def __init__(self, collect_sums: Callable[[], dict[str, float]]) -> None:
        """Keep the function that returns the sums since its last call, on all ranks; see :meth:`StepSums.collect`."""
        self.collect_sums = collect_sums
        self.history: list[dict[str, float]] = []
        self.verdict: bool | None = None
        self.collapsed = False

    def collect(self, step: int) -> dict[str, float]:
        """Record and return the sums since the last call."""
        sums = self.collect_sums()
        if sums["groups"]:
            self._record(step, sums)
        return sums

    def _record(self, step: int, sums: dict[str, float]) -> None:
        groups = sums["groups"]
        if not self.history:
            logger.info(
                "step %d: loss %.3f where guessing costs %.3f, accuracy@1 %.2f where guessing has %.2f",
                step,
                sums["loss"] / groups,
                sums["guessing"] / groups,
                sums["accuracy"] / groups,
                sums["one_in_n"] / groups,
            )
        self.history.append(sums)
        if sums["spread"] / groups < 1e-5 and not self.collapsed:
            self.collapsed = True
            logger.warning(
                "step %d: all passages of a query get the same score (spread %.1e): the model has collapsed; "
                "lower learning_rate, or start from another model",
                step,
                sums["spread"] / groups,
            )

    def check_learning(self, step: int, learning_rate: float) -> None:
        """Log once that nothing is being learned, and once that something is."""
        recent = self.history[len(self.history) // 2 :]
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
        self.__init__(self.collect_sums)  # type: ignore[misc]

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Check every ``unlogged_steps`` where nothing is logged."""
        if args.logging_strategy == "no" and state.global_step % self.unlogged_steps == 0:
            self.collect(state.global_step)
            self._check_when_due(args, state, args.learning_rate)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Check once the learning rate's warmup is over."""
        if logs and "loss_if_guessing" in logs:
            self._check_when_due(args, state, logs["learning_rate"])

    def _check_when_due(self, args: TrainingArguments, state: TrainerState, learning_rate: float) -> None:
        enough = sum(sums["groups"] for sums in self.history) >= 2 * self.least_groups
        if enough and state.global_step >= args.get_warmup_steps(state.max_steps):
            self.check_learning(state.global_step, learning_rate)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Record what came after the last log, and give a run that was too short for a verdict one at its end."""
        self.collect(state.global_step)
        if self.verdict is None:
            self.check_learning(state.global_step, args.learning_rate)
