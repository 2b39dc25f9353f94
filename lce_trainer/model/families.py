"""What is known of each family of models: its positions, the token its head reads, and its packed forward passes.

This is the one file that a new family touches: its record in ``FAMILIES``. A family without a record is an encoder
or a decoder by transformers' own lists, counts positions from 0, and is padded.

In a packed row the last layer computes only what the head reads: keys and values of all tokens, but queries, output
projection and feed-forward of one token a pair. Where queries, keys and values are plain linear layers of the same
states, one product makes all three. Both are exact, forward and backward.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.auto import modeling_auto
from transformers.models.modernbert.modeling_modernbert import apply_rotary_pos_emb

from lce_trainer.model.packed.attention import Packing, attend
from lce_trainer.model.packed.cpu import is_plain, linear

Patch = tuple[nn.Module, Callable[..., Any]]  # a module, and its forward for packed rows


@dataclass(frozen=True)
class Family:
    """One ``model_type`` of transformers.

    Attributes:
        is_decoder: Whether a token sees only the tokens before it. The head of a decoder reads a pair's last token,
            that of an encoder its first (or their mean).
        positions_after_padding: Whether positions are counted from the one after the pad token's id, not from 0.
        has_normed_head: Whether its classification head is a dense layer, an activation, a LayerNorm and a classifier
            over a pair's pooled token, as modular CrossEncoders have it; see :mod:`lce_trainer.model.modular`.
        has_own_attention: Whether its attention is not called through transformers' ``AttentionInterface``, so that
            its patches alone make it packed.
        servers: Servers that score with a classification head of this family, by their sources:
            text-embeddings-inference (``tei``), vLLM (``vllm``) and llama.cpp (``gguf``), whose converter is reported
            to leave out BERT's pooler and ModernBERT's dense layer.
        refused_by: Servers whose source refuses such a head.
        patches: Yields the modules of a model whose forward is replaced for packed rows; None if the family is padded.
    """

    is_decoder: bool = False
    positions_after_padding: bool = False
    has_normed_head: bool = False
    has_own_attention: bool = False
    servers: tuple[str, ...] = ()
    refused_by: tuple[str, ...] = ()
    patches: Callable[[Any], Iterator[Patch]] | None = None


def _bert(model: PreTrainedModel) -> Iterator[Patch]:
    """Yield the patches of BERT, RoBERTa, XLM-R, CamemBERT and ELECTRA."""
    layers = model.base_model.encoder.layer
    yield from ((layer.attention.self, _bert_attention) for layer in layers)
    yield layers[-1], _bert_layer


def _distilbert(model: PreTrainedModel) -> Iterator[Patch]:
    layers = model.base_model.transformer.layer
    yield from ((layer.attention, _distilbert_attention) for layer in layers)
    yield layers[-1], _distilbert_layer


def _mpnet(model: PreTrainedModel) -> Iterator[Patch]:
    """Yield all modules down to the layers: none passes on what it does not know, and a packing is such."""
    encoder = model.base_model.encoder
    yield from ((model, _mpnet_scores), (model.base_model, _mpnet_model), (encoder, _mpnet_encoder))
    yield from ((layer, _mpnet_layer) for layer in encoder.layer[:-1])
    yield encoder.layer[-1], partial(_mpnet_layer, reads=True)


def _modernbert(model: PreTrainedModel) -> Iterator[Patch]:
    if model.config.classifier_pooling == "mean":
        yield model, _modernbert_mean
    else:
        yield model.base_model.layers[-1], _modernbert_layer


def _decoder(model: Any) -> Iterator[Patch]:
    """Yield the patches of Llama and those built like it; a language-model head needs none of the family's."""
    yield model.base_model.layers[-1], _decoder_layer
    if hasattr(model, "score"):
        yield model, _decoder_head


FAMILIES = {
    "bert": Family(servers=("tei", "vllm"), patches=_bert),
    "electra": Family(patches=_bert),
    "roberta": Family(positions_after_padding=True, servers=("tei", "vllm", "gguf"), patches=_bert),
    "xlm-roberta": Family(positions_after_padding=True, servers=("tei", "vllm", "gguf"), patches=_bert),
    "camembert": Family(positions_after_padding=True, servers=("tei",), patches=_bert),
    "distilbert": Family(patches=_distilbert),
    "modernbert": Family(has_normed_head=True, servers=("tei", "vllm"), patches=_modernbert),
    "qwen3": Family(is_decoder=True, servers=("vllm",), refused_by=("tei",), patches=_decoder),
    "qwen2": Family(is_decoder=True, servers=("vllm",), patches=_decoder),
    "llama": Family(is_decoder=True, servers=("vllm",), patches=_decoder),
    "mistral": Family(is_decoder=True, servers=("vllm",), refused_by=("tei",), patches=_decoder),
    "mpnet": Family(positions_after_padding=True, has_own_attention=True, refused_by=("tei",), patches=_mpnet),
    "longformer": Family(positions_after_padding=True),
    "xlm-roberta-xl": Family(positions_after_padding=True),
    "xmod": Family(positions_after_padding=True),
}


