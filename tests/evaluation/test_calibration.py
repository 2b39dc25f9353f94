"""Probabilities of simulated scores, whose line is known, and of labels chosen so that the figures can be counted."""

import numpy as np
import pytest

from lce_trainer.errors import EvaluationError
from lce_trainer.evaluation.calibration import (
    _folds,
    _lowest_cut,
    _sums,
    calibrate,
    expected_calibration_error,
    fit_line,
    probabilities,
)


def simulated(queries: int = 400, each: int = 25, slope: float = 0.7, intercept: float = -2.0, seed: int = 0):
    """Logits of pairs whose labels are drawn by a known line."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, queries * each)
    relevant = rng.random(len(logits)) < 1 / (1 + np.exp(-(slope * logits + intercept)))
    return logits, relevant, np.repeat(np.arange(queries), each)


def test_the_line_that_labels_were_drawn_by_is_found_again():
    logits, relevant, _ = simulated()
    slope, intercept = fit_line(logits, relevant)
    assert (slope, intercept) == (pytest.approx(0.7, abs=0.03), pytest.approx(-2.0, abs=0.08))
    # Far from 0 and 1 in size and place too.
    moved = fit_line(1000 * logits + 5e4, relevant)
    assert moved == (pytest.approx(slope / 1000), pytest.approx(intercept - 50 * slope))


def test_the_line_is_that_of_logistic_regression():
    linear_model = pytest.importorskip("sklearn.linear_model")
    logits, relevant, _ = simulated()
    theirs = linear_model.LogisticRegression(C=1e9, tol=1e-8).fit(logits[:, None], relevant)
    slope, intercept = fit_line(logits, relevant)
    assert slope == pytest.approx(theirs.coef_[0, 0], abs=2e-3)
    assert intercept == pytest.approx(theirs.intercept_[0], abs=2e-3)


def test_labels_that_a_score_separates_wholly_have_a_line():
    logits = np.array([-2.0, -1.0, 1.0, 2.0])
    slope, intercept = fit_line(logits, logits > 0)
    assert 0 < slope < 10 and intercept == pytest.approx(0.0, abs=1e-6)
    # Where the likelihood is highest, probabilities and targets (3/4 and 1/4) agree in the sum over the scores.
    assert (logits * probabilities(logits, slope, intercept)).sum() == pytest.approx(0.75 * 3 - 0.25 * 3)


def test_the_calibration_error_by_hand():
    chances, relevant = np.array([0.8, 0.2, 0.2, 0.8]), np.array([True, False, False, True])
    assert expected_calibration_error(chances, relevant, bins=2) == pytest.approx(0.2)
    assert expected_calibration_error(chances, ~relevant, bins=2) == pytest.approx(0.8)
    assert expected_calibration_error(chances, relevant, bins=1) == pytest.approx(0.0)


def test_bins_hold_equally_many_pairs_and_a_pair_that_counts_twice_is_two():
    chances, relevant = np.linspace(0.1, 0.9, 30), np.arange(30) % 3 == 0
    mass, predicted, observed = _sums(chances, relevant, np.ones(30), 15)
    assert mass.tolist() == [2.0] * 15
    assert predicted.sum() == pytest.approx(chances.sum()) and observed.sum() == 10
    doubled = _sums(chances, relevant, np.full(30, 2.0), 15)
    for once, twice in zip((mass, predicted, observed), doubled, strict=True):
        np.testing.assert_allclose(twice, 2 * once)


def test_figures_are_better_after_than_before_and_of_queries_that_had_no_part_in_the_fit():
    logits, relevant, query = simulated()
    found = calibrate(logits, relevant, query)
    assert (found["pairs"], found["queries"], found["relevant"]) == (10_000, 400, int(relevant.sum()))
    before, after = found["before"], found["after"]
    assert after["ece"] < 0.02 < 0.1 < before["ece_low"] <= before["ece"]
    assert after["ece_low"] < 0.005  # what is calibrated may be so by the interval
    assert after["brier"] < before["brier"] and after["log_loss"] < before["log_loss"]
    assert found["cut_off"] is None
    for figures in (before, after):
        assert len(figures["bins"]) == 15 and sum(bin["pairs"] for bin in figures["bins"]) == 10_000
        error = sum(bin["pairs"] * abs(bin["predicted"] - bin["observed"]) for bin in figures["bins"]) / 10_000
        assert error == pytest.approx(figures["ece"])
    fold = _folds(relevant, query, 13)
    assert all(len(set(fold[query == number].tolist())) == 1 for number in range(400))
    assert np.bincount(fold[::25]).tolist() == [80] * 5


def test_labels_that_no_score_explains_look_no_better_when_they_are_fitted():
    """On the pairs of the fit any line looks at least as good as the mean; on others it does not."""
    rng = np.random.default_rng(3)
    logits, relevant, query = rng.normal(size=100), rng.random(100) < 0.5, np.arange(100)
    slope, intercept = fit_line(logits, relevant)
    inside = probabilities(logits, slope, intercept)
    log_loss = -np.log(np.where(relevant, inside, 1 - inside)).mean()
    found = calibrate(logits if slope > 0 else -logits, relevant, query)
    assert found["after"]["log_loss"] > log_loss


def test_each_kind_of_label_is_in_every_fold_that_fits():
    relevant = np.repeat([True, False], [10, 90])
    query = np.concatenate([np.repeat(np.arange(5), 2), np.repeat(np.arange(5, 35), 3)])
    fold = _folds(relevant, query, 13)
    assert sorted(fold[relevant].tolist()) == sorted([0, 1, 2, 3, 4] * 2)


def test_the_lowest_cut_off_with_the_wanted_precision():
    # From the best down: 12 relevant, then by turns; equal scores stand on one side.
    logits = np.concatenate([np.full(12, 5.0), np.arange(4.0, -4.0, -1.0)])
    relevant = np.concatenate([np.full(12, True), [False, True] * 4])
    assert _lowest_cut(logits, relevant, 1.0) == (4.5, 1.0)
    cut, _ = _lowest_cut(logits, relevant, 0.9)  # 13 of 14
    assert cut == 2.5
    cut, _ = _lowest_cut(logits, relevant, 0.5)  # all
    assert cut == -3.0
    assert _lowest_cut(logits, ~relevant, 0.5) == (None, pytest.approx(4 / 19))
    assert _lowest_cut(logits[-5:], relevant[-5:], 0.1) == (None, 0.0)  # fewer than ten pairs prove nothing


def test_a_cut_off_says_how_precise_it_is_where_other_queries_choose_it():
    logits, relevant, query = simulated()
    found = calibrate(logits, relevant, query, precision=0.8)
    cut = found["cut_off"]
    assert cut["wanted"] == 0.8
    assert cut["probability"] == pytest.approx(
        probabilities(np.array(cut["logit"]), found["slope"], found["intercept"]), abs=1e-12
    )
    assert relevant[logits >= cut["logit"]].mean() == pytest.approx(0.8, abs=0.005)
    assert cut["precision_low"] < 0.8 < cut["precision_high"]
    assert cut["precision"] == pytest.approx(0.8, abs=0.03) and 0 < cut["recall"] < 1
    with pytest.raises(
        EvaluationError, match=r"no cut-off has a precision of 1: the best that leaves 10 pairs or more"
    ):
        calibrate(*simulated(intercept=-4.0, slope=0.1), precision=1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda logits, relevant, query: (logits, relevant & (np.arange(60) < 18), query),
            "9 relevant pairs are too few",
        ),
        (lambda logits, relevant, query: (logits, np.ones(60, bool), query), "0 pairs that are not relevant"),
        (lambda logits, relevant, query: (logits, relevant, query % 3), "3 queries have a relevant pair: 5 or more"),
        (
            lambda logits, relevant, query: (np.where(query == 1, np.nan, logits), relevant, query),
            "are NaN or infinite",
        ),
        (lambda logits, relevant, query: (-logits, relevant, query), "a higher score does not make"),
        (lambda logits, relevant, query: (0 * logits, relevant, query), "all 60 pairs have the same score"),
    ],
)
def test_what_cannot_be_calibrated_is_refused_with_the_reason(change, message):
    rng = np.random.default_rng(0)
    relevant = np.arange(60) % 2 == 0
    given = rng.normal(size=60) + 2 * relevant, relevant, np.arange(60) // 4
    with pytest.raises(EvaluationError, match=message):
        calibrate(*change(*given))
