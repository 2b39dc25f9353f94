"""Stuffed negatives: how many, which, what of them, and that they depend on seed, epoch and group alone."""

import logging

import numpy as np
import pytest
from datasets import Dataset

from helpers.tiny import build_tokenizer, ids_of_pairs
from helpers.token_ids import settings
from helpers.trainers import make_groups, make_trainer
from lce_trainer.errors import TrainingError
from lce_trainer.model.pairs import encode_groups
from lce_trainer.training.collator import GroupCollator
from lce_trainer.training.sampling import EpochGroups
from lce_trainer.training.stuffing import stuff_negatives
from lce_trainer.training.token_ids import token_ids

QUERY = "what is the moon"


def row(number: int = 0, negatives: int = 7, epoch: int = 0) -> dict:
    passages = ["it is far", *(f"snow {place}" for place in range(negatives))]
    return {
        "query_id": f"q{number}",
        "query": QUERY,
        "passages": passages,
        "labels": [1.0] + [0.0] * negatives,
        "scores": None,
        "epoch": epoch,
    }


def stuffed(group: dict, share: float, seed: int = 42) -> list[str]:
    return stuff_negatives(group, range(len(group["passages"])), share, seed)


@pytest.mark.parametrize("share", [0.05, 0.3, 0.8])
def test_the_share_of_stuffed_negatives_is_near_the_one_wanted(share):
    """Of 7,000 negatives, within four standard deviations; the four ways come alike."""
    made = []
    for group in map(row, range(1000)):
        made += zip(stuffed(group, share), group["passages"], strict=True)
    changed = [(text, plain) for text, plain in made if text != plain]
    assert len(changed) / 7000 == pytest.approx(share, abs=4 * (share * (1 - share) / 7000) ** 0.5)
    forms = [f"{QUERY} {{}}", f"{{}} {QUERY}", f"{QUERY} {QUERY} {{}}", "what moon {}"]
    counts = [sum(text == form.format(plain) for text, plain in changed) for form in forms]
    assert sum(counts) == len(changed)
    assert min(counts) > len(changed) / 4 - 4 * (3 / 16 * len(changed)) ** 0.5


def test_what_is_relevant_is_never_stuffed_neither_as_the_positive_nor_beside_a_better_one():
    group = row() | {"labels": [3.0, 1.0, 2.0, 0.0, 0.0, -1.0, 1.0, 0.0]}
    for epoch in range(20):
        texts = stuffed(group | {"epoch": epoch}, 1.0)
        assert [text != plain for text, plain in zip(texts, group["passages"], strict=True)] == [
            label <= 0 for label in group["labels"]
        ]


def test_the_draw_depends_on_seed_epoch_and_group_and_on_nothing_else():
    first = stuffed(row(), 0.5)
    assert first == stuffed(row(), 0.5)
    others = (stuffed(row(epoch=1), 0.5), stuffed(row(number=1), 0.5), stuffed(row(), 0.5, seed=1))
    assert all(other != first for other in others)
    # A passage is stuffed or not whichever others are drawn beside it, and a larger share stuffs the same and more.
    assert stuff_negatives(row(), [0, 6, 2], 0.5, 42) == [first[0], first[6], first[2]]
    more = stuffed(row(), 0.9)
    for text, plain, other in zip(first, row()["passages"], more, strict=True):
        assert text in (plain, other)


def collator(share: float) -> GroupCollator:
    return GroupCollator(build_tokenizer(), 4, 32, 8, stuffed_negatives=share)


def test_a_group_is_stuffed_alike_in_whatever_batch_or_worker_it_comes():
    rows = [row(i, epoch=i % 3) for i in range(12)]
    whole = ids_of_pairs(collator(0.5)(rows).pairs)
    alone = [ids for group in rows for ids in ids_of_pairs(collator(0.5)([group]).pairs)]
    assert whole == alone != ids_of_pairs(collator(0.0)(rows).pairs)


def test_nothing_but_the_passages_is_changed():
    rows = [row(i) | {"scores": [float(place) for place in range(8)]} for i in range(5)]
    plain, made = collator(0.0)(rows), collator(1.0)(rows)
    for name in ("labels", "teacher_scores", "group_sizes"):
        np.testing.assert_array_equal(getattr(made, name), getattr(plain, name))
    assert made.query_ids == plain.query_ids
    is_first = np.isin(np.arange(20), [0, 4, 8, 12, 16])
    same = np.array([a == b for a, b in zip(ids_of_pairs(made.pairs), ids_of_pairs(plain.pairs), strict=True)])
    np.testing.assert_array_equal(same, is_first)


def test_a_stuffed_negative_is_tokenized_as_the_text_that_it_is():
    ids = ids_of_pairs(collator(1.0)([row(negatives=1)]).pairs)[1]
    forms = [f"{QUERY} snow 0", f"snow 0 {QUERY}", f"{QUERY} {QUERY} snow 0", "what moon snow 0"]
    assert ids in ids_of_pairs(encode_groups(build_tokenizer(), [QUERY], [forms], 32, 8)[0])


def test_texts_are_not_tokenized_before_they_are_stuffed(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    groups = Dataset.from_list([{key: value for key, value in row().items() if key != "epoch"}])
    ids = token_ids(groups, build_tokenizer(), settings(tmp_path, pretokenize=True))
    with caplog.at_level(logging.WARNING):
        assert token_ids(groups, build_tokenizer(), settings(tmp_path, pretokenize=True, stuffed_negatives=0.1)) is None
    assert "pretokenize: stuffed negatives are other texts" in caplog.text
    with pytest.raises(TrainingError, match="needs passages as texts"):
        collator(0.1)(EpochGroups(groups, ids).__getitems__([(0, 0)]))


def test_it_is_a_setting_of_the_trainer(tmp_path):
    trainer = make_trainer(tmp_path, make_groups(4), stuffed_negatives=0.25)
    assert trainer.data_collator.stuffed_negatives == 0.25
    assert make_trainer(tmp_path, make_groups(4)).data_collator.stuffed_negatives == 0
