"""What the trainer measures while it trains, and what follows from it."""

import numpy as np
import pytest
from datasets import Dataset
from transformers import EarlyStoppingCallback, TrainerCallback

from helpers.trainers import Ruin, easy_groups, make_groups, make_trainer
from lce_trainer.errors import TrainingError
from lce_trainer.evaluation.metrics import ranking_metrics
from lce_trainer.model.reranker import Reranker

# ---- evaluation


def test_evaluation_measures_what_the_reranker_would_rank(tmp_path, tiny_reranker):
    groups = make_groups(9, seed=4)
    groups = Dataset.from_list([*groups, {**groups[0], "labels": [0.0] * 4}])
    trainer = make_trainer(tmp_path, None, model=str(tiny_reranker), eval_dataset=groups, max_length=128)
    metrics = trainer.evaluate()
    reranker = Reranker.from_pretrained(tiny_reranker)
    run, qrels = {}, {}
    for i, row in enumerate(groups):
        scores = reranker.score([(row["query"], text) for text in row["passages"]])
        run[str(i)] = {str(j): float(score) for j, score in enumerate(scores)}
        qrels[str(i)] = {str(j): int(label) for j, label in enumerate(row["labels"])}
    for measure, values in ranking_metrics(run, qrels).items():
        assert metrics[f"eval_{measure}"] == pytest.approx(np.mean(list(values.values())), abs=1e-9)
    assert metrics["eval_loss"] > 0
    output = trainer.predict(groups)
    assert [len(scores) for scores in output.predictions] == [len(row) for row in groups["labels"]]
    np.testing.assert_allclose(output.predictions[0], list(run["0"].values()), atol=1e-5)


def test_several_sets_have_their_own_figures_and_a_mean(tmp_path):
    sets = {"one": make_groups(3, seed=1), "two": make_groups(5, seed=2)}
    metrics = make_trainer(tmp_path, None, eval_dataset=sets).evaluate()
    both = [metrics["eval_one_ndcg@10"], metrics["eval_two_ndcg@10"]]
    assert metrics["eval_ndcg@10"] == pytest.approx(np.mean(both))


class Evaluations(TrainerCallback):
    """Writes down what a callback gets to see of an evaluation."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []
        self.logged: list[str] = []

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.seen.append(dict(metrics))

    def on_log(self, args, state, control, logs, **kwargs):
        self.logged += logs


@pytest.mark.parametrize("metric", [None, "eval_two_ndcg@10", "eval_one_loss"])
@pytest.mark.parametrize("best", [True, False])
def test_several_sets_are_one_evaluation_to_early_stopping(metric, best, tmp_path, caplog):
    """Patience is counted once, by the mean or by a set of one's own, and no figure is missed."""
    sets = {"one": easy_groups(3), "two": easy_groups(5)}
    run = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    watch = Evaluations()
    trainer = make_trainer(
        tmp_path,
        easy_groups(80),
        eval_dataset=sets,
        load_best_model_at_end=best,
        metric_for_best_model=metric,
        callbacks=[watch, EarlyStoppingCallback(2)],
        learning_rate=0.0,
        **run,
    )
    trainer.train()
    assert trainer.state.global_step == 3  # never better than at step 1
    assert trainer.state.best_metric == watch.seen[0][metric or "eval_ndcg@10"]
    assert len(watch.seen) == 3
    figures = {f"eval_{name}{figure}" for name in ("", "one_", "two_") for figure in ("ndcg@10", "loss")}
    assert all(figures <= metrics.keys() for metrics in watch.seen) and figures <= set(watch.logged)
    assert "early stopping is disabled" not in caplog.text


def test_early_stopping_without_evaluations_is_an_error_that_says_what_to_set(tmp_path):
    trainer = make_trainer(tmp_path, easy_groups(4), callbacks=[EarlyStoppingCallback(2)])
    with pytest.raises(TrainingError, match="EarlyStoppingCallback goes by evaluations: set eval_strategy"):
        trainer.train()


def test_the_best_checkpoints_alone_are_saved(tmp_path):
    run = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "best", "learning_rate": 0.0}
    trainer = make_trainer(tmp_path, easy_groups(24), eval_dataset=easy_groups(5), **run)
    trainer.train()
    assert trainer.state.global_step == 3
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]


@pytest.mark.parametrize("kind", ["reduce_lr_on_plateau", "greedy"])
def test_a_rising_ndcg_does_not_cut_the_learning_rate_and_a_falling_one_does(kind, tmp_path):
    def last_rate(*figures: float) -> float:
        figure = iter(figures)
        trainer = make_trainer(
            tmp_path,
            easy_groups(24),
            eval_dataset=easy_groups(5),
            compute_metrics=lambda prediction: {"ndcg@10": next(figure)},
            lr_scheduler_type=kind,
            lr_scheduler_kwargs={"patience": 0, "factor": 0.5, "max_lr": 1e-4} if kind == "greedy" else {"patience": 0},
            learning_rate=1e-4,
            eval_strategy="steps",
            eval_steps=1,
        )
        trainer.train()
        rate: float = trainer.optimizer.param_groups[0]["lr"]
        return rate

    assert last_rate(0.2, 0.4, 0.6) == 1e-4
    assert last_rate(0.6, 0.4, 0.4) < 1e-4


def test_the_best_ranking_checkpoint_is_kept_and_training_stops_early(tmp_path):
    groups = easy_groups(80)
    run = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "num_train_epochs": 2}
    trainer = make_trainer(
        tmp_path,
        groups,
        eval_dataset=easy_groups(30),
        load_best_model_at_end=True,
        callbacks=[Ruin(), EarlyStoppingCallback(2)],
        learning_rate=0.02,
        **run,
    )
    trainer.train()
    curve = [entry["eval_ndcg@10"] for entry in trainer.state.log_history if "eval_ndcg@10" in entry]
    assert trainer.state.global_step < 20
    assert trainer.state.best_metric == max(curve) > curve[-1]
    assert trainer.evaluate()["eval_ndcg@10"] == pytest.approx(max(curve))


# ---- saving
