import logging
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerState

from helpers.checkpoints import RUN, run_to_the_end
from helpers.killed import killed_at, moments_of
from helpers.trainers import Ruin, assert_same, easy_groups, make_groups, make_trainer, weights
from lce_trainer.artifacts import MANIFEST
from lce_trainer.errors import TrainingError
from lce_trainer.training.checkpoints import newest_checkpoint, rotate, seal, verify


def checkpoint(folder, step, sealed=True, best=None):
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    (path / "model.safetensors").write_bytes(b"weights" * 10)
    (path / "optimizer.pt").write_bytes(b"moments" * 10)
    TrainerState(global_step=step, best_global_step=best).save_to_json(str(path / "trainer_state.json"))
    if sealed:
        seal(path)
    return path


def test_the_newest_is_by_number_not_by_name(tmp_path):
    checkpoint(tmp_path, 9)
    newest = checkpoint(tmp_path, 10)
    assert newest_checkpoint(tmp_path) == newest


DAMAGE = {
    "no manifest": lambda path: (path / MANIFEST).unlink(),
    "half a manifest": lambda path: (path / MANIFEST).write_text("{"),
    "a file is gone": lambda path: (path / "optimizer.pt").unlink(),
    "a file is short": lambda path: (path / "optimizer.pt").write_bytes(b"moments"),
    "a bit is wrong": lambda path: (path / "optimizer.pt").write_bytes(b"momentz" * 10),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_skipped_and_named(tmp_path, caplog, damage):
    whole, damaged = checkpoint(tmp_path, 1), checkpoint(tmp_path, 2)
    DAMAGE[damage](damaged)
    with caplog.at_level(logging.WARNING):
        assert newest_checkpoint(tmp_path) == whole
    assert "checkpoint-2" in caplog.text


def test_a_checkpoint_whose_best_one_is_damaged_is_skipped(tmp_path, caplog):
    first, best, _ = checkpoint(tmp_path, 1, best=1), checkpoint(tmp_path, 2, best=2), checkpoint(tmp_path, 3, best=2)
    assert newest_checkpoint(tmp_path).name == "checkpoint-3"
    DAMAGE["a bit is wrong"](best)
    assert newest_checkpoint(tmp_path) == first
    assert all(f"skipped: checkpoint-{step}: {best}" in caplog.text for step in (2, 3))


def test_nothing_to_go_on_from(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    assert newest_checkpoint(tmp_path / "nothing") is None
    checkpoint(tmp_path, 3, sealed=False)
    assert newest_checkpoint(tmp_path) is None


def test_what_was_never_sealed_goes_first_and_what_must_stay_stays(tmp_path):
    steps = {step: checkpoint(tmp_path, step, sealed=step != 30) for step in (4, 8, 12, 30)}
    rotate(tmp_path, 2, [steps[12], steps[4]])
    assert sorted(tmp_path.iterdir()) == sorted([steps[4], steps[12]])
    rotate(tmp_path, 1, [steps[12], steps[4]])
    rotate(tmp_path, None, [])
    assert sorted(tmp_path.iterdir()) == sorted([steps[4], steps[12]])
    rotate(tmp_path, 1, [])
    assert list(tmp_path.iterdir()) == [steps[12]]


# ---- the trainer's own


def state_of(folder: Path) -> dict[str, bytes]:
    """All that a run ends with, but the log, which holds how fast it went."""
    return {
        name: (folder / name).read_bytes()
        for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")
    }


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> tuple[dict[str, bytes], list[bool]]:
    """How a run ends that nothing interrupted, and the moments it could have been killed at."""
    folder = tmp_path_factory.mktemp("whole")
    moments = moments_of(run_to_the_end, folder)
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-4"]
    verify(folder / "checkpoint-4")
    return state_of(folder / "checkpoint-4"), moments


@pytest.mark.parametrize("half_written", [True, False])
@pytest.mark.parametrize("draw", range(5))
def test_a_run_killed_while_it_writes_a_checkpoint_ends_bit_equal(draw, half_written, whole_run, tmp_path):
    """Ten moments drawn at random. Though only one checkpoint is kept, a good one is left once there was one."""
    wanted, moments = whole_run
    choice = [moment for moment, is_written in enumerate(moments) if is_written == half_written]
    killed_at(random.Random(29).sample(choice, 5)[draw], run_to_the_end, tmp_path)
    begun = [path.name for path in tmp_path.glob("checkpoint-*")]
    assert newest_checkpoint(tmp_path) is not None or begun in ([], ["checkpoint-1"])
    run_to_the_end(tmp_path)
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    assert state_of(tmp_path / "checkpoint-4") == wanted


def test_a_run_goes_on_from_the_newest_that_verifies_and_says_what_it_skipped(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="lce_trainer")
    run = {**RUN, "save_total_limit": None}
    make_trainer(tmp_path, make_groups(8), **run).train()
    wanted = state_of(tmp_path / "checkpoint-4")
    os.truncate(tmp_path / "checkpoint-4" / "optimizer.pt", 100)
    (tmp_path / "checkpoint-3" / MANIFEST).unlink()
    caplog.clear()
    trainer = make_trainer(tmp_path, make_groups(8), **run)
    trainer.train(resume_from_checkpoint=True)
    assert f"going on from {tmp_path / 'checkpoint-2'}" in caplog.text
    for skipped in ("checkpoint-4", "checkpoint-3"):
        assert f"checkpoint skipped: {skipped}: {tmp_path / skipped}" in caplog.text
    assert state_of(tmp_path / "checkpoint-4") == wanted
    assert len(trainer.state.log_history) == 1  # the rest was in the checkpoint's own


def test_a_checkpoint_named_must_be_there_and_whole(tmp_path, caplog):
    make_trainer(tmp_path, make_groups(8), **RUN).train()
    trainer = make_trainer(tmp_path, make_groups(8), **RUN)
    with pytest.raises(TrainingError, match=r"there is no checkpoint at .*checkpoint-9"):
        trainer.train(resume_from_checkpoint=tmp_path / "checkpoint-9")
    (tmp_path / "checkpoint-4" / "scheduler.pt").write_bytes(b"")
    with pytest.raises(TrainingError, match=r"scheduler.pt has 0 bytes where its manifest says"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    trainer.train()
    assert "training starts from the beginning, though" in caplog.text and "checkpoint-4" in caplog.text


def test_a_run_that_is_over_is_not_trained_on(tmp_path, caplog):
    """Neither at its end nor where it had stopped early, with the best checkpoint loaded; more epochs go on."""
    run = {**RUN, "eval_strategy": "steps", "eval_steps": 1, "num_train_epochs": 8, "learning_rate": 0.02}
    run |= {"eval_dataset": easy_groups(20), "load_best_model_at_end": True, "save_total_limit": 5}

    def trainer(**more):
        return make_trainer(tmp_path, easy_groups(16), callbacks=[Ruin(), EarlyStoppingCallback(2)], **run | more)

    first = trainer()
    first.train()
    stopped = first.state.global_step
    assert 2 < stopped < 32
    again = trainer()
    assert again.train(resume_from_checkpoint=True).global_step == stopped
    assert_same(weights(again), weights(first), 0)
    assert again.state.best_metric == first.state.best_metric
    assert f"early stopping ended it at step {stopped} of 32" in caplog.text
    shutil.rmtree(tmp_path / f"checkpoint-{stopped}")
    from_before = trainer()
    from_before.train(resume_from_checkpoint=True)
    assert from_before.state.global_step == stopped  # patience is not what it was at the start
    more = trainer(num_train_epochs=9)
    more.train(resume_from_checkpoint=True)
    assert more.state.global_step > stopped


def test_max_steps_within_an_epoch_are_not_overrun_on_resume(tmp_path):
    run = {**RUN, "max_steps": 3}
    whole = make_trainer(tmp_path, make_groups(16), **run)
    whole.train()
    again = make_trainer(tmp_path, make_groups(16), **run)
    assert again.train(resume_from_checkpoint=True).global_step == 3
    assert_same(weights(again), weights(whole), 0)


@pytest.mark.parametrize("kind", ["autocast", "weights", "compiled"])
def test_bf16_and_compiled_runs_resume_bit_equal(kind, tmp_path):
    """Moments follow the weights into bfloat16; a compiled model is saved, and goes on, like any other."""
    compiled = {"torch_compile": True, "torch_compile_backend": "eager"}
    settings = {"autocast": {"bf16": True}, "weights": {}, "compiled": compiled}[kind]
    run = {**RUN, "save_total_limit": None, **settings}

    def trainer(**more):
        made = make_trainer(tmp_path, make_groups(8), **run | more)
        if kind == "weights":
            made.model.to(torch.bfloat16)
        assert made.accelerator.state.dynamo_plugin.dynamic  # compiled for all shapes, not for those of each step
        return made

    trainer().train()
    wanted = state_of(tmp_path / "checkpoint-4")
    moments = torch.load(tmp_path / "checkpoint-4" / "optimizer.pt", weights_only=True)["state"][0]["exp_avg"]
    assert moments.dtype == (torch.bfloat16 if kind == "weights" else torch.float32)
    shutil.rmtree(tmp_path / "checkpoint-4")
    resumed = trainer(torch_compile=False) if kind == "compiled" else trainer()
    resumed.train(resume_from_checkpoint=tmp_path / "checkpoint-2")
    assert state_of(tmp_path / "checkpoint-4") == wanted


class StopAt(TrainerCallback):
    """Stops a run as a limit of time does: after a step, with a checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


class Terminate(TrainerCallback):
    """SIGTERM in the middle of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)  # transformers asks for the checkpoint from a timer


@pytest.mark.parametrize("stop", [StopAt, Terminate])
@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_run_that_a_callback_or_sigterm_stopped_goes_on_to_the_same_end(stop, step, whole_run, tmp_path):
    """In the middle of an epoch and at its end, though patience has not run out."""
    run = {**RUN, "save_steps": 4, "eval_strategy": "steps", "eval_steps": 1, "eval_dataset": easy_groups(4)}
    run |= {"enable_jit_checkpoint": stop is Terminate, "save_total_limit": None}
    stopped = make_trainer(tmp_path, make_groups(8), callbacks=[stop(step), EarlyStoppingCallback(9)], **run)
    for callback in stopped.callback_handler.callbacks:
        if type(callback).__name__ == "JITCheckpointCallback":
            callback.jit_manager.kill_wait = 0
    stopped.train()
    assert stopped.state.global_step == step
    assert newest_checkpoint(tmp_path) == tmp_path / f"checkpoint-{step}"
    resumed = make_trainer(tmp_path, make_groups(8), callbacks=[EarlyStoppingCallback(9)], **run)
    assert resumed.train(resume_from_checkpoint=True).global_step == 4
    assert state_of(tmp_path / "checkpoint-4") == whole_run[0]


def test_it_is_said_why_nothing_is_trained(tmp_path, caplog):
    make_trainer(tmp_path, make_groups(8), **RUN).train()
    for epochs, steps in ((2, 4), (1, 2)):
        caplog.clear()
        again = make_trainer(tmp_path, make_groups(8), **RUN | {"num_train_epochs": epochs})
        assert again.train(resume_from_checkpoint=True).global_step == 4
        assert "nothing is trained" in caplog.text and f"all {steps} steps were done" in caplog.text


def test_weights_alone_are_not_gone_on_from(tmp_path):
    """transformers would begin a new schedule of the learning rate in the middle of the run."""
    run = {**RUN, "save_only_model": True}
    make_trainer(tmp_path, make_groups(8), **run, callbacks=[StopAt(3)]).train()
    again = make_trainer(tmp_path, make_groups(8), **run)
    with pytest.raises(
        TrainingError, match=r"checkpoint-3 holds weights alone \(save_only_model\).* pass the folder as"
    ):
        again.train(resume_from_checkpoint=True)


class EndFirstEpoch(TrainerCallback):
    """Ends the first epoch after its first step."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_epoch_stop = state.global_step == 1


def test_going_on_where_the_run_did_not_stop_says_that_groups_are_missed(tmp_path, caplog):
    """After an epoch that a callback ended, and with another batch size."""
    run = {**RUN, "num_train_epochs": 3, "save_total_limit": None}
    make_trainer(tmp_path, make_groups(8), callbacks=[EndFirstEpoch(), StopAt(2)], **run).train()
    make_trainer(tmp_path, make_groups(8), **run).train(resume_from_checkpoint=True)
    assert "saved 1.50 epochs into its run, and is gone on from at 1.00, where step 2 lies with 2 steps" in caplog.text
    caplog.clear()
    make_trainer(tmp_path, make_groups(8), **run).train(resume_from_checkpoint=tmp_path / "checkpoint-3")
    assert "groups are missed" not in caplog.text
    smaller = {**run, "per_device_train_batch_size": 2}
    make_trainer(tmp_path, make_groups(8), **smaller).train(resume_from_checkpoint=tmp_path / "checkpoint-3")
    assert "saved 1.50 epochs into its run, and is gone on from at 0.75" in caplog.text
