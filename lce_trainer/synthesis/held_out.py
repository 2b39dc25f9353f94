"""Which documents are held out: a share of them, by a hash of their names."""

import math
from collections.abc import Sequence

import numpy as np

from lce_trainer.artifacts import digest


def hold_out(names: Sequence[str], share: float, seed: int, least: int = 0) -> np.ndarray:
    """Return which rows are held out, bool, shape ``(rows,)``: all rows of a name are, or none.

    Names are ordered by a hash of the seed and the name, and the first of them are held out. So the order in which
    they come says nothing, and of more names those that were held out before come first again among themselves.

    Args:
        names: What each row belongs to, such as its document.
        share: Of the distinct names, rounded up.
        seed: Seeds the hash.
        least: Names at least, where there are so many.
    """
    distinct = sorted(set(names), key=lambda name: digest([seed, name]))
    n = max(math.ceil(len(distinct) * share), min(len(distinct), least))
    held = set(distinct[:n])
    return np.array([name in held for name in names], dtype=bool)
