import itertools
import math
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from datasets import Dataset
from torch.utils.data import DataLoader
from torch.utils.data._utils.pin_memory import pin_memory

from helpers.tiny import build_tokenizer, ids_of_pairs
from lce_trainer.errors import TrainingError
from lce_trainer.model.pairs import EncodedPairs, length_buckets, pad_pairs
from lce_trainer.training.collator import GroupCollator, micro_batches
from lce_trainer.training.sampling import EpochGroups, GroupSampler


def group(query: str, passages: list[str], labels: list[float], **more) -> dict:
    return {"query_id": query, "query": query, "passages": passages, "labels": labels, "scores": None, **more}


def collator(**settings) -> GroupCollator:
    return GroupCollator(build_tokenizer(), **{"group_size": 4, "max_length": 32, "max_query_length": 8, **settings})


ROWS = [
    group("what is the moon", ["moon", "river river", "tree"], [1, 0, 0], scores=[0.9, 0.1, None]),
    group("why burns wood", ["fire burns", "snow falls on the hill"], [1, 0]),
    group("red fish", ["red", "green tree", "blue", "bird", "stone", "river"], [1, 0, 0, 0, 0, 0]),
]


def test_a_batch_holds_each_pair_as_the_tokenizer_makes_it():
    tokenizer = build_tokenizer()
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    batch = GroupCollator(tokenizer, group_size=4, max_length=32, max_query_length=8)(ROWS[:2])
    pairs = [("what is the moon", p) for p in ("moon", "river river", "tree")]
    pairs += [("why burns wood", p) for p in ("fire burns", "snow falls on the hill")]
    expected = tokenizer([q for q, _ in pairs], [p for _, p in pairs], padding=True, return_tensors="pt")
    padded = pad_pairs(tokenizer, batch.pairs)
    for name in ("input_ids", "token_type_ids", "attention_mask"):
        assert torch.equal(padded[name], expected[name]), name
    assert batch.mask.tolist() == [[True, True, True], [True, True, False]]
    assert batch.labels.tolist() == [1, 0, 0, 1, 0]
    assert batch.by_group(batch.labels).tolist() == [[1, 0, 0], [1, 0, 0]]
    assert batch.target.tolist() == [0, 0]
    assert batch.group_sizes.tolist() == [3, 2]
    assert batch.pairs.lengths.tolist() == expected["attention_mask"].sum(1).tolist()
    assert batch.query_ids == ("what is the moon", "why burns wood")
    assert not batch.is_cut.any() and len(batch.is_cut) == 5


def test_a_batch_holds_no_padding_and_passes_through_data_loaders_as_it_is():
    """Nothing of it is on a device, so neither pinning nor sending to a device changes it; and it cannot be changed."""
    batch = collator()(ROWS)
    assert all(len(values) == batch.pairs.lengths.sum() for values in batch.pairs.inputs.values())
    assert send_to_device(batch, "meta") is batch and pin_memory(batch) is batch
    loader = Accelerator(cpu=True).prepare(DataLoader(ROWS, 2, collate_fn=collator()))
    assert [made.query_ids for made in loader] == [("what is the moon", "why burns wood"), ("red fish",)]
    with pytest.raises(FrozenInstanceError):
        batch.labels = batch.labels


def test_scores_by_group_keep_their_gradient():
    batch = collator()(ROWS[:2])
    scores = torch.arange(1.0, 6, requires_grad=True)
    grid = batch.by_group(scores)
    assert grid.tolist() == [[1, 2, 3], [4, 5, 0]]
    (grid * torch.tensor([[1.0, 2, 3], [4, 5, 6]])).sum().backward()
    assert scores.grad.tolist() == [1, 2, 3, 4, 5]


def test_teacher_scores_follow_their_passages_and_unknown_ones_are_nan():
    teacher = collator()(ROWS[:2]).teacher_scores
    assert teacher[:2].tolist() == pytest.approx([0.9, 0.1])
    assert len(teacher) == 5 and np.isnan(teacher[2:]).all()


def test_a_large_group_shows_its_positive_and_other_negatives_each_epoch():
    seen = []
    for epoch in range(2):
        batch = collator()([{**ROWS[2], "epoch": epoch}])
        assert batch.group_sizes.tolist() == [4]
        assert batch.labels.tolist() == [1, 0, 0, 0]
        seen.append({tuple(ids) for ids in ids_of_pairs(batch.pairs)[1:]})
    assert seen[0] != seen[1]


def test_truncation_keeps_the_query_and_every_separator():
    tokenizer = build_tokenizer()
    query, passage = "what is the moon", " ".join(["river"] * 60)
    batch = collator(max_length=16)([group(query, [passage, "tree"], [1, 0])])
    ids = ids_of_pairs(batch.pairs)[0]
    assert len(ids) == 16
    assert ids[:6] == tokenizer(query)["input_ids"]
    assert ids.count(tokenizer.sep_token_id) == 2 and ids[-1] == tokenizer.sep_token_id
    assert batch.is_cut.tolist() == [True, False]


