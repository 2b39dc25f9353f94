"""What ``evaluate.load`` runs: from this folder, or from a Hub space that holds its files."""

from lce_trainer.evaluation.metrics import RankingMetrics

__all__ = ["RankingMetrics"]
