"""Generation of queries that a process of its own can be killed in."""

from pathlib import Path

import datasets

from helpers.fake_llm import FakeLLM
from lce_trainer.synthesis.journal import Journal
from lce_trainer.synthesis.prompts import Prompt
from lce_trainer.synthesis.queries import (
    GenerateConfig,
    generate_queries,
)
from lce_trainer.synthesis.retrieval.bm25 import BM25Index
from lce_trainer.synthesis.retrieval.hybrid import FirstStage

PROMPT = Prompt("test.jinja", "Write. {% for e in examples %}{{ e.query }} {% endfor %}Passage: {{ passage }}\nQuery:")
FILLER = ["alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel", "india", "juliet"]


def build_passages(n=300):
    """Passages of 5 to 44 words, each about a topic of its own."""
    texts = [f"topic{i} is " + " ".join(FILLER[(i + j) % 10] for j in range(3 + (i * 7) % 40)) for i in range(n)]
    return datasets.Dataset.from_dict({"passage_id": [f"p{i}" for i in range(n)], "text": texts})


def plan(passages, answer=lambda i: [f"what is topic{i}", f"where does topic{i} live"], **variables):
    prompts = (PROMPT.render(passage=text, examples=[], **variables) for text in passages["text"])
    return {prompt: answer(i) for i, prompt in enumerate(prompts)}


def generate(folder, passages, llm, config, seed=5, prompt=PROMPT, **more):
    first_stage = FirstStage(len(passages), BM25Index.build(passages, folder / "bm25"), None)
    with Journal(folder / "journal.jsonl") as journal:
        return generate_queries(passages, llm, prompt, config, seed, journal, first_stage, **more)


def generate_file(folder: Path, kill_after: int | None) -> None:
    """What the killed process runs, too."""
    passages = build_passages()
    llm = FakeLLM(completions=plan(passages), kill_after=kill_after, log=folder / "asked.jsonl")
    queries, *_ = generate(folder, passages, llm, GenerateConfig(queries=200, per_passage=2))
    queries.to_parquet(folder / "queries.parquet")
