"""Cross-encoders without padding: all pairs of a batch in one row, and a last layer that computes only what is read.

A packed row holds the pairs one after the other. Linear layers and norms see no padding at all, and
attention runs within each pair; see :mod:`lce_trainer.model.packed.attention`. The classification head of an
encoder reads one token a pair, so its last layer needs keys and values of all tokens, but queries,
output projection and feed-forward of that token alone. Both are exact, forward and backward.

The model stays the stock one: an attention function is registered with ``transformers``, and the
last layer's ``forward`` is replaced on the instance, or every layer's where the family computes attention in its
own way. Called without a packing, it does what it
always did.
"""

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.masking_utils import sdpa_mask
from transformers.modeling_outputs import SequenceClassifierOutput

from lce_trainer.compat import attention_implementation
from lce_trainer.model.families import Patch, family_of, first_position
from lce_trainer.model.loading import longest_input
from lce_trainer.model.packed.attention import Packing, make_packing, packed_attention, places_in_pairs
from lce_trainer.model.packed.cpu import Replacement, speed_up
from lce_trainer.model.pairs import EncodedPairs, length_buckets, pad_pairs, slice_indices
from lce_trainer.model.yes_no import answer_scores, answers_of, pair_logits

logger = logging.getLogger(__name__)

PACKED_ATTENTION = "lce_packed"


def enable_packing(model: PreTrainedModel) -> bool:
    """Make a model take packed rows besides what it always took.

    Args:
        model: A reranker, not yet wrapped for training.

    Returns:
        Whether it can, checked by a comparison of packed and padded scores; the reason why not is
        logged once.
    """
    model = _without_adapters(model)
    kind, patches = model.config.model_type, _patches(model)
    if not patches:
        logger.info("%s cannot be packed: padding", type(model).__name__)
        return False
    if getattr(model.config, "is_decoder", False) and not family_of(model.config).is_decoder:
        logger.info("a %s model with is_decoder cannot be packed: padding", kind)
        return False
    if not family_of(model.config).has_own_attention:
        AttentionInterface.register(PACKED_ATTENTION, packed_attention)
        AttentionMaskInterface.register(PACKED_ATTENTION, sdpa_mask)
        model.attention_when_padded = attention_implementation(model.config)
        model.set_attn_implementation(PACKED_ATTENTION)
    speed_up(model)
    for module, packed in patches:
        module.forward = _Packed(module, packed)
    problem = _self_test(model)
    if problem:
        disable_packing(model)
        logger.warning("this %s model cannot be packed, %s: padding", kind, problem)
    return not problem


def _patches(model: PreTrainedModel) -> list[Patch]:
    """Return the modules whose forward is replaced for packed rows; none if the model cannot be packed."""
    family = family_of(model.config)
    if family.patches is None:
        return []
    if family.is_decoder and answers_of(model):
        return [*family.patches(model), (model, _packed_answer)]
    return list(family.patches(model)) if _classifies(model) else []


def _packed_answer(model: Any, *args: Any, packing: Packing, **kwargs: Any) -> SequenceClassifierOutput:
    """Score the pairs of a packed row by a language model's answer, yes or no."""
    hidden = model.base_model(*args, packing=packing, **kwargs).last_hidden_state
    return SequenceClassifierOutput(logits=answer_scores(model, hidden[:, 0])[:, None])


def packs(model: PreTrainedModel) -> bool:
    """Return whether :func:`enable_packing` has made this model take packed rows."""
    model = _without_adapters(model)
    own = family_of(model.config).has_own_attention
    by_config = own or attention_implementation(model.config) == PACKED_ATTENTION
    # A config can be shared with a model that was never enabled.
    return by_config and any(isinstance(module.__dict__.get("forward"), _Packed) for module in model.modules())


def disable_packing(model: PreTrainedModel) -> None:
    """Undo :func:`enable_packing`, if it was done."""
    model = _without_adapters(model)
    if not packs(model):
        return
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), Replacement):
            del module.forward
    if not family_of(model.config).has_own_attention:
        model.set_attn_implementation(model.attention_when_padded)


class _Packed(Replacement):
    """Replaces a module's forward for packed rows; without a packing it calls that of its class."""

    def __init__(self, module: nn.Module, packed: Callable[..., Any]) -> None:
        super().__init__(module)
        self.packed = packed

    def __call__(self, *args: Any, packing: Packing | None = None, **kwargs: Any) -> Any:
        if packing is None:
            return type(self.module).forward(self.module, *args, **kwargs)
        return self.packed(self.module, *args, packing=packing, **kwargs)


def _without_adapters(model: PreTrainedModel) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _classifies(model: PreTrainedModel) -> bool:
    return type(model).__name__.endswith("ForSequenceClassification")


def batch_scores(
    model: nn.Module,
    pairs: EncodedPairs,
    unwrapped: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
) -> Tensor:
    """Compute the logit of each pair in one forward pass, packed if the model can.

    Args:
        model: The reranker; it may be wrapped for training.
        pairs: What it scores.
        unwrapped: The reranker itself.
        tokenizer: The tokenizer, which says how pairs are padded.
        device: The device the model is on.

    Returns:
        Logits, shape ``(pairs,)``.
    """
    if packs(unwrapped):
        return packed_scores(model, pairs, unwrapped.config, device)
    return pair_logits(model, send_to_device(pad_pairs(tokenizer, pairs), device), unwrapped)


