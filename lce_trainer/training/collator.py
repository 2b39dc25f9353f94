"""Rows of groups into one batch of tensors: draw, tokenize, pad."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lce_trainer.errors import TrainingError
from lce_trainer.model.pairs import EncodedPairs, TokenLists, encode_groups, join_pairs, pad_pairs
from lce_trainer.model.template import pair_overhead
from lce_trainer.training.sampling import sample_group

Batch = dict[str, Any]

_OF_GROUPS = ("mask", "labels", "teacher", "target", "group_sizes", "query_ids")  # the rest of a batch is of pairs


@dataclass
class GroupCollator:
    """Draw each row's positive and negatives for its epoch, and make one batch of pairs.

    Attributes:
        tokenizer: A fast tokenizer with a pad token.
        group_size: Passages a query shows in one step, its positive included; a group with fewer
            keeps them all and repeats none.
        max_length: Tokens of a pair at most, special tokens included. Only the passage is cut.
        max_query_length: Tokens of a query at most.
        seed: Of the draw, see :func:`lce_trainer.training.sampling.sample_group`.
        pad_to_multiple_of: Round padded lengths up, for hardware that likes 8.
        curriculum_epochs: Of the draw too.

    Raises:
        TrainingError: The tokenizer is not a fast one, has no pad token, or no room is left for
            the passage.
    """

    tokenizer: PreTrainedTokenizerBase
    group_size: int = 8
    max_length: int = 256
    max_query_length: int = 64
    seed: int = 42
    pad_to_multiple_of: int | None = None
    curriculum_epochs: int | None = None

    def __post_init__(self) -> None:
        if not self.tokenizer.is_fast:
            raise TrainingError(f"{type(self.tokenizer).__name__} is not a fast tokenizer: load it with AutoTokenizer")
        if self.tokenizer.pad_token_id is None:
            raise TrainingError("the tokenizer has no pad token: set tokenizer.pad_token (its eos_token will do)")
        overhead = pair_overhead(self.tokenizer)
        if self.max_query_length + overhead >= self.max_length:
            raise TrainingError(
                f"max_query_length={self.max_query_length} and {overhead} tokens around the texts leave no room for a "
                f"passage in max_length={self.max_length}: lower the one or raise the other"
            )

    def __call__(self, rows: Sequence[Mapping[str, Any] | None]) -> Batch:
        """Make a batch.

        Args:
            rows: Groups, each with its ``epoch`` (0 if it has none), their query and passages as text or
                as :class:`lce_trainer.model.pairs.TokenLists`; None fills up a batch and is left out.

        Returns:
            ``input_ids`` and the tokenizer's other inputs, shape ``(pairs, length)``, padded on the
            right, groups one after the other with the positive first; ``mask``, ``labels`` and
            ``teacher`` (NaN where unknown), shape ``(groups, width)``; ``target``, shape
            ``(groups,)``; and on the host, for those who cut the batch: ``group_sizes``,
            ``lengths`` (tokens of each pair, an array), ``query_ids``, ``cut_pairs``. No rows at all give
            one empty pair and no group, so that every rank has something to run. What the last row
            tells of its ``stream`` is passed on.
        """
        groups = [row for row in rows if row is not None]
        draws = [self._draw(row) for row in groups]
        sizes = [len(draw) for draw in draws]
        encoded, cut = self._encode(groups, draws)
        mask = torch.arange(max(sizes, default=0)) < torch.tensor(sizes, dtype=torch.long)[:, None]
        told = [row["stream"] for row in rows if row is not None and "stream" in row][-1:]
        return {
            **pad_pairs(self.tokenizer, encoded, self.pad_to_multiple_of),
            "mask": mask,
            "labels": _grid(mask, [row["labels"] for row in groups], draws, 0.0),
            "teacher": _grid(mask, [row.get("scores") for row in groups], draws, math.nan),
            "target": torch.zeros(len(groups), dtype=torch.long),
            "group_sizes": sizes,
            "lengths": encoded.lengths,
            "query_ids": [row["query_id"] for row in groups],
            "cut_pairs": cut if groups else 0,
            **({"stream": told[0]} if told else {}),
        }

    def _draw(self, row: Mapping[str, Any]) -> list[int]:
        """Which passages the group shows, its positive first."""
        target, negatives = sample_group(
            self.seed,
            row.get("epoch", 0),
            row["query_id"],
            row["labels"],
            self.group_size - 1,
            self.curriculum_epochs,
        )
        return [target, *negatives]

    def _encode(self, groups: Sequence[Mapping[str, Any]], draws: Sequence[list[int]]) -> tuple[EncodedPairs, int]:
        """Pairs of the groups, from their texts or from the ids that are kept of these; and how many were cut."""
        limits = (self.max_length, self.max_query_length)
        queries = [row["query"] for row in groups]
        if groups and isinstance(queries[0], TokenLists):
            passages = [row["passages"].take(draw) for row, draw in zip(groups, draws, strict=True)]
            return join_pairs(self.tokenizer, [*queries, *passages], [len(draw) for draw in draws], *limits)
        texts = [[row["passages"][i] for i in draw] for row, draw in zip(groups, draws, strict=True)]
        return encode_groups(self.tokenizer, queries or [""], texts or [[""]], *limits)


def group_collator(tokenizer: PreTrainedTokenizerBase, args: Any) -> GroupCollator:
    """The collator that the settings of a run ask for."""
    return GroupCollator(
        tokenizer,
        args.group_size,
        args.max_length,
        args.max_query_length,
        args.seed if args.data_seed is None else args.data_seed,
        args.pad_to_multiple_of,
        args.curriculum_epochs,
    )


def select_groups(batch: Batch, groups: Sequence[int]) -> Batch:
    """Part of a batch: the named groups with their pairs, in the order named; no pair counts as cut."""
    starts = np.concatenate([[0], np.cumsum(batch["group_sizes"])])
    part = _select_pairs(batch, np.concatenate([np.arange(starts[group], starts[group + 1]) for group in groups]))
    for name in _OF_GROUPS:
        value = batch[name]
        chosen = torch.as_tensor(np.asarray(groups), device=value.device) if isinstance(value, Tensor) else None
        part[name] = value[chosen] if chosen is not None else [value[i] for i in groups]
    return {**part, "cut_pairs": 0}


def select_pairs(batch: Batch, pairs: np.ndarray) -> Batch:
    """A batch with some of its pairs, and all else as it was.

    Args:
        batch: Of :class:`GroupCollator`.
        pairs: Their places in the batch, shape ``(chosen,)``. If there is none, the first pair is taken all the
            same, as something to run.

    Returns:
        The batch, and ``places``: the given ones, as a tensor.
    """
    places = torch.as_tensor(pairs, dtype=torch.long, device=batch["input_ids"].device)
    return {**_select_pairs(batch, pairs if len(pairs) else np.zeros(1, dtype=int)), "places": places}


def _select_pairs(batch: Batch, pairs: np.ndarray) -> Batch:
    part = dict(batch)
    for name, value in batch.items():
        if name == "lengths":
            part[name] = value[pairs]
        elif isinstance(value, Tensor) and name not in (*_OF_GROUPS, "places"):
            part[name] = value[torch.as_tensor(pairs, device=value.device)]
    return part


def micro_batches(
    group_sizes: Sequence[int], lengths: np.ndarray, pairs: float, tokens: float = math.inf
) -> list[list[int]]:
    """Groups that go through the model together: whole ones, alike in length, within both bounds.

    A group is never split, so one of more than ``pairs`` passages, or ``tokens`` tokens, is a micro-batch of its own.
    """
    starts = np.concatenate([[0], np.cumsum(group_sizes)])
    longest = np.maximum.reduceat(lengths, starts[:-1])
    of_group = np.add.reduceat(lengths, starts[:-1])
    parts: list[list[int]] = []
    filled, long = math.inf, math.inf
    for group in np.argsort(longest, kind="stable")[::-1].tolist():
        if filled + group_sizes[group] > pairs or long + of_group[group] > tokens:
            parts.append([])
            filled, long = 0, 0
        parts[-1].append(group)
        filled, long = filled + group_sizes[group], long + of_group[group]
    return parts


def _grid(mask: Tensor, values: Sequence[Any], draws: Sequence[list[int]], fill: float) -> Tensor:
    """What is drawn of each group's values; ``fill`` beside it, and where a group has none."""
    grid = np.full(mask.shape, fill, dtype=np.float32)
    for row, (known, draw) in enumerate(zip(values, draws, strict=True)):
        if known is not None and len(known):
            grid[row, : len(draw)] = np.asarray(known, dtype=np.float32)[draw]  # None becomes NaN
    return torch.from_numpy(grid)
