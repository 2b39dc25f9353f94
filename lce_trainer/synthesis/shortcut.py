"""What a reranker could learn from a labelled set without reading a single query.

Whatever tells positives from negatives query-blind is learned before relevance: a set whose
positives were shorter than its negatives (length alone: AUC 0.74) taught a reranker to rank
worse than BM25. So every labelled set is shown to guessers that see the passage alone.
"""

import logging

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

logger = logging.getLogger(__name__)

# An AUC is known to about 0.01 from so many groups; more only cost time.
_MAX_GROUPS = 5000
_FOLDS = 5
_WARN_ABOVE = 0.6
_ADVICE = {
    "length": "set label.match_length=true and raise label.candidates, so that there are lengths to choose from",
    "words": "positives are worded unlike negatives: look at some of both, and clean boilerplate out of the corpus",
    "popularity": "the same passages are negatives again and again: draw more passages (generate.queries) "
    "or mine deeper (mine.top_k)",
}


def shortcut_probe(groups: datasets.Dataset, seed: int = 0) -> dict[str, float]:
    """How often a guesser that never sees the query puts a positive above a negative of its group.

    Groups are what the LCE loss compares in, so each AUC is taken inside groups and averaged over
    them; 0.5 is chance. ``length`` counts words and knows no direction, so it is at least 0.5.
    The others learn from four fifths of the queries and guess on the rest, so on labels that
    hold no shortcut they may fall a little under 0.5: ``words`` is naive Bayes over the words of
    the passage, ``popularity`` how often that very passage was positive or negative elsewhere.

    Args:
        groups: The groups artifact; at most 5,000 of them, drawn by the seed, are probed.
        seed: Seeds the draw and the folds.

    Returns:
        AUC by guesser; NaN where no group has both a positive and a negative.
    """
    rng = np.random.default_rng(seed)
    rows = np.sort(rng.permutation(len(groups))[:_MAX_GROUPS])
    table = groups.select_columns(["passage_ids", "passages", "labels"]).select(rows).with_format("arrow")[:]
    lengths = pc.list_value_length(table["labels"]).to_numpy(zero_copy_only=False)
    row = np.repeat(np.arange(len(rows)), lengths)
    positive = pc.list_flatten(table["labels"]).to_numpy(zero_copy_only=False) > 0
    fold = rng.integers(0, _FOLDS, len(rows))[row]
    passages, ids = (pc.list_flatten(table[name]).combine_chunks() for name in ("passages", "passage_ids"))

    one_each = np.arange(len(row))
    length = auc(word_counts(passages), positive, row)
    probe = {
        "length": max(length, 1 - length),
        "words": auc(_learned(*_words(passages), positive, row, fold), positive, row),
        "popularity": auc(_learned(_codes(ids), one_each, positive, row, fold), positive, row),
    }
    for name, value in probe.items():
        if value > _WARN_ABOVE:
            logger.warning(
                "a guesser that sees only the passage's %s tells positives from negatives with AUC %.2f, over %.1f: "
                "the reranker will learn that first; %s",
                name,
                value,
                _WARN_ABOVE,
                _ADVICE[name],
            )
    return probe


def auc(scores: np.ndarray, positive: np.ndarray, group: np.ndarray | None = None) -> float:
    """Chance that a positive scores above a negative, ties counting half (Mann-Whitney U).

    Args:
        scores: Shape ``(n,)``.
        positive: True where the label is positive, shape ``(n,)``.
        group: Compare inside groups only, and average over those that have both; int, shape ``(n,)``.

    Returns:
        Between 0 and 1; NaN if no group has both.
    """
    scores, positive = np.asarray(scores, dtype=np.float64), np.asarray(positive, dtype=bool)
    if not len(scores):
        return float("nan")
    group = np.zeros(len(scores), dtype=np.int64) if group is None else np.asarray(group)
    order = np.lexsort((scores, group))
    scores, positive, group = scores[order], positive[order], group[order]
    new_group = np.r_[True, group[1:] != group[:-1]]
    new_run = new_group | np.r_[True, scores[1:] != scores[:-1]]
    # Items of one run (equal scores in one group) share the mean of their places.
    starts = np.flatnonzero(new_run)
    ends = np.r_[starts[1:], len(scores)]
    run = np.cumsum(new_run) - 1
    group = np.cumsum(new_group) - 1
    rank = (starts + ends + 1)[run] / 2 - np.flatnonzero(new_group)[group]
    n_positive = np.bincount(group, weights=positive)
    n_negative = np.bincount(group, weights=~positive)
    both = (n_positive > 0) & (n_negative > 0)
    if not both.any():
        return float("nan")
    above = np.bincount(group, weights=rank * positive) - n_positive * (n_positive + 1) / 2
    return float(np.mean(above[both] / (n_positive * n_negative)[both]))


def word_counts(texts: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Words of each text, split at white space; int64, shape ``(texts,)``."""
    counts: np.ndarray = pc.count_substring_regex(texts, pattern=r"\S+").to_numpy(zero_copy_only=False)
    return counts.astype(np.int64)


def _words(passages: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Code of every distinct word of every passage, and which passage holds it."""
    plain = pc.utf8_trim_whitespace(pc.replace_substring_regex(pc.utf8_lower(passages), r"[^\pL\pN]+", " "))
    words = pc.utf8_split_whitespace(plain)
    owner = np.repeat(np.arange(len(passages)), pc.list_value_length(words).to_numpy(zero_copy_only=False))
    codes = _codes(pc.list_flatten(words))
    pairs = np.unique(owner * (codes.max(initial=0) + 1) + codes)
    return pairs % (codes.max(initial=0) + 1), pairs // (codes.max(initial=0) + 1)


def _codes(values: pa.Array) -> np.ndarray:
    """Strings as integers, equal for equal strings; int64."""
    codes: np.ndarray = values.dictionary_encode().indices.to_numpy(zero_copy_only=False)
    return codes.astype(np.int64)


def _learned(
    codes: np.ndarray, owner: np.ndarray, positive: np.ndarray, row: np.ndarray, fold: np.ndarray
) -> np.ndarray:
    """Mean log-odds of a passage's features, counted on the folds that its group is not in.

    Args:
        codes: A feature, shape ``(features,)``.
        owner: Index of the passage that has it, shape ``(features,)``.
        positive: True where a passage is positive, shape ``(passages,)``.
        row: Group of each passage, shape ``(passages,)``.
        fold: Fold of each passage's group, shape ``(passages,)``.
    """
    # A group's positives weigh as much as its negatives, or large groups would drown small ones.
    side = 2 * row + positive
    weight = 1 / np.bincount(side)[side]
    size = int(codes.max(initial=0)) + 1
    cell = fold[owner] * size + codes
    odds = []
    for label in (positive, ~positive):
        counts = np.bincount(cell, weights=(weight * label)[owner], minlength=_FOLDS * size).reshape(_FOLDS, size)
        elsewhere = counts.sum(0) - counts
        # Add-one smoothing; a feature seen nowhere else says nothing.
        odds.append(np.log(elsewhere + 1))
    log_odds = (odds[0] - odds[1]).reshape(-1)
    n_features = np.bincount(owner, minlength=len(row))
    total: np.ndarray = np.bincount(owner, weights=log_odds[cell], minlength=len(row))
    return total / np.maximum(n_features, 1)
