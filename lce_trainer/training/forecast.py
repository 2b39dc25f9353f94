"""The forecast of a run, logged before its first step: memory, time, and what ``max_length`` cuts."""

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import psutil
import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lce_trainer.model.pairs import EncodedPairs
from lce_trainer.training.arguments import LCETrainingArguments
from lce_trainer.training.collator import Batch, GroupCollator
from lce_trainer.training.streaming import usable_rows

logger = logging.getLogger(__name__)

_SAMPLE_GROUPS, _SAMPLE_PAIRS = 256, 1024  # tokenized to know the lengths, in a fraction of a second
_MEASURED_TOKENS = (256, 1024)  # of the two forward passes that activations are measured on
_BACKWARD = 1.15  # for what the backward pass holds besides, and the allocator wastes: measured 0.9 to 1.3 on a CPU
_MANY_CUT = 0.1  # chosen by us: more of the queries or passages than this being cut is worth a warning
# Bytes of state a trained parameter has: AdamW's two float32 moments unless the name says otherwise.
_OPTIMIZER_BYTES = {"4bit": 1, "8bit": 2, "sgd": 0, "adafactor": 0, "lomo": 0, "ademamix": 12}
_OPTIMIZER_BYTES |= {"lion": 4, "rmsprop": 4, "adagrad": 4}


@dataclass(frozen=True)
class Forecast:
    """What a run will need.

    Attributes:
        groups: Of a step, on all devices.
        pairs: Of a step, on all devices.
        tokens: Of a step, on all devices, without padding.
        weights: Bytes on one device, which are there already.
        gradients: Bytes on one device.
        optimizer: Bytes of its state on one device.
        activations: Bytes of the largest forward pass on one device.
        fixed_activations: The part of them that does not grow with the tokens.
        token: Bytes of activations that a token leaves for the backward pass.
        longest: Tokens of the longest pair.
        seconds: Of a step, on the devices at hand; NaN if not measured.
        measured: Whether activations and seconds come from forward passes, or activations from a formula.
        cut_queries: Part of the queries longer than ``max_query_length``.
        cut_passages: Part of the passages that end at ``max_length``.
    """

    groups: int
    pairs: float
    tokens: float
    weights: int
    gradients: int
    optimizer: int
    activations: float
    fixed_activations: float
    token: float
    longest: int
    seconds: float
    measured: bool
    cut_queries: float
    cut_passages: float

    @property
    def besides_weights(self) -> float:
        """Bytes that training needs on one device once the weights are there."""
        return self.gradients + self.optimizer + self.activations


def forecast_step(
    model: Any,
    args: LCETrainingArguments,
    collator: GroupCollator,
    groups: Any,
    score: Callable[[EncodedPairs], Tensor] | None,
) -> Forecast:
    """Estimate what a step needs, from a sample of the groups and two small forward passes.

    Weights, gradients and optimizer state are counted. Activations are what autograd really keeps
    of the forward passes, by :func:`torch.autograd.graph.saved_tensors_hooks`, as a line through
    the two; a model sharded over devices is not run, and Korthikanti et al. 2022, eq. 2 without
    attention's score matrix (https://huggingface.co/papers/2205.05198) is used in their place. A step
    is assumed to last three forward passes: a backward one is worth two.

    Leaves weights, gradients and every random number generator as they were.

    Args:
        model: The reranker, not wrapped for training.
        args: The settings.
        collator: Makes the batches of the run.
        groups: The groups that will be trained on, or a stream of them.
        score: Returns the logit of each pair as a training step computes it, shape ``(pairs,)``; None for a model
            that is sharded over devices.
    """
    rows = _sample(groups, args.group_size)
    batch = collator(rows)
    lengths = batch.pairs.lengths
    group_tokens = np.add.reduceat(lengths, batch.group_sizes.cumsum() - batch.group_sizes)
    ranks = args.world_size if score is None else 1
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = sum(p.numel() * p.element_size() for p in trained)
    if score is None:
        fixed, token, seconds = 0.0, _token_formula(model.config, args), np.nan
    else:
        fixed, token, seconds = _measure_forward(model, args.device, collator, rows, score)
    sharing = args.world_size if args.split_groups else 1
    at_once = _peak_tokens(group_tokens, args.per_device_train_batch_size) / sharing
    if args.micro_batch_size is not None:
        at_once = min(at_once, args.micro_batch_size * float(lengths.max()))
    if args.micro_batch_tokens is not None:
        at_once = min(at_once, max(args.micro_batch_tokens, float(lengths.max())))
    on_this_device = args.per_device_train_batch_size * args.gradient_accumulation_steps / sharing
    per_step = round(on_this_device * args.world_size)
    queries = collator.tokenizer([row["query"] for row in rows], add_special_tokens=False)["input_ids"]
    return Forecast(
        groups=per_step,
        pairs=len(lengths) / len(group_tokens) * per_step,
        tokens=float(group_tokens.mean()) * per_step,
        weights=weights // ranks,
        # DistributedDataParallel keeps a second copy of the gradients, in the buckets it reduces.
        gradients=gradients * (2 if args.world_size > 1 and score is not None else 1) // ranks,
        optimizer=_optimizer_bytes(args.optim) * sum(p.numel() for p in trained) // ranks,
        activations=fixed + _BACKWARD * token * at_once,
        fixed_activations=fixed,
        token=token,
        longest=int(lengths.max()),
        seconds=seconds * float(group_tokens.mean()) * on_this_device,
        measured=score is not None,
        cut_queries=float(np.mean([len(ids) > args.max_query_length for ids in queries])),
        cut_passages=float((lengths >= args.max_length).mean()),
    )


