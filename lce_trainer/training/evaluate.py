"""The figures of an evaluation while training, and which of them early stopping goes by."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import EarlyStoppingCallback

from lce_trainer.errors import EvaluationError, TrainingError, format_ids
from lce_trainer.evaluation.metrics import ranking_metrics
from lce_trainer.training.arguments import DEFAULT_METRIC, LCETrainingArguments
from lce_trainer.training.loss import lce_loss


def set_early_stopping_metric(args: LCETrainingArguments, callbacks: Iterable[Any]) -> None:
    """Have early stopping go by nDCG@10 unless another figure was chosen.

    Not whenever there are evaluations: with a figure for the best model ``transformers`` keeps the best checkpoint,
    and with ``save_total_limit=1`` in place of the last one.

    Raises:
        TrainingError: A callback is to stop early, but there are no evaluations.
    """
    if not any(isinstance(callback, EarlyStoppingCallback) for callback in callbacks):
        return
    if args.eval_strategy == "no":
        raise TrainingError("EarlyStoppingCallback goes by evaluations: set eval_strategy to steps or epoch")
    if args.metric_for_best_model is None:
        args.metric_for_best_model, args.greater_is_better = DEFAULT_METRIC, True


def group_metrics(
    scores: Sequence[np.ndarray], labels: Sequence[np.ndarray], temperature: float, query_ids: Sequence[str]
) -> dict[str, float]:
    """Return means over groups of the ranking measures, and of the LCE of each group's first best positive as ``loss``.

    A group without a positive, or without a passage, counts as 0, and has no loss. The measures take labels as
    :func:`lce_trainer.evaluation.metrics.ranking_metrics` takes grades, soft ones included. MRR and MAP count a label
    from 1 on as relevant, as there; of soft labels, and where no label is 0 or less (as on a scale from 1 to 5), at
    least half of the highest one.

    Args:
        scores: Logits of each group's passages.
        labels: Their grades; above 0 is positive.
        temperature: Divides the scores in the loss.
        query_ids: Of each group, for the message; need not be distinct.

    Raises:
        EvaluationError: A score is NaN, a label is not one that the measures take, or there is no passage at all.
    """
    if bad := [query_id for query_id, row in zip(query_ids, scores, strict=True) if np.isnan(row).any()]:
        raise EvaluationError(
            f"a passage of queries {format_ids(bad)} has NaN for a score, so they cannot be ranked; use bf16 in place "
            "of fp16, inspect these groups, or use a checkpoint whose weights are finite"
        )
    distinct = len(set(map(str, query_ids))) == len(query_ids)
    names = [str(name) if distinct else f"{name} (group {i})" for i, name in enumerate(query_ids)]
    run = {q: {str(i): float(s) for i, s in enumerate(row)} for q, row in zip(names, scores, strict=True)}
    qrels = {q: {str(i): float(label) for i, label in enumerate(row)} for q, row in zip(names, labels, strict=True)}
    every = np.concatenate([np.asarray(row, dtype=np.float64) for row in labels]) if len(labels) else np.zeros(0)
    relevant_from = float(every.max()) / 2 if len(every) and every.min() > 0 else None
    found = ranking_metrics(run, qrels, relevant_from)
    metrics = {name: math.fsum(values.values()) / len(scores) for name, values in found.items()}
    losses = []
    for row, grades in zip(scores, labels, strict=True):
        if not len(grades):
            continue
        best = int(grades.argmax())
        competing = grades < grades[best]
        competing[best] = True
        if grades[best] > 0 and competing.sum() > 1:
            grid, mask = torch.from_numpy(row)[None], torch.from_numpy(competing)[None]
            losses.append(float(lce_loss(grid, torch.tensor([best]), mask, temperature)))
    return {**metrics, "loss": float(np.mean(losses))} if losses else metrics
