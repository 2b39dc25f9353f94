"""Filters of queries: near-duplicates, and queries that say too little to tell one passage from another."""

import math
from collections import Counter
from collections.abc import Collection, Sequence

import numpy as np

from lce_trainer.synthesis.language import index_words
from lce_trainer.synthesis.retrieval.hybrid import FirstStage

_NEARLY = 0.95  # of the best passage's score


def near_duplicates(queries: Sequence[str], threshold: float) -> list[int]:
    """Return the queries whose set of words has a Jaccard similarity of ``threshold`` or more with an earlier one kept.

    Exact. Two sets that are so similar share one of their rarest words, so only the first few of each are compared.
    Source: prefix filtering, Chaudhuri, Ganti & Kaushik 2006, https://doi.org/10.1109/ICDE.2006.9.

    Args:
        queries: Texts.
        threshold: Above 0, to 1, which is the same words in any order.

    Returns:
        Their indices, in order.
    """
    sets = [frozenset(index_words(query)) for query in queries]
    common = Counter(word for words in sets for word in words)
    kept_with: dict[str, list[int]] = {}
    dropped = []
    for item, words in enumerate(sets):
        if not words:
            continue
        rarest = sorted(words, key=lambda word: (common[word], word))
        prefix = rarest[: len(words) - math.ceil(threshold * len(words) - 1e-9) + 1]
        others = {other for word in prefix for other in kept_with.get(word, ())}
        if any(_jaccard(words, sets[other]) >= threshold - 1e-9 for other in others):
            dropped.append(item)
            continue
        for word in prefix:
            kept_with.setdefault(word, []).append(item)
    return dropped


def vague_queries(queries: Sequence[str], most: int, first_stage: FirstStage) -> list[int]:
    """Return the queries for which too many passages score within 5 % of the best one.

    Every retriever of the first stage has to find it so: a word that many passages hold may still be clear to an
    encoder, and the other way round.

    Args:
        queries: Texts.
        most: Passages within 5 % of the best score, itself included, that are not too many.
        first_stage: Retrievers over the corpus.

    Returns:
        Their indices, in order.
    """
    vague = np.ones(len(queries), dtype=bool)
    for retriever in first_stage.retrievers.values():
        rows, scores = retriever.search(queries, most + 1)
        if rows.shape[1] <= most:  # a corpus of no more passages
            return []
        vague &= (rows[:, most] >= 0) & (scores[:, 0] > 0) & (scores[:, most] >= _NEARLY * scores[:, 0])
    return np.flatnonzero(vague).tolist()


def _jaccard(one: Collection[str], other: Collection[str]) -> float:
    both = len(set(one) & set(other))
    return both / (len(one) + len(other) - both)
