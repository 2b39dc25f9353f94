"""Token sequences that begin alike, run through a causal model so that what they share is computed once.

The beginning that all sequences of a call share is a cache, which every row starts from by reference.
What some of them share beyond it, as the queries asked about one passage do, makes a prefix tree, laid
out depth first in one row: each token stands there once, attends to its own ancestors, and has its
depth as its position. So it gets what it would get in its sequence alone. Source: tree attention of
Miao et al. 2023, https://huggingface.co/papers/2305.09781.
"""

import contextlib
import copy
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from lce_trainer.errors import LLMError

logger = logging.getLogger(__name__)

_WORTH_SHARING = 16  # tokens; sequences that share fewer are cheaper apart, each padded to its like
_ROW_TOKENS = 512  # that a tree adds to its first sequence at most: attention grows with the square of a row
_LOGIT_BYTES = 2**29  # of logits that a forward pass makes at most; one row of them is the whole vocabulary
# How far rounding alone takes logits, as part of their norm.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.05}


@dataclass
class _Row:
    """A prefix tree, depth first; ``paths`` holds the columns of each sequence's tokens."""

    ids: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    paths: dict[int, np.ndarray] = field(default_factory=dict)


def last_logits(
    model: Any, sequences: Sequence[list[int]], counts: Sequence[int], cache: Any, past: int, budget: int, trees: bool
) -> Iterator[tuple[Tensor, dict[int, list[int]]]]:
    """Logits after each of the last ``counts[i]`` tokens of sequence ``i``.

    Args:
        model: A causal language model.
        sequences: Token ids.
        counts: How many of a sequence's tokens are read, 1 or more, all of them after ``past``.
        cache: Keys and values of the first ``past`` tokens, which all sequences share; None for none.
        past: Tokens in the cache.
        budget: Tokens of a forward pass at most, padding counted; a longer sequence goes alone.
        trees: Whether sequences that share more are packed as trees: :func:`takes_trees`.

    Yields:
        For some of the sequences, in no particular order: logits, shape ``(rows, vocabulary)``, in
        the model's dtype, and the rows of each of these sequences by its index.
    """
    rows = _pack(sequences, past, _ROW_TOKENS if trees else 0)
    read = [len(np.unique(np.concatenate([path[-counts[i] :] for i, path in row.paths.items()]))) for row in rows]
    weights = model.get_output_embeddings().weight
    most = max(_LOGIT_BYTES // (weights.shape[0] * weights.element_size()), 1)
    for batch in cut_batches([len(row.ids) for row in rows], budget, read, most):
        chosen = [rows[i] for i in batch]
        wanted = np.zeros((len(chosen), len(chosen[0].ids)), dtype=bool)
        for line, row in zip(wanted, chosen, strict=True):
            for index, path in row.paths.items():
                line[path[-counts[index] :]] = True
        logits = _forward(model, chosen, wanted, cache, past)
        number = wanted.ravel().cumsum().reshape(wanted.shape) - 1
        yield (
            logits,
            {
                index: line[path[-counts[index] :]].tolist()
                for line, row in zip(number, chosen, strict=True)
                for index, path in row.paths.items()
            },
        )


def cut_batches(
    lengths: Sequence[int], budget: int, read: Sequence[int] | None = None, most: int = 0
) -> Iterator[list[int]]:
    """Indices in batches of like length, longest first, each within the budget when padded.

    Args:
        lengths: Of each item, tokens.
        budget: Tokens of a batch at most; a longer item goes alone.
        read: Rows of logits that each item needs; None for no such limit.
        most: Rows of logits of a batch at most.
    """
    batch: list[int] = []
    total = 0
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        rows = read[index] if read else 0
        if batch and ((len(batch) + 1) * lengths[batch[0]] > budget or total + rows > most):
            yield batch
            batch, total = [], 0
        batch.append(index)
        total += rows
    if batch:
        yield batch


def common_prefix(sequences: Sequence[list[int]], limits: Sequence[int]) -> int:
    """Length of the prefix that all sequences share, at most the least limit; 0 for fewer than two."""
    if len(sequences) < 2:
        return 0
    return min(_alike(min(sequences), max(sequences)), *limits)


def prefix_cache(model: Any, ids: Sequence[int]) -> Any:
    """Keys and values of some tokens; windows are left to the masks, so all of them are kept."""
    with clear_errors(), torch.inference_mode():
        return model(
            torch.tensor([list(ids)], device=model.device),
            past_key_values=DynamicCache(),
            use_cache=True,
            logits_to_keep=1,
        ).past_key_values


def expanded(cache: Any, rows: int) -> Any:
    """The same cache for several rows, by reference; what a forward pass adds to it is its own."""
    if cache is None:
        return None
    cache = copy.copy(cache)
    cache.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in cache.layers:
        if layer.is_initialized:
            layer.keys = layer.keys.expand(rows, -1, -1, -1)
            layer.values = layer.values.expand(rows, -1, -1, -1)
    return cache


def takes_trees(model: Any) -> bool:
    """Whether a model's logits in a prefix tree are those of each sequence alone.

    Its layers must be plain or sliding-window attention, it must go by the positions and the mask it
    is given. That is tried out on a few tokens; a model that fails gets each sequence in a row of its
    own, without a common cache.
    """
    try:
        fit = set(_windows(model)) <= {"full_attention", "sliding_attention"} and _tree_is_exact(model)
    except Exception as error:  # whatever a model raises that was not written for this
        logger.debug("trying a prefix tree: %s", error)
        fit = False
    if not fit:
        logger.info("%s does not take packed prefix trees: shared text is computed again", type(model).__name__)
    return fit


@contextlib.contextmanager
def clear_errors() -> Iterator[None]:
    """What to do when the accelerator's memory is full."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise LLMError("the accelerator ran out of memory: lower llm.batch_tokens") from None


@contextlib.contextmanager
def only(model: Any, wanted: Tensor) -> Iterator[None]:
    """Logits of the wanted tokens alone, shape ``(1, tokens, vocabulary)``.

    Only these rows go through the head; what a model does to its logits afterwards, it still does.
    """
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, args: (args[0][wanted][None], *args[1:]))
    try:
        yield
    finally:
        hook.remove()


def masks(model: Any, seen: Tensor, query: Tensor, key: Tensor) -> Any:
    """The additive mask that a model's layers take, or one for each kind of layer.

    Args:
        model: The model.
        seen: Which keys a query attends to, windows apart, shape ``(rows, queries, keys)``, bool.
        query: Positions, shape ``(rows, queries)``.
        key: Positions, shape ``(rows, keys)``.
    """
    distance = query[:, :, None] - key[:, None, :]
    made = {}
    for kind, window in _windows(model).items():
        inside = seen if window is None else seen & (distance < window)
        made[kind] = torch.zeros(inside.shape, dtype=model.dtype, device=inside.device).masked_fill_(
            ~inside, torch.finfo(model.dtype).min
        )[:, None]
    return made if len(made) > 1 else next(iter(made.values()))


def _pack(sequences: Sequence[list[int]], past: int, room: int) -> list[_Row]:
    """Rows for what follows the first ``past`` tokens; ``room`` 0 gives each sequence its own."""
    rows: list[_Row] = []
    before: list[int] = []
    first = 0
    for index in sorted(range(len(sequences)), key=sequences.__getitem__):
        ids = sequences[index]
        shared = _alike(before, ids)
        if rows and room and shared - past >= _WORTH_SHARING and len(rows[-1].ids) + len(ids) - shared <= first + room:
            row = rows[-1]
            path = row.paths[next(reversed(row.paths))][: shared - past]
        else:
            rows.append(row := _Row())
            path, shared, first = np.zeros(0, dtype=np.int64), past, len(ids) - past
        row.paths[index] = np.concatenate([path, np.arange(len(row.ids), len(row.ids) + len(ids) - shared)])
        row.ids += ids[shared:]
        row.depths += range(shared, len(ids))
        before = ids
    return rows


def _forward(model: Any, rows: Sequence[_Row], wanted: np.ndarray, cache: Any, past: int) -> Tensor:
    """Logits of the wanted columns of some rows, shape ``(columns, vocabulary)``, row after row."""
    width = wanted.shape[1]
    device = model.device
    input_ids = torch.tensor([row.ids + [0] * (width - len(row.ids)) for row in rows], device=device)
    shape: dict[str, Any] = {}
    if any(len(row.paths) > 1 for row in rows):
        depths = torch.tensor([row.depths + [past] * (width - len(row.ids)) for row in rows], device=device)
        seen = torch.from_numpy(np.stack([_ancestors(row, width) for row in rows])).to(device)
        before = torch.arange(past, device=device).expand(len(rows), -1)
        seen = torch.cat([seen.new_ones(len(rows), width, past), seen], dim=2)
        shape = {
            "position_ids": depths,
            "attention_mask": masks(model, seen, depths, torch.cat([before, depths], dim=1)),
        }
    # Else padding is on the right, where causal attention never looks, and no mask is needed.
    with clear_errors(), torch.inference_mode(), only(model, torch.from_numpy(wanted).to(device)):
        logits: Tensor = model(
            input_ids, past_key_values=expanded(cache, len(rows)), use_cache=cache is not None, **shape
        ).logits[0]
    return logits


def _ancestors(row: _Row, width: int) -> np.ndarray:
    """Which columns each column of a tree attends to, shape ``(width, width)``; padding to itself."""
    seen = np.eye(width, dtype=bool)
    for path in row.paths.values():
        seen[np.ix_(path, path)] = np.tri(len(path), dtype=bool)
    return seen


def _tree_is_exact(model: Any) -> bool:
    ids = np.random.default_rng(0).permutation(model.get_output_embeddings().weight.shape[0])[:60].tolist()
    stem, tails = ids[: _WORTH_SHARING + 4], (ids[_WORTH_SHARING + 4 : -8], ids[-8:])
    sequences, counts = [stem + tail for tail in tails], [len(tail) for tail in tails]
    found: list[dict[int, Tensor]] = []
    for past, cache, trees in ((4, prefix_cache(model, stem[:4]), True), (0, None, False)):
        batches = last_logits(model, sequences, counts, cache, past, 1 if not trees else 10**6, trees)
        found.append({index: logits[at].float() for logits, rows in batches for index, at in rows.items()})
    packed, alone = found
    exact = all((packed[i] - alone[i]).norm() <= _TOLERANCE[model.dtype] * alone[i].norm() for i in alone)
    with torch.inference_mode():  # a model that ignores its positions would not notice that a tree's are not 0, 1, 2, …
        tokens, positions = torch.tensor([ids], device=model.device), torch.arange(len(ids), device=model.device)[None]
        near, far = (model(tokens, position_ids=positions * step, logits_to_keep=1).logits for step in (1, 2))
    return exact and not torch.equal(near, far)


def _alike(first: Sequence[int], second: Sequence[int]) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def _windows(model: Any) -> dict[str, int | None]:
    """The kinds of attention layer, and how far each looks back; None for all the way."""
    config = model.config.get_text_config(decoder=True)
    found: dict[str, int | None] = {}
    for layer in DynamicCache(config=config).layers:
        if type(layer) is DynamicSlidingWindowLayer:
            found["sliding_attention"] = layer.sliding_window
        elif type(layer) is DynamicLayer:
            found["full_attention"] = None
        else:
            found[type(layer).__name__] = None
    return found
