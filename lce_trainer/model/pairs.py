"""Queries and passages into pairs of token ids, and pairs into tensors: the input side of training and scoring."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lce_trainer.errors import TrainingError
from lce_trainer.model.template import JOINTS, PairTemplate, as_text, pair_template, plain_backend

_TEXTS = 1024  # tokenized at once: what a tokenizer makes of whole long texts is many times their size


def slice_indices(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the indices of several slices of a flat array, one slice after the other.

    Args:
        starts: The index at which each slice begins, shape ``(slices,)``.
        counts: The length of each slice, shape ``(slices,)``.

    Returns:
        Indices, shape ``(counts.sum(),)``.
    """
    begins = counts.cumsum() - counts
    places: np.ndarray = np.repeat(starts - begins, counts)
    places += np.arange(len(places))
    return places


@dataclass(frozen=True)
class TokenLists:
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
    def end_to_end(cls, ids: np.ndarray, counts: np.ndarray) -> "TokenLists":
        """Make texts of ``counts`` tokens each that lie end to end."""
        return cls(ids, counts.cumsum() - counts, counts)

    @classmethod
    def concatenated(cls, parts: Sequence["TokenLists"]) -> "TokenLists":
        """Join texts that each lie end to end, one part after the other."""
        return cls.end_to_end(
            np.concatenate([part.ids for part in parts]), np.concatenate([part.counts for part in parts])
        )

    @classmethod
    def of_one(cls, ids: np.ndarray) -> "TokenLists":
        """Make a single text."""
        return cls(ids, np.zeros(1, dtype=np.int64), np.array([len(ids)]))

    @classmethod
    def of(cls, lists: Sequence[Sequence[int]]) -> "TokenLists":
        """Make texts from one list of ids each."""
        counts = np.fromiter(map(len, lists), np.int64, len(lists))
        return cls.end_to_end(np.fromiter(chain.from_iterable(lists), np.int32, counts.sum()), counts)

    def take(self, rows: np.ndarray | Sequence[int]) -> "TokenLists":
        """Copy some of the texts, reading nothing else."""
        counts = self.counts[rows]
        return self.end_to_end(self.ids[slice_indices(self.starts[rows], counts)], counts)


@dataclass(frozen=True)
class EncodedPairs:
    """Pairs as a model reads them.

    Attributes:
        lengths: Tokens of each pair, shape ``(pairs,)``.
        inputs: For each of the tokenizer's inputs, those of all pairs, shape ``(lengths.sum(),)``.
    """

    lengths: np.ndarray
    inputs: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.lengths)

    @classmethod
    def of(cls, lists: Mapping[str, Sequence[Sequence[int]]]) -> "EncodedPairs":
        """Make pairs from one list each, for each of the inputs."""
        found = {name: TokenLists.of(rows) for name, rows in lists.items()}
        return cls(found["input_ids"].counts, {name: rows.ids for name, rows in found.items()})

    def take(self, rows: np.ndarray) -> "EncodedPairs":
        """Copy some of the pairs, in the order of ``rows``, shape ``(chosen,)``."""
        lengths = self.lengths[rows]
        places = slice_indices((self.lengths.cumsum() - self.lengths)[rows], lengths)
        return EncodedPairs(lengths, {name: values[places] for name, values in self.inputs.items()})


@dataclass(frozen=True)
class PairLayout:
    """The special tokens that a tokenizer puts around a query and a passage.

    Attributes:
        separators: Three texts: before the query, between the two, and after the passage.
        types: Token types of five parts: the query's and passage's tokens have places 1 and 3.
        has_types: Whether the model reads token types.
    """

    separators: TokenLists
    types: np.ndarray
    has_types: bool

    @property
    def overhead(self) -> int:
        """Tokens of a pair besides its query and passage."""
        return len(self.separators.ids)

    def with_separators(self, parts: Sequence[TokenLists]) -> TokenLists:
        """Join all texts in one array, after the separators, which are its first three."""
        return TokenLists.concatenated([self.separators, *parts])

    def join(self, texts: TokenLists, rows: np.ndarray, counts: np.ndarray, side: str = "right") -> EncodedPairs:
        """Join texts into pairs, all at once.

        Args:
            texts: Of :meth:`with_separators`.
            rows: Query and passage of each pair, shape ``(pairs, 2)``; 0 is the first text after the separators.
            counts: Tokens that are kept of each, shape ``(pairs, 2)``.
            side: Where the rest is cut off, "right" or "left".
        """
        shape = (len(rows), 5)
        starts, sizes = np.empty(shape, dtype=np.int64), np.empty(shape, dtype=np.int64)
        starts[:, ::2], sizes[:, ::2] = texts.starts[:3], texts.counts[:3]
        starts[:, 1::2], sizes[:, 1::2] = texts.starts[3:][rows], counts
        if side == "left":
            starts[:, 1::2] += texts.counts[3:][rows] - counts
        inputs = {"input_ids": texts.ids[slice_indices(starts.ravel(), sizes.ravel())]}
        if self.has_types:
            inputs["token_type_ids"] = np.repeat(np.tile(self.types, len(rows)), sizes.ravel())
        return EncodedPairs(sizes.sum(axis=1), inputs)