def family_of(config: PreTrainedConfig) -> Family:
    """Return the record of a model's family, made from transformers' lists of models if there is none."""
    kind = config.model_type
    writes = kind in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    fills = kind in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return FAMILIES.get(kind) or Family(is_decoder=writes and not fills)


def first_position(config: PreTrainedConfig) -> int:
    """Return the number of a pair's first position."""
    return int(config.pad_token_id) + 1 if family_of(config).positions_after_padding else 0


def has_trained_head(config: PreTrainedConfig) -> bool:
    """Return whether the checkpoint of this config holds a classification head."""
    return any("ForSequenceClassification" in kind for kind in config.architectures or [])


def head_modules(model: PreTrainedModel) -> list[str]:
    """Return the names of the modules between the last layer and the score.

    Those are what a classifier has besides its base model, and the base model's pooler if there is one: base
    checkpoints often come without it.
    """
    names = [
        name
        for name, module in model.named_children()
        if name != model.base_model_prefix and any(True for _ in module.parameters())
    ]
    return names + ["pooler"] * (getattr(model.base_model, "pooler", None) is not None)


def is_head_weight(model: PreTrainedModel, key: str) -> bool:
    """Return whether a weight of this name lies between the last layer and the score."""
    return key.removeprefix(f"{model.base_model_prefix}.").partition(".")[0] in head_modules(model)


@contextmanager
def float32_head(model: nn.Module) -> Iterator[None]:
    """Let the last layer of a classifier in half precision compute its logits in float32.

    The state that it reads stays as it is. A logit that is rounded to 8 or 11 bits would be equal to that of many other
    pairs. A language model that answers yes or no has its own way, see :mod:`lce_trainer.model.yes_no`.

    Args:
        model: A classifier with one label; one in float32 or wider is left alone.
    """
    heads = [
        module
        for module in model.modules()
        if type(module) is nn.Linear and module.out_features == 1 and module.weight.dtype.itemsize < 4
    ]
    before = [module.__dict__.get("forward") for module in heads]
    for module in heads:
        vars(module)["forward"] = partial(_float32_linear, module)
    try:
        yield
    finally:
        for module, forward in zip(heads, before, strict=True):
            if forward is None:
                vars(module).pop("forward", None)
            else:
                vars(module)["forward"] = forward


def _float32_linear(layer: nn.Linear, states: Tensor) -> Tensor:
    bias = None if layer.bias is None else layer.bias.float()
    return functional.linear(states.float(), layer.weight.float(), bias)


def _project(states: Tensor, layers: Sequence[Any], size: int) -> Sequence[Tensor]:
    """Return all states after each linear layer, by heads, each of shape ``(tokens, heads, size)``."""
    if is_plain(*layers):
        weight = torch.cat([layer.weight for layer in layers])
        bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
        return linear(states, weight, bias).view(len(states), len(layers), -1, size).unbind(1)
    return [layer(states).unflatten(1, (-1, size)) for layer in layers]


def _bert_attention(attention: Any, hidden_states: Tensor, *_: Any, packing: Packing, **__: Any) -> tuple[Tensor, None]:
    layers = attention.query, attention.key, attention.value
    query, key, value = _project(hidden_states.squeeze(0), layers, attention.attention_head_size)
    dropout = attention.dropout.p if attention.training else 0.0
    return attend(query, key, value, packing, dropout=dropout, scaling=attention.scaling).flatten(1)[None], None


def _distilbert_attention(
    attention: Any, hidden_states: Tensor, *_: Any, packing: Packing, **__: Any
) -> tuple[Tensor, None]:
    layers = attention.q_lin, attention.k_lin, attention.v_lin
    query, key, value = _project(hidden_states.squeeze(0), layers, attention.attention_head_size)
    dropout = attention.dropout.p if attention.training else 0.0
    context = attend(query, key, value, packing, dropout=dropout, scaling=attention.scaling)
    return attention.out_lin(context.flatten(1))[None], None


def _bert_layer(layer: Any, hidden_states: Tensor, *_: Any, packing: Packing, **__: Any) -> Tensor:
    attention = layer.attention.self
    context, read = _read_attention(attention, attention.query, attention.key, attention.value, hidden_states, packing)
    scored: Tensor = layer.feed_forward_chunk(layer.attention.output(context, read))
    return scored[:, None]