class ForecastCallback(TrainerCallback):  # type: ignore[misc]
    """Logs the forecast before the first step, and the time again after the third."""

    measured_steps = (2, 3)  # the first one takes longer

    def __init__(self, forecast: Callable[[], Forecast]) -> None:
        """Keep the function that makes the forecast of the run."""
        self.forecast = forecast
        self.first = 0
        self.started: float | None = None
        self.seconds: list[float] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forecast, on the first rank: it runs the bare model, which no other rank has to wait for."""
        self.first, self.seconds = state.global_step, []
        if state.is_world_process_zero:
            log_forecast(self.forecast(), state.max_steps - state.global_step, free_memory(args.device), args)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock of a step that is to be measured."""
        if state.global_step - self.first + 1 in self.measured_steps:
            _wait_for_device()
            self.started = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop the clock, and log the time that is left by the measured steps."""
        if self.started is None:
            return
        _wait_for_device()
        self.seconds.append(time.perf_counter() - self.started)
        self.started = None
        left = state.max_steps - state.global_step
        if len(self.seconds) == len(self.measured_steps) and left and state.is_world_process_zero:
            step = float(np.mean(self.seconds))
            logger.info("a step took %s: %s to go, without evaluations", _time(step), _time(step * left))


def log_forecast(plan: Forecast, steps: int, free: int | None, args: Any) -> None:
    """Log a forecast, and warn of too little memory and of what is cut.

    Args:
        plan: Of the run.
        steps: To go.
        free: Bytes of the device that nothing uses; None if not known.
        args: The ``LCETrainingArguments`` of the run.
    """
    logger.info(
        "%d steps of %d groups, about %.0f pairs, %.0f tokens each; %s by a first guess, without evaluations",
        steps,
        plan.groups,
        plan.pairs,
        plan.tokens,
        _time(plan.seconds * steps),
    )
    logger.info(
        "memory: the weights' %s, and about %s more: gradients %s, optimizer %s, activations %s (%s a token, by %s); "
        "%s has %s free",
        _size(plan.weights),
        _size(plan.besides_weights),
        _size(plan.gradients),
        _size(plan.optimizer),
        _size(plan.activations),
        _size(plan.token),
        "a forward pass" if plan.measured else "a formula",
        args.device,
        "an unknown amount" if free is None else _size(free),
    )
    if free is not None and plan.besides_weights > free:
        room = free - plan.gradients - plan.optimizer - plan.fixed_activations
        pairs = int(0.9 * room / (_BACKWARD * plan.token * plan.longest))
        remedy = (
            f"set micro_batch_size to {pairs} (pairs at once), which leaves the gradient as it is"
            if pairs > 0
            else "gradients and optimizer state alone are too large: train with peft_config, an optimizer that keeps "
            "less, or on more devices; micro_batch_size will not do"
        )
        logger.warning(
            "training needs about %s besides the weights, but %s has %s free: %s",
            _size(plan.besides_weights),
            args.device,
            _size(free),
            remedy,
        )
    if plan.cut_passages > _MANY_CUT:
        logger.warning(
            "max_length=%d cuts about %.0f %% of the passages: what answers the query may be in the part that is "
            "dropped; raise it, or split the passages",
            args.max_length,
            100 * plan.cut_passages,
        )
    if plan.cut_queries > _MANY_CUT:
        logger.warning(
            "max_query_length=%d cuts about %.0f %% of the queries: raise it",
            args.max_query_length,
            100 * plan.cut_queries,
        )


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that one process of this machine may still allocate on a device; None if not known."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    if device.type != "cpu":
        return None
    free = psutil.virtual_memory().available
    for limit, used in (  # a container's own limit, in the second and the first version of cgroups
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            free = min(free, int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _sample(groups: Any, group_size: int) -> list[dict[str, Any]]:
    """Rows spread evenly over a dataset, or the first usable ones of a stream."""
    n = max(_SAMPLE_PAIRS // group_size, 8)
    n = min(n, _SAMPLE_GROUPS)
    if not isinstance(groups, datasets.Dataset):
        return list(islice(usable_rows(groups, epoch=0), n))
    rows = np.unique(np.linspace(0, len(groups) - 1, n).astype(int))
    return [dict(row) for row in groups.select(rows)]


def _peak_tokens(groups: np.ndarray, batch_size: int) -> float:
    """Tokens of the largest of many batches, drawn from groups of so many tokens."""
    drawn = np.random.default_rng(0).integers(0, len(groups), (256, batch_size))
    return float(groups[drawn].sum(axis=1).max())


def _measure_forward(
    model: Any,
    device: torch.device,
    collator: GroupCollator,
    rows: list[dict[str, Any]],
    score: Callable[[EncodedPairs], Tensor],
) -> tuple[float, float, float]:
    """Return bytes of activations that do not depend on the tokens, bytes a token, and seconds a token of a step."""
    # Two passages a group, so that a pass can be small where groups are large.
    collator = replace(collator, group_size=2)
    tokens, kept, seconds = [], [], 0.0
    with _training_mode(model, device):
        for wanted in _MEASURED_TOKENS:
            batch = _batch_of(collator, rows, wanted)
            _wait_for_device()
            started = time.perf_counter()
            kept.append(_saved_bytes(model, partial(score, batch.pairs)))
            _wait_for_device()
            seconds = time.perf_counter() - started
            tokens.append(int(batch.pairs.lengths.sum()))
    token = (kept[1] - kept[0]) / (tokens[1] - tokens[0]) if tokens[1] > tokens[0] else kept[1] / tokens[1]
    fixed = max(kept[1] - token * tokens[1], 0.0)
    if _checkpointed(model):
        # Kept are the layers' inputs, and of the one layer that is being run again all results and their gradients.
        # What a last layer keeps of which one token is read is next to nothing.
        layers, hidden = model.config.num_hidden_layers, model.config.hidden_size
        token = min(token, 2 * token / max(layers - 1, 1) + 4 * hidden * layers)
    return fixed, token, 3 * seconds / tokens[1]


def _batch_of(collator: GroupCollator, rows: list[dict[str, Any]], tokens: int) -> Batch:
    """So many of the rows, over again if need be, that they have this many tokens."""
    lengths = collator(rows[:16]).pairs.lengths
    count = max(round(tokens / (2 * float(np.mean(lengths)))), 1)
    return collator([rows[i % len(rows)] for i in range(count)])


@contextmanager
def _training_mode(model: Any, device: torch.device) -> Iterator[None]:
    """Run the model as in training, and restore its mode and the random number generators afterwards."""
    training = model.training
    checkpointed = _checkpointed(model)
    for part in checkpointed:  # autograd's hooks are not called inside a checkpoint
        part.gradient_checkpointing = False
    model.train()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        model.train(training)
        for part in checkpointed:
            part.gradient_checkpointing = True


def _checkpointed(model: nn.Module) -> list[Any]:
    """Modules that keep their inputs alone, and run forward again in the backward pass."""
    return [part for part in model.modules() if getattr(part, "gradient_checkpointing", False)]


def _saved_bytes(model: nn.Module, run: Callable[[], Tensor]) -> int:
    """Return the bytes that autograd keeps for the backward pass, without the weights themselves."""
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # an output kept as it is would hold its own graph, and never be freed

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        scores = run()
    for tensor in (*model.parameters(), *model.buffers()):
        sizes.pop(tensor.untyped_storage().data_ptr(), None)
    del scores  # until here it holds the graph, so that no address is used twice
    return sum(sizes.values())


def _token_formula(config: Any, args: Any) -> float:
    bytes_of_a_number = 2 if args.bf16 or args.fp16 else 4
    return float(17 * bytes_of_a_number * config.hidden_size * config.num_hidden_layers)


def _optimizer_bytes(name: Any) -> int:
    found = (size for part, size in _OPTIMIZER_BYTES.items() if part in getattr(name, "value", str(name)))
    return next(found, 8)


def _wait_for_device() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def _size(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} GiB"


def _time(seconds: float) -> str:
    if np.isnan(seconds):
        return "an unknown time"
    if seconds < 100:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
