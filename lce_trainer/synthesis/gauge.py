"""How far synthetic queries are from those of the people who will search, and the mix of styles that is nearest."""

import itertools
import logging
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from lce_trainer.artifacts import digest
from lce_trainer.synthesis.language import count_words, index_words
from lce_trainer.synthesis.shortcut import auc

logger = logging.getLogger(__name__)

# Fewer queries of the user's say nothing: with five of them the interval of the AUC is half as wide as its range.
_LEAST = 5
_MOST = 1000  # queries of either kind that the classifier learns from; more only cost time
_FOLDS = 5
_BUCKETS = 2048  # of hashed n-grams of characters, and as many of words
_PENALTY = 1e-3  # on the squared weights, beside a mean loss in nats
_LENGTHS = (2, 3, 4, 6, 9, 13)  # words from which a bin of lengths begins
_OVERLAPS = (0.25, 0.5, 0.75)


class Sourced(NamedTuple):
    """A query, and the texts of the passages that answer it; none if they are not in the corpus."""

    query: str
    passages: Sequence[str]


def gauge(own: Sequence[Sourced], synthetic: Sequence[Sourced], seed: int) -> dict[str, Any]:
    """Measure how synthetic queries differ from queries that people have written.

    A logistic regression on hashed n-grams of characters (1 to 3) and on words is trained on four fifths of both
    kinds and guesses on the rest. An AUC of 0.5 means that it cannot distinguish them, 1.0 that it always can. What
    it finds may be the form of the queries or what they are about.

    Args:
        own: Queries of the user's. Dev queries, never the test's.
        synthetic: What the language model wrote.
        seed: Seeds the draw of at most 1,000 queries of either kind, and the folds.

    Returns:
        ``available``, and ``reason`` where it is False. Otherwise ``own`` and ``synthetic``, the numbers of queries;
        ``own_digest``, which changes when the user's queries do; ``auc`` with ``auc_low`` and ``auc_high``, a 95 %
        interval; ``features``, by name the values of the user's and of the synthetic queries.
    """
    if len(own) < _LEAST:
        what = f"only {len(own)} own queries given, {_LEAST} are needed" if own else "no own queries given"
        return {"available": False, "reason": f"{what}: gauge not available"}
    if len(synthetic) < _LEAST:
        return {"available": False, "reason": f"only {len(synthetic)} synthetic queries: gauge not available"}
    rng = np.random.default_rng(seed)
    drawn = [[some[i] for i in np.sort(rng.permutation(len(some))[:_MOST])] for some in (own, synthetic)]
    area = _cross_validated_auc([[each.query for each in some] for some in drawn], rng)
    error = _auc_error(area, len(drawn[0]), len(drawn[1]))
    figures = [_figures(some) for some in (own, synthetic)]
    return {
        "available": True,
        "own": len(own),
        "synthetic": len(synthetic),
        "own_digest": digest(sorted(each.query for each in own)),
        "auc": round(area, 3),
        "auc_low": round(max(area - 1.96 * error, 0.0), 3),
        "auc_high": round(min(area + 1.96 * error, 1.0), 3),
        "features": {name: [figures[0][name], figures[1][name]] for name in figures[0]},
    }


def describe_gauge(found: Mapping[str, Any]) -> str:
    """Return what :func:`gauge` found as one line."""
    if not found["available"]:
        return str(found["reason"])
    features = (f"{name} {_plain(one)} against {_plain(other)}" for name, (one, other) in found["features"].items())
    return (
        f"a classifier distinguishes your {found['own']} dev queries from {found['synthetic']:,} synthetic ones with "
        f"AUC {found['auc']:.2f} [{found['auc_low']:.2f}, {found['auc_high']:.2f}] (0.5: not at all); yours against "
        f"synthetic: {'; '.join(features)}"
    )


def mix_styles(own: Sequence[Sourced], samples: Mapping[str, Sequence[Sourced]]) -> dict[str, float]:
    """Return the weights with which styles together come nearest to the user's queries.

    Nearest by least squares over the shares of queries in bins of length, with a question mark, and in bins of how
    many of their words stand in the passage; weights are not negative and add up to 1. Only what these three
    features show is matched, and a style that differs from another in none of them has an arbitrary weight.

    Args:
        own: Queries of the user's, at least one.
        samples: By style, queries that the language model wrote; styles without any get no weight.

    Returns:
        A weight for each style, in steps of 0.01.
    """
    written = [style for style, some in samples.items() if some]
    target = _profile(own)
    columns = np.stack([_profile(samples[style]) for style in written], axis=1)
    best, weights = math.inf, np.zeros(len(written))
    # Exact, for the few styles there are: the best weights are the best ones on some subset, all of them above 0.
    for size in range(1, len(written) + 1):
        for chosen in itertools.combinations(range(len(written)), size):
            part = columns[:, list(chosen)]
            solved = _sum_to_one(part, target)
            distance = float(np.sum((part @ solved - target) ** 2))
            if solved.min() >= 0 and distance < best - 1e-12:
                best, weights = distance, np.zeros(len(written))
                weights[list(chosen)] = solved
    rounded = dict(zip(written, np.round(weights, 2).tolist(), strict=True))
    return {style: rounded.get(style, 0.0) for style in samples}


def overlap(query: str, passages: Sequence[str]) -> float:
    """Return the largest share of the query's distinct words that stand in one of its passages; NaN without either."""
    words = set(index_words(query))
    if not words or not passages:
        return math.nan
    return max(len(words & set(index_words(text))) / len(words) for text in passages)


