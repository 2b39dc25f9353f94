"""Cross-encoders without padding: all pairs of a batch in one row, and a last layer that computes only what is read.

A packed row holds the pairs one after the other. Linear layers and norms see no padding at all, and
attention runs within each pair; see :mod:`lce_trainer.attention`. The classification head of an
encoder reads one token a pair, so its last layer needs keys and values of all tokens, but queries,
output projection and feed-forward of that token alone. Both are exact, forward and backward.

The model stays the stock one: an attention function is registered with ``transformers``, and the
last layer's ``forward`` is replaced on the instance. Called without a packing, it does what it
always did.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import sdpa_mask
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.modernbert.modeling_modernbert import apply_rotary_pos_emb

from lce_trainer.attention import Packing, attend, make_packing, packed_attention
from lce_trainer.collator import length_buckets
from lce_trainer.loading import POSITIONS_AFTER_PADDING
from lce_trainer.yes_no import pair_logits

logger = logging.getLogger(__name__)

PACKED_ATTENTION = "lce_packed"


def enable_packing(model: PreTrainedModel, read_only: bool = True) -> bool:
    """Make a model take packed rows besides what it always took.

    Args:
        model: A sequence classifier, not yet wrapped for training.
        read_only: Compute of the last layer only what the head reads; False computes it whole.

    Returns:
        Whether it can, checked by a comparison of packed and padded scores; the reason why not is
        logged once.
    """
    if hasattr(model, "get_base_model"):  # with adapters
        model = model.get_base_model()
    kind = model.config.model_type
    if kind not in _LAYERS or not type(model).__name__.endswith("ForSequenceClassification"):
        logger.info("%s cannot be packed: padding", type(model).__name__)
        return False
    if getattr(model.config, "classifier_pooling", "cls") != "cls":
        logger.info("a head that averages over all tokens cannot be packed: padding")
        return False
    if getattr(model.config, "is_decoder", False) and kind not in _DECODERS:
        logger.info("a %s model with is_decoder cannot be packed: padding", kind)
        return False
    AttentionInterface.register(PACKED_ATTENTION, packed_attention)
    AttentionMaskInterface.register(PACKED_ATTENTION, sdpa_mask)
    before: str = model.config._attn_implementation
    layers = _layers(model)
    model.set_attn_implementation(PACKED_ATTENTION)
    layers[-1].forward = MethodType(_LAYERS[kind] if read_only else _read_whole_layer, layers[-1])
    if kind in _DECODERS:
        model.forward = MethodType(_decoder_forward, model)
    problem = _self_test(model)
    if problem:
        disable_packing(model)
        model.set_attn_implementation(before)
        logger.warning("this %s model cannot be packed, %s: padding", kind, problem)
    return not problem


def packs(model: PreTrainedModel) -> bool:
    """Whether :func:`enable_packing` has made this model take packed rows."""
    return bool(model.config._attn_implementation == PACKED_ATTENTION)


def disable_packing(model: PreTrainedModel) -> None:
    """Undo :func:`enable_packing`, if it was done."""
    if not packs(model):
        return
    for patched in (_layers(model)[-1], model):
        patched.__dict__.pop("forward", None)
    model.set_attn_implementation("sdpa")


def packed_scores(
    model: nn.Module, tensors: Mapping[str, Tensor], lengths: Sequence[int], config: PreTrainedConfig
) -> Tensor:
    """Logit of each pair of a padded batch, by one packed forward pass.

    Args:
        model: That :func:`enable_packing` has seen; it may be wrapped for training since.
        tensors: ``input_ids`` and whatever else the model takes of that shape, ``(pairs, width)``,
            padded on the right.
        lengths: Tokens of each pair.
        config: The model's.

    Returns:
        Shape ``(pairs,)``.
    """
    pairs = len(lengths)
    if filler := _filler(sum(lengths), tensors["input_ids"]):
        tensors = {name: torch.cat([tensor, tensor[:1]]) for name, tensor in tensors.items()}
        lengths = [*lengths, filler]
    packed, order = pack_pairs(tensors, lengths, config)
    logits: Tensor = model(**packed).logits[:, 0]
    return logits[torch.as_tensor(np.argsort(order)[:pairs], device=logits.device)]


def batch_scores(model: nn.Module, tensors: Mapping[str, Tensor], unwrapped: PreTrainedModel) -> Tensor:
    """Logit of each pair of a padded batch with its ``attention_mask``, packed if the model can; shape ``(pairs,)``."""
    if packs(unwrapped):
        return packed_scores(model, tensors, tensors["attention_mask"].sum(dim=1).tolist(), unwrapped.config)
    return pair_logits(model, tensors, unwrapped)


def padded_scores(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    lengths: Sequence[int],
    unwrapped: PreTrainedModel,
    overhead: int,
    multiple: int,
) -> tuple[Tensor, int]:
    """Logit of each pair, by padded forward passes over pairs alike in length.

    Args:
        model: Any reranker; it may be wrapped for training.
        tensors: Its inputs, shape ``(pairs, width)``, padded on the right.
        lengths: Tokens of each pair.
        unwrapped: The reranker itself.
        overhead: Tokens of padding that are worth one more pass.
        multiple: Round padded lengths up to a multiple of this.

    Returns:
        Shape ``(pairs,)``; and the tokens of the passes, padding included.
    """
    width, device = tensors["input_ids"].shape[1], tensors["input_ids"].device
    buckets = length_buckets(lengths, overhead)
    logits, padded = [], 0
    for rows in buckets:
        long = min(-(-max(lengths[i] for i in rows) // multiple) * multiple, width)
        chosen = torch.as_tensor(rows, device=device)
        logits.append(pair_logits(model, {name: tensor[chosen, :long] for name, tensor in tensors.items()}, unwrapped))
        padded += len(rows) * long
    back = torch.as_tensor(np.argsort(np.concatenate(buckets)), device=device)
    return torch.cat(logits)[back], padded


def pack_pairs(
    tensors: Mapping[str, Tensor], lengths: Sequence[int], config: PreTrainedConfig
) -> tuple[dict[str, Any], np.ndarray]:
    """A padded batch as one packed row.

    Args:
        tensors: ``input_ids`` and whatever else the model takes of that shape, ``(pairs, width)``,
            padded on the right.
        lengths: Tokens of each pair.
        config: Of the model.

    Returns:
        The model's inputs, each of shape ``(1, tokens)``, with the ``packing``; and the order of
        the pairs in them: its logits are those of ``lengths[order]``.
    """
    sizes = np.asarray(lengths)
    order = np.argsort(sizes, kind="stable")
    device, width = tensors["input_ids"].device, tensors["input_ids"].shape[1]
    packing = make_packing(sizes[order], device, reads_last=config.model_type in _DECODERS)
    position = np.concatenate([np.arange(size) for size in sizes[order]])
    flat = torch.as_tensor(position + np.repeat(order * width, sizes[order]), device=device)
    inputs: dict[str, Any] = {
        name: tensor.reshape(-1)[flat][None] for name, tensor in tensors.items() if name != "attention_mask"
    }
    first = config.pad_token_id + 1 if config.model_type in POSITIONS_AFTER_PADDING else 0
    inputs["position_ids"] = torch.as_tensor(position + first, device=device)[None]
    # A mask of four dimensions is taken for a finished one, so none of tokens x tokens is made.
    inputs["attention_mask"] = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=device)
    if config.model_type in _DECODERS:
        inputs["use_cache"] = False
    return {**inputs, "packing": packing}, order


def _filler(tokens: int, input_ids: Tensor) -> int:
    """Tokens of one more pair, whose logit nobody reads, that make row lengths repeat on a CPU; 0 if none is needed.

    oneDNN's and PyTorch's caches keep what they compiled for each of the last 1024 shapes, and glibc's heap is
    torn by buffers of ever new sizes, so memory grows with every new row length: 1.8 GB instead of 1.2 GB after
    150 steps. Rows of 1024 tokens and more get 32 lengths an octave, 1.6 % of tokens on average.
    """
    if input_ids.device.type != "cpu" or tokens < 1024:
        return 0
    return -tokens % min(1 << (tokens.bit_length() - 6), input_ids.shape[1])


def _layers(model: PreTrainedModel) -> nn.ModuleList:
    """The transformer layers of a sequence classifier."""
    base = model.base_model
    found = getattr(base, "encoder", None) or getattr(base, "transformer", None) or base
    layers: nn.ModuleList = found.layers if hasattr(found, "layers") else found.layer
    return layers


@torch.no_grad()
def _self_test(model: PreTrainedModel) -> str | None:
    """What is wrong with the packed scores of four made-up pairs, if anything."""
    lengths = [3, 9, 9, 14]
    config, device = model.config, model.device
    real = np.arange(max(lengths)) < np.array(lengths)[:, None]
    pad = config.pad_token_id or 0
    words = np.random.default_rng(0).integers(min(pad + 1, config.vocab_size - 1), config.vocab_size, real.shape)
    inputs = {
        "input_ids": torch.as_tensor(np.where(real, words, pad), device=device),
        "attention_mask": torch.as_tensor(real.astype(np.int64), device=device),
    }
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        padded = model(**inputs).logits[:, 0]
        packed = packed_scores(model, inputs, lengths, config)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        return f"the packed forward failed ({' '.join(str(error).split())})"
    finally:
        for module in training:
            module.training = True
    difference, size = float((packed - padded).abs().max()), float(padded.abs().max())
    allowed = 1e-5 + 1e-3 * size if packed.dtype.itemsize >= 4 else 0.05 + 0.05 * size
    return None if difference <= allowed else f"its scores would differ by {difference:.1e}"


def _read_whole_layer(layer: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The last layer of any family, computed whole; what is read of it, shape ``(pairs, 1, width)``."""
    out: Tensor = type(layer).forward(layer, hidden_states, *args, **kwargs)
    packing = kwargs.get("packing")
    return out if packing is None else out[0, packing.read][:, None]


