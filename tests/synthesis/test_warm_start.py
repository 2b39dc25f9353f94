import hashlib

import numpy as np
import pytest
from datasets import Dataset

from helpers.tiny import WORDS
from lce_trainer.errors import TrainingError
from lce_trainer.groups.schema import validate_groups
from lce_trainer.synthesis.warm_start import WarmStartConfig, warm_start_groups


def corpus(n: int) -> Dataset:
    rng = np.random.default_rng(0)
    return Dataset.from_dict({"text": [" ".join(rng.choice(WORDS, 30)) + "." for _ in range(n)]})


def embed(texts):
    """A bag of hashed words: the same vector for the same text, more alike the more words are shared."""
    vectors = np.zeros((len(texts), 64), dtype=np.float32)
    for row, text in enumerate(texts):
        for word in text.split():
            vectors[row, int(hashlib.md5(word.encode()).hexdigest(), 16) % 64] += 1
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def build(tmp_path, n=40, seed=13, **settings):
    config = WarmStartConfig(pairs=160, max_passage_words=25, **settings)
    return warm_start_groups(corpus(n), embed, config, seed, tmp_path / "bm25")


def test_every_pool_has_its_source_first_and_no_passage_twice(tmp_path):
    groups, counts = build(tmp_path)
    assert counts["groups"] == 20 and counts["pairs"] == 160
    for row in groups.to_list():
        assert row["labels"] == [1.0] + [0.0] * 7
        assert len(set(row["passages"])) == 8
        assert set(row["query"].split()) <= set(row["passages"][0].split())


def test_scores_are_the_teachers_cosines(tmp_path):
    for row in build(tmp_path)[0].to_list():
        np.testing.assert_allclose(row["scores"], embed(row["passages"]) @ embed([row["query"]])[0], rtol=1e-5)


def test_the_trainer_takes_every_group(tmp_path):
    groups, _ = build(tmp_path)
    assert validate_groups(groups)[1]["groups"] == len(groups)


def test_the_same_seed_gives_the_same_groups_and_another_one_others(tmp_path):
    first, again, other = build(tmp_path)[0], build(tmp_path)[0], build(tmp_path, seed=14)[0]
    assert first.to_list() == again.to_list()
    assert first.to_list() != other.to_list()


def test_a_corpus_smaller_than_a_pool_is_an_error(tmp_path):
    with pytest.raises(TrainingError, match=r"set train.warm_start.pairs=0"):
        build(tmp_path, n=1, group_size=60)
