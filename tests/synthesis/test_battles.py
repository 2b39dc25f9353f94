import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lce_trainer.synthesis.battles import draw_battles, strengths


def drawn(n, opponents, seed=0, query=None):
    query = np.zeros(n, dtype=np.int64) if query is None else query
    return draw_battles(query, [f"p{i}" for i in range(n)], opponents, seed)


def normal_cdf(x):
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


def reached(start, left, right):
    """Candidates that battles connect with one of them."""
    known, more = {start}, True
    while more:
        grown = known | {b for a, b in zip(left, right, strict=True) if a in known}
        grown |= {a for a, b in zip(left, right, strict=True) if b in known}
        known, more = grown, len(grown) > len(known)
    return known


@settings(max_examples=60, deadline=None)
@given(n=st.integers(2, 40), opponents=st.sampled_from([2, 4, 6, 8]), seed=st.integers(0, 10**6))
def test_each_candidate_meets_as_many_others_once_each_and_all_are_connected(n, opponents, seed):
    left, right = drawn(n, opponents, seed)
    met = {frozenset(pair) for pair in zip(left.tolist(), right.tolist(), strict=True)}
    assert len(met) == len(left) and all(len(pair) == 2 for pair in met)
    assert set(np.bincount(np.r_[left, right], minlength=n)) == {min(opponents, n - 1)}
    assert reached(0, left.tolist(), right.tolist()) == set(range(n))


def test_nobody_meets_a_candidate_of_another_query_and_one_alone_meets_nobody():
    query = np.array([3, 0, 3, 0, 3, 7, 3, 3, 3, 3])
    left, right = drawn(10, 4, query=query)
    assert (query[left] == query[right]).all()
    assert 5 not in np.r_[left, right]
    assert drawn(0, 4)[0].shape == (0,)


def test_who_meets_whom_depends_on_the_candidates_and_the_seed_alone():
    names = [f"p{i}" for i in range(12)]
    order = np.random.default_rng(1).permutation(12)

    def met(names, seed=0, before=0):
        query = np.r_[np.zeros(before), np.ones(len(names))].astype(int)
        every = [f"other {i}" for i in range(before)] + names
        left, right = draw_battles(query, every, 4, seed)
        pairs = {frozenset((every[a], every[b])) for a, b in zip(left, right, strict=True)}
        return {pair for pair in pairs if not any(name.startswith("other") for name in pair)}

    assert met(names) == met([names[i] for i in order]) == met(names, before=9)
    assert met(names) != met(names, seed=1)


@pytest.mark.parametrize("n", [5, 16, 60])
def test_a_planted_order_is_recovered_from_sparse_battles(n):
    rng = np.random.default_rng(n)
    planted = rng.permutation(np.linspace(-2, 2, n))
    left, right = drawn(n, 4)
    wins = np.array([normal_cdf(planted[a] - planted[b]) for a, b in zip(left, right, strict=True)])
    found = strengths(left, right, wins, np.zeros(n, dtype=int))
    # The prior alone keeps it from the planted values: it pulls towards 0, and may swap two that are near.
    apart = planted[:, None] > planted[None, :] + 0.5
    assert (found[:, None] > found[None, :])[apart].all()
    assert np.abs(found).max() < np.abs(planted).max()
    assert np.corrcoef(found, planted)[0, 1] > 0.99


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=5),
    seed=st.integers(0, 10**6),
    outcomes=st.sampled_from(["fair", "sure", "some unknown"]),
)
def test_strengths_are_the_maximum_have_mean_0_and_do_not_depend_on_order_or_other_queries(sizes, seed, outcomes):
    rng = np.random.default_rng(seed)
    query = np.repeat(np.arange(len(sizes)), sizes)
    left, right = drawn(len(query), 4, seed, query)
    wins = rng.random(len(left))
    if outcomes == "sure":
        wins = wins.round()
    if outcomes == "some unknown":
        wins[rng.random(len(wins)) < 0.4] = np.nan
    found = strengths(left, right, wins, query)
    fought = np.zeros(len(query), dtype=bool)
    fought[np.r_[left, right][~np.isnan(np.r_[wins, wins])]] = True
    assert (np.isfinite(found) == fought).all()

    # The derivative of the log-likelihood and of the prior, by central differences.
    def objective(values):
        known = ~np.isnan(wins)
        ahead = values[left[known]] - values[right[known]]
        up, down = (np.log([normal_cdf(sign * x) for x in ahead]) if len(ahead) else 0.0 for sign in (1, -1))
        return np.sum(wins[known] * up + (1 - wins[known]) * down) - 0.05 * np.sum(values**2)

    start = np.where(fought, found, 0.0)
    for place in np.flatnonzero(fought):
        nudge = np.zeros(len(start))
        nudge[place] = 1e-4
        assert abs(objective(start + nudge) - objective(start - nudge)) / 2e-4 < 1e-5
    for number in range(len(sizes)):
        mine = found[(query == number) & fought]
        assert not len(mine) or abs(mine.sum()) < 1e-8

    order = rng.permutation(len(query))
    place = np.argsort(order)
    again = strengths(place[right], place[left], 1 - wins, query[order])
    np.testing.assert_allclose(again, found[order], atol=1e-8)
    alone = query == query[0]
    inside = alone[left]
    first = strengths(left[inside], right[inside], wins[inside], query[alone])
    np.testing.assert_allclose(first, found[alone], atol=1e-8)


def test_who_wins_all_and_who_loses_all_have_finite_strengths():
    left, right = drawn(30, 4)
    wins = np.where(left == 7, 1.0, np.where(right == 7, 0.0, 0.5))
    wins = np.where(left == 3, 0.0, np.where(right == 3, 1.0, wins))
    found = strengths(left, right, wins, np.zeros(30, dtype=int))
    assert np.isfinite(found).all()
    assert (found.argmax(), found.argmin()) == (7, 3)
    assert 1 < found[7] < 6


def test_a_single_battle_has_the_strengths_of_its_equation():
    (found,) = {round(abs(x), 9) for x in strengths(np.array([0]), np.array([1]), np.array([1.0]), np.zeros(2, int))}
    # φ(2s) / Φ(2s) = 0.1 s
    density = math.exp(-2 * found**2) / math.sqrt(2 * math.pi)
    assert density / normal_cdf(2 * found) == pytest.approx(0.1 * found, abs=1e-7)


def test_many_queries_are_the_same_however_many_are_solved_at_once(monkeypatch):
    sizes = [2, 9, 16, 5, 1, 16] * 4
    query = np.repeat(np.arange(len(sizes)), sizes)
    left, right = drawn(len(query), 6, 0, query)
    wins = np.random.default_rng(0).random(len(left))
    whole = strengths(left, right, wins, query)
    monkeypatch.setattr("lce_trainer.synthesis.battles._CELLS", 16**2 * 5)
    np.testing.assert_allclose(strengths(left, right, wins, query), whole, atol=1e-9)
