import json
import pickle
from dataclasses import fields

import pytest
import torch
from transformers import HfArgumentParser, TrainingArguments

from lce_trainer.errors import ConfigError
from lce_trainer.training.arguments import LCETrainingArguments


def test_the_token_is_in_nothing_that_is_saved(tmp_path):
    args = LCETrainingArguments(str(tmp_path), hub_token="hf_SECRETSECRET", learning_rate=3e-5)
    assert args.hub_token == "hf_SECRETSECRET"
    torch.save(args, tmp_path / "args.bin")
    public = json.dumps(args.to_public_dict(), default=str)
    assert b"SECRET" not in (tmp_path / "args.bin").read_bytes()
    assert b"SECRET" not in pickle.dumps(args)
    assert "SECRET" not in public and str(tmp_path) not in public
    assert json.loads(public) == {"learning_rate": 3e-5}


def test_bf16_is_accepted_where_there_is_no_accelerator(tmp_path):
    assert LCETrainingArguments(str(tmp_path), bf16=True).mixed_precision == "bf16"


def test_numbers_and_no_may_come_as_yaml_reads_them(tmp_path):
    args = LCETrainingArguments(str(tmp_path), learning_rate="2e-4", eval_strategy=False, save_strategy=False)
    assert args.learning_rate == 2e-4
    assert (args.eval_strategy, args.save_strategy, args.logging_strategy) == ("no", "no", "steps")


def test_ranking_decides_which_checkpoint_is_best(tmp_path):
    args = LCETrainingArguments(
        str(tmp_path), load_best_model_at_end=True, eval_strategy="steps", save_strategy="steps", save_steps=10
    )
    assert (args.metric_for_best_model, args.greater_is_better) == ("ndcg@10", True)
    assert LCETrainingArguments(str(tmp_path)).metric_for_best_model is None
    best = LCETrainingArguments(str(tmp_path), eval_strategy="epoch", save_strategy="best")
    assert (best.metric_for_best_model, best.greater_is_better) == ("ndcg@10", True)


@pytest.mark.parametrize("kind", ["reduce_lr_on_plateau", "greedy"])
def test_a_scheduler_that_follows_a_metric_is_told_which_way_is_better(kind, tmp_path):
    def mode(**settings):
        args = LCETrainingArguments(str(tmp_path), lr_scheduler_type=kind, eval_strategy="epoch", **settings)
        return args.lr_scheduler_kwargs["mode"]

    assert mode() == mode(metric_for_best_model="eval_dev_mrr@10") == "max"
    assert mode(metric_for_best_model="loss") == mode(greater_is_better=False) == "min"
    assert mode(lr_scheduler_kwargs={"patience": 3}) == mode(lr_scheduler_kwargs='{"patience": 3}') == "max"
    assert mode(lr_scheduler_kwargs={"mode": "min"}) == "min"
    assert LCETrainingArguments(str(tmp_path)).lr_scheduler_kwargs is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group_size": 1}, "group_size must be a whole number from 2 up, not 1"),
        ({"micro_batch_size": 0}, "micro_batch_size must be"),
        ({"curriculum_epochs": 0}, "curriculum_epochs must be a whole number from 1 up, not 0"),
        ({"max_length": "long"}, "max_length must be a whole number"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"learning_rate": "fast"}, "learning_rate must be a number, not 'fast'"),
        ({"distillation_weight": 1.5}, "distillation_weight must be from 0 to 1"),
        ({"stuffed_negatives": -0.1}, "stuffed_negatives must be from 0 to 1"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor must be 0"),
        ({"remove_unused_columns": True}, "remove_unused_columns must be false"),
        ({"ddp_broadcast_buffers": True}, "ddp_broadcast_buffers must be false"),
        ({"train_sampling_strategy": "group_by_length"}, "random or sequential"),
        ({"eval_strategy": "sometimes"}, "sometimes"),
        ({"save_strategy": "best"}, "save_strategy is best, but nothing is ever evaluated"),
        ({"load_best_model_at_end": True}, "save and eval strategy to match"),
    ],
)
def test_a_value_that_cannot_be_used_is_a_one_line_error(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        LCETrainingArguments(str(tmp_path), **settings)
    assert "\n" not in str(caught.value)


def test_the_command_line_explains_every_setting_of_ours(capsys):
    with pytest.raises(SystemExit) as stopped:
        HfArgumentParser(LCETrainingArguments).parse_args(["--help"])
    assert stopped.value.code == 0
    told = " ".join(capsys.readouterr().out.split())
    inherited = {item.name for item in fields(TrainingArguments)}
    own = [item for item in fields(LCETrainingArguments) if item.name not in inherited]
    assert len(own) >= 12
    for item in own:
        assert f"--{item.name}" in told
        # argparse breaks lines at hyphens too
        assert item.metadata["help"].replace(" ", "") in told.replace(" ", ""), item.name


def test_every_setting_is_documented_once_and_reachable_from_a_command_line(tmp_path):
    inherited = {item.name: item for item in fields(TrainingArguments)}
    for item in fields(LCETrainingArguments):
        if item.name not in inherited or item.default != inherited[item.name].default:
            assert item.metadata["help"][0].isupper() and item.metadata["help"].endswith((".", "accelerator."))
    parser = HfArgumentParser(LCETrainingArguments)
    (args,) = parser.parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--group_size", "16", "--micro_batch_size", "32"]
    )
    assert (args.group_size, args.micro_batch_size) == (16, 32)
