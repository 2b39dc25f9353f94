"""How judges agree with labels and with each other, on literal scores."""

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import cohen_kappa_score

from lce_trainer.synthesis.agreement import cohens_kappa, mean_of_judges, measure_judge, rank_correlations

NAN = float("nan")


def test_a_judge_that_separates_the_labels_has_the_threshold_between_them():
    found = measure_judge(np.array([0.9, 0.8, 0.2, 0.1]), np.array([True, True, False, False]), np.array([0, 1, 0, 1]))
    assert found["auc"] == found["auc_low"] == found["auc_high"] == found["auc_within_query"] == 1.0
    assert (found["threshold"], found["kappa"], found["kappa_held_out"]) == (0.5, 1.0, 1.0)
    assert found["abstained"] == 0.0


def test_figures_of_a_judge_that_errs():
    scores, relevant = np.array([3.0, 2.0, 1.0, 0.0]), np.array([True, False, True, False])
    found = measure_judge(scores, relevant, np.array([0, 0, 1, 1]))
    assert (found["auc"], found["auc_within_query"]) == (0.75, 1.0)
    assert (found["threshold"], found["kappa"]) == (2.5, 0.5)  # of equally good ones the highest
    assert found["auc_low"] <= 0.75 <= found["auc_high"]


def test_an_interval_is_narrower_on_more_queries():
    rng = np.random.default_rng(0)
    widths = []
    for n in (20, 200):
        relevant = np.arange(n) % 2 == 0
        found = measure_judge(rng.normal(size=n) + relevant, relevant, np.arange(n) // 4)
        assert found["auc_low"] < found["auc"] < found["auc_high"]
        widths.append(found["auc_high"] - found["auc_low"])
    assert widths[1] < widths[0] / 2


def test_a_threshold_chosen_on_noise_does_not_hold_on_other_queries():
    rng = np.random.default_rng(1)
    found = [measure_judge(rng.normal(size=40), rng.random(40) < 0.4, np.arange(40)) for _ in range(10)]
    best, held_out = (np.mean([row[key] for row in found]) for key in ("kappa", "kappa_held_out"))
    assert best > 0.1 > held_out


def test_an_abstention_is_the_lowest_score_and_never_relevant():
    found = measure_judge(np.array([1.0, NAN, 0.0, NAN]), np.array([True, True, False, False]), np.arange(4))
    assert found["auc"] == pytest.approx((1 + 1 + 0 + 0.5) / 4)
    assert found["abstained"] == 0.5 and found["auc_within_query"] is None
    silent = measure_judge(np.full(4, NAN), np.array([True, True, False, False]), np.arange(4))
    assert (silent["auc"], silent["threshold"], silent["kappa"]) == (0.5, None, 0.0)


def test_kappa_and_spearman_are_those_of_other_libraries():
    rng = np.random.default_rng(2)
    for _ in range(20):
        a, b = rng.random(30) < 0.3, rng.random(30) < 0.6
        assert cohens_kappa(a, b) == pytest.approx(cohen_kappa_score(a, b))
        one, other = rng.integers(0, 5, 30).astype(float), rng.integers(0, 5, 30).astype(float)
        (row,) = rank_correlations({"a": one, "b": other})
        assert row["spearman"] == pytest.approx(spearmanr(one, other).statistic)
    assert cohens_kappa(np.ones(3, bool), np.ones(3, bool)) == 1.0
    assert cohens_kappa(np.ones(3, bool), np.zeros(3, bool)) == 0.0


def test_agreement_is_over_the_pairs_that_both_scored():
    (row,) = rank_correlations({"a": np.array([1.0, 2.0, 3.0, NAN]), "b": np.array([1.0, 4.0, 9.0, 0.0])})
    assert row == {"judges": ["a", "b"], "pairs": 3, "spearman": pytest.approx(1.0)}
    (row,) = rank_correlations({"a": np.array([1.0, 1.0]), "b": np.array([1.0, 2.0])})
    assert row["spearman"] is None


def test_the_mean_of_judges_weighs_each_alike_whatever_its_scale():
    one, other = np.array([0.0, 1.0, 2.0]), np.array([300.0, 100.0, 200.0])
    mean = mean_of_judges({"a": one, "b": other})
    np.testing.assert_allclose(mean, np.array([0.0, -1.0, 1.0]) * np.sqrt(1.5) / 2, atol=1e-12)
    np.testing.assert_allclose(mean, mean_of_judges({"a": one * 10 - 4, "b": other}), atol=1e-12)
    silent = mean_of_judges({"a": np.array([0.0, 1.0, NAN]), "b": np.array([0.0, NAN, NAN])})
    assert np.isnan(silent[2]) and not np.isnan(silent[:2]).any()
