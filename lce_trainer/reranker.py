"""A trained reranker: load it, score pairs, rank passages."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lce_trainer.collator import pad_pairs
from lce_trainer.errors import TrainingError
from lce_trainer.loading import load_model, load_tokenizer, longest_input, settle
from lce_trainer.packing import batch_scores, disable_packing, enable_packing
from lce_trainer.pair_template import encode_by_template, pair_template
from lce_trainer.saving import save_reranker

WINDOW = 16384  # pairs tokenized at once: bounds the memory that token ids take


@dataclass(frozen=True)
class RankedPassage:
    """A passage in its place.

    Attributes:
        index: Among the passages that were ranked.
        score: Raw logit.
        passage: Its text.
    """

    index: int
    score: float
    passage: str


class Reranker:
    """A cross-encoder with one label, ready to score.

    The scores are raw logits, those of ``AutoModelForSequenceClassification`` and of
    ``sentence_transformers.CrossEncoder`` on the same checkpoint.

    Example::

        reranker = Reranker.from_pretrained("out")
        reranker.rank("what is a moon", ["A moon is ...", "Rivers flow ..."], top_k=1)
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int | None = None,
        packing: Literal["auto", "none"] = "auto",
    ) -> None:
        """Wrap a loaded model; see :meth:`from_pretrained`."""
        self.model = model.eval()
        self.tokenizer = tokenizer
        settle(model, tokenizer)
        limit = longest_input(model)
        self.max_length = max_length or min(tokenizer.model_max_length, limit)
        if self.max_length > limit:
            raise TrainingError(f"max_length={self.max_length}, but the model reads {limit} tokens at most")
        if packing == "auto":
            enable_packing(self.model)
        else:
            disable_packing(self.model)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        max_length: int | None = None,
        yes_no: bool | None = None,
        packing: Literal["auto", "none"] = "auto",
    ) -> "Reranker":
        """Load a reranker.

        Args:
            name: Hub id, folder, or ``package:NAME/FOLDER``.
            device: An accelerator if there is one, else the CPU.
            dtype: Of the weights; as saved if None.
            max_length: Tokens of a pair at most; what the checkpoint was trained with if None.
            yes_no: Score by a language model's answer, see :mod:`lce_trainer.yes_no`; if None, that
                of a checkpoint which says so.
            packing: With auto pairs are scored without padding where the model's family can be, and
                with none padded.

        Raises:
            TrainingError: There is no such model, or it is not a reranker with one label.
            ConfigError: The package of a ``package:`` name is missing.
        """
        model = load_model(name, dtype=dtype or "auto", yes_no=yes_no, trained=True)
        if device is None:
            device = torch.accelerator.current_accelerator() or "cpu"
        return cls(model.to(device), load_tokenizer(name), max_length=max_length, packing=packing)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a plain checkpoint; adapters that were loaded are part of it."""
        save_reranker(self.model, self.tokenizer, self.max_length, Path(folder))

    def score(
        self, pairs: Sequence[tuple[str, str]], *, batch_tokens: int = 8192, progress: bool = False
    ) -> np.ndarray:
        """Score queries with passages.

        Args:
            pairs: Query and passage of each.
            batch_tokens: Tokens, padding included, in one forward pass at most.
            progress: Show a bar.

        Returns:
            Raw logits, float32, shape ``(pairs,)``; higher is more relevant.
        """
        # Equal pairs are scored once: rows of one batch can differ in the last bit.
        places = {pair: place for place, pair in enumerate(dict.fromkeys((query, passage) for query, passage in pairs))}
        scores = np.zeros(len(places), dtype=np.float32)
        with torch.inference_mode(), tqdm(total=len(places), unit="pair", disable=not progress) as bar:
            for rows, batch in scoring_batches(self.tokenizer, list(places), self.max_length, batch_tokens):
                inputs = {name: tensor.to(self.model.device) for name, tensor in batch.items()}
                scores[rows] = batch_scores(self.model, inputs, self.model).float().cpu().numpy()
                bar.update(len(rows))
        return scores[[places[query, passage] for query, passage in pairs]]

    def rank(self, query: str, passages: Sequence[str], top_k: int | None = None) -> list[RankedPassage]:
        """Passages from the most relevant down; equal scores keep their order.

        Args:
            query: What was asked.
            passages: Candidates.
            top_k: Return so many; all if None.
        """
        scores = self.score([(query, passage) for passage in passages])
        order = np.argsort(-scores, kind="stable")[:top_k]
        return [RankedPassage(int(i), float(scores[i]), passages[i]) for i in order]


def scoring_batches(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]], max_length: int, batch_tokens: int
) -> Iterator[tuple[np.ndarray, dict[str, Tensor]]]:
    """Pairs alike in length, padded together, the longest of each window first.

    Pairs are cut as every other loader of the checkpoint cuts them, from the longer side first: a
    query is whole as long as it takes less than half of the room, and is encoded as in training.

    Args:
        tokenizer: Of the model.
        pairs: Query and passage of each.
        max_length: Tokens of a pair at most.
        batch_tokens: Tokens of a batch at most, padding included; a single pair may have more.

    Yields:
        Indices of the batch's pairs, and the model's inputs, shape ``(batch, length)``.
    """
    for start in range(0, len(pairs), WINDOW):
        window = pairs[start : start + WINDOW]
        encoded = _encode_pairs(tokenizer, window, max_length)
        lengths = np.array([len(ids) for ids in encoded["input_ids"]])
        order = np.argsort(-lengths, kind="stable")
        while len(order):
            rows, order = np.split(order, [max(1, batch_tokens // lengths[order[0]])])
            batch = pad_pairs(tokenizer, {name: [values[i] for i in rows] for name, values in encoded.items()})
            yield start + rows, batch


def _encode_pairs(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]], max_length: int
) -> Mapping[str, list[list[int]]]:
    """Token ids of each pair, for each of the tokenizer's inputs."""
    if template := pair_template(tokenizer):
        return encode_by_template(tokenizer, template, pairs, max_length)[0]
    encoded: Mapping[str, list[list[int]]] = tokenizer(
        [query for query, _ in pairs],
        [passage for _, passage in pairs],
        truncation="longest_first",
        max_length=max_length,
    )
    return encoded
