"""From a pile of documents to a published reranker, with no human label."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lce_trainer.collator import GroupCollator
    from lce_trainer.conversion import to_groups
    from lce_trainer.errors import LCETrainerError
    from lce_trainer.groups import GROUPS_FEATURES, check_groups, load_groups, validate_groups
    from lce_trainer.loss import distillation_loss, lce_loss
    from lce_trainer.metrics import RankingMetrics, ranking_metrics
    from lce_trainer.reranker import RankedPassage, Reranker
    from lce_trainer.trainer import LCETrainer
    from lce_trainer.training_args import LCETrainingArguments

__all__ = [
    "GROUPS_FEATURES",
    "GroupCollator",
    "LCETrainer",
    "LCETrainerError",
    "LCETrainingArguments",
    "RankedPassage",
    "RankingMetrics",
    "Reranker",
    "check_groups",
    "distillation_loss",
    "lce_loss",
    "load_groups",
    "ranking_metrics",
    "to_groups",
    "validate_groups",
]

_HOME = {
    "GROUPS_FEATURES": "groups",
    "GroupCollator": "collator",
    "LCETrainer": "trainer",
    "LCETrainerError": "errors",
    "LCETrainingArguments": "training_args",
    "RankedPassage": "reranker",
    "RankingMetrics": "metrics",
    "Reranker": "reranker",
    "check_groups": "groups",
    "distillation_loss": "loss",
    "lce_loss": "loss",
    "load_groups": "groups",
    "ranking_metrics": "metrics",
    "to_groups": "conversion",
    "validate_groups": "groups",
}


def __getattr__(name: str) -> Any:
    # Importing torch takes seconds: `lce-trainer --help` and a user of one name pay for what they use.
    if name in _HOME:
        return getattr(importlib.import_module(f"lce_trainer.{_HOME[name]}"), name)
    raise AttributeError(f"module 'lce_trainer' has no attribute {name!r}")
