"""The losses of a group: tensors in, tensor out."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Reduction = Literal["sum", "none"]


def lce_loss(
    scores: Tensor, target: Tensor, mask: Tensor, temperature: float = 1.0, reduction: Reduction = "sum"
) -> Tensor:
    """Cross-entropy of each group's positive against that group's own negatives.

    Source: Gao, Dai & Callan 2021, eq. 5, https://huggingface.co/papers/2101.08751.

    The mask says who competes. A query's other positives stay out of the denominator by being
    masked; with graded labels the competitors are the passages of a strictly lower grade.

    Args:
        scores: Logits, shape ``(groups, width)``; rows padded to the widest group.
        target: Column of each group's positive, shape ``(groups,)``, int64.
        mask: True where a score competes, the positive's own included, shape ``(groups, width)``.
        temperature: Divides the scores.
        reduction: ``"sum"`` over groups, or ``"none"`` for one loss a group.

    Returns:
        Loss in nats, float32 (float64 scores stay float64): a scalar, or shape ``(groups,)``.
    """
    logits = (_at_least_float32(scores) / temperature).masked_fill(~mask, -torch.inf)
    return functional.cross_entropy(logits, target, reduction=reduction)


def distillation_loss(
    scores: Tensor, teacher_scores: Tensor, mask: Tensor, temperature: float = 1.0, reduction: Reduction = "sum"
) -> Tensor:
    """KL divergence of each group's score distribution from its teacher's, KL(teacher || student).

    Only the teacher is tempered: its scores (cosines, probabilities, log-likelihoods) have a
    scale of their own, which has nothing to do with the student's logits.

    Args:
        scores: The student's logits, shape ``(groups, width)``.
        teacher_scores: The teacher's scores, shape ``(groups, width)``; anything where masked.
        mask: True where a teacher's score is known, shape ``(groups, width)``; a group with none
            has no loss.
        temperature: Divides the teacher's scores.
        reduction: ``"sum"`` over groups, or ``"none"`` for one loss a group.

    Returns:
        Divergence in nats, float32 (float64 scores stay float64): a scalar, or shape ``(groups,)``.
    """
    scores = _at_least_float32(scores)
    teacher_scores = teacher_scores.to(scores.dtype) / temperature
    # The lowest finite number and not -inf: a row with no teacher at all would be NaN.
    lowest = torch.finfo(scores.dtype).min
    student = functional.log_softmax(scores.masked_fill(~mask, lowest), dim=1).masked_fill(~mask, 0)
    teacher = functional.log_softmax(teacher_scores.masked_fill(~mask, lowest), dim=1)
    probability = teacher.exp().masked_fill(~mask, 0)
    divergence = (probability * (teacher.masked_fill(~mask, 0) - student)).sum(dim=1)
    return divergence.sum() if reduction == "sum" else divergence


def group_losses(
    scores: Tensor,
    target: Tensor,
    mask: Tensor,
    teacher_scores: Tensor,
    temperature: float = 1.0,
    distillation_weight: float = 0.0,
    distillation_temperature: float = 1.0,
) -> Tensor:
    """LCE of each group, mixed with the distillation from its teacher's scores where it has several.

    Args:
        scores: Logits, shape ``(groups, width)``.
        target: Column of each group's positive, shape ``(groups,)``.
        mask: True where a score competes, shape ``(groups, width)``.
        teacher_scores: NaN where unknown, shape ``(groups, width)``.
        temperature: Divides the scores.
        distillation_weight: Part of the loss that is the distillation.
        distillation_temperature: Divides the teacher's scores.

    Returns:
        Loss in nats, shape ``(groups,)``.
    """
    scores = _at_least_float32(scores)
    lce = lce_loss(scores, target, mask, temperature, reduction="none")
    if not distillation_weight:
        return lce
    known = mask & ~teacher_scores.isnan()
    distilled = distillation_loss(
        scores / temperature, teacher_scores, known, distillation_temperature, reduction="none"
    )
    weight = distillation_weight * (known.sum(dim=1) > 1).to(lce.dtype)  # one score alone says nothing
    mixed: Tensor = (1 - weight) * lce + weight * distilled
    return mixed


def _at_least_float32(scores: Tensor) -> Tensor:
    return scores if scores.dtype == torch.float64 else scores.float()