def pair_layout(tokenizer: PreTrainedTokenizerBase) -> PairLayout:
    """Return how a fast tokenizer makes a pair, found by having it make one.

    Raises:
        TrainingError: It does not put the query first and the passage after it, each once and whole.
    """
    after = tokenizer.backend_tokenizer.post_processor
    return _pair_layout(tokenizer, after and after.__getstate__(), "token_type_ids" in tokenizer.model_input_names)


@lru_cache(maxsize=16)
def _pair_layout(tokenizer: PreTrainedTokenizerBase, after: bytes | None, has_types: bool) -> PairLayout:
    """``after``, what the tokenizer does with a pair, makes the cache notice when that was changed."""
    backend = plain_backend(tokenizer)
    word = "a"
    if not backend.encode(word, add_special_tokens=False).ids:  # other words, and no token for unknown ones
        word = next(text for text in backend.get_vocab() if backend.encode(text, add_special_tokens=False).ids)
    pair = backend.encode(word, word)
    of = np.array([-1 if text is None else text for text in pair.sequence_ids])
    query, passage = np.flatnonzero(of == 0), np.flatnonzero(of == 1)
    size = len(backend.encode(word, add_special_tokens=False).ids)
    if not (len(query) == len(passage) == size == np.ptp(query) + 1 == np.ptp(passage) + 1 and query[0] < passage[0]):
        raise TrainingError(
            "the tokenizer does not make a pair of a query and then a passage, each once and whole: "
            f"two words give {pair.tokens}"
        )
    cuts = [query[0], query[-1] + 1, passage[0], passage[-1] + 1]
    parts, kinds = np.split(np.array(pair.ids), cuts), np.split(np.array(pair.type_ids), cuts)
    return PairLayout(
        TokenLists.of([part.tolist() for part in parts[::2]]),
        np.array([kind[0] if len(kind) else 0 for kind in kinds]),
        has_types,
    )


def tokenize_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> TokenLists:
    """Tokenize texts, without special tokens around them; those in them are text, see :func:`as_text`."""
    texts = as_text(tokenizer, texts)
    backend = plain_backend(tokenizer)
    parts = (texts[start : start + _TEXTS] for start in range(0, len(texts), _TEXTS))
    encodings = (backend.encode_batch_fast(part, add_special_tokens=False) for part in parts)
    return TokenLists.concatenated([TokenLists.of([encoding.ids for encoding in part]) for part in encodings])


def join_pairs(
    tokenizer: PreTrainedTokenizerBase,
    parts: Sequence[TokenLists],
    sizes: Sequence[int],
    max_length: int,
    max_query_length: int,
) -> tuple[EncodedPairs, np.ndarray]:
    """Join each group's query with each of its passages, all given as token ids.

    Args:
        tokenizer: Whose special tokens go around them.
        parts: First the queries, then all passages, each of the parts with its texts end to end.
        sizes: Passages of each group.
        max_length: Tokens of a pair at most. The query and every separator stay; the passage is cut.
        max_query_length: Tokens of a query at most.

    Returns:
        The pairs, and which of them were cut, bool, shape ``(pairs,)``.
    """
    layout = pair_layout(tokenizer)
    texts = layout.with_separators(parts)
    group = np.repeat(np.arange(len(sizes)), sizes)
    rows = np.stack([group, len(sizes) + np.arange(len(group))], axis=1)
    whole = texts.counts[3:][rows]
    kept = np.minimum(whole, max_query_length)
    kept[:, 1] = np.minimum(whole[:, 1], max_length - layout.overhead - kept[:, 0])
    return layout.join(texts, rows, kept), (kept < whole).any(axis=1)


def encode_groups(
    tokenizer: PreTrainedTokenizerBase,
    queries: Sequence[str],
    passages: Sequence[Sequence[str]],
    max_length: int,
    max_query_length: int,
) -> tuple[EncodedPairs, np.ndarray]:
    """Encode each query with each of its passages; every query is tokenized once.

    Args:
        tokenizer: A fast tokenizer.
        queries: One a group.
        passages: One list a group.
        max_length: Tokens of a pair at most. The query, and every separator or the template, stay;
            the passage is cut.
        max_query_length: Tokens of a query at most.

    Returns:
        The pairs, and which of them were cut, bool, shape ``(pairs,)``.
    """
    if template := pair_template(tokenizer):
        pairs = [(query, text) for query, texts in zip(queries, passages, strict=True) for text in texts]
        return encode_by_template(tokenizer, template, pairs, max_length, max_query_length)
    texts = [text for texts in passages for text in texts]
    found = tokenize_texts(tokenizer, [*queries, *texts])
    return join_pairs(tokenizer, [found], list(map(len, passages)), max_length, max_query_length)


