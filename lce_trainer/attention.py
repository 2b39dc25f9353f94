"""Attention within the pairs of a packed row.

By a kernel for variable lengths where the hardware has one, else by a few calls of
``scaled_dot_product_attention`` over pairs alike in length: padding exists inside those calls only.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lce_trainer.collator import length_buckets

_LONGEST_BY_PRODUCTS = 1024  # tokens, beyond which weights of tokens x tokens would fill the memory
_CALL_OVERHEAD = 512  # tokens of padding inside attention that are worth one more call of it


@dataclass
class Packing:
    """Where the pairs of a packed row lie, and how attention over them is cut into calls.

    Attributes:
        lengths: Tokens of each pair, on the host, shape ``(pairs,)``; ascending.
        read: Index of the token that the head reads of each pair, shape ``(pairs,)``.
        starts: Index of each pair's first token and the number of tokens, shape ``(pairs + 1,)``, int32.
        padded: For attention by calls: token index of every place of every call, calls one after the
            other, places that are padding pointing at their pair's first token, shape ``(places,)``.
        places: Place of every token, shape ``(tokens,)``: the inverse of ``padded``.
        calls: ``(pairs, length)`` of each call.
        masks: Keys that are no padding, for the calls that have some.
    """

    lengths: np.ndarray
    read: Tensor
    starts: Tensor
    padded: Tensor
    places: Tensor
    calls: list[tuple[int, int]]
    masks: dict[Any, Tensor | None] = field(default_factory=dict)

    def mask(self, call: int, window: int | None, causal: bool, one_query: bool) -> Tensor | None:
        """Which keys a call's queries see, True where seen; None if all, or if plainly causal."""
        key = (call, window, causal, one_query)
        if key not in self.masks:
            self.masks[key] = self._mask(*key)
        return self.masks[key]

    def _mask(self, call: int, window: int | None, causal: bool, one_query: bool) -> Tensor | None:
        first = sum(pairs for pairs, _ in self.calls[:call])
        pairs, longest = self.calls[call]
        lengths = self.lengths[first : first + pairs]
        ragged, local = bool((lengths < longest).any()), window is not None and window < longest
        if not local and (not ragged or (causal and not one_query)):
            # A causal query never sees the padding behind it.
            return None
        device = self.read.device
        sizes, key = torch.as_tensor(lengths, device=device), torch.arange(longest, device=device)
        seen = (key < sizes[:, None])[:, None, None]  # (pairs, 1, 1, keys)
        if window is not None and local:
            query = (sizes - 1 if causal else torch.zeros_like(sizes))[:, None] if one_query else key[None]
            distance = (query[:, :, None] - key)[:, None]  # (pairs or 1, 1, queries, keys)
            seen = seen & (distance.abs() < window)
            if causal:
                seen = seen & (distance >= 0)
        return seen


