"""The embeddings of a bi-encoder."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import AutoModel, AutoTokenizer

from lce_trainer.compat import find_file
from lce_trainer.errors import ConfigError
from lce_trainer.hardware import best_device, multiplies_bfloat16
from lce_trainer.names import resolve_model

_TOKENIZED = 16_384  # texts tokenized at once: bounds the memory that token ids take


def embed(
    texts: Sequence[str],
    model: str,
    *,
    max_length: int = 256,
    batch_tokens: int = 8192,
    pooling: str | None = None,
    normalize: bool = True,
    progress: bool = True,
) -> np.ndarray:
    """Embed texts with a bi-encoder.

    Args:
        texts: What to embed.
        model: Hub id, folder, or ``package:NAME/FOLDER``.
        max_length: Tokens of a text at most.
        batch_tokens: Tokens, padding included, in one forward pass at most.
        pooling: ``mean`` or ``cls``; if None, what the model's ``1_Pooling`` says, else mean.
        normalize: Scale every embedding to length 1.
        progress: Show a bar.

    Returns:
        float32, shape ``(texts, dim)``. Where the hardware multiplies bfloat16 the model runs in it, which moves
        a cosine by some thousandths.

    Raises:
        ConfigError: There is no such model, or it pools in another way.
    """
    name = resolve_model(model)
    device = best_device()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        encoder = AutoModel.from_pretrained(name, dtype=torch.float32).to(device).eval()
        pooling = pooling or _pooling(name)
    except (OSError, ValueError) as error:
        raise ConfigError(f"no encoder {model!r}: {_one_line(error)}") from None
    if pooling not in ("mean", "cls"):
        raise ConfigError(f"{model} pools its tokens by {pooling!r}; expected mean or cls")
    positions = getattr(encoder.config, "max_position_embeddings", None) or max_length
    max_length = min(max_length, tokenizer.model_max_length, positions)
    embeddings = np.zeros((len(texts), encoder.config.hidden_size), dtype=np.float32)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=multiplies_bfloat16())
    with torch.inference_mode(), autocast, tqdm(total=len(texts), desc="embedding", disable=not progress) as bar:
        for start in range(0, len(texts), _TOKENIZED):
            window = list(texts[start : start + _TOKENIZED])
            ids = tokenizer(window, truncation=True, max_length=max_length)["input_ids"]
            for rows in _batches([len(one) for one in ids], batch_tokens):
                lengths = torch.tensor([len(ids[row]) for row in rows])
                padded = torch.full((len(rows), int(lengths.max())), tokenizer.pad_token_id or 0)
                mask = torch.arange(padded.shape[1]) < lengths[:, None]  # (batch, width)
                padded[mask] = torch.tensor([token for row in rows for token in ids[row]])
                mask = mask.to(device)
                states = encoder(input_ids=padded.to(device), attention_mask=mask.long()).last_hidden_state.float()
                pooled = states[:, 0] if pooling == "cls" else (states * mask[..., None]).sum(1) / mask.sum(1)[:, None]
                if normalize:
                    pooled = torch.nn.functional.normalize(pooled, dim=-1)
                embeddings[start + rows] = pooled.cpu().numpy()
                bar.update(len(rows))
    return embeddings


def _batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[np.ndarray]:
    """Rows of each batch, longest first, so that what does not fit into memory fails at once."""
    order = np.argsort(-np.asarray(lengths), kind="stable")
    start = 0
    while start < len(order):
        size = max(1, batch_tokens // max(1, lengths[order[start]]))
        yield order[start : start + size]
        start += size


def _pooling(name: str) -> str:
    """How sentence-transformers pools this model; mean where it does not say."""
    file = find_file(name, "1_Pooling/config.json")
    if file is None:
        return "mean"
    config: dict[str, Any] = json.loads(Path(file).read_text(encoding="utf-8"))
    modes = [key.removeprefix("pooling_mode_") for key, value in config.items() if value is True]
    mode = str(config.get("pooling_mode") or "+".join(mode for mode in modes if mode != "include_prompt"))
    return {"mean_tokens": "mean", "cls_token": "cls"}.get(mode, mode)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
