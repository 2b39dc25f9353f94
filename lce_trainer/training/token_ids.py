"""Token ids of queries and passages, kept on disk so that each text is tokenized once."""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from lce_trainer.model.pairs import TokenLists, tokenize_texts
from lce_trainer.model.template import keeps_special_tokens, pair_template, plain_backend
from lce_trainer.training.arguments import LCETrainingArguments

logger = logging.getLogger(__name__)

_BATCH = 64  # groups tokenized at once: what a tokenizer makes of whole long texts is many times their size

_FEATURES = datasets.Features(
    {
        "query": datasets.List(datasets.Value("int32")),
        "passages": datasets.List(datasets.List(datasets.Value("int32"))),
    }
)


class TokenIds:
    """Token ids of groups, memory-mapped."""

    def __init__(self, ids: datasets.Dataset) -> None:
        self.ids = ids.with_format("arrow")

    def take(self, rows: Sequence[int]) -> list[tuple[TokenLists, TokenLists]]:
        """Return query and passages of each of these groups; no other is read."""
        table = self.ids[list(rows)]
        return [
            (TokenLists.of_one(query.values.to_numpy()), _views(passages.values))
            for query, passages in zip(table["query"], table["passages"], strict=True)
        ]


def _views(lists: Any) -> TokenLists:
    """Lists of ids, left where they lie."""
    ends = lists.offsets.to_numpy()
    return TokenLists(lists.values.to_numpy(), ends[:-1], ends[1:] - ends[:-1])


def token_ids(
    groups: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, args: LCETrainingArguments
) -> TokenIds | None:
    """Return the token ids of all groups, from the cache of ``datasets``; None if ``args.pretokenize`` is off.

    Made by one process of a machine, and reused by every run with the same texts and tokenizer, however its groups
    were made.
    """
    wanted = args.device.type != "cpu" if args.pretokenize is None else args.pretokenize
    if not wanted:
        return None
    why = "pairs that go through a template are tokenized as one text, each time" if pair_template(tokenizer) else None
    if args.stuffed_negatives:
        why = "stuffed negatives are other texts in each epoch, and are tokenized each time"
    if why is not None:
        if args.pretokenize:
            logger.warning("pretokenize: %s", why)
        return None

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        texts = dict.fromkeys([*batch["query"], *(text for texts in batch["passages"] for text in texts)])
        found = tokenize_texts(tokenizer, list(texts))
        # A pair holds fewer tokens of a text than this, so a text that is cut is still known to be.
        parts = zip(texts, found.starts, np.minimum(found.counts, args.max_length), strict=True)
        ids = {text: found.ids[start : start + count] for text, start, count in parts}
        return {
            "query": [ids[text] for text in batch["query"]],
            "passages": [[ids[text] for text in texts] for texts in batch["passages"]],
        }

    columns = groups.select_columns(["query", "passages"])
    # Not the dataset's own fingerprint: groups converted anew, by each rank or run, would have another one.
    made_by = [plain_backend(tokenizer).to_str(), keeps_special_tokens(tokenizer), args.max_length]
    of = json.dumps([Hasher.hash_bytes(_content(columns)), *made_by])
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
