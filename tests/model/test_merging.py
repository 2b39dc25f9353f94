"""Merged weights lie where they should, to the bit at both ends."""

import pytest
import torch

from helpers.tiny import build_model
from lce_trainer.errors import TrainingError
from lce_trainer.model.merging import interpolate


def test_weights_lie_between_base_and_trained():
    base = {"a": torch.tensor([0.0, 1.0]), "steps": torch.tensor([3])}
    trained = {"a": torch.tensor([4.0, -1.0]), "steps": torch.tensor([7])}
    assert interpolate(base, trained, 0.25)["a"].tolist() == [1.0, 0.5]
    assert interpolate(base, trained, 0.25)["steps"].tolist() == [7]
    merged = interpolate(base, {**trained, "a": trained["a"].to(torch.bfloat16)}, 0.5)["a"]
    assert merged.dtype == torch.bfloat16 and merged.tolist() == [2.0, 0.0]


def test_the_ends_are_the_weights_themselves():
    base, trained = (build_model(seed).state_dict() for seed in (0, 1))
    for share, end in ((0.0, base), (1.0, trained)):
        merged = interpolate(base, trained, share)
        assert merged.keys() == end.keys()
        assert all(torch.equal(merged[name], end[name]) for name in end)


def test_other_architectures_are_refused():
    base = build_model().state_dict()
    more = {**base, "extra": torch.zeros(1)}
    with pytest.raises(TrainingError, match="extra is a weight of one of them alone"):
        interpolate(base, more, 0.5)
    name = "classifier.weight"
    with pytest.raises(TrainingError, match=r"classifier.weight has the shape \(1, 3\) in the base and \(1, 32\)"):
        interpolate({**base, name: torch.zeros(1, 3)}, base, 0.5)
