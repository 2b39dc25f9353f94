"""Rows of groups into one flat batch: draw, tokenize, join."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lce_trainer.errors import TrainingError
from lce_trainer.model.pairs import EncodedPairs, TokenLists, encode_groups, join_pairs, slice_indices
from lce_trainer.model.template import keep_special_tokens, pair_overhead
from lce_trainer.training.sampling import sample_group
from lce_trainer.training.stuffing import stuff_negatives


class StreamPosition(NamedTuple):
    """How far a pass over a stream has come.

    Attributes:
        epoch: The pass, from 0.
        read: Rows read.
        no_positive: Rows dropped for having no positive.
        no_negative: Rows dropped for having no negative.
        shared: Rows whose query is also evaluated on.
        digest: Checksum of the query ids of the batch, over all ranks, that the row belongs to.
    """

    epoch: int
    read: int
    no_positive: int
    no_negative: int
    shared: int
    digest: int = 0

    def with_digest(self, digest: int) -> "StreamPosition":
        """Return the same position with another checksum."""
        return StreamPosition(self.epoch, self.read, self.no_positive, self.no_negative, self.shared, digest)


@dataclass(frozen=True, eq=False)
class Batch:
    """The pairs of several groups, flat and on the host from the collator to the model's door.

    The pairs of a group follow each other, its positive first. Nothing is padded: packing pairs into a row, cutting a
    batch and padding are each a :meth:`~lce_trainer.model.pairs.EncodedPairs.take`. Since a batch holds no tensor, data
    loaders pass it on as it is; the device gets what the model reads, and the loss, from it.

    Attributes:
        pairs: Token ids of all pairs. A batch of no group has one pair all the same, so that there is something to run.
        labels: The label of each pair's passage, float32, shape ``(pairs,)``.
        teacher_scores: The teacher's score of each pair, NaN where unknown, float32, shape ``(pairs,)``.
        is_cut: Whether tokens of the pair's query or passage were cut off, shape ``(pairs,)``.
        group_sizes: Pairs of each group, shape ``(groups,)``.
        query_ids: The query of each group.
        stream_position: How far the stream was read up to the last group, if the groups come from one.
    """

    pairs: EncodedPairs
    labels: np.ndarray
    teacher_scores: np.ndarray
    is_cut: np.ndarray
    group_sizes: np.ndarray
    query_ids: tuple[str, ...]
    stream_position: StreamPosition | None = None

    def take(self, groups: Sequence[int]) -> "Batch":
        """Return a batch of some of the groups, in the order named, without a stream position."""
        chosen = np.asarray(groups, dtype=np.int64)
        sizes = self.group_sizes[chosen]
        rows = slice_indices((self.group_sizes.cumsum() - self.group_sizes)[chosen], sizes)
        return Batch(
            self.pairs.take(rows if len(rows) else np.zeros(1, dtype=np.int64)),
            self.labels[rows],
            self.teacher_scores[rows],
            self.is_cut[rows],
            sizes,
            tuple(self.query_ids[group] for group in chosen),
        )

    @property
    def mask(self) -> Tensor:
        """True where a group has a pair, on the host, shape ``(groups, width)``; width is the largest group's size."""
        width = self.group_sizes.max(initial=0)
        return torch.from_numpy(np.arange(width) < self.group_sizes[:, None])

    @property
    def target(self) -> Tensor:
        """The column of each group's positive, int64, on the host, shape ``(groups,)``."""
        return torch.zeros(len(self.group_sizes), dtype=torch.long)

    def by_group(self, values: Tensor | np.ndarray, fill: float = 0.0) -> Tensor:
        """Return one row a group of values that belong to pairs.

        Args:
            values: One for each pair, shape ``(pairs,)``; a tensor's gradient goes through.
            fill: Stands where a group has no pair.

        Returns:
            Shape ``(groups, width)``, on the device of the values.
        """
        flat = torch.as_tensor(values)
        mask = self.mask.to(flat.device, non_blocking=True)
        return torch.full(mask.shape, fill, dtype=flat.dtype, device=flat.device).masked_scatter(mask, flat)


