"""Token ids of queries and passages: put together into pairs, and kept on disk so that each text is tokenized once."""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import numpy as np
import pyarrow.compute as pc
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from lce_trainer.pair_template import pair_template
from lce_trainer.training_args import LCETrainingArguments

logger = logging.getLogger(__name__)

# Groups tokenized at once: what a tokenizer makes of whole long texts is many times their size.
_BATCH = 64

# Ids of each pair, for each of the tokenizer's inputs.
Encoded: TypeAlias = Mapping[str, Sequence[Sequence[int] | np.ndarray]]

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
        ids: Before the query, between the two, and after the passage.
        types: Token types of five parts: the query's and passage's tokens have places 1 and 3.
    """

    ids: tuple[np.ndarray, np.ndarray, np.ndarray]
    types: np.ndarray

    def join(self, query: np.ndarray, passage: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids and token types of a pair, each of shape ``(tokens,)``."""
        before, between, after = self.ids
        parts = (before, query, between, passage, after)
        return np.concatenate(parts), np.repeat(self.types, [len(part) for part in parts])


def pair_layout(tokenizer: PreTrainedTokenizerBase) -> PairLayout:
    """How a fast tokenizer makes a pair, found by having it make one."""
    backend = plain_backend(tokenizer)
    word = "a"
    if not backend.encode(word, add_special_tokens=False).ids:  # other words, and no token for unknown ones
        word = next(text for text in backend.get_vocab() if backend.encode(text, add_special_tokens=False).ids)
    pair = backend.encode(word, word)
    of = np.array([-1 if text is None else text for text in pair.sequence_ids])
    query, passage = np.flatnonzero(of == 0), np.flatnonzero(of == 1)
    cuts = [query[0], query[-1] + 1, passage[0], passage[-1] + 1]
    parts, kinds = np.split(np.array(pair.ids), cuts), np.split(np.array(pair.type_ids), cuts)
    return PairLayout((parts[0], parts[2], parts[4]), np.array([kind[0] if len(kind) else 0 for kind in kinds]))


def plain_backend(tokenizer: PreTrainedTokenizerBase) -> Any:
    """The tokenizer's own engine, which cuts and pads nothing."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return backend


def join_pairs(
    tokenizer: PreTrainedTokenizerBase,
    queries: Sequence[Any],
    passages: Sequence[Sequence[Any]],
    max_length: int,
    max_query_length: int,
) -> tuple[Encoded, int]:
    """Pairs of each query with each of its passages, all given as token ids.

    Args:
        tokenizer: Whose special tokens go around them.
        queries: One list of ids a group.
        passages: Lists of ids, one list of them a group.
        max_length: Tokens of a pair at most. The query and every separator stay; the passage is cut.
        max_query_length: Tokens of a query at most.

    Returns:
        Ids of each pair for each of the tokenizer's inputs, and how many pairs were cut.
    """
    layout = pair_layout(tokenizer)
    room = max_length - sum(map(len, layout.ids))
    pairs, cut = [], 0
    for query, texts in zip(queries, passages, strict=True):
        head = np.asarray(query[:max_query_length], dtype=np.int64)
        left = room - len(head)
        cut += sum(len(query) > max_query_length or len(text) > left for text in texts)
        pairs += [layout.join(head, np.asarray(text[:left], dtype=np.int64)) for text in texts]
    encoded = {"input_ids": [ids for ids, _ in pairs], "token_type_ids": [types for _, types in pairs]}
    return {name: ids for name, ids in encoded.items() if name in tokenizer.model_input_names}, cut


class TokenIds:
    """Token ids of groups, memory-mapped."""

    def __init__(self, ids: datasets.Dataset) -> None:
        self.ids = ids.with_format("arrow")

    def take(self, rows: Sequence[int]) -> list[tuple[np.ndarray, list[np.ndarray]]]:
        """Of each of these groups, its query's ids, and those of its passages."""
        table = self.ids[list(rows)]
        queries, passages = (table[name].combine_chunks() for name in ("query", "passages"))
        texts = passages.flatten()
        heads = np.split(queries.flatten().to_numpy(), _inner_ends(queries))
        bodies = np.split(texts.flatten().to_numpy(), _inner_ends(texts))
        ends = np.cumsum(passages.value_lengths().to_numpy())
        return [
            (head, bodies[end - n : end]) for head, end, n in zip(heads, ends, np.diff(ends, prepend=0), strict=True)
        ]


def _inner_ends(lists: Any) -> np.ndarray:
    """Where each list but the last one ends."""
    ends: np.ndarray = np.cumsum(lists.value_lengths().to_numpy())[:-1]
    return ends


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