def _sum_to_one(columns: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Return the least-squares weights that add up to 1, of any sign, shape ``(columns,)``."""
    first, rest = columns[:, :1], columns[:, 1:]
    others, *_ = np.linalg.lstsq(rest - first, target - first[:, 0], rcond=None)
    return np.concatenate([[1 - others.sum()], others])


def _profile(some: Sequence[Sourced]) -> np.ndarray:
    """Return the shares of queries by length, with a question mark, and by overlap, shape ``(features,)``."""
    lengths = np.digitize([count_words(each.query) for each in some], _LENGTHS)
    overlaps = np.array([overlap(*each) for each in some])
    known = np.digitize(overlaps[~np.isnan(overlaps)], _OVERLAPS)
    return np.concatenate(
        [
            np.bincount(lengths, minlength=len(_LENGTHS) + 1) / len(some),
            [np.mean(["?" in each.query or "？" in each.query for each in some])],
            np.bincount(known, minlength=len(_OVERLAPS) + 1) / max(len(known), 1),
        ]
    )


def _figures(some: Sequence[Sourced]) -> dict[str, float | None]:
    """Return what is shown of the queries beside the AUC; None where it is not known."""
    lengths = np.array([count_words(each.query) for each in some])
    overlaps = np.array([overlap(*each) for each in some])
    known = overlaps[~np.isnan(overlaps)]
    words = {f"words, {name}": float(np.percentile(lengths, at)) for name, at in _PERCENTILES.items()}
    return {
        **{name: round(value, 1) for name, value in words.items()},
        "with a question mark": round(float(np.mean(["?" in each.query or "？" in each.query for each in some])), 3),
        "words that stand in the passage": round(float(known.mean()), 3) if len(known) else None,
    }


_PERCENTILES = {"10th percentile": 10, "median": 50, "90th percentile": 90}


def _cross_validated_auc(texts: Sequence[Sequence[str]], rng: np.random.Generator) -> float:
    """Return the mean AUC over folds that the classifier has not learned from.

    Args:
        texts: Queries of the user's, and synthetic ones.
        rng: Draws the folds.
    """
    features = _hashed([*texts[0], *texts[1]])
    positive = np.repeat([True, False], [len(texts[0]), len(texts[1])])
    folds = min(_FOLDS, len(texts[0]), len(texts[1]))
    # Both kinds are in every fold. A text that occurs twice is in one fold, or it would be recognised.
    fold = np.empty(len(positive), dtype=np.int64)
    start = 0
    for some in texts:
        code = np.unique(some, return_inverse=True)[1].reshape(-1)
        fold[start : start + len(some)] = (rng.permutation(code.max() + 1) % folds)[code]
        start += len(some)
    areas = []
    for held_out in range(folds):
        test = fold == held_out
        if positive[test].any() and not positive[test].all() and positive[~test].any() and not positive[~test].all():
            weights = _logistic_regression(features[torch.from_numpy(~test)], torch.from_numpy(positive[~test]))
            # Rounded, so that equal queries score alike whatever the order in which a CPU adds.
            areas.append(
                auc(torch.round(features[torch.from_numpy(test)] @ weights, decimals=6).numpy(), positive[test])
            )
    return float(np.mean(areas)) if areas else math.nan


def _hashed(texts: Sequence[str]) -> torch.Tensor:
    """Return which n-grams of characters and which words each text has, by bucket, unit length, float64."""
    found = torch.zeros(len(texts), 2 * _BUCKETS, dtype=torch.float64)
    for row, text in enumerate(texts):
        found[row, list({zlib.crc32(gram.encode("utf-8", "replace")) % _BUCKETS for gram in _grams(text)})] = 1
        found[row, [_BUCKETS + zlib.crc32(w.encode("utf-8", "replace")) % _BUCKETS for w in set(index_words(text))]] = 1
    return torch.nn.functional.normalize(found)


def _grams(text: str) -> Iterator[str]:
    """Yield runs of one to three characters, beginning and end of the text marked; small and capital as they are."""
    marked = f"\x02{text}\x03"
    for size in (1, 2, 3):
        yield from (marked[i : i + size] for i in range(len(marked) - size + 1))


def _logistic_regression(features: torch.Tensor, positive: torch.Tensor) -> torch.Tensor:
    """Return the weights of a logistic regression without intercept, both classes weighing the same."""
    target = positive.to(features)
    weight = torch.where(positive, 0.5 / target.sum(), 0.5 / (1 - target).sum())
    weights = torch.zeros(features.shape[1], dtype=features.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        scores = features @ weights
        loss = torch.nn.functional.binary_cross_entropy_with_logits(scores, target, weight=weight, reduction="sum")
        loss = loss + _PENALTY * weights.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return weights.detach()


def _auc_error(area: float, positives: int, negatives: int) -> float:
    """Return the standard error of an AUC. Source: Hanley & McNeil 1982, https://doi.org/10.1148/radiology.143.1.7063747."""
    q1, q2 = area / (2 - area), 2 * area**2 / (1 + area)
    spread = (positives - 1) * (q1 - area**2) + (negatives - 1) * (q2 - area**2)
    return math.sqrt(max(area * (1 - area) + spread, 0.0) / (positives * negatives))


def _plain(value: float | None) -> str:
    return "unknown" if value is None else f"{value:g}"