def encode_by_template(
    tokenizer: PreTrainedTokenizerBase,
    template: PairTemplate,
    pairs: Sequence[tuple[str, str]],
    max_length: int,
    max_query_length: int | None = None,
) -> tuple[EncodedPairs, np.ndarray]:
    """Encode pairs that go through a template.

    Args:
        tokenizer: A fast tokenizer.
        template: The tokenizer's.
        pairs: Query and passage of each.
        max_length: Tokens of a pair at most, the template's among them. The passage is cut.
        max_query_length: Tokens of a query at most. If None a query is cut only where the pair is too
            long and the query is the longer half of it, as ``truncation="longest_first"`` does.

    Returns:
        The pairs, and which of them were cut, bool, shape ``(pairs,)``.

    Raises:
        TrainingError: The template alone takes ``max_length`` tokens.
    """
    if max_length <= template.overhead:
        raise TrainingError(
            f"max_length is {max_length}, but the template of pairs takes {template.overhead} tokens: raise it"
        )
    backend = plain_backend(tokenizer)
    texts = {text: "" for pair in pairs for text in pair}
    texts = dict(zip(texts, as_text(tokenizer, list(texts)), strict=True))
    pairs = [(texts[query], texts[passage]) for query, passage in pairs]
    places = {query: place for place, query in enumerate(dict.fromkeys(query for query, _ in pairs))}
    queries = backend.encode_batch(list(places), add_special_tokens=False)

    def encode(rows: Sequence[int], limits: Sequence[int]) -> list[Any]:
        rendered = []
        for row, limit in zip(rows, limits, strict=True):
            query, passage = pairs[row]
            tokens = queries[places[query]]
            rendered.append(
                template.render(query[: tokens.offsets[limit - 1][1]] if len(tokens) > limit else query, passage)
            )
        return list(backend.encode_batch(rendered, add_special_tokens=False))

    sizes = [len(queries[places[query]]) for query, _ in pairs]
    limit = max_length if max_query_length is None else max_query_length
    encodings = encode(range(len(pairs)), [limit] * len(pairs))
    was_cut = [size > limit or len(encoding) > max_length for size, encoding in zip(sizes, encodings, strict=True)]
    if max_query_length is None:
        room = max_length - template.overhead
        rows = [i for i, encoding in enumerate(encodings) if len(encoding) > max_length and sizes[i] > room // 2]
        # What the passage leaves over is the query's.
        around = template.overhead - JOINTS
        limits = [max(room // 2, room - (len(encodings[i]) - around - min(sizes[i], limit))) for i in rows]
        for row, encoding in zip(rows, encode(rows, limits), strict=True):
            encodings[row] = encoding
    tail = list(template.tail_ids)
    ids = [encoding.ids for encoding in encodings]
    ids = [row if len(row) < max_length else row[: max_length - len(tail)] + tail for row in ids]
    encoded = EncodedPairs.of({"input_ids": ids})
    if "token_type_ids" in tokenizer.model_input_names:
        encoded.inputs["token_type_ids"] = np.zeros_like(encoded.inputs["input_ids"])
    return encoded, np.array(was_cut, dtype=bool)


def pad_pairs(
    tokenizer: PreTrainedTokenizerBase, encoded: EncodedPairs, multiple: int | None = None
) -> dict[str, Tensor]:
    """Pad pairs on the right to the longest.

    Returns:
        Their inputs, each of shape ``(pairs, length)``, int64, and ``attention_mask``.
    """
    width = -(-int(encoded.lengths.max()) // (multiple or 1)) * (multiple or 1)
    real = np.arange(width) < encoded.lengths[:, None]
    fill = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id}
    padded = {"attention_mask": torch.from_numpy(real.astype(np.int64))}
    for name in encoded.inputs.keys() - {"attention_mask"}:
        table = np.full(real.shape, fill.get(name, 0), dtype=np.int64)
        table[real] = encoded.inputs[name]
        padded[name] = torch.from_numpy(table)
    return padded


def length_buckets(lengths: np.ndarray, overhead: int) -> list[np.ndarray]:
    """Cut pairs, sorted by length, into forward passes at the least cost.

    A pass costs its padded tokens, and ``overhead`` tokens for being one pass more. The optimum
    is found by dynamic programming over the distinct lengths.

    Args:
        lengths: Tokens of each pair.
        overhead: Tokens that one more forward pass is worth.

    Returns:
        Indices of the pairs of each pass, shortest pass first.
    """
    distinct, counts = np.unique(lengths, return_counts=True)
    upto = np.concatenate([[0], np.cumsum(counts)])
    cost = np.zeros(len(distinct) + 1)
    cut = np.zeros(len(distinct) + 1, dtype=int)
    for end in range(1, len(distinct) + 1):
        costs = cost[:end] + (upto[end] - upto[:end]) * distinct[end - 1] + overhead
        cut[end] = int(costs.argmin())
        cost[end] = costs[cut[end]]
    order = np.argsort(lengths, kind="stable")
    buckets = []
    end = len(distinct)
    while end:
        buckets.append(order[upto[cut[end]] : upto[end]])
        end = cut[end]
    return buckets[::-1]