def packed_scores(model: nn.Module, pairs: EncodedPairs, config: PreTrainedConfig, device: torch.device) -> Tensor:
    """Compute the logit of each pair by one packed forward pass.

    Args:
        model: A model after :func:`enable_packing`; it may be wrapped for training since.
        pairs: What it scores.
        config: The model's.
        device: The device the model is on.

    Returns:
        Logits, shape ``(pairs,)``.
    """
    filler = _filler(int(pairs.lengths.sum()), int(pairs.lengths.max()))
    packed, order = pack_pairs(pairs, config, device, filler)
    back = torch.as_tensor(np.argsort(order)[: len(pairs)]).to(device, non_blocking=True)
    logits: Tensor = model(**packed).logits[:, 0]
    return logits[back]


def padded_scores(
    model: nn.Module,
    pairs: EncodedPairs,
    unwrapped: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    overhead: int,
    multiple: int | None = None,
) -> tuple[Tensor, int]:
    """Compute the logit of each pair by padded forward passes over pairs alike in length.

    Args:
        model: Any reranker; it may be wrapped for training.
        pairs: What it scores.
        unwrapped: The reranker itself.
        tokenizer: The tokenizer, which says how pairs are padded.
        device: The device the model is on.
        overhead: Tokens of padding that are worth one more pass.
        multiple: Round padded lengths up to a multiple of this.

    Returns:
        Logits, shape ``(pairs,)``; and the tokens of the passes, padding included.
    """
    buckets = length_buckets(pairs.lengths, overhead)
    logits, tokens = [], 0
    for rows in buckets:
        inputs = pad_pairs(tokenizer, pairs.take(rows), multiple)
        logits.append(pair_logits(model, send_to_device(inputs, device), unwrapped))
        tokens += inputs["input_ids"].numel()
    back = torch.as_tensor(np.argsort(np.concatenate(buckets)), device=device)
    return torch.cat(logits)[back], tokens


def pack_pairs(
    pairs: EncodedPairs, config: PreTrainedConfig, device: torch.device, filler: int = 0
) -> tuple[dict[str, Any], np.ndarray]:
    """Put pairs into one packed row, the shortest first.

    The row is made on the host, so that it waits for no device.

    Args:
        pairs: What the row holds.
        config: The model's.
        device: The device the row goes to.
        filler: Tokens of one more pair, which repeats tokens of the others; 0 for none.

    Returns:
        The model's inputs, each of shape ``(1, tokens)``, with the ``packing``; and the order of
        the pairs in them: its logits are those of the pairs ``order``, the filler counted as the last.
    """
    sizes, starts = pairs.lengths, pairs.lengths.cumsum() - pairs.lengths
    if filler:
        sizes, starts = np.append(sizes, filler), np.append(starts, 0)
    order = np.argsort(sizes, kind="stable")
    family = family_of(config)
    packing = make_packing(sizes[order], device, reads_last=family.is_decoder)
    tokens = slice_indices(starts[order], sizes[order])
    rows = {name: values[tokens].astype(np.int64) for name, values in pairs.inputs.items() if name != "attention_mask"}
    rows["position_ids"] = places_in_pairs(sizes[order]) + first_position(config)
    inputs: dict[str, Any] = {
        name: torch.from_numpy(row)[None].to(device, non_blocking=True) for name, row in rows.items()
    }
    # A mask of four dimensions is taken for a finished one, so none of tokens x tokens is made.
    inputs["attention_mask"] = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=device)
    if family.is_decoder:
        inputs["use_cache"] = False
    return {**inputs, "packing": packing}, order


def _filler(tokens: int, longest: int) -> int:
    """Return the tokens of one more pair, whose logit nobody reads, so that row lengths repeat; 0 if none is needed.

    On a CPU oneDNN's and PyTorch's caches keep what they compiled for each of the last 1024 shapes, and glibc's heap
    is torn by buffers of ever new sizes, so memory grows with every new row length: 1.8 GB instead of 1.2 GB after
    150 steps. On a GPU the product of a new shape waits until a kernel is chosen for it. Rows of 1024 tokens and more
    get 32 lengths an octave, 1.6 % of tokens on average.
    """
    return 0 if tokens < 1024 else -tokens % (1 << min(tokens.bit_length() - 6, longest.bit_length() - 1))


@torch.no_grad()
def _self_test(model: PreTrainedModel) -> str | None:
    """Return what is wrong with the packed scores of random pairs; None if nothing is."""
    config = model.config
    longest = min(140, longest_input(model) or 140)  # more tokens than a window has
    lengths = np.array([3, 9, 9, longest])
    real = np.arange(longest) < lengths[:, None]
    pad = config.pad_token_id or 0
    words = np.random.default_rng(0).choice(np.delete(np.arange(config.vocab_size), pad), real.shape)
    inputs = {
        "input_ids": torch.as_tensor(np.where(real, words, pad)),
        "attention_mask": torch.as_tensor(real.astype(np.int64)),
    }
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        padded = pair_logits(model, send_to_device(inputs, model.device), model)
        packed = packed_scores(model, EncodedPairs(lengths, {"input_ids": words[real]}), config, model.device)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        return f"the packed forward failed ({' '.join(str(error).split())})"
    finally:
        for module in training:
            module.training = True
    difference, size = float((packed - padded).abs().max()), float(padded.abs().max())
    allowed = 1e-5 + 1e-3 * size if model.dtype.itemsize >= 4 else 0.02 + 0.05 * size
    return None if difference <= allowed else f"its scores would differ by {difference:.1e}"
