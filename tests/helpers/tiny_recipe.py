"""A recipe in which everything is tiny and nothing is fake, and a whole run of it."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import processors
from transformers import BertModel, LlamaConfig, LlamaForCausalLM

from helpers.tiny import WORDS, build_model, build_tokenizer
from lce_trainer.synthesis.cost import is_usage

ARTIFACTS = ("passages", "queries", "candidates", "groups", "model", "evaluation")
TOKEN = "hf_" + "S3cret" * 6


class Finished(NamedTuple):
    """A run that nothing interrupted.

    Attributes:
        recipe: Its file.
        root: What it made.
        printed: On standard output.
        log: On standard error.
    """

    recipe: Path
    root: Path
    printed: str
    log: str

    def copy(self, root: Path, *artifacts: str) -> Path:
        """A run folder in which only these artifacts are made."""
        for name in artifacts:
            shutil.copytree(self.root / name, root / name, ignore=shutil.ignore_patterns(".cache"))
        return root


def finish(folder: Path) -> Finished:
    """Run the recipe as a user does, a token in the environment."""
    recipe = write_recipe(folder)
    done = subprocess.run(
        [sys.executable, "-m", "lce_trainer.cli", "run", str(recipe)],
        env={**os.environ, "HF_TOKEN": TOKEN, "HUGGING_FACE_HUB_TOKEN": TOKEN},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return Finished(recipe, folder / "run", done.stdout, done.stderr)


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


def contents(root: Path) -> dict[str, bytes]:
    """What a run leaves, the answers of its journals included.

    No Arrow caches, no logs of how fast it went, no page that draws a log, and of a journal no seconds that calls took.
    """
    files = (file for file in sorted(root.rglob("*")) if file.is_file())
    names = {file.relative_to(root).as_posix(): file for file in files if file != root / "report.html"}
    return {
        name: _answers(file) if file.name == "journal.jsonl" else file.read_bytes()
        for name, file in names.items()
        if ".cache/" not in name and name[:5] != "logs/"
    }


def _answers(journal: Path) -> bytes:
    lines = (json.loads(line)["answers"] for line in journal.read_text(encoding="utf-8").splitlines())
    answers = ({key: answer for key, answer in line.items() if not is_usage(key)} for line in lines)
    return json.dumps([line for line in answers if line]).encode()


def assert_same_run(root: Path, wanted: dict[str, bytes]) -> None:
    """Check that a run left what :func:`contents` of another one holds."""
    got = contents(root)
    assert sorted(got) == sorted(wanted)
    assert [name for name in wanted if got[name] != wanted[name]] == []


RECIPE = """
run_dir: {folder}/run
corpus: {{source: docs.jsonl}}
llm: {{model: {folder}/llm, dtype: float32}}
generate: {{queries: 60, per_passage: 2, max_new_tokens: 6, min_words: 1, roundtrip_k: 0}}
mine: {{top_k: 10, encoder: {folder}/encoder}}
label: {{candidates: 6, random: 1, negatives: 4, drop_margin: -0.5}}
train:
  model: {folder}/encoder
  learning_rate: 3e-3
  early_stopping_patience: null
  precision: float32
  per_device_train_batch_size: 4
  group_size: 4
  max_length: 48
  max_query_length: 12
  max_steps: 20
evaluate: {{queries: test.jsonl, dev_queries: dev.jsonl, top_k: 10}}
"""
