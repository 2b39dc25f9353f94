"""What a run reports: to transformers' callbacks, and to the dashboards that they feed."""

import json
import math
import sqlite3
from contextlib import closing

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback

from helpers.trainers import easy_groups, make_trainer

CURVES = {
    "loss",
    "loss_if_guessing",
    "accuracy@1",
    "margin",
    "score_spread",
    "learning_rate",
    "grad_norm",
    "pairs_per_second",
    "tokens_per_second",
    "padding",
    "cut_pairs",
}


def test_a_dashboard_shows_the_curves_and_the_rankings(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer = make_trainer(
        tmp_path / "out",
        easy_groups(24),
        eval_dataset={"near": easy_groups(6), "far": easy_groups(3)},
        report_to="tensorboard",
        logging_steps=1,
        eval_strategy="epoch",
        hub_token="hf_SECRETSECRET",
    )
    trainer.train()
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    tags = set(board.Tags()["scalars"])
    assert {f"train/{name}" for name in CURVES} <= tags
    assert {f"eval/{name}ndcg@10" for name in ("", "near_", "far_")} <= tags
    for name in CURVES:
        points = board.Scalars(f"train/{name}")
        assert [point.step for point in points] == [1, 2, 3], name
        assert all(math.isfinite(point.value) for point in points), name
    logged = [entry["margin"] for entry in trainer.state.log_history if "margin" in entry]
    assert [point.value for point in board.Scalars("train/margin")] == pytest.approx(logged, rel=1e-6)
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and b"SECRET" in file.read_bytes()]


def test_trackio_gets_the_same_curves_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "board"))  # read when trackio is imported
    pytest.importorskip("trackio", reason="not among the test requirements: pip install trackio")
    trainer = make_trainer(
        tmp_path / "out",
        easy_groups(16),
        eval_dataset={"near": easy_groups(6), "far": easy_groups(3)},
        report_to="trackio",
        project="curves",
        logging_steps=1,
        eval_strategy="epoch",
        hub_token="hf_SECRETSECRET",
    )
    trainer.train()
    with closing(sqlite3.connect(tmp_path / "board" / "curves.db")) as board:
        rows = [json.loads(row) for (row,) in board.execute("SELECT metrics FROM metrics ORDER BY id")]
    steps = [row for row in rows if "train/loss" in row]
    assert [row["train/global_step"] for row in steps] == [1, 2]
    assert all(math.isfinite(row[f"train/{name}"]) for row in steps for name in CURVES)
    logged = [entry["margin"] for entry in trainer.state.log_history if "margin" in entry]
    assert [row["train/margin"] for row in steps] == pytest.approx(logged, rel=1e-6)
    rankings = {f"eval/{name}ndcg@10" for name in ("", "near_", "far_")}
    assert rankings <= {name for row in rows for name in row}
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and b"SECRET" in file.read_bytes()]


class StopAt(TrainerCallback):
    """Stops at the first accuracy it sees, and writes down what it sees."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen += logs
        if "accuracy@1" in logs:
            control.should_training_stop = True

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.seen += metrics


def test_a_plain_callback_sees_the_figures_and_stops_the_run(tmp_path):
    callback = StopAt()
    trainer = make_trainer(
        tmp_path,
        easy_groups(80),
        eval_dataset=easy_groups(4),
        callbacks=[callback],
        logging_steps=2,
        eval_on_start=True,
    )
    trainer.train()
    assert trainer.state.global_step == 2
    assert set(callback.seen) >= {*CURVES, "eval_ndcg@10", "eval_mrr@10", "eval_map@10", "eval_loss"}
