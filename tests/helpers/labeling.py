"""Labeling that a process of its own can be killed in."""

import hashlib
import math
from pathlib import Path

import datasets
import numpy as np

from helpers.fake_llm import FakeLLM
from lce_trainer.synthesis.journal import Journal
from lce_trainer.synthesis.labeling import LabelConfig, label_candidates, load_judge
from lce_trainer.synthesis.prompts import Prompt

LIKELIHOOD = Prompt("likelihood.jinja", "Passage: {{ passage }}\nQuery:")


class HashedJudge:
    """Scores any pair, the same each time; ``lean`` is how much longer passages please it."""

    name = identity = "hashed"

    def __init__(self, lean=0.0):
        self.lean = lean
        self.asked = 0

    def reads(self, prompt):
        return str(prompt)

    def score(self, prompts, continuations, each=None):
        self.asked += len(prompts)
        pairs = list(zip(prompts, continuations, strict=True))
        noise = [int(hashlib.sha256("\0".join(pair).encode()).hexdigest()[:8], 16) / 2**32 for pair in pairs]
        return [draw + self.lean * math.log(len(prompt)) for draw, prompt in zip(noise, prompts, strict=True)]


def label_by(llm, found, passages, config, journal, seed=0, prompt=LIKELIHOOD):
    """Groups by a language model alone, without an encoder."""
    return label_candidates(found, passages, load_judge(config, llm, prompt), None, config, seed, journal)


def scattered(n, seed=0):
    """A corpus of passages of 5 to 60 words, and n queries with 50 candidates from it, none of them the source."""
    rng = np.random.default_rng(seed)
    texts = [f"p{i} " + "word " * int(rng.integers(4, 60)) for i in range(1000)]
    passages = datasets.Dataset.from_dict({"passage_id": [f"p{i}" for i in range(1000)], "text": texts})
    drawn = [[f"p{i}" for i in rng.permutation(1000)[:51]] for _ in range(n)]
    found = datasets.Dataset.from_dict(
        {
            "query_id": [f"q{i}" for i in range(n)],
            "query": [f"query {i}" for i in range(n)],
            "source_passage_id": [row[0] for row in drawn],
            "passage_ids": [row[1:] for row in drawn],
        }
    )
    return passages, found


def label_file(folder: Path, kill_after: int | None) -> None:
    """What the killed process runs, too."""
    passages, found = scattered(60)
    texts = dict(zip(passages["passage_id"][:], passages["text"][:], strict=True))
    pairs = [
        (LIKELIHOOD.render(passage=texts[key], examples=[]), f" {row['query']}")
        for row in found
        for key in [row["source_passage_id"], *row["passage_ids"]]
    ]
    scores = dict(zip(pairs, HashedJudge().score(*zip(*pairs, strict=True)), strict=True))
    llm = FakeLLM(scores=scores, kill_after=kill_after, log=folder / "asked.jsonl")
    with Journal(folder / "journal.jsonl") as journal:
        tables, _, _ = label_by(llm, found, passages, LabelConfig(candidates=12, random=0), journal, seed=3)
    tables["train"].to_parquet(folder / "groups.parquet")