def _read_layer(compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The last layer of a family, of what is read alone, shape ``(pairs, 1, width)``."""

    def forward(layer: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if kwargs.get("packing") is None:
            return _read_whole_layer(layer, hidden_states, *args, **kwargs)
        return compute(layer, hidden_states, **kwargs)[:, None]

    return forward


def _bert_layer(layer: Any, hidden_states: Tensor, packing: Packing, **_: Any) -> Tensor:
    """Of BERT, RoBERTa or ELECTRA."""
    attention = layer.attention.self
    context, read = _read_attention(attention, attention.query, attention.key, attention.value, hidden_states, packing)
    scored: Tensor = layer.feed_forward_chunk(layer.attention.output(context, read))
    return scored


def _distilbert_layer(layer: Any, hidden_states: Tensor, packing: Packing, **_: Any) -> Tensor:
    attention = layer.attention
    context, read = _read_attention(
        attention, attention.q_lin, attention.k_lin, attention.v_lin, hidden_states, packing
    )
    attended = layer.sa_layer_norm(attention.out_lin(context) + read)
    scored: Tensor = layer.output_layer_norm(layer.ffn(attended) + attended)
    return scored


def _read_attention(
    attention: Any, query: nn.Module, key: nn.Module, value: nn.Module, hidden_states: Tensor, packing: Packing
) -> tuple[Tensor, Tensor]:
    """Context of the tokens that are read, and their states, shape ``(pairs, width)``."""
    tokens, read = hidden_states[0], hidden_states[0, packing.read]
    q, k, v = (
        states.view(len(states), -1, attention.attention_head_size)
        for states in (query(read), key(tokens), value(tokens))
    )
    dropout = attention.dropout.p if attention.training else 0.0
    return attend(q, k, v, packing, dropout=dropout, scaling=attention.scaling).flatten(1), read


def _modernbert_layer(
    layer: Any, hidden_states: Tensor, packing: Packing, position_embeddings: tuple[Tensor, Tensor], **_: Any
) -> Tensor:
    attention = layer.attn
    # One matrix makes queries, keys and values, so queries are made of all tokens.
    states = attention.Wqkv(layer.attn_norm(hidden_states)).unflatten(-1, (3, -1, attention.head_dim))
    query, key, value = states.unbind(2)
    query, key = apply_rotary_pos_emb(query, key, *position_embeddings, unsqueeze_dim=2)
    context = attend(
        query[0, packing.read],
        key[0],
        value[0],
        packing,
        dropout=attention.attention_dropout if layer.training else 0.0,
        scaling=attention.head_dim**-0.5,
        window=attention.sliding_window,
    )
    read = hidden_states[0, packing.read] + attention.out_drop(attention.Wo(context.flatten(1)))
    scored: Tensor = read + layer.mlp(layer.mlp_norm(read))
    return scored


def _decoder_forward(model: Any, *args: Any, packing: Packing | None = None, **kwargs: Any) -> Any:
    """A decoder's forward; its own head would look for one last token in a packed row."""
    if packing is None:
        return type(model).forward(model, *args, **kwargs)
    hidden = model.base_model(*args, packing=packing, **kwargs).last_hidden_state
    return SequenceClassifierOutput(logits=model.score(hidden)[:, 0])


_LAYERS: dict[str, Callable[..., Tensor]] = {
    "bert": _read_layer(_bert_layer),
    "roberta": _read_layer(_bert_layer),
    "xlm-roberta": _read_layer(_bert_layer),
    "camembert": _read_layer(_bert_layer),
    "electra": _read_layer(_bert_layer),
    "distilbert": _read_layer(_distilbert_layer),
    "modernbert": _read_layer(_modernbert_layer),
    "qwen3": _read_whole_layer,
    "qwen2": _read_whole_layer,
    "llama": _read_whole_layer,
    "mistral": _read_whole_layer,
}
_DECODERS = {"qwen3", "qwen2", "llama", "mistral"}
