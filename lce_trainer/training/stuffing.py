"""Hard negatives made by stuffing: the query, or its words, added to passages that do not answer it."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lce_trainer.evaluation.attacks import keywords
from lce_trainer.training.sampling import random_raw

_FORMS = (
    lambda query, passage: f"{query} {passage}",
    lambda query, passage: f"{passage} {query}",
    lambda query, passage: f"{query} {query} {passage}",
    lambda query, passage: f"{' '.join(keywords(query))} {passage}",
)


def stuff_negatives(row: Any, drawn: Sequence[int], share: float, seed: int) -> list[str]:
    """Return the passages of a group that are trained on, some of its negatives stuffed.

    Which, and how, is a function of the seed, the epoch, the query's id and the passage's place, and of nothing else,
    as in :mod:`lce_trainer.training.sampling`.

    Args:
        row: The group, with its ``epoch``, its passages as texts.
        drawn: The places of the passages.
        share: Of the negatives, from 0 to 1. A passage with a label above 0 is never stuffed.
        seed: Of the draw.
    """
    query, passages, labels = row["query"], row["passages"], row["labels"]
    raw = random_raw(2 * len(passages), seed, row["query_id"], "stuffing", row.get("epoch", 0)).reshape(2, -1)
    is_stuffed = (raw[0] / 2.0**64 < share) & (np.asarray(labels, dtype=np.float64) <= 0)
    return [
        _FORMS[int(raw[1, place]) % len(_FORMS)](query, passages[place]) if is_stuffed[place] else passages[place]
        for place in drawn
    ]
