"""Tiny models of every family that packs, and a batch of ragged pairs."""

import copy
from collections.abc import Sequence

import numpy as np
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    CamembertConfig,
    DistilBertConfig,
    ElectraConfig,
    LlamaConfig,
    MistralConfig,
    ModernBertConfig,
    MPNetConfig,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
    XLMRobertaConfig,
)

from lce_trainer.model.pairs import EncodedPairs

SMALL = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
SMALL |= {"max_position_embeddings": 64, "num_labels": 1, "pad_token_id": 0}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SHIFTED = SMALL | STILL | {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
CONFIGS = {
    "bert": BertConfig(**SMALL, **STILL),
    "roberta": RobertaConfig(**SHIFTED),
    "xlm-roberta": XLMRobertaConfig(**SHIFTED),
    "camembert": CamembertConfig(**SHIFTED),
    "electra": ElectraConfig(**SMALL, **STILL, embedding_size=16),
    "distilbert": DistilBertConfig(
        vocab_size=60,
        dim=32,
        n_layers=3,
        n_heads=4,
        hidden_dim=48,
        num_labels=1,
        dropout=0.0,
        attention_dropout=0.0,
        seq_classif_dropout=0.0,
        max_position_embeddings=64,
    ),
    "mpnet": MPNetConfig(**SHIFTED),
    "modernbert": ModernBertConfig(
        **SMALL,
        local_attention=8,
        global_attn_every_n_layers=2,
        classifier_pooling="cls",
        cls_token_id=2,
        sep_token_id=3,
        bos_token_id=2,
        eos_token_id=3,
    ),
    "modernbert, local last layer": ModernBertConfig(
        **SMALL,
        local_attention=8,
        global_attn_every_n_layers=3,
        layer_types=["full_attention"] + ["sliding_attention"] * 2,
        classifier_pooling="cls",
        cls_token_id=2,
        sep_token_id=3,
        bos_token_id=2,
        eos_token_id=3,
    ),
    "modernbert, mean": ModernBertConfig(
        **SMALL,
        local_attention=8,
        global_attn_every_n_layers=2,
        classifier_pooling="mean",
        cls_token_id=2,
        sep_token_id=3,
        bos_token_id=2,
        eos_token_id=3,
    ),
    "qwen3": Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=8),
    "qwen2": Qwen2Config(**SMALL, num_key_value_heads=2),
    "llama": LlamaConfig(**SMALL, num_key_value_heads=2),
    "mistral, sliding": MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=5),
}
LENGTHS = [7, 30, 3, 12, 12, 29, 1, 30]


def make_model(family: str, dtype: torch.dtype = torch.float64):
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_config(copy.deepcopy(CONFIGS[family]), dtype=dtype).eval()
    with torch.no_grad():  # so that scores differ, and a wrong token shows
        for parameter in model.parameters():
            parameter.mul_(3) if parameter.dim() > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def flat(batch: dict[str, torch.Tensor], lengths: Sequence[int] = LENGTHS) -> EncodedPairs:
    """The pairs of a padded batch, without the padding."""
    sizes = np.array(lengths)
    real = np.arange(batch["input_ids"].shape[1]) < sizes[:, None]
    return EncodedPairs(
        sizes, {name: tensor.numpy()[real] for name, tensor in batch.items() if name != "attention_mask"}
    )


def make_batch(model) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(5)
    real = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    pad = model.config.pad_token_id
    ids = torch.where(real, torch.randint(4, 60, real.shape, generator=draw), pad)
    batch = {"input_ids": ids, "attention_mask": real.long()}
    if model.config.model_type in ("bert", "electra"):
        batch["token_type_ids"] = (real & (torch.arange(max(LENGTHS)) > 1)).long()
    return batch
