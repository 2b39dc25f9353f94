"""Token ids of queries and passages: put together into pairs, and kept on disk so that each text is tokenized once."""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from lce_trainer.errors import TrainingError
from lce_trainer.pair_template import pair_template
from lce_trainer.ragged import Encoded, Texts, ragged
from lce_trainer.training_args import LCETrainingArguments

logger = logging.getLogger(__name__)

# Groups, and texts, tokenized at once: what a tokenizer makes of whole long texts is many times their size.
_BATCH, _TEXTS = 64, 1024

_FEATURES = datasets.Features(
    {
        "query": datasets.List(datasets.Value("int32")),
        "passages": datasets.List(datasets.List(datasets.Value("int32"))),
    }
)


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


def plain_backend(tokenizer: PreTrainedTokenizerBase) -> Any:
    """The tokenizer's own engine, which cuts and pads nothing."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return backend


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


class TokenIds:
    """Token ids of groups, memory-mapped."""

    def __init__(self, ids: datasets.Dataset) -> None:
        self.ids = ids.with_format("arrow")

    def take(self, rows: Sequence[int]) -> list[tuple[Texts, Texts]]:
        """Query and passages of each of these groups, of which none is read before it is taken."""
        table = self.ids[list(rows)]
        return [
            (Texts.of_one(query.values.to_numpy()), _views(passages.values))
            for query, passages in zip(table["query"], table["passages"], strict=True)
        ]


def _views(lists: Any) -> Texts:
    """Lists of ids, left where they lie."""
    ends = lists.offsets.to_numpy()
    return Texts(lists.values.to_numpy(), ends[:-1], ends[1:] - ends[:-1])


def token_ids(
    groups: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, args: LCETrainingArguments
) -> TokenIds | None:
    """Token ids of all groups if ``args.pretokenize`` asks for them, in the cache of ``datasets``; else None.

    Made by one process of a machine, and reused by every run with the same texts and tokenizer, however its groups
    were made.
    """
    wanted = args.device.type != "cpu" if args.pretokenize is None else args.pretokenize
    if not wanted:
        return None
    if pair_template(tokenizer):
        if args.pretokenize:
            logger.warning("pretokenize: pairs that go through a template are tokenized as one text, each time")
        return None
    backend = plain_backend(tokenizer)

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        texts = dict.fromkeys([*batch["query"], *(text for texts in batch["passages"] for text in texts)])
        encodings = backend.encode_batch_fast(list(texts), add_special_tokens=False)
        # A pair holds fewer tokens of a text than this, so what is cut still shows.
        ids = {text: encoding.ids[: args.max_length] for text, encoding in zip(texts, encodings, strict=True)}
        return {
            "query": [ids[text] for text in batch["query"]],
            "passages": [[ids[text] for text in texts] for texts in batch["passages"]],
        }

    columns = groups.select_columns(["query", "passages"])
    # Not the dataset's own fingerprint: groups converted anew, by each rank or run, would have another one.
    of = json.dumps([Hasher.hash_bytes(_content(columns)), backend.to_str(), args.max_length])
    key = hashlib.sha256(of.encode()).hexdigest()[:32]
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "lce_trainer"
    folder.mkdir(parents=True, exist_ok=True)
    with args.main_process_first(desc="tokenizing"):
        return TokenIds(
            columns.map(
                encode,
                batched=True,
                batch_size=_BATCH,
                features=_FEATURES,
                cache_file_name=str(folder / f"token-ids-{key}.arrow"),
                new_fingerprint=key,
                desc="tokenizing",
            )
        )


def _content(columns: datasets.Dataset) -> Iterator[Any]:
    """Lengths and bytes of all queries and passages: the same for the same texts, wherever they lie in memory."""
    for batch in columns.with_format("arrow").iter(_BATCH):
        passages = batch["passages"].combine_chunks()
        yield passages.value_lengths().to_numpy()
        for texts in (batch["query"].combine_chunks(), passages.flatten()):
            lengths = pc.binary_length(texts).to_numpy()
            yield lengths
            if lengths.any():  # or there may be no buffers
                start = np.frombuffer(texts.buffers()[1], np.int32)[texts.offset]
                yield texts.buffers()[2][start : start + lengths.sum()]
