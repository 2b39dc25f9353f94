"""Write on from prompts, token by token; a row that has ended leaves the batch."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import DynamicLayer

from lce_trainer.synthesis.llm.tree import clear_errors, cut_batches, expanded, masks, only

_CANDIDATES = 256  # tokens looked at first for the nucleus, before the whole vocabulary is sorted
_LEAVE = 0.75  # rows that have ended leave once no more than this share of the batch is still writing


def decode(
    model: Any,
    sequences: Sequence[list[int]],
    cache: Any,
    past: int,
    max_new_tokens: int,
    draw: Callable[[Tensor, Sequence[int], int], Tensor],
    ended: Callable[[list[int]], bool],
    budget: int,
) -> list[list[int]]:
    """Tokens that follow each sequence, up to and with the model's end token.

    Args:
        model: A causal language model that goes by masks and positions:
            :func:`lce_trainer.synthesis.llm.tree.takes_trees`.
        sequences: Token ids.
        cache: Keys and values of the first ``past`` tokens, which all sequences share; None for none.
        past: Tokens in the cache.
        max_new_tokens: Tokens written at most.
        draw: Given logits of shape ``(rows, vocabulary)``, the sequences they belong to and the
            step, the next token of each, shape ``(rows,)``.
        ended: Whether what was written so far ends the answer.
        budget: Tokens of the sequences that a forward pass reads at most, padding counted.
    """
    device = model.device
    ends = _end_tokens(model)
    lengths = [len(ids) - past for ids in sequences]
    width = max(lengths)
    written: list[list[int]] = [[] for _ in sequences]
    with clear_errors(), torch.inference_mode():
        logits, cache = _read(model, [ids[past:] for ids in sequences], cache, past, width + max_new_tokens, budget)
        # Columns of the keys: the prefix, the tail with its padding on the right, what is written.
        column = torch.arange(past + width + max_new_tokens, device=device)
        length = torch.tensor(lengths, device=device)[:, None]
        position = torch.where(column < past + width, column, column - width + length)
        seen = (column < past + length) | (column >= past + width)
        rows = list(range(len(sequences)))  # those in the batch
        writing = set(rows)
        for step in range(max_new_tokens):
            tokens = draw(logits, rows, step)
            for row, token in zip(rows, tokens.tolist(), strict=True):
                if row in writing:
                    written[row].append(token)
                    if token in ends or ended(written[row]):
                        writing.remove(row)
            if not writing or step == max_new_tokens - 1:
                break
            if len(writing) <= _LEAVE * len(rows):
                places = torch.tensor([place for place, row in enumerate(rows) if row in writing], device=device)
                cache.batch_select_indices(places)
                rows = [rows[place] for place in places.tolist()]
                tokens, position, seen = tokens[places], position[places], seen[places]
            now = past + width + step
            at = position[:, now, None]
            logits = model(
                tokens[:, None],
                position_ids=at,
                attention_mask=masks(model, seen[:, None, : now + 1], at, position[:, : now + 1]),
                past_key_values=cache,
                use_cache=True,
            ).logits[:, -1]
    return written


def decode_plainly(
    model: Any,
    sequences: Sequence[list[int]],
    max_new_tokens: int,
    draw: Callable[[Tensor, Sequence[int], int], Tensor],
    ended: Callable[[list[int]], bool],
) -> list[list[int]]:
    """:func:`decode` for any model, by ``generate``: nothing is shared, and all rows stay to the end."""
    width = max(map(len, sequences))
    pads = [width - len(ids) for ids in sequences]
    input_ids = torch.tensor([[0] * pad + ids for pad, ids in zip(pads, sequences, strict=True)], device=model.device)
    pad = torch.tensor(pads, device=model.device)[:, None]
    with clear_errors(), torch.inference_mode():
        output = model.generate(
            input_ids,
            attention_mask=(torch.arange(width, device=model.device) >= pad).long(),
            generation_config=GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False),
            logits_processor=LogitsProcessorList([_Draw(draw, width)]),
            stopping_criteria=StoppingCriteriaList([_Ended(ended, width)]),
        )
    ends = _end_tokens(model)
    found = []
    for tokens in output[:, width:].tolist():
        end = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
        found.append(tokens[: end + 1])
    return found


def sample(logits: Tensor, seeds: Sequence[int], step: int, temperature: float, top_p: float) -> Tensor:
    """A token a row from temperature and nucleus, by the Gumbel-max trick; the likeliest at temperature 0.

    The noise is a hash of the row's seed, the step and the token: no random state, so a row's
    tokens do not depend on its batch, and near-equal logits of another batch rarely change them.

    Args:
        logits: Shape ``(rows, vocabulary)``.
        seeds: One for each row.
        step: Tokens that have been written.
        temperature: Divides the logits.
        top_p: Draws from the likeliest tokens of this mass.

    Returns:
        Token ids, shape ``(rows,)``.
    """
    if temperature == 0:
        return logits.argmax(-1)
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    total = scores.logsumexp(-1, keepdim=True)
    vocabulary = scores.shape[-1]
    keep = vocabulary if top_p >= 1 else min(_CANDIDATES, vocabulary)
    while True:
        top, tokens = scores.topk(keep)
        probabilities = (top - total).exp()
        nucleus = probabilities.cumsum(-1) - probabilities < top_p
        if keep == vocabulary or not nucleus[:, -1].any():
            break
        keep = min(keep * 16, vocabulary)
    noise = _gumbel(seeds, step, tokens)
    drawn = (top + noise).masked_fill(~nucleus, -math.inf).argmax(-1, keepdim=True)
    return tokens.gather(1, drawn).squeeze(1)


class _Room(DynamicLayer):  # type: ignore[misc]
    """One layer's keys and values, in memory taken once: a plain layer copies all of it for every token."""

    def __init__(self, keys: Tensor, rows: int, columns: int) -> None:
        super().__init__()
        self.lazy_initialization(keys, keys)
        self.room = keys.new_zeros(2, rows, keys.shape[1], columns, keys.shape[3])

    def fill(self, rows: Tensor, keys: Tensor, values: Tensor) -> None:
        """What some rows start with."""
        self.room[0][rows, :, : keys.shape[2]] = keys
        self.room[1][rows, :, : keys.shape[2]] = values

    def use(self, columns: int) -> None:
        """Take the first columns as filled."""
        self.keys, self.values = self.room[:, :, :, :columns]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        start, end = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        self.room[0, :, :, start:end] = key_states
        self.room[1, :, :, start:end] = value_states
        self.use(end)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        self.room = self.room[:, indices]
        self.use(self.keys.shape[2])


