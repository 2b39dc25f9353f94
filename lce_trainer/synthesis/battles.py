"""Scores from comparisons: few battles between a query's candidates, and the strengths that explain their outcomes.

Sources: Thurstone 1927, *A law of comparative judgment*, for the model; Pipitone, Houir Alami, Avadhanam, Kaminskyi and
Khoo 2025, *zELO*, https://huggingface.co/papers/2509.12541, for sparse battles decided by a language model.
"""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch

from lce_trainer.artifacts import digest

# Precision of the normal prior of a strength, so that one who wins all has a finite one: a standard deviation of 3.2,
# where a difference of 2 is a win in 98 of 100 battles.
_PRECISION = 0.1
_MOST_STEPS = 100
_NEAR = 1e-10  # a step so small ends the search
_STEP = 1.0  # of a strength at most, where the curve is too flat for Newton's step to be trusted
_CELLS = 1 << 22  # of the matrices that are solved at once


def draw_battles(query: np.ndarray, names: Sequence[str], opponents: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw who meets whom: each candidate meets equally many others of its query, and all are connected.

    The candidates of a query stand in a random ring; each meets its neighbours, and those at further distances that
    are drawn for the whole ring. In a pool of no more than ``opponents + 1`` candidates each meets all others. The draw
    depends on the names of a query's own candidates, and not on their order.

    Args:
        query: The query of each candidate, int, shape ``(candidates,)``.
        names: What tells the candidates of a query apart.
        opponents: How many others each candidate meets; an even number.
        seed: Seeds the draw.

    Returns:
        The two candidates of each battle, int64, shape ``(battles,)`` each, query after query.
    """
    left: list[int] = []
    right: list[int] = []
    order = np.argsort(query, kind="stable")
    for members in np.split(order, np.flatnonzero(np.diff(query[order])) + 1) if len(order) else ():
        ring = sorted(members.tolist(), key=lambda place: names[place])
        rng = np.random.default_rng(int(digest([seed, *(names[place] for place in ring)]), 16))
        ring = [ring[place] for place in rng.permutation(len(ring))]
        n = len(ring)
        if n <= opponents + 1:
            met = list(itertools.combinations(range(n), 2))
        else:
            further = rng.choice(np.arange(2, (n + 1) // 2), opponents // 2 - 1, replace=False).tolist()
            met = [(place, (place + distance) % n) for distance in (1, *further) for place in range(n)]
        left += [ring[one] for one, _ in met]
        right += [ring[other] for _, other in met]
    return np.array(left, dtype=np.int64), np.array(right, dtype=np.int64)


def strengths(left: np.ndarray, right: np.ndarray, wins: np.ndarray, query: np.ndarray) -> np.ndarray:
    """Return the strength of each candidate that makes the outcomes of the battles of its query most likely.

    In Thurstone's model one beats another with probability Φ(difference of their strengths). The likelihood has a
    normal prior on the strengths, and one maximum, which Newton's method finds for all queries at once.

    Args:
        left: One candidate of each battle, shape ``(battles,)``.
        right: The other one.
        wins: How likely ``left`` wins, from 0 to 1; NaN where that is not known.
        query: The query of each candidate, int, shape ``(candidates,)``.

    Returns:
        Float64, shape ``(candidates,)``, with mean 0 over a query; a difference of 1 is a win in 84 of 100 battles.
        NaN for a candidate none of whose battles has a known outcome.
    """
    known = ~np.isnan(wins)
    left, right, wins = left[known], right[known], wins[known].astype(np.float64)
    found = np.full(len(query), np.nan)
    fought = np.unique(np.concatenate([left, right]))
    if not len(fought):
        return found
    rows, row = np.unique(query[fought], return_inverse=True)
    order = np.argsort(row, kind="stable")
    fought, row = fought[order], row[order]
    starts = np.searchsorted(row, np.arange(len(rows) + 1))
    place = np.arange(len(fought)) - starts[row]
    width = int(place.max()) + 1
    at = np.zeros(len(query), dtype=np.int64)
    at[fought] = row * width + place  # the cell of each candidate in a table of a row a query
    left, right = at[left], at[right]
    window = max(_CELLS // width**2, 1)
    table = np.zeros(len(rows) * width)
    for first in range(0, len(rows), window):
        n = min(window, len(rows) - first)
        inside = (left >= first * width) & (left < (first + n) * width)
        cells = slice(first * width, (first + n) * width)
        table[cells] = _fit(left[inside] - cells.start, right[inside] - cells.start, wins[inside], n, width).reshape(-1)
    found[fought] = table[at[fought]]
    return found


def _fit(left: np.ndarray, right: np.ndarray, wins: np.ndarray, n: int, width: int) -> np.ndarray:
    """Return the strengths of n queries of ``width`` candidates at most, shape ``(n, width)``."""
    table = np.zeros(n * width)
    rows, one, other = left // width, left % width, right % width
    corners = [(one, one, 1), (other, other, 1), (one, other, -1), (other, one, -1)]
    for _ in range(_MOST_STEPS):
        ahead = table[left] - table[right]
        by, against = _hazard(ahead), _hazard(-ahead)
        push = wins * by - (1 - wins) * against
        curve = wins * by * (by + ahead) + (1 - wins) * against * (against - ahead)
        slope = np.bincount(left, push, n * width) - np.bincount(right, push, n * width) - _PRECISION * table
        bend = np.zeros(n * width * width)
        for some, others, sign in corners:
            bend += sign * np.bincount((rows * width + some) * width + others, curve, len(bend))
        bend = bend.reshape(n, width, width) + _PRECISION * np.eye(width)
        step = np.linalg.solve(bend, slope.reshape(n, width, 1))[..., 0]
        largest = np.abs(step).max(axis=1, keepdims=True)
        table += (step * np.minimum(1, _STEP / np.maximum(largest, _NEAR))).reshape(-1)
        if largest.max() < _NEAR:
            break
    return table.reshape(n, width)


def _hazard(ahead: np.ndarray) -> np.ndarray:
    """Return φ(x) / Φ(x), the derivative of log Φ(x)."""
    log_ndtr = torch.special.log_ndtr(torch.from_numpy(ahead)).numpy()
    hazard: np.ndarray = np.exp(-(ahead**2) / 2 - math.log(2 * math.pi) / 2 - log_ndtr)
    return hazard
