"""A tiny random reranker and its tokenizer; nothing is downloaded."""

import random

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from lce_trainer.model.pairs import EncodedPairs

WORDS = """red green blue fish bird tree stone river hill cloud rain snow wind fire sand leaf root seed moon star
what is the a of in on how why does where grows lives falls burns shines flows""".split()  # noqa: SIM905


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer with BERT's special tokens and pair template."""
    vocab = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=128,
    )


def build_model(seed: int = 0, dropout: float = 0.0) -> BertForSequenceClassification:
    """A two-layer BERT reranker with random weights."""
    torch.manual_seed(seed)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=4 + len(WORDS),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=128,
            num_labels=1,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
    )


def ids_of_pairs(encoded: EncodedPairs, name: str = "input_ids") -> list[list[int]]:
    """One list of ids, or of another input, a pair."""
    ends = encoded.lengths.cumsum()[:-1]
    return [values.tolist() for values in np.split(encoded.inputs[name], ends)]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


def make_pairs(n: int, seed: int = 0) -> list[tuple[str, str]]:
    draw = random.Random(seed)
    return [
        (" ".join(draw.choices(WORDS, k=draw.randint(1, 40))), " ".join(draw.choices(WORDS, k=draw.randint(1, 60))))
        for _ in range(n)
    ]