@dataclass
class GroupCollator:
    """Draws each row's positive and negatives for its epoch, and makes one batch of pairs.

    Attributes:
        tokenizer: A fast tokenizer with a pad token.
        group_size: Passages of a query in one step, its positive included; a group with fewer
            keeps them all and repeats none.
        max_length: Tokens of a pair at most, special tokens included. Only the passage is cut.
        max_query_length: Tokens of a query at most.
        seed: Seed of the draw, see :func:`lce_trainer.training.sampling.sample_group`.
        curriculum_epochs: Epochs in which the draw goes from easy to hard; see there.
        special_tokens_in_texts: Whether they keep their meaning, or are text; set in the tokenizer.
        stuffed_negatives: Share of the negatives that are stuffed, see :mod:`lce_trainer.training.stuffing`.

    Raises:
        TrainingError: The tokenizer is not a fast one, has no pad token, or no room is left for
            the passage.
    """

    tokenizer: PreTrainedTokenizerBase
    group_size: int = 8
    max_length: int = 256
    max_query_length: int = 64
    seed: int = 42
    curriculum_epochs: int | None = None
    special_tokens_in_texts: bool = False
    stuffed_negatives: float = 0.0

    def __post_init__(self) -> None:
        keep_special_tokens(self.tokenizer, self.special_tokens_in_texts)
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
                as :class:`lce_trainer.model.pairs.TokenLists`; None fills up a batch and is dropped.
        """
        groups = [row for row in rows if row is not None]
        draws = [self._draw(row) for row in groups]
        pairs, is_cut = self._encode(groups, draws)
        return Batch(
            pairs,
            _drawn([row["labels"] for row in groups], draws),
            _drawn([row.get("scores") for row in groups], draws),
            is_cut[: sum(map(len, draws))],
            np.array([len(draw) for draw in draws], dtype=np.int64),
            tuple(row["query_id"] for row in groups),
            groups[-1].get("stream_position") if groups else None,
        )

    def _draw(self, row: Mapping[str, Any]) -> list[int]:
        """Return which passages of the group are in the batch, its positive first."""
        target, negatives = sample_group(
            self.seed,
            row.get("epoch", 0),
            row["query_id"],
            row["labels"],
            self.group_size - 1,
            self.curriculum_epochs,
        )
        return [target, *negatives]

    def _encode(
        self, groups: Sequence[Mapping[str, Any]], draws: Sequence[list[int]]
    ) -> tuple[EncodedPairs, np.ndarray]:
        """Return the pairs of the groups, made from texts or from token ids, and which of them were cut."""
        limits = (self.max_length, self.max_query_length)
        queries = [row["query"] for row in groups]
        if groups and isinstance(queries[0], TokenLists):
            if self.stuffed_negatives:
                raise TrainingError("stuffed_negatives needs passages as texts, not as token ids: tokenize them later")
            passages = [row["passages"].take(draw) for row, draw in zip(groups, draws, strict=True)]
            return join_pairs(self.tokenizer, [*queries, *passages], [len(draw) for draw in draws], *limits)
        texts = [self._texts(row, draw) for row, draw in zip(groups, draws, strict=True)]
        return encode_groups(self.tokenizer, queries or [""], texts or [[""]], *limits)

    def _texts(self, row: Mapping[str, Any], draw: Sequence[int]) -> list[str]:
        if self.stuffed_negatives:
            return stuff_negatives(row, draw, self.stuffed_negatives, self.seed)
        return [row["passages"][i] for i in draw]


def group_collator(tokenizer: PreTrainedTokenizerBase, args: Any) -> GroupCollator:
    """Make the collator that the settings of a run describe."""
    return GroupCollator(
        tokenizer,
        args.group_size,
        args.max_length,
        args.max_query_length,
        args.seed if args.data_seed is None else args.data_seed,
        args.curriculum_epochs,
        args.special_tokens_in_texts,
        args.stuffed_negatives,
    )


def micro_batches(
    group_sizes: np.ndarray | Sequence[int], lengths: np.ndarray, pairs: float, tokens: float = math.inf
) -> list[list[int]]:
    """Return which groups go through the model together: whole ones, alike in length, within both bounds.

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


def _drawn(values: Sequence[Any], draws: Sequence[list[int]]) -> np.ndarray:
    """Return what is drawn of each group's values, one after the other; NaN where there is none, or no value."""
    parts = [
        np.asarray(known, dtype=np.float32)[draw]  # None becomes NaN
        if known is not None and len(known)
        else np.full(len(draw), math.nan, dtype=np.float32)
        for known, draw in zip(values, draws, strict=True)
    ]
    return np.concatenate([np.empty(0, dtype=np.float32), *parts])
