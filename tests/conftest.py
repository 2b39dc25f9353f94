"""Tiny random models, built once a session; no test downloads anything."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Bits are compared, and a GPU's differ; see test_gpu.py.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from lce_trainer.model.pairs import EncodedPairs

if TYPE_CHECKING:
    from tiny_recipe import Finished

WORDS = """red green blue fish bird tree stone river hill cloud rain snow wind fire sand leaf root seed moon star
what is the a of in on how why does where grows lives falls burns shines flows""".split()  # noqa: SIM905
SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


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


@pytest.fixture(scope="session")
def tiny_reranker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a saved tiny reranker: model and tokenizer."""
    path = tmp_path_factory.mktemp("tiny-reranker")
    build_model().save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> "Finished":
    """A whole run of the tiny recipe, which nothing interrupted; look, and do not touch."""
    from tiny_recipe import finish

    return finish(tmp_path_factory.mktemp("finished"))