def _read(
    model: Any, tails: Sequence[list[int]], cache: Any, past: int, room: int, budget: int
) -> tuple[Tensor, DynamicCache]:
    """Logits after each tail, and a cache of all of them with room for what is written.

    Args:
        model: The model.
        tails: What follows the first ``past`` tokens.
        cache: Of these; None for none.
        past: Tokens in it.
        room: Tokens that will follow them, those of the longest tail among them.
        budget: See :func:`decode`.
    """
    width = max(map(len, tails))
    distinct = list(dict.fromkeys(map(tuple, tails)))  # several answers to one prompt read it once
    number = {tail: place for place, tail in enumerate(distinct)}
    owner = np.array([number[tuple(tail)] for tail in tails])
    logits, whole = torch.empty(0), DynamicCache()
    for batch in cut_batches([len(tail) for tail in distinct], budget):
        longest = len(distinct[batch[0]])
        ids = [[*distinct[i], *[0] * (longest - len(distinct[i]))] for i in batch]
        ends = torch.tensor([[len(distinct[i]) - 1] for i in batch], device=model.device)
        start = DynamicCache() if cache is None else expanded(cache, len(batch))
        with only(model, torch.arange(longest, device=model.device) == ends):
            output = model(torch.tensor(ids, device=model.device), past_key_values=start, use_cache=True)
        rows, read = (torch.from_numpy(found).to(model.device) for found in np.nonzero(owner[:, None] == batch))
        if not whole.layers:
            logits = output.logits.new_empty(len(tails), output.logits.shape[-1])
            whole.layers = [_Room(layer.keys, len(tails), past + room) for layer in start.layers]
        logits[rows] = output.logits[0, read]
        for layer, filled in zip(whole.layers, start.layers, strict=True):
            layer.fill(rows, filled.keys[read], filled.values[read])
    for layer in whole.layers:
        layer.use(past + width)
    return logits, whole


class _Draw(LogitsProcessor):  # type: ignore[misc]
    """Leaves the drawn token alone."""

    def __init__(self, draw: Callable[[Tensor, Sequence[int], int], Tensor], width: int) -> None:
        self.draw = draw
        self.width = width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens = self.draw(scores, range(len(scores)), input_ids.shape[1] - self.width)
        return torch.full_like(scores, -math.inf).scatter_(1, tokens[:, None], 0.0)


class _Ended(StoppingCriteria):  # type: ignore[misc]
    """Ends a row once what it wrote ends the answer."""

    def __init__(self, ended: Callable[[list[int]], bool], width: int) -> None:
        self.ended = ended
        self.width = width

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        written = input_ids[:, self.width :].tolist()
        return torch.tensor([self.ended(tokens) for tokens in written], device=input_ids.device)


def _end_tokens(model: Any) -> set[int]:
    ends = model.generation_config.eos_token_id
    return set(ends) if isinstance(ends, list) else {ends}


def _gumbel(seeds: Sequence[int], step: int, tokens: Tensor) -> Tensor:
    """Standard Gumbel noise, shape of ``tokens``, a function of (row's seed, step, token) alone.

    The hash is splitmix64 (Steele, Lea & Flood 2014, https://doi.org/10.1145/2660193.2660195).
    """
    state = torch.tensor([seed % 2**63 for seed in seeds], device=tokens.device)[:, None]
    for value in (torch.tensor(step, device=tokens.device), tokens):
        state = state + (value + 1) * -0x61C8864680B583EB
        state = (state ^ (state >> 30 & 2**34 - 1)) * -0x40A7B892E31B1A47
        state = (state ^ (state >> 27 & 2**37 - 1)) * -0x6B2FB644ECCEEE15
        state = state ^ (state >> 31 & 2**33 - 1)
    uniform = ((state & 2**23 - 1).float() + 0.5) * 2.0**-23
    return -torch.log(-torch.log(uniform))
