"""Tiny random models, built once a session; no test downloads anything."""

import json
import os
import random
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

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


def build_llm(seed: int = 0) -> LlamaForCausalLM:
    """A two-layer causal language model with random weights, so large that what it reads changes what it says."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=4 + len(WORDS),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=1024,
            initializer_range=0.3,
            bos_token_id=2,
            eos_token_id=3,
            pad_token_id=0,
        )
    )


def write_recipe(folder: Path) -> Path:
    """A recipe with everything that it names, all of it tiny, in a folder: what it writes goes to ``folder/run``."""
    build_llm().save_pretrained(folder / "llm")
    causal = build_tokenizer()
    causal.backend_tokenizer.post_processor = processors.TemplateProcessing("[CLS] $0", None, [("[CLS]", 2)])
    causal.model_max_length = 1024
    causal.save_pretrained(folder / "llm")
    encoder = build_model(dropout=0.1).config
    encoder.initializer_range = 0.2
    BertModel(encoder).save_pretrained(folder / "encoder")
    build_tokenizer().save_pretrained(folder / "encoder")
    draw = random.Random(5)
    documents = [{"doc_id": f"d{i}", "text": " ".join(draw.choices(WORDS, k=draw.randint(8, 25)))} for i in range(60)]
    for name, chosen in (("docs", documents), ("dev", documents[:8]), ("test", documents[20:32])):
        rows = chosen
        if name != "docs":
            rows = [
                {"query_id": row["doc_id"], "query": " ".join(row["text"].split()[2:6]), "doc_ids": [row["doc_id"]]}
                for row in chosen
            ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.format(folder=folder), encoding="utf-8")
    return recipe


RECIPE = """
run_dir: {folder}/run
corpus: {{source: docs.jsonl}}
llm: {{model: {folder}/llm, dtype: float32}}
generate: {{queries: 60, per_passage: 2, max_new_tokens: 6, min_words: 1, roundtrip_k: 0}}
mine: {{top_k: 10}}
label: {{candidates: 6, negatives: 4, drop_margin: -0.5}}
train:
  model: {folder}/encoder
  warm_start: {{pairs: 192, group_size: 4, hard: 2, max_passage_words: 12, learning_rate: 3e-3}}
  learning_rate: 3e-3
  early_stopping_patience: null
  precision: float32
  per_device_train_batch_size: 4
  group_size: 4
  max_length: 48
  max_query_length: 12
  max_steps: 20
evaluate: {{queries: test.jsonl, dev_queries: dev.jsonl, top_k: 10, bi_encoder: {folder}/encoder}}
"""
