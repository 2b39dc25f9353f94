import logging

import pytest
from datasets import Dataset

from lce_trainer.guards import check_eval


def groups(*rows: tuple[str, list[str], list[float]]) -> Dataset:
    queries, passages, labels = zip(*rows, strict=True)
    return Dataset.from_dict({"query": list(queries), "passages": list(passages), "labels": list(labels)})


TRAIN = groups(
    ("red fish", ["a fish is red", "a bird", "a stone"], [1, 0, 0]),
    ("blue bird", ["a bird", "a fish is red", "a leaf"], [2, 1, 0]),
)


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.WARNING, logger="lce_trainer")

    def of(rows: Dataset) -> list[str]:
        caplog.clear()
        check_eval(rows, "dev", TRAIN)
        return [record.message for record in caplog.records]

    return of


def test_queries_are_the_same_whatever_their_case_and_outer_spaces(said):
    dev = groups((" Red FISH ", ["new", "newer"], [1, 0]), ("green tree", ["new", "newer"], [1, 0]))
    assert said(dev) == ["dev: 1 of its 2 queries are also trained on, so its figures say too much"]


def test_passages_are_counted_and_so_are_those_relevant_in_both(said):
    dev = groups(
        ("q1", ["a bird", "a stone", "new"], [1, 0, 0]),  # a positive there too
        ("q2", ["a leaf", "new", "newer"], [1, 0, 0]),  # a negative there
        ("q3", ["a fish is red", "A bird"], [0, 1]),
    )
    assert said(dev) == [
        "dev: 4 of its 8 passages are also trained on, and 1 of its 3 relevant ones as positives: its figures hold for "
        "these documents, and may be lower for new ones"
    ]


def test_what_has_nothing_in_common_says_nothing(said):
    assert said(groups(("q1", ["new", "newer"], [1, 0]))) == []


def test_only_what_is_trained_on_counts(said, caplog):
    dev = groups(("q1", ["a leaf", "new"], [1, 0]))
    check_eval(dev, "dev", TRAIN.select([0]))
    assert not caplog.records
    check_eval(dev.select([0, 0]), "dev", TRAIN.select([1]))
    assert "2 of its 4 passages are also trained on, and 0 of its 2 relevant ones" in caplog.text


def test_groups_without_a_positive_are_counted(said):
    assert said(groups(("q1", ["x", "y"], [0, 0]), ("q2", [], []), ("q3", ["x"], [1]))) == [
        "dev: 2 of 3 groups hold no positive; they count as 0"
    ]
