import itertools
import logging

import datasets
import numpy as np
import pyarrow as pa
import pytest

from lce_trainer.synthesis.shortcut import auc, shortcut_probe, word_counts

WORDS = [f"word{i}" for i in range(200)]


def brute_auc(scores, positive):
    pairs = list(itertools.product(scores[positive], scores[~positive]))
    return sum((p > n) + (p == n) / 2 for p, n in pairs) / len(pairs)


def build_groups(passage_of, n=300, negatives=5, seed=0):
    """Groups whose passage is made by ``passage_of(rng, positive)``, which returns id and text."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        made = [passage_of(rng, j == 0) for j in range(1 + negatives)]
        rows.append(
            {
                "query_id": f"q{i}",
                "query": f"query {i}",
                "passage_ids": [key for key, _ in made],
                "passages": [text for _, text in made],
                "labels": [1.0] + [0.0] * negatives,
            }
        )
    return datasets.Dataset.from_list(rows)


def text(rng, length):
    return " ".join(rng.choice(WORDS, length))


def blind(rng, positive):
    return str(rng.integers(10**9)), text(rng, rng.integers(10, 40))


@pytest.mark.parametrize("seed", range(20))
def test_auc_is_the_share_of_pairs_in_the_right_order_ties_counting_half(seed):
    rng = np.random.default_rng(seed)
    scores, positive = rng.integers(0, 6, 30), rng.random(30) < 0.3
    positive[:2] = True, False
    assert auc(scores, positive) == pytest.approx(brute_auc(scores, positive), abs=1e-12)


def test_auc_inside_groups_is_the_mean_over_groups_that_have_both():
    rng = np.random.default_rng(3)
    group = rng.integers(0, 25, 200)
    scores, positive = rng.integers(0, 5, 200), rng.random(200) < 0.3
    positive[group == 7] = True
    by_group = [(scores[group == g], positive[group == g]) for g in range(25)]
    expected = [brute_auc(s, p) for s, p in by_group if p.any() and not p.all()]
    assert len(expected) < 25
    assert auc(scores, positive, group) == pytest.approx(np.mean(expected), abs=1e-12)


def test_auc_of_one_kind_only_is_not_a_number():
    assert np.isnan(auc(np.arange(3), np.ones(3, bool)))
    assert np.isnan(auc(np.array([]), np.array([], bool)))


def test_labels_drawn_at_random_hold_no_shortcut(caplog):
    probe = shortcut_probe(build_groups(blind))
    assert set(probe) == {"length", "words", "popularity"}
    assert all(0.44 < value < 0.56 for value in probe.values()), probe
    assert not caplog.records


def test_random_labels_over_passages_that_recur_hold_no_shortcut():
    def few(rng, positive):
        key = int(rng.integers(60))
        return str(key), text(np.random.default_rng(key), 20)

    # A guesser loses what it is not shown of a passage that recurs, so chance can read under 0.5, never over.
    probe = shortcut_probe(build_groups(few))
    assert all(0.4 < value < 0.53 for value in probe.values()), probe


@pytest.mark.parametrize("sign", [1, -1])
def test_a_length_shortcut_is_seen_in_either_direction_and_warned_of(caplog, sign):
    def by_length(rng, positive):
        return str(rng.integers(10**9)), text(rng, 25 + sign * (8 if positive else 0) + rng.integers(0, 10))

    with caplog.at_level(logging.WARNING):
        probe = shortcut_probe(build_groups(by_length))
    assert probe["length"] > 0.9
    assert [record.args[0] for record in caplog.records] == ["length"]
    assert "label.match_length=true" in caplog.text


def test_a_word_that_only_positives_use_is_a_shortcut():
    def by_word(rng, positive):
        return str(rng.integers(10**9)), text(rng, 20) + (" Overview:" if positive else " overviews")

    probe = shortcut_probe(build_groups(by_word))
    assert probe["words"] > 0.9
    assert probe["length"] == 0.5


def test_negatives_that_are_always_the_same_passages_are_a_shortcut():
    def by_popularity(rng, positive):
        key = rng.integers(10**9) if positive else rng.integers(30)
        return str(key), text(rng, 20)

    assert shortcut_probe(build_groups(by_popularity))["popularity"] > 0.9


def test_the_probe_never_sees_the_query():
    groups = build_groups(blind, n=60)
    other = groups.remove_columns("query").add_column("query", [f"overview {i}" for i in range(60)])
    assert shortcut_probe(groups, seed=4) == shortcut_probe(other, seed=4)


def test_large_sets_are_probed_on_a_draw(monkeypatch):
    monkeypatch.setattr("lce_trainer.synthesis.shortcut._MAX_GROUPS", 50)
    groups = build_groups(blind, n=120)
    assert shortcut_probe(groups, seed=1) == shortcut_probe(groups, seed=1) != shortcut_probe(groups, seed=2)


def test_words_are_what_white_space_separates():
    assert word_counts(pa.array(["", "  ", "one", " two  words\n"])).tolist() == [0, 0, 1, 2]