def test_a_query_is_cut_at_its_own_limit_only():
    tokenizer = build_tokenizer()
    query = " ".join(["what", "is", "the"] * 10)
    batch = collator(max_length=16, max_query_length=5)([group(query, ["moon", "river"], [1, 0])])
    head = tokenizer.convert_tokens_to_ids(["what", "is", "the", "what", "is"])
    assert ids_of_pairs(batch.pairs)[0][1:7] == [*head, tokenizer.sep_token_id]
    assert tokenizer.convert_tokens_to_ids("moon") in ids_of_pairs(batch.pairs)[0]
    assert batch.is_cut.all()


def test_places_without_a_row_are_left_out_and_none_at_all_leave_one_empty_pair():
    batch = collator()([ROWS[0], None])
    assert batch.group_sizes.tolist() == [3]
    for empty in (collator()([None, None]), batch.take([])):
        assert len(empty.group_sizes) == len(empty.mask) == len(empty.target) == len(empty.labels) == 0
        assert len(empty.teacher_scores) == len(empty.is_cut) == len(empty.query_ids) == 0
        assert len(empty.pairs) == 1 and empty.pairs.lengths[0] >= 3


def test_padded_lengths_round_up():
    assert pad_pairs(build_tokenizer(), collator()(ROWS).pairs, multiple=8)["input_ids"].shape[1] % 8 == 0


def test_workers_that_live_through_epochs_draw_what_one_process_draws():
    groups = Dataset.from_list([{**ROWS[2], "query_id": f"q{i}"} for i in range(6)])

    def two_epochs(workers: int) -> list[list[list[int]]]:
        epoch = 0
        loader = DataLoader(
            EpochGroups(groups),
            batch_size=2,
            sampler=GroupSampler(6, seed=3, epoch=lambda: epoch),
            collate_fn=collator(group_size=3),
            num_workers=workers,
            persistent_workers=workers > 0,
        )
        batches = []
        for epoch in range(2):  # noqa: B007
            batches += [ids_of_pairs(batch.pairs) for batch in loader]
        return batches

    alone, many = two_epochs(0), two_epochs(2)
    assert alone == many
    assert not all(a == b for a, b in itertools.pairwise(alone))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"max_length": 11, "max_query_length": 8}, "leave no room for a passage"), ({}, "no pad token")],
)
def test_settings_that_cannot_work_are_errors(settings, message):
    tokenizer = build_tokenizer()
    if not settings:
        tokenizer.pad_token = None
    with pytest.raises(TrainingError, match=message):
        GroupCollator(tokenizer, **settings)


def test_selected_groups_make_the_batch_they_would_make_alone():
    batch = collator()(ROWS)
    part, alone = batch.take([2, 0]), collator()([ROWS[2], ROWS[0]])
    assert part.query_ids == alone.query_ids and ids_of_pairs(part.pairs) == ids_of_pairs(alone.pairs)
    for name in ("labels", "teacher_scores", "is_cut", "group_sizes"):
        np.testing.assert_array_equal(getattr(part, name), getattr(alone, name), err_msg=name)


def test_micro_batches_keep_to_a_number_of_tokens():
    sizes, lengths = [2, 1, 3, 2], [5, 9, 30, 2, 2, 3, 8, 8]
    assert micro_batches(sizes, lengths, math.inf, 25) == [[1], [0], [3, 2]]
    assert micro_batches(sizes, lengths, 4, 25) == [[1], [0], [3], [2]]


def test_micro_batches_keep_groups_whole_and_lose_none():
    sizes = [3, 8, 2, 4, 1, 5, 8]
    lengths = np.random.default_rng(0).integers(5, 60, sum(sizes)).tolist()
    parts = micro_batches(sizes, lengths, 7)
    assert sorted(itertools.chain(*parts)) == list(range(7))
    assert all(len(part) == 1 or sum(sizes[i] for i in part) <= 7 for part in parts)


def test_length_buckets_are_the_cheapest_cut():
    rng = np.random.default_rng(1)
    for _ in range(20):
        lengths = rng.integers(3, 40, 7).tolist()
        overhead = int(rng.integers(0, 60))
        buckets = length_buckets(lengths, overhead)
        assert sorted(np.concatenate(buckets).tolist()) == list(range(7))
        cost = sum(len(rows) * max(lengths[i] for i in rows) + overhead for rows in buckets)
        ordered, best = sorted(lengths), math.inf
        for cuts in itertools.product([False, True], repeat=6):
            edges = [0, *[i + 1 for i, cut in enumerate(cuts) if cut], 7]
            best = min(best, sum((b - a) * ordered[b - 1] + overhead for a, b in itertools.pairwise(edges)))
        assert cost == best


def test_the_price_of_a_pass_decides_how_many_there_are():
    lengths = [5, 100, 6, 7, 90]
    assert len(length_buckets(lengths, 10**6)) == 1
    assert len(length_buckets(lengths, 0)) == 5


def test_padding_is_on_the_right_whatever_the_tokenizer_prefers():
    tokenizer = build_tokenizer()
    tokenizer.padding_side = "left"
    encoded = EncodedPairs.of({"input_ids": [[5, 6, 7], [8]], "token_type_ids": [[0, 0, 1], [1]]})
    padded = pad_pairs(tokenizer, encoded)
    assert padded["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert padded["token_type_ids"].tolist() == [[0, 0, 1], [1, 0, 0]]
    assert padded["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
