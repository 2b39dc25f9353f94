"""Weights on the line from a base to what training made of it."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lce_trainer.errors import TrainingError


def interpolate(base: Mapping[str, Tensor], trained: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Return ``(1 - share) * base + share * trained`` of each weight.

    Source: Wortsman et al. 2022, *Robust fine-tuning of zero-shot models*, https://huggingface.co/papers/2109.01903.

    Args:
        base: Weights before training, by name.
        trained: Weights after it.
        share: Of the trained weights, from 0 to 1; at the ends the weights are exactly those of one of the two.

    Returns:
        The weights in the dtypes of the trained ones, computed in float32. What counts, and is no floating-point
        number, is that of the trained model.

    Raises:
        TrainingError: The two do not have the same weights in the same shapes.
    """
    if odd := sorted(base.keys() ^ trained.keys()):
        raise TrainingError(
            f"a model and its base can be merged if they have one architecture, and {odd[0]} is a weight of one of "
            f"them alone{f', like {len(odd) - 1} more' if len(odd) > 1 else ''}"
        )
    merged = {}
    for name, weight in trained.items():
        if base[name].shape != weight.shape:
            raise TrainingError(
                f"a model and its base can be merged if they have one architecture, and {name} has the shape "
                f"{tuple(base[name].shape)} in the base and {tuple(weight.shape)} in the model"
            )
        if weight.is_floating_point():
            ends = base[name].to(weight.device, torch.float32), weight.float()
            weight = torch.lerp(*ends, share).to(weight.dtype)
        merged[name] = weight
    return merged
