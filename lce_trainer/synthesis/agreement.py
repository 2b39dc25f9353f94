"""How well a judge agrees with people's labels, and judges with each other."""

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np

from lce_trainer.synthesis.shortcut import auc

_RESAMPLES = 1000
_FOLDS = 5


def measure_judge(scores: np.ndarray, relevant: np.ndarray, query: np.ndarray, seed: int = 13) -> dict[str, Any]:
    """Measure a judge on pairs that people have labelled.

    Args:
        scores: The judge's, shape ``(pairs,)``; NaN where it abstains, which counts as its lowest score.
        relevant: True where people find that the passage answers the query, shape ``(pairs,)``.
        query: Number of each pair's query, int, shape ``(pairs,)``.
        seed: Seeds the bootstrap and the folds.

    Returns:
        ``auc`` of all pairs with ``auc_low`` and ``auc_high``, its percentile bootstrap interval over queries, 95 %;
        ``auc_within_query``, the mean over queries that have both kinds, None without one; ``threshold``, the score
        from which on a pair counts as relevant so that Cohen's kappa is highest, and ``kappa`` there;
        ``kappa_held_out``, where each fifth of the queries is decided by the threshold of the others, None for a single
        query; and ``abstained``, the share of pairs. The threshold is None where none is better than no pair at all.
    """
    values = np.where(np.isnan(scores), -np.inf, scores)
    low, high = _auc_interval(values, relevant, query, seed)
    threshold, kappa = _best_threshold(values, relevant)
    within = auc(values, relevant, query)
    return {
        "auc": auc(values, relevant),
        "auc_low": low,
        "auc_high": high,
        "auc_within_query": None if np.isnan(within) else within,
        "threshold": None if np.isinf(threshold) else threshold,
        "kappa": kappa,
        "kappa_held_out": _kappa_held_out(values, relevant, query, seed),
        "abstained": float(np.isnan(scores).mean()),
    }


def cohens_kappa(decided: np.ndarray, relevant: np.ndarray) -> float:
    """Return Cohen's kappa of two yes-or-no labels of the same pairs, of shape ``(pairs,)`` each.

    Source: Cohen 1960, https://doi.org/10.1177/001316446002000104. It is 1 for equal labels, and 0 for an agreement
    that chance explains, also where one of the two gives all pairs the same label.
    """
    agreed = float(np.mean(decided == relevant))
    p, q = float(np.mean(decided)), float(np.mean(relevant))
    chance = p * q + (1 - p) * (1 - q)
    return 1.0 if chance == 1 else (agreed - chance) / (1 - chance)


def mean_of_judges(scores: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the mean of the judges' scores, each standardized over all pairs, shape ``(pairs,)``.

    Of a pair on which some judges abstain, those count that do not; NaN where all abstain.
    """
    standardized = []
    for values in scores.values():
        known = values[~np.isnan(values)]
        spread = float(known.std()) if len(known) else 0.0
        standardized.append((values - known.mean()) / spread if spread > 0 else np.where(np.isnan(values), np.nan, 0.0))
    stacked = np.stack(standardized)
    answers = (~np.isnan(stacked)).sum(axis=0)
    mean: np.ndarray = np.where(answers > 0, np.nansum(stacked, axis=0) / np.maximum(answers, 1), np.nan)
    return mean


def rank_correlations(scores: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Return Spearman's rank correlation of every two judges, over the pairs that both of them scored.

    Args:
        scores: By judge, shape ``(pairs,)``; NaN where it abstains.

    Returns:
        A row every two judges: ``judges``, ``pairs``, and ``spearman``, None where one of the two scores all alike.
    """
    rows = []
    for one, other in combinations(scores, 2):
        both = ~np.isnan(scores[one]) & ~np.isnan(scores[other])
        ranks = [_ranks(scores[name][both]) for name in (one, other)]
        varied = all(len(np.unique(rank)) > 1 for rank in ranks)
        spearman = float(np.corrcoef(ranks[0], ranks[1])[0, 1]) if varied else None
        rows.append({"judges": [one, other], "pairs": int(both.sum()), "spearman": spearman})
    return rows


def _ranks(values: np.ndarray) -> np.ndarray:
    """Return ranks from 1, equal values sharing the mean of theirs."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    ranks: np.ndarray = (np.cumsum(count) - (count - 1) / 2)[place.reshape(-1)]
    return ranks


def _auc_interval(scores: np.ndarray, relevant: np.ndarray, query: np.ndarray, seed: int) -> tuple[float, float]:
    """Return the ends of the interval; queries are drawn and not pairs, since those of one query are alike."""
    rng = np.random.default_rng([seed, 0])
    members = [np.flatnonzero(query == number) for number in np.unique(query)]
    found = []
    for _ in range(_RESAMPLES):
        rows = np.concatenate([members[place] for place in rng.integers(len(members), size=len(members))])
        found.append(auc(scores[rows], relevant[rows]))
    known = np.array(found)[~np.isnan(found)]  # a draw may hold one kind of pairs alone
    low, high = np.percentile(known, [2.5, 97.5])
    return float(low), float(high)


def _best_threshold(scores: np.ndarray, relevant: np.ndarray) -> tuple[float, float]:
    """Return the threshold with the highest kappa, half way to the next lower score, and that kappa.

    Of equally good ones the highest. Infinity, and a kappa of 0, where no threshold is better than no pair at all.
    """
    levels = np.unique(scores[np.isfinite(scores)])[::-1].tolist()
    best, highest = float("inf"), 0.0
    for level, below in zip(levels, [*levels[1:], *levels[-1:]], strict=True):
        kappa = cohens_kappa(scores >= level, relevant)
        if kappa > highest:
            best, highest = (level + below) / 2, kappa
    return best, highest


def _kappa_held_out(scores: np.ndarray, relevant: np.ndarray, query: np.ndarray, seed: int) -> float | None:
    numbers = np.random.default_rng([seed, 1]).permutation(np.unique(query))
    folds = min(_FOLDS, len(numbers))
    if folds < 2:
        return None
    decided = np.zeros(len(scores), dtype=bool)
    for fold in range(folds):
        inside = np.isin(query, numbers[fold::folds])
        threshold, _ = _best_threshold(scores[~inside], relevant[~inside])
        decided[inside] = scores[inside] >= threshold
    return cohens_kappa(decided, relevant)
