"""A warm start for a cross-encoder that costs no LLM call.

An encoder trained for embeddings knows which texts are alike, yet with a fresh classification
head it ranks at chance and needs thousands of pairs to learn to compare two texts in one
sequence. Here its own similarity is the teacher: pseudo-queries are cut from the corpus, and the
cross-encoder fits the softmax of the bi-encoder's cosines over each query's pool.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np

from lce_trainer.errors import TrainingError
from lce_trainer.groups.schema import GROUPS_FEATURES
from lce_trainer.settings import option
from lce_trainer.synthesis.retrieval.bm25 import BM25Index

_WORD = re.compile(r"[^\W_][\w\-]*[^\W_]")
_SENTENCE = re.compile(r"(?<=[.!?:])\s+|\n+")
# Windows are shared: each is in about so many pools, so the teacher embeds far fewer texts than pairs.
_USES_OF_A_WINDOW = 4
_SHORTEST_WINDOW = 20


@dataclass
class WarmStartConfig:
    """A start that costs no LLM call: the base model's own similarity, taught to the cross-encoder.

    Only worth its time when the base is an encoder for embeddings; a reranker from the Hub
    needs none (``pairs: 0``).
    """

    pairs: int = option(0, "Pairs to train on before the judged groups; 0 switches it off.")
    teacher: str | None = option(None, "Encoder for embeddings whose similarity is taught; train.model if null.")
    group_size: int = option(8, "Passages of each pseudo-query's pool.")
    hard: int = option(4, "How many of them BM25 brings; the rest are drawn at random.")
    temperature: float = option(0.05, "Of the softmax over the teacher's cosine similarities.")
    learning_rate: float = option(2e-4, "Peak learning rate of the warm start.")
    max_passage_words: int = option(70, "Words of a passage window; windows are drawn at random.")


def warm_start_groups(
    passages: datasets.Dataset,
    embed: Callable[[Sequence[str]], np.ndarray],
    config: WarmStartConfig,
    seed: int,
    index_path: Path,
) -> tuple[datasets.Dataset, dict[str, int]]:
    """Pseudo-queries with their pools, scored by the bi-encoder.

    Args:
        passages: The passages artifact.
        embed: Texts to unit vectors, shape ``(texts, dim)``.
        config: How many pairs, how large a pool, how many of it hard.
        seed: Seeds every draw.
        index_path: Folder for the BM25 index over the windows.

    Returns:
        Groups whose ``scores`` are cosines; the source window is labelled 1, the rest of its pool 0.

    Raises:
        TrainingError: The corpus is smaller than one pool.
    """
    rng = np.random.default_rng(seed)
    n_queries = config.pairs // config.group_size
    n_windows = max(config.pairs // _USES_OF_A_WINDOW, 2 * config.group_size)
    windows = _windows(passages["text"][:], n_windows, config.max_passage_words, rng)
    if len(windows) < config.group_size:
        raise TrainingError(
            f"the warm start needs at least {config.group_size} passages of different text, there are {len(windows)}: "
            f"set train.warm_start.pairs=0"
        )
    rarity = _rarity(windows)
    sources: list[int] = np.resize(rng.permutation(len(windows)), n_queries).tolist()
    queries = [_pseudo_query(windows[row], rarity, rng) for row in sources]

    table = datasets.Dataset.from_dict({"text": windows})
    found, _ = BM25Index.build(table, index_path).search(queries, min(4 * config.hard + 1, len(windows)))
    pools = np.stack(
        [_pool(source, row, len(windows), config, rng) for source, row in zip(sources, found, strict=True)]
    )

    query_vectors, window_vectors = embed(queries), embed(windows)
    cosines = np.einsum("qd,qpd->qp", query_vectors, window_vectors[pools])
    ids = [f"w{row}" for row in range(len(windows))]
    groups = datasets.Dataset.from_dict(
        {
            "query_id": [f"warm-{i}" for i in range(n_queries)],
            "query": queries,
            "passage_ids": [[ids[row] for row in pool] for pool in pools],
            "passages": [[windows[row] for row in pool] for pool in pools],
            "labels": [[1.0] + [0.0] * (config.group_size - 1)] * n_queries,
            "scores": cosines.astype(np.float32).tolist(),
        },
        features=GROUPS_FEATURES,
    )
    return groups, {"groups": n_queries, "pairs": int(pools.size), "windows": len(windows)}


def _windows(texts: Sequence[str], n: int, max_words: int, rng: np.random.Generator) -> list[str]:
    """Runs of words of random length and place, from passages drawn uniformly; distinct, in drawn order."""
    windows: dict[str, None] = {}
    for row in np.resize(rng.permutation(len(texts)), n).tolist():
        words = texts[row].split()
        length = int(rng.integers(min(_SHORTEST_WINDOW, max_words), max_words + 1))
        start = int(rng.integers(0, max(len(words) - length, 0) + 1))
        windows.setdefault(" ".join(words[start : start + length]))
    return list(windows)


def _rarity(windows: Sequence[str]) -> dict[str, float]:
    """Inverse document frequency of each word, nats."""
    seen: dict[str, int] = {}
    for window in windows:
        for word in set(_WORD.findall(window.lower())):
            seen[word] = seen.get(word, 0) + 1
    return {word: float(np.log(len(windows) / count)) for word, count in seen.items()}


def _pseudo_query(window: str, rarity: dict[str, float], rng: np.random.Generator) -> str:
    """A few of the window's rare words, or one of its sentences with words left out."""
    sentences = [sentence for sentence in _SENTENCE.split(window) if 4 <= len(sentence.split()) <= 30]
    if sentences and rng.random() < 0.4:
        words = sentences[int(rng.integers(len(sentences)))].split()
        kept = [word for word, drawn in zip(words, rng.random(len(words)), strict=True) if drawn > 0.3]
        return " ".join(kept or words)
    words = list(dict.fromkeys(_WORD.findall(window)))
    if not words:
        return window
    rare = sorted(words, key=lambda word: -rarity.get(word.lower(), 0.0))[:10]
    n = min(int(rng.integers(2, 6)), len(rare))
    drawn = {rare[i] for i in rng.permutation(len(rare))[:n]}
    return " ".join(word for word in words if word in drawn)


def _pool(
    source: int, found: np.ndarray, n_windows: int, config: WarmStartConfig, rng: np.random.Generator
) -> np.ndarray:
    """The source first, then what BM25 found, then windows drawn at random."""
    hard = found[(found >= 0) & (found != source)]
    hard = rng.permutation(hard)[: config.hard]
    pool = np.concatenate([[source], hard])
    others = rng.permutation(np.setdiff1d(rng.integers(0, n_windows, 4 * config.group_size), pool))
    pool = np.concatenate([pool, others])[: config.group_size]
    if len(pool) < config.group_size:
        rest = np.setdiff1d(np.arange(n_windows), pool)
        pool = np.concatenate([pool, rest[: config.group_size - len(pool)]])
    return pool.astype(np.int64)
