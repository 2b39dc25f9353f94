"""The best checkpoint of a run is gone or damaged before its weights are loaded: an error, or the right weights."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from helpers.trainers import make_groups, make_trainer
from lce_trainer.errors import TrainingError

RUN = {"num_train_epochs": 2, "per_device_train_batch_size": 4, "optim": "adamw_torch", "learning_rate": 1e-3}
RUN |= {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
RUN |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}


def trainer_in(folder, *callbacks):
    """A trainer whose best checkpoint is its first one: the loss that is taken for the best is the highest."""
    groups = make_groups(8)
    trainer = make_trainer(folder, groups, eval_dataset=groups, **RUN)
    for callback in callbacks:
        trainer.add_callback(callback)
    return trainer


class Lose(TrainerCallback):
    """Damages the best checkpoint after the last step."""

    def __init__(self, damage):
        self.damage = damage

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == state.max_steps:
            self.damage(Path(state.best_model_checkpoint))


def flip(folder):
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [shutil.rmtree, lambda best: (best / "model.safetensors").unlink(), flip])
def test_a_best_checkpoint_that_is_gone_or_damaged_is_an_error_and_a_resumed_run_ends_right(damage, tmp_path):
    whole = trainer_in(tmp_path / "whole")
    whole.train()
    assert whole.state.best_global_step == 1 < whole.state.global_step
    with pytest.raises(TrainingError, match=r"the best checkpoint cannot be loaded: .*checkpoint-1"):
        trainer_in(tmp_path / "lost", Lose(damage)).train()
    again = trainer_in(tmp_path / "lost")
    again.train(resume_from_checkpoint=True)
    assert again.state.best_global_step == 1
    for name, weights in again.model.state_dict().items():
        assert torch.equal(weights, whole.model.state_dict()[name]), name


def test_a_finished_run_whose_best_checkpoint_is_gone_does_not_end_with_its_last_weights(tmp_path):
    trainer = trainer_in(tmp_path)
    trainer.train()
    last = sorted(tmp_path.glob("checkpoint-*"))[-1]
    shutil.rmtree(tmp_path / "checkpoint-1")
    with pytest.raises(TrainingError, match="the best checkpoint cannot be loaded"):
        trainer_in(tmp_path).train(resume_from_checkpoint=str(last))
