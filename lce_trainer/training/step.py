"""A step cut into what goes through the model at once, exactly, even inside a group.

Whole groups need nothing but a cut: the loss is a sum over groups. A group with more pairs than a chunk goes
through twice: first without a graph, to know all its scores and so the loss's gradient by each score; then
chunk by chunk with a graph, each backward starting from its scores' gradients, under the random numbers of
the first time. That is the gradient cache of Gao et al. 2021 (https://arxiv.org/abs/2101.06983), on scores.

Ranks can share every group as chunks share it: each runs its pairs, all gather all scores and compute the same
loss, and each goes back from its own scores' gradients.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lce_trainer.distributed import gradient_accumulation, max_over_ranks, passes_are_collective
from lce_trainer.model.pairs import EncodedPairs
from lce_trainer.training.collator import Batch, micro_batches


@dataclass(frozen=True, eq=False)
class Chunk:
    """Pairs that go through the model at once.

    Attributes:
        rows: Which pairs of the part these are, shape ``(chunk,)``; none on a rank that has nothing left to run.
        pairs: Their token ids; if there are none, those of the part's first pair, so that there is something to run.
    """

    rows: np.ndarray
    pairs: EncodedPairs


@dataclass(frozen=True, eq=False)
class Part:
    """Whole groups whose loss is computed at once.

    Attributes:
        batch: The groups.
        chunks: The groups' pairs, or this rank's share of them, as they go through the model.
    """

    batch: Batch
    chunks: list[Chunk]


@dataclass(frozen=True, eq=False)
class Pass:
    """One pass through the model, forward and backward.

    Attributes:
        pairs: What goes through.
        loss: Computes the loss from the pairs' logits, shape ``(pairs,)``.
        is_counted: Whether the pairs belong to a group and go through for the first time.
        random_state: The random number generators are set to this first; None leaves them as they are.
    """

    pairs: EncodedPairs
    loss: Callable[[Tensor], Tensor]
    is_counted: bool
    random_state: list[Tensor] | None = None


def run_step(
    accelerator: Accelerator,
    model: nn.Module,
    parts: Sequence[Part],
    score: Callable[[EncodedPairs, bool], Tensor],
    loss_of: Callable[[Tensor, Batch], Tensor],
    backward: Callable[[Pass], Tensor],
    is_shared: bool = False,
) -> Tensor:
    """Run the parts of a batch forward and backward.

    Args:
        accelerator: Joins the ranks, and knows whether they must run the model equally often.
        model: As wrapped for training.
        parts: From :func:`cut_step`.
        score: Returns the logit of each pair, shape ``(pairs,)``; the flag is that of :attr:`Pass.is_counted`.
        loss_of: Returns the loss of a part from the logits of its pairs, shape ``(pairs,)``.
        backward: Runs one pass, and returns its loss.
        is_shared: Whether other ranks hold the rest of each part's pairs.

    Returns:
        The loss of the batch.
    """
    cached = [part for part in parts if len(part.chunks) > 1]
    counts = [sum(len(part.chunks) for part in some) for some in (cached, parts)]
    largest_counts = max_over_ranks(accelerator, *counts) if passes_are_collective(accelerator) else counts
    losses: list[Tensor] = []
    passes: list[Pass] = []
    for part in cached:
        replays, loss = cache_gradients(accelerator, part, score, loss_of, is_shared)
        losses.append(loss)
        passes += replays
    idle = Pass(parts[0].chunks[0].pairs.take(np.zeros(1, dtype=np.int64)), lambda scores: scores.sum() * 0, False)
    with torch.no_grad():
        for _ in range(largest_counts[0] - counts[0]):
            score(idle.pairs, False)
    passes += [_whole(accelerator, part, loss_of, is_shared) for part in parts if len(part.chunks) == 1]
    passes += [idle] * (largest_counts[1] - counts[1])
    for number, one in enumerate(passes, start=1):
        # Only the last backward may reduce over ranks: they need not have equally many passes.
        reducing = nullcontext() if number == len(passes) else gradient_accumulation(accelerator, model)
        with reducing, replayed(one.random_state, accelerator.device):
            loss = backward(one)
        if one.random_state is None:
            losses.append(loss)
    return torch.stack(losses).sum()


def cut_step(batch: Batch, pairs: int | None, rank: int = 0, ranks: int = 1, tokens: int | None = None) -> list[Part]:
    """Cut a batch into parts of whole groups, and a part into the chunks that go through the model at once.

    Args:
        batch: Of :class:`lce_trainer.training.collator.GroupCollator`.
        pairs: In a chunk at max_over_ranks; None: as many as there are.
        rank: Of those that share the pairs of every group, whose chunks are wanted.
        ranks: That share the pairs of every group; they must all hold the same batch.
        tokens: In a chunk at max_over_ranks, but for one pair that has more; None: as many as there are.

    Returns:
        The parts, each with as many chunks on every rank, one unless a single group is larger than a chunk.
    """
    parts = [batch]
    if (pairs is not None or tokens is not None) and len(batch.group_sizes):
        bounds = [math.inf if bound is None else bound * ranks for bound in (pairs, tokens)]
        parts = [batch.take(groups) for groups in micro_batches(batch.group_sizes, batch.pairs.lengths, *bounds)]
    return [Part(part, _chunks(part, pairs, rank, ranks, tokens)) for part in parts]


def _chunks(part: Batch, pairs: int | None, rank: int, ranks: int, tokens: int | None) -> list[Chunk]:
    lengths = part.pairs.lengths
    if not len(part.group_sizes):
        return [Chunk(np.zeros(0, dtype=np.int64), part.pairs)]
    longest_first = np.argsort(-lengths, kind="stable")
    share = -(-len(longest_first) // ranks)
    count = 1 if pairs is None else -(-share // pairs)
    if tokens is not None:
        # As if all pairs were as long as the longest, so that every rank counts alike and no chunk is too large.
        bound = max(tokens // int(lengths.max()), 1)
        count = max(count, -(-share // bound) if lengths.sum() > tokens * ranks else 1)
    if count == ranks == 1:
        return [Chunk(np.arange(len(lengths)), part.pairs)]
    return [
        Chunk(rows, part.pairs.take(rows if len(rows) else np.zeros(1, dtype=np.int64)))
        for rows in np.array_split(longest_first[rank::ranks], count)
    ]


def gather_scores(accelerator: Accelerator, scores: Tensor, rows: np.ndarray, size: int, is_shared: bool) -> Tensor:
    """Put the scores of some pairs where they belong in their part, with those of the ranks that share it.

    Args:
        accelerator: Joins the ranks.
        scores: Logits of the pairs ``rows``, and perhaps of more, which are dropped; the gradient goes to these.
        rows: Which pairs of the part these are.
        size: Pairs of the part.
        is_shared: Whether other ranks have the rest of them.

    Returns:
        Logits of the part's pairs, shape ``(size,)``.
    """
    index = torch.as_tensor(rows, dtype=torch.long).to(scores.device, non_blocking=True)
    own = scores.new_zeros(size).index_copy(0, index, scores[: len(rows)])
    if not is_shared:
        return own
    # Exact: of each pair's scores on the ranks all but one are zero.
    known = own.detach()
    everyones: Tensor = accelerator.reduce(known, reduction="sum")
    return own + (everyones - known)


def cache_gradients(
    accelerator: Accelerator,
    part: Part,
    score: Callable[[EncodedPairs, bool], Tensor],
    loss_of: Callable[[Tensor, Batch], Tensor],
    is_shared: bool = False,
) -> tuple[list[Pass], Tensor]:
    """Score the chunks of a part without a graph, and compute the gradient of their loss by each score.

    Args:
        accelerator: As of :func:`run_step`.
        part: Several chunks.
        score: As of :func:`run_step`.
        loss_of: As of :func:`run_step`.
        is_shared: As of :func:`run_step`.

    Returns:
        A pass for each chunk, whose loss is ``(scores * gradient).sum()``, and the loss of the part.
    """
    states, scores = [], []
    with torch.no_grad():
        for chunk in part.chunks:
            states.append(_random_state(accelerator.device))
            scores.append(score(chunk.pairs, bool(len(chunk.rows)))[: len(chunk.rows)])
    # In half precision the gradient would be rounded, and in float16 vanish before the loss is scaled.
    together = torch.cat(scores)
    leaf = together.to(torch.promote_types(together.dtype, torch.float32)).requires_grad_()
    rows = np.concatenate([chunk.rows for chunk in part.chunks])
    loss = loss_of(gather_scores(accelerator, leaf, rows, len(part.batch.labels), is_shared), part.batch)
    (gradient,) = torch.autograd.grad(loss, leaf)
    passes = []
    for chunk, state, by_score in zip(
        part.chunks, states, torch.split(gradient, [len(chunk.rows) for chunk in part.chunks]), strict=True
    ):
        # A pair that is none of the chunk's rows has no gradient.
        weight = torch.cat([by_score, by_score.new_zeros(len(chunk.pairs) - len(chunk.rows))])
        passes.append(Pass(chunk.pairs, _weighted_sum(weight), False, state))
    return passes, loss.detach()


def _weighted_sum(weight: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda scores: (scores * weight).sum()


def _whole(accelerator: Accelerator, part: Part, loss_of: Callable[[Tensor, Batch], Tensor], is_shared: bool) -> Pass:
    """Return the pass of a part that goes through at once."""
    (chunk,) = part.chunks

    def loss(scores: Tensor) -> Tensor:
        if not len(part.batch.group_sizes):
            return scores.sum() * 0
        return loss_of(gather_scores(accelerator, scores, chunk.rows, len(part.batch.labels), is_shared), part.batch)

    return Pass(chunk.pairs, loss, bool(len(chunk.rows)))


@contextmanager
def replayed(state: list[Tensor] | None, device: torch.device) -> Iterator[None]:
    """Run under the random numbers that follow a state, and put back the present one; None changes nothing."""
    if state is None:
        yield
        return
    now = _random_state(device)
    _set_random_state(state, device)
    try:
        yield
    finally:
        _set_random_state(now, device)


def _random_state(device: torch.device) -> list[Tensor]:
    """Return the states of the generators a model draws from: the CPU's, and the device's own."""
    states = [torch.get_rng_state()]
    if device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state(device))
    return states


def _set_random_state(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states[1], device)
