"""Token ids of many texts, or of many pairs, laid end to end: thousands of them are cut and joined by one gather."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np


def ragged(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Places of pieces of a flat array, one piece after the other.

    Args:
        starts: Where each piece begins, shape ``(pieces,)``.
        counts: How long it is, shape ``(pieces,)``.

    Returns:
        Indices, shape ``(counts.sum(),)``.
    """
    begins = counts.cumsum() - counts
    places: np.ndarray = np.repeat(starts - begins, counts)
    places += np.arange(len(places))
    return places


@dataclass(frozen=True)
class Texts:
    """Token ids of texts.

    Attributes:
        ids: Of all of them, and perhaps of others, shape ``(tokens,)``.
        starts: Where each text begins, shape ``(texts,)``.
        counts: Tokens of each, shape ``(texts,)``.
    """

    ids: np.ndarray
    starts: np.ndarray
    counts: np.ndarray

    @classmethod
    def end_to_end(cls, ids: np.ndarray, counts: np.ndarray) -> "Texts":
        """Texts of ``counts`` tokens each, between which nothing lies."""
        return cls(ids, counts.cumsum() - counts, counts)

    @classmethod
    def concatenated(cls, parts: Sequence["Texts"]) -> "Texts":
        """Texts that each lie end to end, one part after the other."""
        return cls.end_to_end(
            np.concatenate([part.ids for part in parts]), np.concatenate([part.counts for part in parts])
        )

    @classmethod
    def of_one(cls, ids: np.ndarray) -> "Texts":
        """A single text."""
        return cls(ids, np.zeros(1, dtype=np.int64), np.array([len(ids)]))

    @classmethod
    def of(cls, lists: Sequence[Sequence[int]]) -> "Texts":
        """Texts from one list of ids each."""
        counts = np.fromiter(map(len, lists), np.int64, len(lists))
        return cls.end_to_end(np.fromiter(chain.from_iterable(lists), np.int32, counts.sum()), counts)

    def take(self, rows: np.ndarray | Sequence[int]) -> "Texts":
        """Some of the texts, copied: nothing else is read."""
        counts = self.counts[rows]
        return self.end_to_end(self.ids[ragged(self.starts[rows], counts)], counts)


@dataclass(frozen=True)
class Encoded:
    """Pairs as a model reads them.

    Attributes:
        lengths: Tokens of each pair, shape ``(pairs,)``.
        inputs: For each of the tokenizer's inputs, those of all pairs, shape ``(lengths.sum(),)``.
    """

    lengths: np.ndarray
    inputs: dict[str, np.ndarray]

    @classmethod
    def of(cls, lists: Mapping[str, Sequence[Sequence[int]]]) -> "Encoded":
        """Pairs from one list each, for each of the inputs."""
        found = {name: Texts.of(rows) for name, rows in lists.items()}
        return cls(found["input_ids"].counts, {name: rows.ids for name, rows in found.items()})

    def take(self, rows: np.ndarray) -> "Encoded":
        """Some of the pairs, in the order of ``rows``, shape ``(chosen,)``."""
        lengths = self.lengths[rows]
        places = ragged((self.lengths.cumsum() - self.lengths)[rows], lengths)
        return Encoded(lengths, {name: values[places] for name, values in self.inputs.items()})
