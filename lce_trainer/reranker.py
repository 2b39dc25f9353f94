"""A trained reranker: load it, score pairs, rank passages."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lce_trainer.collator import pad_pairs
from lce_trainer.errors import TrainingError
from lce_trainer.packaged import resolve_model
from lce_trainer.pair_template import encode_by_template, has_trained_head, is_decoder, pair_template, settle_template

WINDOW = 16384  # pairs tokenized at once: bounds the memory that token ids take
# sentence-transformers squashes the score of a one-label model unless its config says otherwise.
RAW_SCORES = {"activation_fn": "torch.nn.modules.linear.Identity"}
_POSITIONS_AFTER_PADDING = {"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "longformer", "xmod"}


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
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, max_length: int | None = None
    ) -> None:
        """Wrap a loaded model; see :meth:`from_pretrained`."""
        self.model = model.eval()
        self.tokenizer = tokenizer
        settle_template(tokenizer, model.config)
        match_padding(model, tokenizer)
        limit = longest_input(model)
        self.max_length = max_length or min(tokenizer.model_max_length, limit)
        if self.max_length > limit:
            raise TrainingError(f"max_length={self.max_length}, but the model reads {limit} tokens at most")

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        max_length: int | None = None,
    ) -> "Reranker":
        """Load a reranker.

        Args:
            name: Hub id, folder, or ``package:NAME/FOLDER``.
            device: An accelerator if there is one, else the CPU.
            dtype: Of the weights; as saved if None.
            max_length: Tokens of a pair at most; what the checkpoint was trained with if None.

        Raises:
            TrainingError: There is no such model, or it does not have exactly one label.
            ConfigError: The package of a ``package:`` name is missing.
        """
        model = load_model(name, dtype=dtype or "auto")
        if device is None:
            device = torch.accelerator.current_accelerator() or "cpu"
        return cls(model.to(device), load_tokenizer(name), max_length=max_length)

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
                scores[rows] = self.model(**inputs).logits[:, 0].float().cpu().numpy()
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


def load_model(
    name: str | Path, *, dropout: float | None = None, dtype: torch.dtype | str = torch.float32
) -> PreTrainedModel:
    """A sequence classifier with one label; the head is new (from torch's RNG) if the base has none.

    Args:
        name: Hub id, folder, or ``package:NAME/FOLDER``.
        dropout: Set every dropout of the model to this; as configured if None.
        dtype: Of the weights. Training wants float32, whatever the checkpoint holds.

    Raises:
        TrainingError: There is no such model, or its head has more than one label.
        ConfigError: The package of a ``package:`` name is missing.
    """
    config = load_config(name)
    if has_trained_head(config) and config.num_labels != 1:
        raise TrainingError(f"{name} classifies into {config.num_labels} labels; a reranker has one")
    config.num_labels = 1
    if dropout is not None:
        for key, value in config.to_dict().items():
            if "dropout" in key and isinstance(value, (int, float)) and not isinstance(value, bool):
                setattr(config, key, dropout)
    try:
        return AutoModelForSequenceClassification.from_pretrained(resolve_model(str(name)), config=config, dtype=dtype)
    except (OSError, ValueError) as error:
        raise TrainingError(f"no model at {str(name)!r}: {' '.join(str(error).split())}") from None


def load_config(name: str | Path) -> PreTrainedConfig:
    """The config of a model.

    Raises:
        TrainingError: There is no such model.
        ConfigError: The package of a ``package:`` name is missing.
    """
    try:
        return AutoConfig.from_pretrained(resolve_model(str(name)))
    except (OSError, ValueError) as error:
        raise TrainingError(f"no model at {str(name)!r}: {' '.join(str(error).split())}") from None


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """The fast tokenizer of a model; a missing pad token is the end-of-sequence token.

    Raises:
        TrainingError: There is no tokenizer of that name.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve_model(str(name)))
    except (OSError, ValueError) as error:
        raise TrainingError(f"no tokenizer at {str(name)!r}: {' '.join(str(error).split())}") from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def match_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Tell the model which token pads: a decoder's head reads the last one that does not."""
    config = model.config.get_text_config()
    if config.pad_token_id is None or is_decoder(model.config):
        config.pad_token_id = model.config.pad_token_id = tokenizer.pad_token_id


def longest_input(model: PreTrainedModel) -> int:
    """Tokens the model has positions for."""
    config: Any = model.config
    positions = int(getattr(config, "max_position_embeddings", None) or 1 << 30)
    # These families count positions from the one after the pad token's id.
    return positions - (config.pad_token_id + 1 if config.model_type in _POSITIONS_AFTER_PADDING else 0)


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
