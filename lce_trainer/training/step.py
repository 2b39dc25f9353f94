"""A step cut into what goes through the model at once, exactly, even inside a group.

Whole groups need nothing but a cut: the loss is a sum over groups. A group with more pairs than fit goes
through twice: first without a graph, to know all its scores and so the loss's gradient by each score; then
chunk by chunk with a graph, each backward starting from its scores' gradients, under the random numbers of
the first time. That is the gradient cache of Gao et al. 2021 (https://arxiv.org/abs/2101.06983), on scores.

Ranks can share every group as chunks share it: each runs its pairs, all learn all scores and compute the same
loss, and each goes back from its own scores' gradients.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lce_trainer.distributed import adding_up, in_lockstep, most
from lce_trainer.training.collator import Batch, micro_batches, select_groups, select_pairs


def run_step(
    accelerator: Accelerator,
    model: nn.Module,
    parts: Sequence[Sequence[Batch]],
    score: Callable[[Batch], Tensor],
    loss_of: Callable[[Tensor, Batch], Tensor],
    backward: Callable[[Batch], Tensor],
) -> Tensor:
    """Forward and backward through the parts of a batch.

    Args:
        accelerator: Tells whether ranks must run the model equally often.
        model: As wrapped for training.
        parts: From :func:`cut_step`.
        score: Gives the logit of each pair of a chunk, shape ``(pairs,)``.
        loss_of: Gives the loss of a part from the logits of this rank's pairs.
        backward: Runs a chunk forward and back; gives its loss.

    Returns:
        The loss of the batch.
    """
    cached = [part for part in parts if len(part) > 1]
    passes = [sum(map(len, cached)), sum(map(len, parts))]
    most_passes = most(accelerator, *passes) if in_lockstep(accelerator) else passes
    losses: list[Tensor] = []
    chunks: list[Batch] = []
    for part in cached:
        ready, loss = cache_gradients(part, score, loss_of)
        losses.append(loss)
        chunks += ready
    idle = idle_chunk(parts[0][0])
    with torch.no_grad():
        for _ in range(most_passes[0] - passes[0]):
            score(idle)
    chunks += [part[0] for part in parts if len(part) == 1] + [idle] * (most_passes[1] - passes[1])
    for place, chunk in enumerate(chunks, start=1):
        # Only the last backward may reduce over ranks: they need not have equally many chunks.
        with nullcontext() if place == len(chunks) else adding_up(accelerator, model), replayed(chunk):
            loss = backward(chunk)
        if "score_gradient" not in chunk:
            losses.append(loss)
    return torch.stack(losses).sum()


def cut_step(
    batch: Batch, pairs: int | None, rank: int = 0, ranks: int = 1, tokens: int | None = None
) -> list[list[Batch]]:
    """Cut a batch into parts of whole groups, and a part into the chunks that go through the model at once.

    Args:
        batch: Of :class:`lce_trainer.training.collator.GroupCollator`.
        pairs: In a chunk at most; None: as many as there are.
        rank: Of those that share the pairs of every group, whose chunks are wanted.
        ranks: That share the pairs of every group; they must all hold the same batch.
        tokens: In a chunk at most, but for one pair that has more; None: as many as there are.

    Returns:
        The chunks of each part: as many on every rank, one unless a single group is larger than a chunk.
        A chunk that is not all of its part holds its own pairs, and everything else of its part; ``places``
        says which of the part's pairs they are, shape ``(chunk,)``. A chunk of no pair holds one that has
        no place, so that there is something to run.
    """
    parts = [batch]
    if (pairs is not None or tokens is not None) and batch["group_sizes"]:
        most = [math.inf if bound is None else bound * ranks for bound in (pairs, tokens)]
        cut = micro_batches(batch["group_sizes"], batch["lengths"], *most)
        parts = [select_groups(batch, groups) for groups in cut]
        parts[0]["cut_pairs"] = batch["cut_pairs"]
    return [_chunks(part, pairs, rank, ranks, tokens) for part in parts]


def _chunks(part: Batch, pairs: int | None, rank: int, ranks: int, tokens: int | None) -> list[Batch]:
    if not part["group_sizes"]:
        return [part]
    longest_first = np.argsort(-part["lengths"], kind="stable")
    share = -(-len(longest_first) // ranks)
    count = 1 if pairs is None else -(-share // pairs)
    if tokens is not None:
        # As if all pairs were as long as the longest, so that every rank counts alike and no chunk is too large.
        fits = max(tokens // int(part["lengths"].max()), 1)
        count = max(count, -(-share // fits) if part["lengths"].sum() > tokens * ranks else 1)
    if count == ranks == 1:
        return [part]
    chunks = [select_pairs(part, rows) for rows in np.array_split(longest_first[rank::ranks], count)]
    for chunk in chunks if rank else chunks[1:]:
        chunk["cut_pairs"] = 0
    return chunks


def idle_chunk(batch: Batch) -> Batch:
    """One pair and no group: a forward and backward pass that only keeps a rank in step with the others."""
    return {**select_pairs(batch, np.empty(0, dtype=int)), "group_sizes": [], "query_ids": [], "cut_pairs": 0}


def gather_scores(accelerator: Accelerator, scores: Tensor, chunk: Batch, shared: bool) -> Tensor:
    """Put scores where they belong in their part, with those of the ranks that share it.

    Args:
        accelerator: Joins the ranks.
        scores: Logits of the chunk's pairs, and of those that have no place; the gradient goes to these.
        chunk: Its ``places`` in the part, and the part's ``group_sizes``.
        shared: Whether other ranks have the rest of them.

    Returns:
        Logits of the part's pairs, shape ``(pairs,)``.
    """
    places = chunk["places"]
    own = scores.new_zeros(sum(chunk["group_sizes"])).index_copy(0, places, scores[: len(places)])
    if not shared:
        return own
    # Exact: of each pair's scores on the ranks all but one are zero.
    known = own.detach()
    everyones: Tensor = accelerator.reduce(known, reduction="sum")
    return own + (everyones - known)


def cache_gradients(
    chunks: Sequence[Batch], score: Callable[[Batch], Tensor], loss_of: Callable[[Tensor, Batch], Tensor]
) -> tuple[list[Batch], Tensor]:
    """Score the chunks of one part without a graph, and find the gradient of their loss by each score.

    Args:
        chunks: Of one part.
        score: Gives the logit of each pair of a batch, shape ``(pairs,)``.
        loss_of: Gives the loss of a part from the logits of this rank's pairs.

    Returns:
        The chunks again, to be run by :func:`replayed` with the loss ``(scores * score_gradient).sum()``, and
        the loss of the part.
    """
    states, scores = [], []
    with torch.no_grad():
        for chunk in chunks:
            states.append(_random_state(chunk["input_ids"].device))
            scores.append(score(chunk)[: len(chunk["places"])])
    # In half precision the gradient would be rounded, and in float16 vanish before the loss is scaled.
    together = torch.cat(scores)
    leaf = together.to(torch.promote_types(together.dtype, torch.float32)).requires_grad_()
    whole = {**chunks[0], "places": torch.cat([chunk["places"] for chunk in chunks])}
    loss = loss_of(leaf, whole)
    (gradient,) = torch.autograd.grad(loss, leaf)
    ready = []
    for chunk, state, part in zip(chunks, states, torch.split(gradient, [len(row) for row in scores]), strict=True):
        by_score = part.new_zeros(len(chunk["lengths"]))  # a pair that has no place has no gradient
        by_score[: len(part)] = part
        # Its groups have been counted, so it carries none.
        ready.append({**chunk, "group_sizes": [], "score_gradient": by_score, "random_state": state})
    return ready, loss.detach()


@contextmanager
def replayed(chunk: Batch) -> Iterator[None]:
    """The random numbers that the chunk had when its scores were cached; those of now are given back."""
    if "random_state" not in chunk:
        yield
        return
    device = chunk["input_ids"].device
    now = _random_state(device)
    _set_random_state(chunk["random_state"], device)
    try:
        yield
    finally:
        _set_random_state(now, device)


def _random_state(device: torch.device) -> list[Tensor]:
    """Of the generators a model draws from: the CPU's, and the device's own."""
    states = [torch.get_rng_state()]
    if device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state(device))
    return states


def _set_random_state(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states[1], device)
