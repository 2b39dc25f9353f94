"""Probabilities from logits: the line that makes them, how far they can be trusted, and a cut-off for a precision."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from lce_trainer.errors import EvaluationError

BINS = 15
_FOLDS = 5
_FEWEST = 10  # pairs of each kind, below which nothing is fitted, and pairs above a cut-off
_RESAMPLES = 1000


def calibrate(
    logits: np.ndarray, relevant: np.ndarray, query: np.ndarray, precision: float | None = None, seed: int = 13
) -> dict[str, Any]:
    """Fit probabilities to labelled pairs, and measure them on queries that had no part in the fit.

    The line that is returned is that of all pairs. The figures are of other ones: each fifth of the queries gets the
    probabilities of the line that the others fit, so no pair is measured by a line that a pair of its query has shaped.

    Args:
        logits: The model's scores, shape ``(pairs,)``.
        relevant: True where the passage answers the query, shape ``(pairs,)``.
        query: Number of each pair's query, int, shape ``(pairs,)``.
        precision: The share of relevant pairs that is wanted above a cut-off, above 0 and up to 1.
        seed: Seeds the folds and the bootstrap.

    Returns:
        ``slope`` and ``intercept`` of :func:`fit_line`; ``pairs``, ``relevant``, ``queries``; ``before``, the logits'
        sigmoid as it is, and ``after``, each with ``ece``, ``ece_low`` and ``ece_high`` (its interval), ``brier``,
        ``log_loss`` in nats, and ``bins``: ``predicted``, ``observed`` and ``pairs`` of each; and ``cut_off``, None or
        what :func:`_cut_off` says.

    Raises:
        EvaluationError: There are too few pairs or queries, a score is not finite, the model does not rank these pairs,
            or no cut-off has the wanted precision.
    """
    logits = np.asarray(logits, dtype=np.float64)
    relevant = np.asarray(relevant, dtype=bool)
    _check(logits, relevant, query)
    slope, intercept = fit_line(logits, relevant)
    if slope <= 0:
        raise EvaluationError(
            f"on these {len(logits)} pairs a higher score does not make a passage more likely to be relevant (slope "
            f"{slope:.3g}): are the labels right, and is this the model for such queries?"
        )
    fold = _folds(relevant, query, seed)
    held_out = np.empty(len(logits))
    for number in range(_FOLDS):
        inside = fold == number
        held_out[inside] = probabilities(logits[inside], *fit_line(logits[~inside], relevant[~inside]))
    return {
        "slope": slope,
        "intercept": intercept,
        "pairs": len(logits),
        "relevant": int(relevant.sum()),
        "queries": len(np.unique(query)),
        "before": _measure(probabilities(logits, 1.0, 0.0), relevant, query, seed),
        "after": _measure(held_out, relevant, query, seed),
        "cut_off": None
        if precision is None
        else _cut_off(logits, relevant, query, fold, (slope, intercept), precision, seed),
    }


def fit_line(logits: np.ndarray, relevant: np.ndarray) -> tuple[float, float]:
    """Return slope and intercept for which ``sigmoid(slope * logit + intercept)`` explains the labels best.

    Platt's scaling, by maximum likelihood. The targets are (n + 1) / (n + 2) of the n relevant pairs and 1 / (m + 2) of
    the m others in place of 1 and 0, so that labels which a score separates wholly have a line too.

    Sources: Platt 1999, *Probabilistic Outputs for Support Vector Machines*; Newton's steps with backtracking by Lin,
    Lin & Weng 2007, https://doi.org/10.1007/s10994-007-5018-6.

    Args:
        logits: Scores, shape ``(pairs,)``.
        relevant: True where the passage answers the query, shape ``(pairs,)``.

    Raises:
        EvaluationError: All labels, or all scores, are the same.
    """
    logits = np.asarray(logits, dtype=np.float64)
    positive, negative = int(relevant.sum()), int((~relevant).sum())
    if not positive or not negative:
        raise EvaluationError(
            "all pairs have one kind of label: there must be relevant ones and others, in many queries"
        )
    mean, spread = logits.mean(), logits.std()
    if spread == 0:
        raise EvaluationError(f"all {len(logits)} pairs have the same score, which distinguishes nothing")
    inputs = np.stack([(logits - mean) / spread, np.ones_like(logits)], axis=1)
    target = np.where(relevant, (positive + 1) / (positive + 2), 1 / (negative + 2))

    def loss(line: np.ndarray) -> float:
        values = inputs @ line
        return float((np.logaddexp(0.0, values) - target * values).sum())

    line = np.array([0.0, np.log((positive + 1) / (negative + 1))])
    for _ in range(100):
        chance = probabilities(inputs @ line, 1.0, 0.0)
        gradient = inputs.T @ (chance - target)
        if np.abs(gradient).max() < 1e-10 * len(logits):
            break
        curvature = inputs.T @ (inputs * (chance * (1 - chance))[:, None]) + 1e-12 * np.eye(2)
        step, size, now = np.linalg.solve(curvature, gradient), 1.0, loss(line)
        while size > 1e-10 and loss(line - size * step) > now - 1e-4 * size * float(gradient @ step):
            size /= 2
        line = line - size * step
    return float(line[0] / spread), float(line[1] - line[0] * mean / spread)


def probabilities(logits: np.ndarray, slope: float, intercept: float) -> np.ndarray:
    """Return ``sigmoid(slope * logit + intercept)`` of each logit, float64."""
    found: np.ndarray = np.exp(-np.logaddexp(0.0, -(slope * logits + intercept)))
    return found


def expected_calibration_error(chances: np.ndarray, relevant: np.ndarray, bins: int = BINS) -> float:
    """Return by how much probabilities and the share of relevant pairs differ, on average over bins of equal size.

    Args:
        chances: Probabilities, shape ``(pairs,)``.
        relevant: True where the passage answers the query, shape ``(pairs,)``.
        bins: Number of bins, cut where they hold equally many pairs.
    """
    order = np.argsort(chances, kind="stable")
    mass, predicted, observed = _sums(chances[order], relevant[order], np.ones(len(order)), bins)
    return float(np.abs(predicted - observed).sum() / mass.sum())


def _check(logits: np.ndarray, relevant: np.ndarray, query: np.ndarray) -> None:
    if not np.isfinite(logits).all():
        raise EvaluationError(f"{int((~np.isfinite(logits)).sum())} scores are NaN or infinite: the model is damaged")
    counts = {"relevant pairs": int(relevant.sum()), "pairs that are not relevant": int((~relevant).sum())}
    for what, count in counts.items():
        if count < _FEWEST:
            raise EvaluationError(
                f"{count} {what} are too few to fit probabilities to: label {_FEWEST} or more, better 100"
            )
    for kind, name in ((relevant, "a relevant pair"), (~relevant, "a pair that is not relevant")):
        queries = len(np.unique(query[kind]))
        if queries < _FOLDS:
            raise EvaluationError(
                f"{queries} queries have {name}: {_FOLDS} or more are needed, since the figures are of queries that "
                "had no part in the fit"
            )


def _folds(relevant: np.ndarray, query: np.ndarray, seed: int) -> np.ndarray:
    """Return the fold of each pair, whole queries in one; queries of each kind of label are dealt out evenly."""
    numbers = np.random.default_rng([seed, 1]).permutation(np.unique(query))
    with_relevant, with_other = (np.isin(numbers, query[kind]) for kind in (relevant, ~relevant))
    dealt = numbers[np.argsort(2 * ~with_relevant + ~with_other, kind="stable")]
    fold = dict(zip(dealt.tolist(), (np.arange(len(dealt)) % _FOLDS).tolist(), strict=True))
    return np.array([fold[number] for number in query.tolist()])


def _measure(chances: np.ndarray, relevant: np.ndarray, query: np.ndarray, seed: int) -> dict[str, Any]:
    """Return the figures of some probabilities; the interval is of bootstrap samples of queries, 95 %.

    Noise makes an ECE larger, and that of a sample is larger still; so the interval is the basic one, which subtracts
    what resampling adds (Davison & Hinkley 1997, section 5.2), and not the percentiles; it is widened where it ends
    below the figure itself.
    """
    order = np.argsort(chances, kind="stable")
    sorted_chances, sorted_relevant = chances[order], relevant[order]
    mass, predicted, observed = _sums(sorted_chances, sorted_relevant, np.ones(len(order)), BINS)
    ece = float(np.abs(predicted - observed).sum() / mass.sum())
    found = []
    for counts in _resampled(query[order], seed):
        drawn, *sums = _sums(sorted_chances, sorted_relevant, counts, BINS)
        found.append(float(np.abs(sums[0] - sums[1]).sum() / drawn.sum()))
    low, high = np.percentile(found, [2.5, 97.5])
    inside = np.clip(chances, 1e-15, 1 - 1e-15)
    kept = mass > 0
    return {
        "ece": ece,
        "ece_low": max(2 * ece - float(high), 0.0),
        "ece_high": max(2 * ece - float(low), ece),
        "brier": float(np.mean((chances - relevant) ** 2)),
        "log_loss": float(-np.mean(np.log(np.where(relevant, inside, 1 - inside)))),
        "bins": [
            {"predicted": float(p / m), "observed": float(o / m), "pairs": int(m)}
            for m, p, o in zip(mass[kept], predicted[kept], observed[kept], strict=True)
        ],
    }


def _sums(
    chances: np.ndarray, relevant: np.ndarray, counts: np.ndarray, bins: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return of each bin the pairs, the sum of their probabilities, and the relevant ones, shape ``(bins,)``.

    Args:
        chances: Probabilities in rising order, shape ``(pairs,)``.
        relevant: Their labels.
        counts: How often each of them counts.
        bins: Number of bins of equal mass.
    """
    middle = np.cumsum(counts) - counts / 2
    place = np.minimum(middle * bins / counts.sum(), bins - 1).astype(np.int64)
    weights = (counts, counts * chances, counts * relevant)
    mass, predicted, observed = (np.bincount(place, weight, minlength=bins) for weight in weights)
    return mass, predicted, observed