def _distilbert_layer(layer: Any, hidden_states: Tensor, *_: Any, packing: Packing, **__: Any) -> Tensor:
    attention = layer.attention
    context, read = _read_attention(
        attention, attention.q_lin, attention.k_lin, attention.v_lin, hidden_states, packing
    )
    attended = layer.sa_layer_norm(attention.out_lin(context) + read)
    scored: Tensor = layer.output_layer_norm(layer.ffn(attended) + attended)
    return scored[:, None]


def _read_attention(
    attention: Any, query: Any, key: Any, value: Any, hidden_states: Tensor, packing: Packing
) -> tuple[Tensor, Tensor]:
    """Return the context of the tokens that the head reads, and their states, shape ``(pairs, width)``."""
    tokens = hidden_states.squeeze(0)
    read, size = tokens[packing.read], attention.attention_head_size
    dropout = attention.dropout.p if attention.training else 0.0
    q = query(read).view(len(read), -1, size)
    if tokens.device.type == "cpu" and is_plain(key, value):
        # As all attention on a CPU in float32 or wider: thin products gain nothing from half precision.
        with torch.autocast("cpu", enabled=False):
            wide = torch.promote_types(tokens.dtype, torch.float32)
            context = _attend_to_states(q.to(wide), key, value, tokens.to(wide), packing, dropout, attention.scaling)
        return context.flatten(1).to(q.dtype), read
    k, v = _project(tokens, (key, value), size)
    return attend(q, k, v, packing, dropout=dropout, scaling=attention.scaling).flatten(1), read


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _attend_to_states(
    query: Tensor, key: nn.Linear, value: nn.Linear, tokens: Tensor, packing: Packing, dropout: float, scaling: float
) -> Tensor:
    """Attention of one query a pair to its tokens, without a key or value being made of each.

    A query's product with ``W x + b`` is that of ``query W`` with ``x``, and a constant; and a mean of
    ``W x + b`` is ``W`` of the mean of ``x``, and ``b``. Exact but for the order of sums.

    Args:
        query: Shape ``(pairs, heads, size)``.
        key: What would make keys of states.
        value: What would make values of them.
        tokens: States of all tokens, shape ``(tokens, width)``.
        packing: Their layout.
        dropout: Of attention weights.
        scaling: Of the products.

    Returns:
        Context, shape ``(pairs, heads, size)``.
    """
    heads, size = query.shape[1:]
    of_key, of_value = (layer.weight.to(query.dtype).view(heads, size, -1) for layer in (key, value))
    projected = torch.einsum("phs,hsw->phw", query * scaling, of_key)
    # Cancels in the softmax, but who waits for every parameter's gradient, as DDP does, waits for this one's.
    constant = (query * scaling * key.bias.to(query.dtype).view(heads, size)).sum(-1, keepdim=True)
    means, totals = [], []
    counts, sizes = [pairs for pairs, _ in packing.calls], [pairs * length for pairs, length in packing.calls]
    parts = torch.split(projected, counts), torch.split(constant, counts), torch.split(tokens, sizes)
    for part, same, rows in zip(*parts, strict=True):
        states = rows.view(len(part), -1, rows.shape[1])
        weights = functional.dropout((part @ states.transpose(1, 2) + same).softmax(-1), dropout)
        means.append(weights @ states)
        totals.append(weights.sum(-1, keepdim=True))
    return torch.einsum("phw,hsw->phs", torch.cat(means), of_value) + torch.cat(totals) * value.bias.to(
        query.dtype
    ).view(heads, size)


def _mpnet_scores(model: Any, *args: Any, packing: Packing, **kwargs: Any) -> SequenceClassifierOutput:
    states = model.base_model(*args, packing=packing, **kwargs)
    return SequenceClassifierOutput(logits=model.classifier(states))


def _mpnet_model(model: Any, input_ids: Tensor, *_: Any, position_ids: Tensor, packing: Packing, **__: Any) -> Tensor:
    states: Tensor = model.encoder(model.embeddings(input_ids=input_ids, position_ids=position_ids), packing=packing)
    return states


def _mpnet_encoder(encoder: Any, hidden_states: Tensor, *_: Any, packing: Packing, **__: Any) -> Tensor:
    # Distances are the same in every pair, so the longest one's biases are those of all.
    bias = encoder.compute_position_bias(hidden_states[:, : packing.longest]).squeeze(0)
    for layer in encoder.layer:
        hidden_states = layer(hidden_states, bias=bias, packing=packing)
    return hidden_states


