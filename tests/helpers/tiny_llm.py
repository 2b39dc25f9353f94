"""Tiny random language models with a byte-level tokenizer."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

SHOTS = "passage: the red fish swims in the cold river. query: where does the red fish live?\n"
PASSAGES = ["a bird lives in the old tree", "rain falls on the hill", "the moon shines on snow and sand at night"]
QUERIES = [" where does the bird live?", " what falls on a hill?", " why does the moon shine?", " who?"]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of a few hundred tokens that puts <bos> first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<bos>", "<eos>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([SHOTS, *PASSAGES, *QUERIES, " yes no Yes No"] * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", model_max_length=10**6
    )


def build_model(family: str) -> torch.nn.Module:
    torch.manual_seed(1)
    shape = {
        "vocab_size": 330,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.4,
        "tie_word_embeddings": False,
    }
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**shape))
    windows = {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8}
    if family == "gemma2":
        return Gemma2ForCausalLM(Gemma2Config(**shape, **windows, final_logit_softcapping=2.0))
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    return Gemma3ForCausalLM(Gemma3TextConfig(**shape, **windows, layer_types=layers))


def prompts() -> list[str]:
    return [f"{SHOTS}passage: {passage} query:" for passage in PASSAGES]


def sampling(count: int, **changes) -> dict:
    settings = {"max_new_tokens": 12, "temperature": 0.9, "top_p": 0.8, "seeds": list(range(count)), "stop": []}
    return settings | changes