def _resampled(query: np.ndarray, seed: int) -> Iterator[np.ndarray]:
    """Yield how often each pair counts in a sample of the queries, which are drawn whole: pairs of one are alike."""
    rng = np.random.default_rng([seed, 0])
    _, place = np.unique(query, return_inverse=True)
    queries = int(place.max()) + 1
    for _ in range(_RESAMPLES):
        yield np.bincount(rng.integers(queries, size=queries), minlength=queries)[place].astype(np.float64)


def _cut_off(
    logits: np.ndarray,
    relevant: np.ndarray,
    query: np.ndarray,
    fold: np.ndarray,
    line: tuple[float, float],
    wanted: float,
    seed: int,
) -> dict[str, Any]:
    """Choose the lowest cut-off above which the wanted share of pairs is relevant.

    Returns:
        ``wanted``; ``probability`` and ``logit`` of the cut-off; and where each fifth of the queries is cut by what the
        others choose, ``precision`` with ``precision_low`` and ``precision_high`` (percentile bootstrap over queries,
        95 %), ``recall``, and ``pairs`` that are left. The precision is None where none is left.

    Raises:
        EvaluationError: No cut-off that leaves enough pairs has that precision.
    """
    cut, best = _lowest_cut(logits, relevant, wanted)
    if cut is None:
        raise EvaluationError(
            f"no cut-off has a precision of {wanted:g}: the best that leaves {_FEWEST} pairs or more has {best:.2f}; "
            "lower --precision, label more pairs, or train a better model"
        )
    above = np.zeros(len(logits), dtype=bool)
    for number in range(_FOLDS):
        inside = fold == number
        chosen, _ = _lowest_cut(logits[~inside], relevant[~inside], wanted)
        if chosen is not None:
            above[inside] = logits[inside] >= chosen
    found = []
    for counts in _resampled(query, seed):
        left = float(counts[above].sum())
        found += [float(counts[above & relevant].sum()) / left] if left else []
    ends = np.percentile(found, [2.5, 97.5]).tolist() if found else [None, None]
    return {
        "wanted": wanted,
        "probability": float(probabilities(np.array(cut), *line)),
        "logit": cut,
        "precision": float(relevant[above].mean()) if above.any() else None,
        "precision_low": ends[0],
        "precision_high": ends[1],
        "recall": float(above[relevant].mean()),
        "pairs": int(above.sum()),
    }


def _lowest_cut(logits: np.ndarray, relevant: np.ndarray, wanted: float) -> tuple[float | None, float]:
    """Return the lowest cut-off with the wanted precision, half way to the next lower score, and the best precision.

    Only cut-offs that leave enough pairs count: of three pairs all may be relevant by chance.
    """
    order = np.argsort(-logits, kind="stable")
    scores = logits[order]
    ends = np.flatnonzero(np.append(np.diff(scores) < 0, True))  # equal scores are on one side
    ends = ends[ends + 1 >= _FEWEST]
    if not len(ends):
        return None, 0.0
    precision = np.cumsum(relevant[order])[ends] / (ends + 1)
    enough = ends[precision >= wanted]
    if not len(enough):
        return None, float(precision.max())
    last = int(enough[-1])
    below = scores[last + 1] if last + 1 < len(scores) else scores[last]
    return float((scores[last] + below) / 2), float(precision.max())
