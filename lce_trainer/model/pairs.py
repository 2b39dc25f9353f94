"""Queries and passages into pairs of token ids, and pairs into tensors: the input side of training and scoring."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lce_trainer.errors import TrainingError
from lce_trainer.model.ragged import Encoded, Texts, ragged
from lce_trainer.model.template import encode_by_template, pair_template, plain_backend

_TEXTS = 1024  # tokenized at once: what a tokenizer makes of whole long texts is many times their size


@dataclass(frozen=True)
class PairLayout:
    """Which special tokens a tokenizer puts around a query and a passage.

    Attributes:
        separators: Three texts: before the query, between the two, and after the passage.
        types: Token types of five parts: the query's and passage's tokens have places 1 and 3.
        has_types: Whether the model reads token types.
    """

    separators: Texts
    types: np.ndarray
    has_types: bool

    @property
    def overhead(self) -> int:
        """Tokens of a pair besides its query and passage."""
        return len(self.separators.ids)

    def with_separators(self, parts: Sequence[Texts]) -> Texts:
        """All texts in one array, after the separators, which are its first three."""
        return Texts.concatenated([self.separators, *parts])

    def join(self, texts: Texts, rows: np.ndarray, counts: np.ndarray, side: str = "right") -> Encoded:
        """Pairs of texts, all at once.

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
        inputs = {"input_ids": texts.ids[ragged(starts.ravel(), sizes.ravel())]}
        if self.has_types:
            inputs["token_type_ids"] = np.repeat(np.tile(self.types, len(rows)), sizes.ravel())
        return Encoded(sizes.sum(axis=1), inputs)


def pair_layout(tokenizer: PreTrainedTokenizerBase) -> PairLayout:
    """How a fast tokenizer makes a pair, found by having it make one.

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
        Texts.of([part.tolist() for part in parts[::2]]),
        np.array([kind[0] if len(kind) else 0 for kind in kinds]),
        has_types,
    )


def tokenized(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Texts:
    """Token ids of texts, without special tokens."""
    backend = plain_backend(tokenizer)
    parts = (texts[start : start + _TEXTS] for start in range(0, len(texts), _TEXTS))
    encodings = (backend.encode_batch_fast(part, add_special_tokens=False) for part in parts)
    return Texts.concatenated([Texts.of([encoding.ids for encoding in part]) for part in encodings])


def join_pairs(
    tokenizer: PreTrainedTokenizerBase,
    parts: Sequence[Texts],
    sizes: Sequence[int],
    max_length: int,
    max_query_length: int,
) -> tuple[Encoded, int]:
    """Pairs of each group's query with each of its passages, all given as token ids.

    Args:
        tokenizer: Whose special tokens go around them.
        parts: First the queries, then all passages, each of the parts with its texts end to end.
        sizes: Passages of each group.
        max_length: Tokens of a pair at most. The query and every separator stay; the passage is cut.
        max_query_length: Tokens of a query at most.

    Returns:
        The pairs, and how many of them were cut.
    """
    layout = pair_layout(tokenizer)
    texts = layout.with_separators(parts)
    group = np.repeat(np.arange(len(sizes)), sizes)
    rows = np.stack([group, len(sizes) + np.arange(len(group))], axis=1)
    whole = texts.counts[3:][rows]
    kept = np.minimum(whole, max_query_length)
    kept[:, 1] = np.minimum(whole[:, 1], max_length - layout.overhead - kept[:, 0])
    return layout.join(texts, rows, kept), int((kept < whole).any(axis=1).sum())


def encode_groups(
    tokenizer: PreTrainedTokenizerBase,
    queries: Sequence[str],
    passages: Sequence[Sequence[str]],
    max_length: int,
    max_query_length: int,
) -> tuple[Encoded, int]:
    """Token ids of each query with each of its passages; every query is tokenized once.

    Args:
        tokenizer: A fast tokenizer.
        queries: One a group.
        passages: One list a group.
        max_length: Tokens of a pair at most. The query, and every separator or the template, stay;
            the passage is cut.
        max_query_length: Tokens of a query at most.

    Returns:
        The pairs, and how many of them were cut.
    """
    if template := pair_template(tokenizer):
        pairs = [(query, text) for query, texts in zip(queries, passages, strict=True) for text in texts]
        return encode_by_template(tokenizer, template, pairs, max_length, max_query_length)
    texts = [text for texts in passages for text in texts]
    found = tokenized(tokenizer, [*queries, *texts])
    return join_pairs(tokenizer, [found], list(map(len, passages)), max_length, max_query_length)


def pad_pairs(tokenizer: PreTrainedTokenizerBase, encoded: Encoded, multiple: int | None = None) -> dict[str, Tensor]:
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
    """The cheapest cut of pairs, sorted by length, into forward passes.

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
