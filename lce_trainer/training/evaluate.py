"""Evaluation while training: every passage of every group is scored once, over all ranks.

And what follows from it: which figure early stopping goes by, and that several sets are one evaluation.
"""

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import datasets
import numpy as np
import torch
from torch import nn
from transformers import EarlyStoppingCallback
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction

from lce_trainer.compat import prepared_models
from lce_trainer.errors import EvaluationError, TrainingError, shown
from lce_trainer.evaluation.metrics import ranking_metrics
from lce_trainer.model.packed.packing import batch_scores
from lce_trainer.model.scoring import score_pairs, tokens_at_once
from lce_trainer.training.arguments import DEFAULT_METRIC, LCETrainingArguments
from lce_trainer.training.loss import lce_loss


def measure_groups(trainer: Any, groups: datasets.Dataset, description: str, prefix: str) -> EvalLoopOutput:
    """Rankings of all groups, and their figures; the same on every rank.

    Args:
        trainer: An ``LCETrainer``.
        groups: Every passage of every group is ranked.
        description: Of the progress bar.
        prefix: Of the figures' names.
    """
    started = time.perf_counter()
    model, args = _model_to_evaluate(trainer), trainer.args
    labels = [np.asarray(row, dtype=np.float64) for row in groups["labels"]]
    pairs = [(query, text) for query, texts in zip(groups["query"], groups["passages"], strict=True) for text in texts]
    flat = score_pairs(
        lambda batch: batch_scores(model, batch, trainer.model, trainer.processing_class, args.device),
        trainer.processing_class,
        pairs,
        args.max_length,
        tokens_at_once(args.eval_batch_tokens, args.device),
        trainer.accelerator,
        desc=description,
        leave=False,
        disable=args.disable_tqdm or not trainer.is_local_process_zero(),
    )
    scores = np.split(flat, np.cumsum([len(row) for row in labels])[:-1])
    query_ids = groups["query_id" if "query_id" in groups.column_names else "query"]
    metrics = group_metrics(scores, labels, args.temperature, query_ids)
    if trainer.compute_metrics is not None:
        metrics |= trainer.compute_metrics(EvalPrediction(predictions=scores, label_ids=labels))
    trainer.tally.pause(time.perf_counter() - started)
    named = {f"{prefix}_{name}": value for name, value in metrics.items()}
    return EvalLoopOutput(predictions=scores, label_ids=labels, metrics=named, num_samples=len(labels))


def _model_to_evaluate(trainer: Any) -> nn.Module:
    args = trainer.args
    model: nn.Module = trainer._wrap_model(trainer.model, training=False)
    if not prepared_models(trainer.accelerator) and model is trainer.model:  # evaluated before it was trained
        model = trainer.accelerator.prepare_model(model, evaluation_mode=True)
    if not trainer.is_in_train and (args.fp16_full_eval or args.bf16_full_eval):
        dtype = torch.float16 if args.fp16_full_eval else torch.bfloat16
        model = model.to(dtype=dtype, device=args.device)
    model.eval()
    return model


@contextmanager
def one_evaluation(handler: Any) -> Iterator[None]:
    """Around the evaluation of several sets: callbacks do not take each of them for an evaluation.

    Early stopping would count its patience once a set, and miss the mean over all of them.

    Args:
        handler: transformers' ``CallbackHandler``; its ``on_evaluate`` is to be called once after this.
    """
    handler.on_evaluate = lambda args, state, control, metrics: control
    try:
        yield
    finally:
        del handler.on_evaluate


def settle_early_stopping(args: LCETrainingArguments, callbacks: Iterable[Any]) -> None:
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
    """Means over groups of the ranking measures, and of the LCE of each group's first best positive as ``loss``.

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
            f"a passage of queries {shown(bad)} has NaN for a score, so they cannot be ranked; use bf16 in place of "
            "fp16, look at these groups, or take a checkpoint whose weights are finite"
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
