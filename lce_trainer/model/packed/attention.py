"""Attention within the pairs of a packed row.

By a kernel for variable lengths where the hardware has one, else by one call of
``scaled_dot_product_attention`` for all pairs of a length, which stand side by side: so the calls read
and write the row in place, and nothing is padded or masked.
"""

import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lce_trainer.compat import flash_attention_forward
from lce_trainer.model.packed.cpu import draw_dropout

logger = logging.getLogger(__name__)

_LONGEST_BY_PRODUCTS = 1024  # tokens, beyond which weights of tokens x tokens would fill the memory

Kernel = Callable[..., Tensor]


@dataclass
class Packing:
    """Where the pairs of a packed row lie.

    Attributes:
        lengths: Tokens of each pair, on the host, shape ``(pairs,)``; ascending.
        read: Index of the token that the head reads of each pair, shape ``(pairs,)``.
        starts: Index of each pair's first token and the number of tokens, shape ``(pairs + 1,)``, int32.
        longest: Tokens of the longest pair.
        calls: ``(pairs, length)`` of each length there is.
        masks: Which keys a query sees, by length, window and direction, where those are not all.
    """

    lengths: np.ndarray
    read: Tensor
    starts: Tensor
    longest: int
    calls: list[tuple[int, int]]
    masks: dict[tuple[int, int, bool], Tensor] = field(default_factory=dict)

    def mask(self, length: int, window: int | None, causal: bool) -> Tensor | None:
        """Return which keys each query of a pair attends to, shape ``(length, length)``; None without a window."""
        if window is None or window >= length:
            return None
        if (length, window, causal) not in self.masks:
            place = torch.arange(length, device=self.read.device)
            distance = place[:, None] - place
            seen = distance.abs() < window
            self.masks[length, window, causal] = seen & (distance >= 0) if causal else seen
        return self.masks[length, window, causal]


def make_packing(lengths: np.ndarray, device: torch.device | str, reads_last: bool = False) -> Packing:
    """Lay out pairs of ascending lengths; decoders read the last token of each, encoders the first."""
    starts = np.concatenate([[0], np.cumsum(lengths)])
    distinct, pairs = np.unique(lengths, return_counts=True)
    return Packing(
        lengths,
        torch.as_tensor(starts[1:] - 1 if reads_last else starts[:-1]).to(device, non_blocking=True),
        torch.as_tensor(starts, dtype=torch.int32).to(device, non_blocking=True),
        int(lengths[-1]),
        list(zip(pairs.tolist(), distinct.tolist(), strict=True)),
    )


