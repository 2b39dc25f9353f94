"""From a pile of documents to a published reranker, with no human label."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lce_trainer.errors import (
        ArtifactError,
        ConfigError,
        CorpusError,
        DataError,
        EvaluationError,
        FirstProcessError,
        GroupsError,
        JobError,
        LabelError,
        LCETrainerError,
        LLMError,
        PromptError,
        PublishError,
        TrainingError,
    )
    from lce_trainer.evaluation.metrics import RankingMetrics, ranking_metrics
    from lce_trainer.groups.convert import load_groups, to_groups
    from lce_trainer.groups.schema import GROUPS_FEATURES, check_groups, validate_groups
    from lce_trainer.model.reranker import RankedPassage, Reranker
    from lce_trainer.training.arguments import LCETrainingArguments
    from lce_trainer.training.collator import GroupCollator
    from lce_trainer.training.loss import distillation_loss, lce_loss
    from lce_trainer.training.trainer import LCETrainer

__version__ = "0.2.0"

__all__ = [
    "GROUPS_FEATURES",
    "ArtifactError",
    "ConfigError",
    "CorpusError",
    "DataError",
    "EvaluationError",
    "FirstProcessError",
    "GroupCollator",
    "GroupsError",
    "JobError",
    "LCETrainer",
    "LCETrainerError",
    "LCETrainingArguments",
    "LLMError",
    "LabelError",
    "PromptError",
    "PublishError",
    "RankedPassage",
    "RankingMetrics",
    "Reranker",
    "TrainingError",
    "check_groups",
    "distillation_loss",
    "lce_loss",
    "load_groups",
    "ranking_metrics",
    "to_groups",
    "validate_groups",
]

_HOME = {
    "ArtifactError": "errors",
    "ConfigError": "errors",
    "CorpusError": "errors",
    "DataError": "errors",
    "EvaluationError": "errors",
    "FirstProcessError": "errors",
    "GROUPS_FEATURES": "groups.schema",
    "GroupCollator": "training.collator",
    "GroupsError": "errors",
    "JobError": "errors",
    "LCETrainer": "training.trainer",
    "LCETrainerError": "errors",
    "LCETrainingArguments": "training.arguments",
    "LLMError": "errors",
    "LabelError": "errors",
    "PromptError": "errors",
    "PublishError": "errors",
    "RankedPassage": "model.reranker",
    "RankingMetrics": "evaluation.metrics",
    "Reranker": "model.reranker",
    "TrainingError": "errors",
    "check_groups": "groups.schema",
    "distillation_loss": "training.loss",
    "lce_loss": "training.loss",
    "load_groups": "groups.convert",
    "ranking_metrics": "evaluation.metrics",
    "to_groups": "groups.convert",
    "validate_groups": "groups.schema",
}


def __getattr__(name: str) -> Any:
    # Importing torch takes seconds: `lce-trainer --help` and a user of one name pay for what they use.
    if name in _HOME:
        return getattr(importlib.import_module(f"lce_trainer.{_HOME[name]}"), name)
    raise AttributeError(f"module 'lce_trainer' has no attribute {name!r}")