def make_packing(lengths: np.ndarray, device: torch.device | str, reads_last: bool = False) -> Packing:
    """Lay out pairs of ascending lengths; decoders read the last token of each, encoders the first."""
    starts = np.concatenate([[0], np.cumsum(lengths)])
    calls, padded, places, place = [], [], [], 0
    for rows in length_buckets(lengths.tolist(), _CALL_OVERHEAD):
        longest = int(lengths[rows[-1]])
        inside = np.arange(longest) < lengths[rows, None]
        padded.append((starts[rows, None] + np.where(inside, np.arange(longest), 0)).ravel())
        places.append(place + np.flatnonzero(inside))
        calls.append((len(rows), longest))
        place += inside.size

    def tensor(values: np.ndarray, dtype: torch.dtype = torch.long) -> Tensor:
        return torch.as_tensor(values, dtype=dtype).to(device, non_blocking=True)

    return Packing(
        lengths,
        tensor(starts[1:] - 1 if reads_last else starts[:-1]),
        tensor(starts, torch.int32),
        tensor(np.concatenate(padded)),
        tensor(np.concatenate(places)),
        calls,
    )


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
    """The attention function that ``transformers`` calls: sdpa, unless the input is packed.

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
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
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
) -> Tensor:
    """Attention of each pair over its own tokens.

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

    Returns:
        Context, of the shape of ``query``.
    """
    one_query = len(query) != len(key)
    if kernel := _kernel(query, dropout, one_query and not causal and window is not None):
        return _attend_by_kernel(kernel, query, key, value, packing, causal, scaling, window)
    if query.device.type == "cpu" and query.dtype in (torch.float16, torch.bfloat16):
        # A CPU's fused kernel is faster in float32, backward twice as fast. Autocast would undo that.
        with torch.autocast("cpu", enabled=False):
            context = _attend_by_calls(
                query.float(), key.float(), value.float(), packing, causal, dropout, scaling, window
            )
        return context.to(query.dtype)
    return _attend_by_calls(query, key, value, packing, causal, dropout, scaling, window)


def _attend_by_calls(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    causal: bool,
    dropout: float,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    one_query = len(query) != len(key)
    sizes = [pairs * longest for pairs, longest in packing.calls]
    counts = [pairs for pairs, _ in packing.calls]
    queries = torch.split(query, counts) if one_query else torch.split(_spread(query, packing), sizes)
    keys, values = torch.split(_spread(key, packing), sizes), torch.split(_spread(value, packing), sizes)
    contexts = []
    for call, states in enumerate(zip(queries, keys, values, strict=True)):
        q, k, v = (state.view(counts[call], -1, *state.shape[1:]).transpose(1, 2) for state in states)
        mask = packing.mask(call, window, causal, one_query)
        # The CPU's fused kernel takes no dropout.
        by_products = query.device.type == "cpu" and dropout > 0 and not causal
        if by_products and packing.calls[call][1] <= _LONGEST_BY_PRODUCTS:
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
    whole = torch.cat(contexts)
    return whole if one_query else _collect(whole, packing)


def _attend_by_products(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, scaling: float | None
) -> Tensor:
    """Attention as plain batched products, shapes ``(pairs, heads, tokens, size)``."""
    pairs, heads, queries, size = query.shape
    q, k, v = (states.reshape(pairs * heads, -1, size) for states in (query, key, value))
    bias = q.new_zeros(()) if mask is None else torch.where(mask, 0.0, torch.finfo(q.dtype).min).to(q.dtype)
    bias = bias.expand(pairs, heads, queries, k.shape[1]).reshape(pairs * heads, queries, -1)
    products = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=size**-0.5 if scaling is None else scaling)
    return torch.bmm(functional.dropout(products.softmax(-1), dropout), v).view(pairs, heads, queries, size)


def _spread(states: Tensor, packing: Packing) -> Tensor:
    """Tokens to their places in the calls, shape ``(places, heads, size)``."""
    spread: Tensor = _Spread.apply(states, packing.padded, packing.places)  # type: ignore[no-untyped-call]
    return spread


def _collect(states: Tensor, packing: Packing) -> Tensor:
    """Tokens back from their places, shape ``(tokens, heads, size)``."""
    collected: Tensor = _Collect.apply(states, packing.places)  # type: ignore[no-untyped-call]
    return collected


class _Spread(torch.autograd.Function):
    """Backward reads each token's gradient from its one place.

    What stands on padding is a copy that nothing depends on, so its gradient is zero; plain indexing
    would still add it up, token by token.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, padded: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return states.index_select(0, padded)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return gradient.index_select(0, places), None, None


class _Collect(torch.autograd.Function):
    """Backward leaves the gradient of padding at zero."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.places = len(states)
        return states.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        whole = gradient.new_zeros((ctx.places, *gradient.shape[1:]))
        return whole.index_copy_(0, places, gradient), None


def _kernel(query: Tensor, dropout: float, reads_first_in_window: bool) -> Callable[..., Any] | None:
    """torch's attention over variable lengths, where it can do what is asked."""
    half = query.dtype in (torch.float16, torch.bfloat16)
    # The kernel lines the last query up with the last key, so a window around the first is not its business.
    if query.device.type != "cuda" or not half or dropout or reads_first_in_window:
        return None
    if torch.cuda.get_device_capability(query.device) < (8, 0):
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # torch before 2.10
        return None
    kernel: Callable[..., Any] = varlen_attn
    return kernel


def _attend_by_kernel(
    kernel: Callable[..., Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    causal: bool,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    one_query = len(query) != len(key)
    longest, before = int(packing.lengths[-1]), -1 if window is None else window - 1
    starts = torch.arange(len(query) + 1, dtype=torch.int32, device=query.device) if one_query else packing.starts
    context: Tensor = kernel(
        query.contiguous(),
        key.contiguous(),
        value.contiguous(),
        starts,
        packing.starts,
        1 if one_query else longest,
        longest,
        scale=scaling,
        window_size=(before, 0 if causal else before),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return context
