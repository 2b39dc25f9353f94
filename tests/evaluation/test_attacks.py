"""Attacks on pairs: what they make of a passage, which triples are drawn, and the shares with their intervals."""

import numpy as np
import pytest

from lce_trainer.errors import EvaluationError
from lce_trainer.evaluation.attacks import PLAIN, Triple, attacks, draw_triples, first_sentence, keywords
from lce_trainer.evaluation.attacks import measure_attacks as measure

TRIPLE = Triple("how far is the moon", "It is far. Very far.", "Cheese is good.")
GROUPS = [
    {"query": f"q{i}", "passages": [f"p{i}", *(f"n{i}-{j}" for j in range(6))], "labels": [1, *[0] * 6]}
    for i in range(9)
]


def test_each_attack_keeps_the_negative_and_adds_what_it_says():
    made = {name: attack(TRIPLE) for name, attack in attacks("[PAD]", "[SEP]").items()}
    assert all("Cheese is good." in text and text != "Cheese is good." for text in made.values())
    assert made["20 pad tokens"].count("[PAD]") == 20
    assert made["query + separator, twice"] == 2 * "how far is the moon [SEP] " + "Cheese is good."
    assert made["separator + query, behind"] == "Cheese is good. [SEP] how far is the moon"
    assert made["query"] == "how far is the moon Cheese is good."
    assert made["query, twice, behind"] == "Cheese is good. how far is the moon how far is the moon"
    assert made["keywords, three times"] == "moon moon moon Cheese is good."
    assert made["first sentence of the positive"] == "It is far. Cheese is good."
    assert [name for name, text in made.items() if text.startswith("Cheese")] == [
        name for name in made if name.endswith("behind")
    ]


def test_keywords_are_the_longer_words_once_or_all():
    assert keywords("What, what is a moon's moon?") == ["What", "what", "moon"]
    assert keywords("is it so") == ["is", "it", "so"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("One. Two.", "One."),
        ("Version 3.5 is out! Yes", "Version 3.5 is out!"),
        ("月球很远。很冷。", "月球很远。"),
        ("no end", "no end"),
        ("x" * 900, "x" * 300),
        ("", ""),
    ],
)
def test_a_first_sentence_is_short_and_whole_where_it_can_be(text, sentence):
    assert first_sentence(text) == sentence


def test_triples_are_drawn_by_the_seed_and_hold_what_labels_say():
    drawn = draw_triples(GROUPS, 5, 4, 3)
    assert drawn == draw_triples(iter(GROUPS), 5, 4, 3) != draw_triples(GROUPS, 5, 4, 4)
    assert [len(triples) for triples in drawn] == [4] * 5
    for triples in drawn:
        number = triples[0].query[1:]
        assert {triple[:2] for triple in triples} == {(f"q{number}", f"p{number}")}
        assert len({triple.negative for triple in triples}) == 4
        assert all(triple.negative.startswith(f"n{number}-") for triple in triples)
    assert len(draw_triples([*GROUPS, {"query": "x", "passages": ["p"], "labels": [1]}], 99, 9, 0)) == 9
    with pytest.raises(EvaluationError, match="none of 1 queries"):
        draw_triples([{"query": "x", "passages": ["p", "r"], "labels": [0, 0]}], 9, 9, 0)


def test_shares_are_of_triples_and_intervals_of_queries():
    """A negative beats its positive where it has the word; in three of four queries one of two triples does."""
    triples = [[Triple(f"q{i}", "b", "a"), Triple(f"q{i}", "b", "c" if i % 4 else "a")] for i in range(40)]
    rows = measure(lambda pairs: np.array([ord(passage[0]) for _, passage in pairs]), triples, {"z": lambda _: "z"})
    plain, attacked = rows
    assert (plain["attack"], plain["share"], plain["lift"]) == (PLAIN, 30 / 80, 0)
    assert (attacked["share"], attacked["low"], attacked["high"]) == (1, 1, 1)
    assert attacked["lift"] == 1 - 30 / 80
    # Of 40 queries with a mean of 0.375 and a deviation of 0.2165.
    half = 1.96 * 0.2165 / 40**0.5
    assert plain["low"] == pytest.approx(0.375 - half, abs=0.01) and plain["high"] == pytest.approx(
        0.375 + half, abs=0.01
    )
    assert attacked["lift_low"] == pytest.approx(1 - plain["high"]) and plain["lift_low"] == plain["lift_high"] == 0


def test_queries_with_more_triples_count_more_and_ties_are_no_win():
    triples = [[Triple("a", "2", "1")], [Triple("b", "2", "3")] * 3, [Triple("c", "2", "2")] * 4]
    (plain,) = measure(lambda pairs: np.array([float(passage) for _, passage in pairs]), triples, {})
    assert plain["share"] == 3 / 8
