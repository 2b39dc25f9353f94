"""Gradients of a step, and the step written plainly."""

import numpy as np
import torch
from datasets import Dataset

from helpers.tiny import WORDS
from lce_trainer.training.step import cut_step


def gradients(trainer) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in trainer.model.named_parameters()}


def one_graph(trainer, batch) -> torch.Tensor:
    """The plain step: the same chunks after one another, one loss a part, one backward pass."""
    trainer.model.train()
    loss = torch.zeros(())
    later = []  # parts of one chunk run after those that are cached
    for part in cut_step(batch, trainer.args.micro_batch_size):
        if len(part.chunks) == 1:
            later.append(part.batch)
            continue
        rows = np.concatenate([chunk.rows for chunk in part.chunks])
        scores = torch.cat([trainer._scores(trainer.model, chunk.pairs) for chunk in part.chunks])
        loss = loss + trainer._loss(scores[np.argsort(rows)], part.batch, len(batch.group_sizes))[0]
    for part in later:
        loss = loss + trainer._loss(trainer._scores(trainer.model, part.pairs), part, len(batch.group_sizes))[0]
    return loss


def large_groups() -> Dataset:
    """One query with 256 negatives, every passage longer than fits."""
    texts = [" ".join(WORDS[(i + j) % len(WORDS)] for j in range(300)) for i in range(257)]
    return Dataset.from_dict({"query": ["what is a star"], "passages": [texts], "labels": [[1.0] + [0.0] * 256]})