def _mpnet_layer(
    layer: Any, hidden_states: Tensor, *_: Any, packing: Packing, bias: Tensor, reads: bool = False
) -> Tensor:
    attention, tokens = layer.attention.attn, hidden_states.squeeze(0)
    size, dropout = attention.attention_head_size, attention.dropout.p if attention.training else 0.0
    if reads:
        kept, bias = tokens[packing.read], bias[:, :1]
        query = attention.q(kept).unflatten(1, (-1, size))
        key, value = _project(tokens, (attention.k, attention.v), size)
    else:
        kept = tokens
        query, key, value = _project(tokens, (attention.q, attention.k, attention.v), size)
    context = attend(query, key, value, packing, dropout=dropout, bias=bias).flatten(1)
    attended = layer.attention.LayerNorm(layer.attention.dropout(attention.o(context)) + kept)
    states: Tensor = layer.output(layer.intermediate(attended), attended)
    return states[:, None] if reads else states[None]


def _modernbert_layer(
    layer: Any, hidden_states: Tensor, *_: Any, packing: Packing, position_embeddings: tuple[Tensor, Tensor], **__: Any
) -> Tensor:
    attention = layer.attn
    # One matrix makes queries, keys and values, so queries are made of all tokens.
    states = attention.Wqkv(layer.attn_norm(hidden_states)).unflatten(-1, (3, -1, attention.head_dim))
    query, key, value = states.unbind(2)
    query, key = apply_rotary_pos_emb(query, key, *position_embeddings, unsqueeze_dim=2)
    context = attend(
        query[0, packing.read],
        key.squeeze(0),
        value.squeeze(0),
        packing,
        dropout=attention.attention_dropout if layer.training else 0.0,
        scaling=attention.head_dim**-0.5,
        window=attention.sliding_window,
    )
    read = hidden_states[0, packing.read] + attention.out_drop(attention.Wo(context.flatten(1)))
    scored: Tensor = read + layer.mlp(layer.mlp_norm(read))
    return scored[:, None]


def _modernbert_mean(model: Any, *args: Any, packing: Packing, **kwargs: Any) -> SequenceClassifierOutput:
    """Score a packed row with a ModernBERT whose head reads the mean over a pair's tokens."""
    states = model.base_model(*args, packing=packing, **kwargs).last_hidden_state.squeeze(0)
    lengths = packing.starts.diff()
    pair = torch.repeat_interleave(lengths, output_size=len(states))
    total = states.new_zeros((len(lengths), states.shape[1]), dtype=torch.promote_types(states.dtype, torch.float32))
    mean = total.index_add(0, pair, states.to(total.dtype)) / lengths[:, None]
    return SequenceClassifierOutput(logits=model.classifier(model.drop(model.head(mean.to(states.dtype)))))


def _decoder_layer(
    layer: Any, hidden_states: Tensor, *_: Any, packing: Packing, position_embeddings: tuple[Tensor, Tensor], **__: Any
) -> Tensor:
    attention = layer.self_attn
    tokens = layer.input_layernorm(hidden_states).squeeze(0)
    query, key, value = (
        project(states).unflatten(1, (-1, attention.head_dim))
        for project, states in (
            (attention.q_proj, tokens[packing.read]),
            (attention.k_proj, tokens),
            (attention.v_proj, tokens),
        )
    )
    if hasattr(attention, "q_norm"):
        query, key = attention.q_norm(query), attention.k_norm(key)
    cos, sin = (turn.squeeze(0)[:, None] for turn in position_embeddings)
    context = attend(
        _rotate(query, cos[packing.read], sin[packing.read]),
        _rotate(key, cos, sin),
        value,
        packing,
        causal=True,
        dropout=attention.attention_dropout if layer.training else 0.0,
        scaling=attention.scaling,
        window=getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None)),
    )
    read = hidden_states[0, packing.read] + attention.o_proj(context.flatten(1))
    scored: Tensor = read + layer.mlp(layer.post_attention_layernorm(read))
    return scored[:, None]


def _rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions, of queries or keys alone; source: ``apply_rotary_pos_emb`` of transformers' Llama."""
    left, right = states.chunk(2, dim=-1)
    return states * cos + torch.cat((-right, left), dim=-1) * sin


def _decoder_head(model: Any, *args: Any, packing: Packing, **kwargs: Any) -> SequenceClassifierOutput:
    """Score a packed row with a decoder's classification head, which would search it for one last token."""
    hidden = model.base_model(*args, packing=packing, **kwargs).last_hidden_state
    return SequenceClassifierOutput(logits=model.score(hidden)[:, 0])