def places_in_pairs(lengths: np.ndarray) -> np.ndarray:
    """Return the place of every token of a row in its pair, from 0; shape ``(tokens,)``."""
    ends = np.cumsum(lengths)
    places: np.ndarray = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
    return places


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packing: Packing | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention for ``transformers``: by sdpa, unless the input is packed.

    Args:
        module: The attention layer.
        query: Shape ``(1, heads, tokens, size)``.
        key: Shape ``(1, key heads, tokens, size)``.
        value: As ``key``.
        attention_mask: For input that is not packed.
        dropout: Of attention weights.
        scaling: Of the products of queries and keys.
        packing: The layout; None if the input is not packed.
        sliding_window: Tokens that a query sees to its left, itself included, and in an encoder as
            many to its right; None for all.
        **kwargs: For sdpa.

    Returns:
        Context, shape ``(1, tokens, heads, size)``, and no weights.
    """
    if packing is None:
        # A mask knows its window already.
        context: Tensor = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )[0]
        return context, None
    causal = bool(getattr(module, "is_causal", False))
    q, k, v = (states.squeeze(0).transpose(0, 1) for states in (query, key, value))
    return attend(q, k, v, packing, causal, dropout, scaling, sliding_window)[None], None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    causal: bool = False,
    dropout: float = 0.0,
    scaling: float | None = None,
    window: int | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Compute the attention of each pair over its own tokens.

    Args:
        query: Of all tokens, shape ``(tokens, heads, size)``, or of the token that is read, shape
            ``(pairs, heads, size)``.
        key: Shape ``(tokens, key heads, size)``; heads may be shared.
        value: As ``key``.
        packing: The layout.
        causal: Tokens see only what is before them.
        dropout: Of attention weights.
        scaling: Of the products of queries and keys.
        window: As in :func:`packed_attention`.
        bias: What is added to the scaled products of queries and keys by their places in the pair, shape
            ``(heads, longest, longest)``, or ``(heads, 1, longest)`` for the token that is read, a pair's first;
            None for nothing. It excludes a window and a direction.

    Returns:
        Context, of the shape of ``query``.
    """
    device = query.device.type
    if torch.is_autocast_enabled(device) and query.dtype != torch.float64:
        # Norms and rotations leave some of the three in float32.
        query, key, value = (states.to(torch.get_autocast_dtype(device)) for states in (query, key, value))
    if len(query) != len(key) and window is not None:
        key, value, packing = _within(window, key, value, packing, causal)
        window = None
    half = query.dtype in (torch.float16, torch.bfloat16)
    if bias is None and half and device == "cuda" and query.shape[-1] % 8 == 0 and _kernel_works(query.device):
        return flash_attention(query, key, value, packing, causal, dropout, scaling, window)
    dtype, wide = query.dtype, half and device == "cpu"
    if wide:  # a CPU's fused kernel is faster in float32, backward twice as fast
        query, key, value = query.float(), key.float(), value.float()
    with torch.autocast(device, enabled=False) if wide else nullcontext():  # which would undo that
        if bias is not None:
            bias = bias.to(query.dtype)
        context: Tensor = attend_by_calls(query, key, value, packing, causal, dropout, scaling, window, bias)
    return context.to(dtype)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def attend_by_calls(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    causal: bool = False,
    dropout: float = 0.0,
    scaling: float | None = None,
    window: int | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Compute :func:`attend` on any device; a window is for queries of all tokens."""
    one_query = len(query) != len(key)
    sizes = [pairs * length for pairs, length in packing.calls]
    parts = (
        torch.split(query, [pairs for pairs, _ in packing.calls] if one_query else sizes),
        torch.split(key, sizes),
        torch.split(value, sizes),
    )
    contexts = []
    for (pairs, length), *states in zip(packing.calls, *parts, strict=True):
        q, k, v = (state.view(pairs, -1, *state.shape[1:]).transpose(1, 2) for state in states)
        mask = packing.mask(length, window, causal) if bias is None else bias[:, :length, :length]
        # The CPU's fused kernel takes no dropout.
        if dropout and bias is None and not causal and query.device.type == "cpu" and length <= _LONGEST_BY_PRODUCTS:
            context = _attend_by_products(q, k, v, mask, dropout, scaling)
        else:
            context = functional.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=causal and not one_query and mask is None,
                scale=scaling,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        contexts.append(context.transpose(1, 2).flatten(0, 1))
    return torch.cat(contexts)


def _attend_by_products(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, scaling: float | None
) -> Tensor:
    """Compute attention as plain batched products, shapes ``(pairs, heads, tokens, size)``."""
    pairs, heads, queries, size = query.shape
    q, k, v = (states.reshape(pairs * heads, -1, size) for states in (query, key, value))
    bias = q.new_zeros(()) if mask is None else torch.where(mask, 0.0, torch.finfo(q.dtype).min).to(q.dtype)
    scale = size**-0.5 if scaling is None else scaling
    weights = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=scale).softmax(-1)
    dropped, part = draw_dropout(weights.shape, dropout)
    kept = torch.where(dropped, weights.new_zeros(()), weights)
    return torch.bmm(kept, v).div(1 - part).view(pairs, heads, queries, size)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _within(window: int, key: Tensor, value: Tensor, packing: Packing, causal: bool) -> tuple[Tensor, Tensor, Packing]:
    """Return the keys and values in the window of the token that the head reads, and their layout."""
    seen = np.minimum(packing.lengths, window)
    ends = np.cumsum(packing.lengths)
    first = ends - (seen if causal else packing.lengths)
    rows = torch.as_tensor(places_in_pairs(seen) + np.repeat(first, seen), device=key.device)
    return key[rows], value[rows], make_packing(seen, key.device, reads_last=causal)


def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    causal: bool = False,
    dropout: float = 0.0,
    scaling: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Compute :func:`attend` by torch's flash attention over variable lengths: CUDA, half precision.

    The operation under ``torch.nn.attention.varlen``, which gives it no dropout, and under attention on
    nested tensors, which gives it no window. It lines the last query up with the last key.
    """
    one_query = len(query) != len(key)
    starts = torch.arange(len(query) + 1, dtype=torch.int32, device=query.device) if one_query else packing.starts
    windows = (
        {} if window is None else {"window_size_left": window - 1, "window_size_right": 0 if causal else window - 1}
    )
    context: Tensor = flash_attention_forward(
        query,
        key,
        value,
        starts,
        packing.starts,
        1 if one_query else packing.longest,
        packing.longest,
        dropout,
        causal and window is None,
        False,
        scale=scaling,
        **windows,
    )[0]
    return context


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _kernel_works(device: torch.device) -> bool:
    """Return whether a GPU's kernel computes attention right."""
    return _checked_kernel(device)


@cache
def _checked_kernel(device: torch.device) -> bool:
    """Compare a GPU's kernel once, and log why it is not used."""
    problem = kernel_problem(flash_attention, device, torch.bfloat16)
    if problem:
        logger.warning("attention on %s goes by calls, one for each length: the kernel %s", device, problem)
    return problem is None


def kernel_problem(kernel: Kernel, device: torch.device | str, dtype: torch.dtype) -> str | None:
    """Return how a kernel differs from :func:`attend_by_calls`, forward or backward; None if it does not.

    Args:
        kernel: Takes the arguments of :func:`attend`.
        device: Where to compare them, on random states.
        dtype: Of the states; they agree to its rounding, or not at all.
    """
    for causal, window, one_query in product((False, True), (None, 9), (False, True)):
        if one_query and window is not None:
            continue  # the keys are cut instead
        what = f"causal {causal}, window {window}, {'one query' if one_query else 'all queries'}"
        try:
            wanted, got = (
                _with_gradients(function, causal, window, one_query, torch.device(device), dtype)
                for function in (attend_by_calls, kernel)
            )
            _with_gradients(kernel, causal, window, one_query, torch.device(device), dtype, dropout=0.1)
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:
            return f"failed ({what}): {' '.join(str(error).split())}"
        for right, found in zip(wanted, got, strict=True):
            off = float((found - right).norm() / right.norm())
            if not off <= 4 * torch.finfo(dtype).eps:
                return f"is off by {off:.1e} ({what})"
    return None


@torch.inference_mode(False)
@torch.enable_grad()
def _with_gradients(
    function: Kernel,
    causal: bool,
    window: int | None,
    one_query: bool,
    device: torch.device,
    dtype: torch.dtype,
    dropout: float = 0.0,
) -> list[Tensor]:
    """Return context and gradients by query, key and value of attention over random states, float32."""
    lengths, draw = np.array([1, 7, 7, 30, 200]), torch.Generator().manual_seed(0)
    packing = make_packing(lengths, device, reads_last=causal)
    queries, tokens, key_heads = (
        len(lengths) if one_query else int(lengths.sum()),
        int(lengths.sum()),
        2 if causal else 4,
    )
    shapes = (queries, 4, 32), (tokens, key_heads, 32), (tokens, key_heads, 32)
    query, key, value = (torch.randn(shape, generator=draw).to(device, dtype).requires_grad_() for shape in shapes)
    with torch.autocast(device.type, enabled=False):
        context = function(query, key, value, packing, causal, dropout, None, window)
        weight = torch.randn(shapes[0], generator=draw).to(device)
        gradients = torch.autograd.grad((context * weight).sum(), (query, key, value))
    return [states.detach().float() for states in (context, *gradients)]
