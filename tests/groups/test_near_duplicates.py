"""Near-duplicates among texts."""

import random

import numpy as np
import pytest

from lce_trainer.errors import ConfigError
from lce_trainer.groups.near_duplicates import _jaccard, _shingles, find_near_duplicates

KNOWN = ["how do I strip whitespace from a string", "what causes scurvy", "", "如何去除字符串两端的空格"]


def test_wording_that_differs_by_case_punctuation_or_an_ending_is_a_near_duplicate_and_other_wording_is_not():
    texts = [
        "How do I strip white-space from a string?",
        "how do i strip whitespaces from strings",
        "What causes scurvy ?",
        "what prevents scurvy",
        "remove blanks at both ends of a text",
        "如何去除字符串两端的空格？",
        "如何给字符串加空格",
        "",
        "?!",
        "what causes SCURVY",
    ]
    assert find_near_duplicates(texts, KNOWN, 0.7).tolist() == [0, 0, 1, -1, -1, 3, -1, -1, -1, 1]


def test_nearly_every_pair_above_the_threshold_is_found_and_none_below():
    draw = random.Random(3)
    words = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(2, 9))) for _ in range(400)]
    known = [" ".join(draw.choices(words, k=draw.randint(3, 12))) for _ in range(150)]
    texts = []
    for _ in range(600):
        some = draw.choice(known).split()
        for _ in range(draw.randint(0, 4)):
            some[draw.randrange(len(some))] = draw.choice(words)
        texts.append(" ".join(some))
    exact = np.array([[_jaccard(_shingles(a), _shingles(b)) for b in known] for a in texts])
    found = find_near_duplicates(texts, known, 0.7)
    near = exact.max(axis=1) >= 0.7
    assert 50 < near.sum() < 550
    assert not (found[~near] >= 0).any()
    assert (found[near] >= 0).mean() > 0.98
    right = found >= 0
    assert (exact[right, found[right]] >= 0.7).all()


def test_the_same_texts_give_the_same_rows_and_a_similarity_beyond_one_is_refused():
    assert find_near_duplicates([], KNOWN, 0.7).tolist() == [] and find_near_duplicates(["a"], [], 0.7).tolist() == [-1]
    assert find_near_duplicates(KNOWN, KNOWN, 1.0).tolist() == [0, 1, -1, 3]
    for threshold in (0, 1.5):
        with pytest.raises(ConfigError, match="above 0 and up to 1"):
            find_near_duplicates(KNOWN, KNOWN, threshold)
