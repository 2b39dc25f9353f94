import math
from collections import Counter
from itertools import chain

import pytest
from datasets import Dataset

from lce_trainer.errors import GroupsError
from lce_trainer.training.sampling import EpochGroups, GroupSampler, sample_group


@pytest.mark.parametrize(("negatives", "wanted"), [(7, 7), (7, 3), (14, 7), (5, 4), (30, 7), (3, 1)])
def test_no_negative_comes_again_before_each_has_come_once(negatives, wanted):
    labels = [1.0] + [0.0] * negatives
    visits = -(-negatives // wanted)
    for start in range(0, 6 * visits, visits):
        drawn = [sample_group(13, epoch, "q", labels, wanted)[1] for epoch in range(start, start + visits)]
        assert all(len(set(group)) == wanted for group in drawn)
        assert {index for group in drawn for index in group} == set(range(1, negatives + 1))
        whole = [index for group in drawn[:-1] for index in group]
        assert len(set(whole)) == len(whole)


def test_a_new_order_is_drawn_for_each_pass():
    labels = [1.0] + [0.0] * 14
    passes = {tuple(sample_group(0, epoch, "q", labels, 7)[1]) for epoch in range(0, 20, 2)}
    assert len(passes) == 10


def test_positives_take_turns():
    labels = [1.0, 1.0, 1.0, 0.0, 0.0]
    targets = [sample_group(3, epoch, "q", labels, 2)[0] for epoch in range(9)]
    assert Counter(targets) == {0: 3, 1: 3, 2: 3}
    assert len(set(targets[:3])) == 3


def test_other_positives_are_never_negatives():
    for epoch in range(20):
        target, negatives = sample_group(3, epoch, "q", [1.0, 1.0, 0.0, 0.0, 0.0], 2)
        assert target in (0, 1) and set(negatives) <= {2, 3, 4}


def test_only_strictly_lower_grades_compete_and_each_pool_is_walked_through():
    labels = [3.0, 2.0, 2.0, 1.0, 0.0, 0.0]
    seen = {grade: [] for grade in (1.0, 2.0, 3.0)}
    for epoch in range(24):
        target, negatives = sample_group(5, epoch, "q", labels, 2)
        assert all(labels[i] < labels[target] for i in negatives)
        seen[labels[target]].append(negatives)
    assert [len(groups) for groups in seen.values()] == [6, 12, 6]
    # Of grade 2 there are three competitors, so two visits make a pass, whichever positive draws.
    for first, second in zip(seen[2.0][::2], seen[2.0][1::2], strict=True):
        assert set(first) | set(second) == {3, 4, 5}


def test_a_short_group_gives_all_it_has_and_repeats_nothing():
    assert sample_group(0, 0, "q", [1.0, 0.0, 0.0], 7) == (0, [1, 2])


def test_the_draw_is_fixed_for_all_time():
    labels = [1.0, 1.0] + [0.0] * 8
    assert [sample_group(42, epoch, "medquad-7", labels, 3) for epoch in range(3)] == [
        (0, [5, 7, 4]),
        (1, [8, 3, 6]),
        (0, [2, 9, 5]),
    ]


def curriculum(epoch, labels, wanted, epochs, seed=7, query_id="q"):
    return sample_group(seed, epoch, query_id, labels, wanted, epochs)


@pytest.mark.parametrize(
    ("negatives", "wanted", "epochs"), [(21, 7, 3), (30, 7, 4), (9, 4, 3), (100, 3, 2), (15, 7, 9)]
)
def test_a_curriculum_draws_from_the_easiest_part_that_grows_by_epoch(negatives, wanted, epochs):
    labels = [1.0] + [0.0] * negatives  # the hardest stands first, so easy ones have high indices
    for epoch in range(epochs + 2):
        part = min((epoch + 1) / epochs, 1)
        size = max(math.ceil(negatives * part), wanted)
        target, drawn = curriculum(epoch, labels, wanted, epochs)
        assert target == 0 and len(set(drawn)) == wanted
        assert min(drawn) > negatives - size
    seen = [set(curriculum(epoch, labels, wanted, epochs)[1]) for epoch in range(-(-negatives // wanted) + epochs)]
    assert set.union(*seen) == set(range(1, negatives + 1))


@pytest.mark.parametrize(("negatives", "wanted", "epochs"), [(21, 7, 3), (30, 7, 4), (9, 4, 3), (11, 5, 20)])
def test_under_a_curriculum_none_comes_again_before_all_of_its_pool_have_come(negatives, wanted, epochs):
    labels = [1.0] + [0.0] * negatives
    times = Counter()
    for epoch in range(3 * epochs):
        size = min(max(-(-negatives * (epoch + 1) // epochs), wanted), negatives)
        pool = range(negatives - size + 1, negatives + 1)
        drawn = curriculum(epoch, labels, wanted, epochs)[1]
        left = [times[i] for i in pool if i not in drawn]
        assert max(times[i] for i in drawn) <= min(left, default=negatives)
        times.update(drawn)


def test_a_curriculum_over_one_epoch_or_a_short_group_is_none():
    labels = [1.0] + [0.0] * 20
    assert [curriculum(epoch, labels, 7, 1) for epoch in range(5)] == [
        sample_group(7, epoch, "q", labels, 7) for epoch in range(5)
    ]
    assert curriculum(0, labels, 20, 5) == (0, list(range(1, 21)))


def test_a_curriculum_counts_the_visits_of_a_pool_and_not_those_of_others():
    labels = [2.0, 1.0] + [0.0] * 12
    seen = {0: [], 1: []}
    for epoch in range(6):
        target, drawn = curriculum(epoch, labels, 4, 3)
        assert all(labels[i] < labels[target] for i in drawn)
        seen[target].append(drawn)
    # By their third visits the pools are whole; three visits of 4 show all of 12 below grade 1.
    assert {i for drawn in seen[1] for i in drawn} == set(range(2, 14))
    assert [len(visits) for visits in seen.values()] == [3, 3]


def test_the_curriculum_is_fixed_for_all_time():
    labels = [1.0] + [0.0] * 9
    assert [curriculum(epoch, labels, 3, 3, 42, "medquad-7")[1] for epoch in range(4)] == [
        [8, 9, 7],
        [6, 5, 4],
        [2, 1, 3],
        [2, 9, 1],
    ]


def test_seed_query_and_epoch_all_matter():
    labels = [1.0] + [0.0] * 40
    draws = [sample_group(s, e, q, labels, 7)[1] for s, e, q in [(0, 0, "a"), (1, 0, "a"), (0, 1, "a"), (0, 0, "b")]]
    assert len({tuple(draw) for draw in draws}) == 4


@pytest.mark.parametrize("labels", [[0.0, 0.0], [1.0, 1.0], [], [1.0]])
def test_a_group_that_teaches_nothing_is_an_error_naming_the_query(labels):
    with pytest.raises(GroupsError, match="'q7'"):
        sample_group(0, 0, "q7", labels, 3)


def test_an_epoch_holds_every_row_once_and_fills_up_with_nothing():
    epoch = 0
    sampler = GroupSampler(10, seed=1, epoch=lambda: epoch, multiple=4)
    first = list(sampler)
    epoch = 1
    second = list(sampler)
    assert len(first) == len(sampler) == 12
    assert first[10:] == [None, None]
    assert sorted(row for _, row in first[:10]) == list(range(10))
    assert {e for e, _ in second[:10]} == {1}
    assert [row for _, row in first[:10]] != [row for _, row in second[:10]]
    assert list(GroupSampler(10, seed=1, epoch=lambda: 1, multiple=4)) == second


def test_ranks_that_share_groups_take_equal_batches():
    alone = list(GroupSampler(10, seed=1, epoch=lambda: 0, multiple=4))
    shared = GroupSampler(10, seed=1, epoch=lambda: 0, multiple=4, copies=2)
    batches = [list(shared)[start : start + 4] for start in range(0, len(shared), 4)]
    assert len(batches) == 6
    assert list(chain(*batches[::2])) == list(chain(*batches[1::2])) == alone


def test_the_last_rows_can_be_dropped_and_the_order_kept():
    sampler = GroupSampler(10, seed=1, epoch=lambda: 2, multiple=4, shuffle=False, drop_last=True)
    assert list(sampler) == [(2, row) for row in range(8)]
    assert len(sampler) == 8


def test_rows_know_their_epoch_and_places_without_a_row_stay_empty():
    groups = EpochGroups(Dataset.from_dict({"query": ["a", "b", "c"]}))
    assert groups.__getitems__([(4, 2), None, (4, 0)]) == [{"query": "c", "epoch": 4}, None, {"query": "a", "epoch": 4}]
    assert groups.__getitems__([None]) == [None]
    assert groups[1, 1] == {"query": "b", "epoch": 1}
