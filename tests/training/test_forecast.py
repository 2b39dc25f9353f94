import json
import logging
import os
import random
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from torch import nn

from helpers.paths import ROOT, TESTS
from helpers.tiny import WORDS, build_model
from helpers.trainers import assert_same, easy_groups, make_groups, make_trainer, weights
from lce_trainer.training.forecast import _sample, _saved_bytes, free_memory, log_forecast

MEASURE = """
import json, random, resource, sys
sys.path.insert(0, {tests!r})
import psutil
from helpers.tiny import WORDS
from datasets import Dataset
from helpers.trainers import make_trainer
from transformers import BertConfig, BertForSequenceClassification

from transformers import TrainerCallback

plans = []

class Ask(TrainerCallback):
    def on_train_begin(self, args, state, control, **kwargs):
        plans.append(real.forecast())  # with what train() has switched on

draw = random.Random(0)
passages = [[" ".join(draw.choices(WORDS, k=draw.randint(10, 60))) for _ in range(8)] for _ in range(24)]
groups = Dataset.from_dict({{"query": ["what"] * 24, "passages": passages, "labels": [[1.0] + [0.0] * 7] * 24}})
settings = {{"group_size": 8, "max_length": 64, "optim": "adamw_torch", "per_device_train_batch_size": 12}}
settings |= json.loads(sys.argv[1])

def trainer(hidden):
    config = BertConfig(
        vocab_size=44, hidden_size=hidden, num_hidden_layers=4, num_attention_heads=4, intermediate_size=4 * hidden,
        max_position_embeddings=64, num_labels=1,
    )
    return make_trainer({out!r}, groups, model=BertForSequenceClassification(config), **settings)

trainer(16).train()  # whatever training imports is in memory now
real = trainer(256)
real.add_callback(Ask())
before = psutil.Process().memory_info().rss
real.train()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps([plans[0].besides_weights, peak - before]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"micro_batch_size": 16}, {"bf16": True}, {"activation_checkpointing": True}])
def test_the_memory_forecast_is_within_a_factor_of_what_training_takes(settings, tmp_path):
    """1.5 either way, on a CPU, whose allocator keeps a part of what it frees."""
    code = MEASURE.format(tests=str(TESTS), out=str(tmp_path))
    root = str(ROOT)
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(settings)],
        env={**os.environ, "PYTHONPATH": root, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    forecast_bytes, real_bytes = json.loads(done.stdout.splitlines()[-1])
    assert real_bytes > 100 * 2**20
    assert 1 / 1.5 < forecast_bytes / real_bytes < 1.5


def test_what_autograd_keeps_is_counted_without_the_weights():
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh())
    inputs = torch.randn(5, 8)
    assert _saved_bytes(model, lambda: model(inputs)) == 4 * (5 * 8 + 5 * 16)


def test_a_step_is_counted_on_the_groups_it_will_draw(tmp_path):
    trainer = make_trainer(
        tmp_path, easy_groups(40), per_device_train_batch_size=4, gradient_accumulation_steps=2, optim="adamw_torch"
    )
    plan = trainer.forecast()
    numbers = sum(p.numel() for p in trainer.model.parameters())
    # [CLS] what is 7 [SEP] red fish [SEP] and three passages of one word
    assert (plan.groups, plan.pairs, plan.tokens) == (8, 32, 8 * (8 + 3 * 7))
    assert (plan.weights, plan.gradients, plan.optimizer) == (4 * numbers, 4 * numbers, 8 * numbers)
    assert plan.longest == 8 and plan.cut_passages == plan.cut_queries == 0
    assert make_trainer(tmp_path, easy_groups(40)).forecast().optimizer == 0


def test_what_is_frozen_has_neither_gradient_nor_state(tmp_path):
    model = build_model()
    model.bert.requires_grad_(False)
    plan = make_trainer(tmp_path, easy_groups(8), model=model, optim="adamw_torch").forecast()
    assert (plan.gradients, plan.optimizer) == (4 * 33, 8 * 33)


def test_forecasting_leaves_no_trace(tmp_path):
    run = {"dropout": 0.1, "optim": "adamw_torch"}
    trainer = make_trainer(tmp_path, make_groups(11), **run)
    torch.manual_seed(5)
    trainer.model.eval()
    trainer.forecast()
    assert not trainer.model.training and trainer.step_sums.collect(trainer.accelerator)["pairs"] == 0
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(5)))
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    torch.manual_seed(5)
    trainer.train()
    other = make_trainer(tmp_path, make_groups(11), **run)
    torch.manual_seed(5)
    other.remove_callback(next(c for c in other.callback_handler.callbacks if type(c).__name__ == "ForecastCallback"))
    other.train()
    assert_same(weights(trainer), weights(other), 0)


def test_activation_checkpointing_is_taken_into_account_and_left_on(tmp_path):
    config = build_model().config
    config.num_hidden_layers = 6
    model = type(build_model())(config)
    plain = make_trainer(tmp_path, make_groups(8), model=model).forecast()
    model.activation_checkpointing_enable()
    less = make_trainer(tmp_path, make_groups(8), model=model).forecast()
    assert less.token < 0.6 * plain.token
    assert all(layer.gradient_checkpointing for layer in model.bert.encoder.layer)


def test_what_does_not_fit_is_warned_of_with_a_micro_batch_size_that_fits(tmp_path, caplog):
    caplog.set_level("WARNING", logger="lce_trainer")  # whatever level a command has left it at
    trainer = make_trainer(tmp_path, make_groups(64), per_device_train_batch_size=32)
    plan = trainer.forecast()
    log_forecast(plan, 10, int(plan.besides_weights) + 1, trainer.args)
    assert not caplog.records
    free = int(plan.besides_weights / 2)
    log_forecast(plan, 10, free, trainer.args)
    (record,) = caplog.records
    assert "training needs about" in record.message and "set micro_batch_size to " in record.message
    pairs = int(record.message.split("set micro_batch_size to ")[1].split()[0])
    small = make_trainer(tmp_path, make_groups(64), per_device_train_batch_size=32, micro_batch_size=pairs)
    assert free / 4 < small.forecast().besides_weights <= free
    caplog.clear()
    log_forecast(replace(plan, optimizer=2 * free), 10, free, trainer.args)
    assert "micro_batch_size will not do" in caplog.text


def test_what_max_length_cuts_is_warned_of_queries_and_passages_apart(tmp_path, caplog):
    draw = random.Random(3)
    passages = [[" ".join(draw.choices(WORDS, k=40 if i % 2 else 5)) for _ in range(4)] for i in range(20)]
    queries = [" ".join(draw.choices(WORDS, k=12 if i % 5 else 3)) for i in range(20)]
    groups = Dataset.from_dict({"query": queries, "passages": passages, "labels": [[1.0, 0, 0, 0]] * 20})
    make_trainer(tmp_path, groups, max_length=32).train()
    assert "max_length=32 cuts about 50 % of the passages" in caplog.text
    assert "max_query_length=10 cuts about 80 % of the queries" in caplog.text
    caplog.clear()
    make_trainer(tmp_path, groups, max_length=64, max_query_length=12).train()
    assert "cuts about" not in caplog.text


def test_the_forecast_comes_before_the_first_step_and_the_time_again_after_the_third(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="lce_trainer")
    make_trainer(tmp_path, easy_groups(32), per_device_train_batch_size=8, logging_steps=1).train()
    messages = [record.message for record in caplog.records]
    first = next(i for i, message in enumerate(messages) if message.startswith("step 1:"))
    assert messages[first - 2].startswith("4 steps of 8 groups, about 32 pairs, 232 tokens each; ")
    assert messages[first - 1].startswith("memory: the weights' 92.6 KiB, and about ")
    (again,) = [message for message in messages if message.startswith("a step took")]
    assert again.endswith(" to go, without evaluations")
    caplog.clear()
    make_trainer(tmp_path, easy_groups(32), per_device_train_batch_size=16).train()
    assert "a step took" not in caplog.text


def test_a_large_dataset_is_sampled_from_end_to_end():
    groups = Dataset.from_dict({"row": list(range(100_000))})
    rows = [row["row"] for row in _sample(groups, 8)]
    assert len(rows) == 128 and rows[0] == 0 and rows[-1] == 99_999 and rows == sorted(set(rows))
    assert [row["row"] for row in _sample(groups.select(range(3)), 256)] == [0, 1, 2]


def test_free_memory_is_known_for_a_cpu():
    assert 2**20 < free_memory(torch.device("cpu")) < 2**50
    assert free_memory(torch.device("meta")) is None
