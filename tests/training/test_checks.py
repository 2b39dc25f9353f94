"""What would quietly have no effect is refused, or made to have one."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from helpers.tiny import build_tokenizer
from helpers.trainers import lively_model, make_groups, make_trainer
from lce_trainer.errors import ConfigError, TrainingError
from lce_trainer.model.packed.packing import packs
from lce_trainer.model.reranker import Reranker
from lce_trainer.training.arguments import LCETrainingArguments
from lce_trainer.training.collator import GroupCollator
from lce_trainer.training.step import Pass
from lce_trainer.training.trainer import LCETrainer

SIZES = {"group_size": 4, "max_length": 48, "max_query_length": 10}


def trainer_of(folder, collator=None, tokenizer=None, settings=None, **more) -> LCETrainer:
    args = LCETrainingArguments(str(folder), report_to="none", **{**SIZES, **(settings or {})})
    return LCETrainer(lively_model(), args, collator, make_groups(4), processing_class=tokenizer, **more)


@pytest.mark.parametrize("name", ["compute_loss_func", "preprocess_logits_for_metrics"])
def test_a_function_that_would_never_be_called_is_an_error(name, tmp_path):
    with pytest.raises(TrainingError, match=f"{name} would not be used: .*; leave it out"):
        trainer_of(tmp_path, tokenizer=build_tokenizer(), **{name: print})


@pytest.mark.parametrize(
    "setting",
    [{"per_device_eval_batch_size": 16}, {"batch_eval_metrics": True}, {"include_for_metrics": ["inputs"]}],
    ids=lambda setting: next(iter(setting)),
)
def test_a_setting_that_would_have_no_effect_is_an_error(setting, tmp_path):
    (name,) = setting
    with pytest.raises(ConfigError, match=f"{name}=.* would not be used: .*; leave it out"):
        trainer_of(tmp_path, tokenizer=build_tokenizer(), settings=setting)


@pytest.mark.parametrize(
    ("own", "settings", "told"),
    [
        ({"max_length": 64}, {}, "max_length=64, and args 48"),
        ({"group_size": 8}, {}, "group_size=8, and args 4"),
        ({"max_query_length": 12}, {}, "max_query_length=12, and args 10"),
        ({"seed": 7}, {}, "seed=7, and args 42"),
        ({}, {"data_seed": 7}, "seed=42, and args 7"),
        ({"curriculum_epochs": 3}, {}, "curriculum_epochs=3, and args None"),
        ({}, {"curriculum_epochs": 2}, "curriculum_epochs=None, and args 2"),
        ({}, {"stuffed_negatives": 0.2}, "stuffed_negatives=0.0, and args 0.2"),
        ({"special_tokens_in_texts": True}, {}, "special_tokens_in_texts=True, and args False"),
    ],
)
def test_a_collator_that_does_not_agree_with_the_settings_is_an_error(own, settings, told, tmp_path):
    collator = GroupCollator(build_tokenizer(), **{**SIZES, **own})
    with pytest.raises(TrainingError, match=f"data_collator has {told}: they must agree"):
        trainer_of(tmp_path, collator, settings=settings)


def test_a_collator_that_agrees_is_used_with_its_tokenizer(tmp_path):
    collator = GroupCollator(build_tokenizer(), **SIZES)
    trainer = trainer_of(tmp_path, collator)
    assert trainer.data_collator is collator and trainer.processing_class is collator.tokenizer
    with pytest.raises(TrainingError, match="another tokenizer than processing_class"):
        trainer_of(tmp_path, collator, build_tokenizer())
    with pytest.raises(TrainingError, match="data_collator must be a GroupCollator, not function"):
        trainer_of(tmp_path, lambda rows: rows)


def test_packing_none_undoes_the_packing_of_who_had_the_model_before(tmp_path):
    model = lively_model()
    Reranker(model, build_tokenizer())
    assert packs(model)
    trainer = make_trainer(tmp_path, make_groups(4), model=model, packing="none")
    assert not packs(trainer.model)
    trainer.train()


def test_several_gpus_in_one_process_are_not_used_behind_your_back(tmp_path, caplog):
    args = LCETrainingArguments(str(tmp_path), report_to="none", per_device_train_batch_size=3, **SIZES)
    assert args.n_gpu <= 1
    args._n_gpu = 2
    assert args.train_batch_size == 6
    trainer = LCETrainer(lively_model(), args, train_dataset=make_groups(4), processing_class=build_tokenizer())
    assert "has 2 GPUs and trains on one of them: start it with accelerate launch" in caplog.text
    assert trainer.args.n_gpu == 1 and trainer._train_batch_size == 3
    assert not isinstance(trainer._wrap_model(trainer.model), torch.nn.DataParallel)


def test_deepspeed_in_half_precision_leaves_labels_and_teacher_as_they_are(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, make_groups(4))
    batch = trainer.data_collator(list(trainer.train_dataset))
    trainer.is_deepspeed_enabled = True
    half = SimpleNamespace(dtype=lambda: torch.bfloat16)  # what transformers asks of accelerate's plugin
    monkeypatch.setattr(AcceleratorState, "deepspeed_plugin", SimpleNamespace(hf_ds_config=half))
    moved = trainer._prepare_inputs(batch)
    assert moved.labels.dtype == moved.teacher_scores.dtype == np.float32
    wanted = trainer.data_collator(list(trainer.train_dataset))
    np.testing.assert_array_equal(moved.labels, wanted.labels)
    np.testing.assert_array_equal(moved.teacher_scores, wanted.teacher_scores)
    one = Pass(batch.pairs, lambda scores: scores.sum() * 1e-9, is_counted=False)
    assert trainer._prepare_inputs(one) is one
