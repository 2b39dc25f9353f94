"""The benchmarks run and compare what they say they compare; how fast anything is, is not tested."""

from pathlib import Path

import datasets
import numpy as np
import pytest
from conftest import WORDS, build_model, build_tokenizer

from benchmarks.loss_curves import LIMIT, OBJECTIVES, compare, largest_difference
from lce_trainer.reranker import RAW_SCORES

GROUP = 4
MAX_LENGTH = 32


def groups_of(n: int, size: int = GROUP) -> datasets.Dataset:
    """Groups of random words, of ragged lengths; some passages are longer than what a pair may have."""
    rng = np.random.default_rng(0)

    def text(low: int, high: int) -> str:
        return " ".join(rng.choice(WORDS, rng.integers(low, high)))

    return datasets.Dataset.from_dict(
        {
            "query_id": [f"q{i}" for i in range(n)],
            "query": [text(2, 6) for _ in range(n)],
            "passages": [[text(2, 40) for _ in range(size)] for _ in range(n)],
            "labels": [[1.0] + [0.0] * (size - 1)] * n,
        }
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    model, tokenizer = build_model(), build_tokenizer()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data *= 8  # else all scores are near 0, and any two losses alike
    model.config.sentence_transformers = dict(RAW_SCORES)
    tokenizer.model_max_length = MAX_LENGTH
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("loss", OBJECTIVES)
def test_our_loss_curve_is_that_of_sentence_transformers(loss, checkpoint, tmp_path):
    steps = 20
    groups = groups_of(OBJECTIVES[loss] * steps)
    losses = compare(checkpoint, groups, loss, steps, MAX_LENGTH, tmp_path, learning_rate=1e-3)
    assert [len(curve) for curve in losses.values()] == [steps, steps]
    assert np.std(losses["lce_trainer"]) > 100 * LIMIT
    assert largest_difference(losses) <= LIMIT
