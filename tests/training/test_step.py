"""Groups too large to go through the model at once."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.backbones import make_trainer as make_trainer_of
from helpers.paths import ROOT
from helpers.steps import gradients, one_graph
from helpers.tiny import build_model, ids_of_pairs
from helpers.tiny_models import ASKING, DECODERS, FAMILIES, tiny_language_model, tiny_model, tiny_tokenizer
from helpers.trainers import assert_same, lively_model, make_groups, make_trainer, weights
from lce_trainer.errors import TrainingError
from lce_trainer.training.step import cache_gradients, cut_step


@pytest.mark.parametrize("precision", ["float32", "bf16", "scaled"])
def test_with_dropout_on_the_gradient_is_that_of_one_graph_under_the_same_random_numbers(precision, tmp_path):
    """Ragged groups in chunks of 3 pairs at most: some are cached, some are not."""
    trainer = make_trainer(
        tmp_path, make_groups(4), dropout=0.3, group_size=6, micro_batch_size=3, bf16=precision == "bf16"
    )
    model = trainer.accelerator.prepare(trainer.model)
    trainer.model_wrapped = model
    batch = trainer.data_collator(list(trainer.train_dataset))
    torch.manual_seed(7)
    wanted_loss = one_graph(trainer, batch)
    wanted_loss.backward()
    wanted_loss = wanted_loss.item()
    wanted, after = gradients(trainer), torch.get_rng_state()
    trainer.model.zero_grad()
    torch.manual_seed(7)
    if precision == "scaled":
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    trainer.model.eval()  # as an evaluation leaves it
    loss = trainer.training_step(model, batch, 4)
    scale = 1024.0 if precision == "scaled" else 1.0
    assert float(loss) == pytest.approx(wanted_loss, rel=1e-6)
    assert torch.equal(torch.get_rng_state(), after)
    assert max(gradient.abs().max() for gradient in wanted.values()) > 1e-2
    assert_same({name: value / scale for name, value in gradients(trainer).items()}, wanted, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_gradient_by_a_score_in_half_precision_is_neither_rounded_nor_lost(dtype, tmp_path):
    """A float16 cannot be as small as the gradient that a large step leaves to one score, before it is scaled."""
    trainer = make_trainer(tmp_path, make_groups(4), group_size=6)
    (part,) = cut_step(trainer.data_collator(list(trainer.train_dataset)), 1)[:1]
    weight = 1.2345678e-9

    def score(pairs, is_counted):
        return torch.ones(len(pairs), dtype=dtype)

    passes, _ = cache_gradients(trainer.accelerator, part, score, lambda scores, batch: scores.double().sum() * weight)
    assert len(passes) == len(part.batch.labels)
    for one in passes:
        wide = torch.promote_types(dtype, torch.float32)
        assert torch.equal(one.loss(torch.ones(1, dtype=wide)), torch.tensor(weight, dtype=wide))


@pytest.mark.parametrize("family", [*FAMILIES, *[f"{family} that answers" for family in DECODERS]])
def test_with_dropout_on_the_gradient_is_that_of_one_graph_for_every_family(family, tmp_path):
    family, answers, _ = family.partition(" that answers")
    tokenizer = "its own"
    if answers:
        tokenizer = tiny_tokenizer(family)
        tokenizer.chat_template, tokenizer.pad_token = ASKING, tokenizer.pad_token or tokenizer.eos_token
    model = (tiny_language_model if answers else tiny_model)(family, dropout=0.3)
    trainer = make_trainer_of(family, tmp_path, model, tokenizer, micro_batch_size=2)
    batch = trainer.data_collator(list(trainer.train_dataset))
    assert max(batch.group_sizes) == 4 and min(batch.group_sizes) == 2
    steps = {
        "one graph": lambda: one_graph(trainer, batch).backward(),
        "cached": lambda: trainer.training_step(model, batch),
        "other numbers": lambda: trainer.training_step(model, batch),
    }
    grads = {}
    for seed, (name, backward) in zip((7, 7, 8), steps.items(), strict=True):
        model.zero_grad()
        torch.manual_seed(seed)
        backward()
        grads[name] = gradients(trainer)
    largest = max(float(gradient.abs().max()) for gradient in grads["one graph"].values())
    assert_same(grads["cached"], grads["one graph"], 1e-6 * max(largest, 1))
    with pytest.raises(AssertionError):
        assert_same(grads["other numbers"], grads["one graph"], 1e-3)


def test_dropout_is_drawn_anew_for_each_chunk_and_again_alike(tmp_path):
    trainer = make_trainer(tmp_path, make_groups(4), dropout=0.3, group_size=6, micro_batch_size=3)
    batch = trainer.data_collator(list(trainer.train_dataset))
    parts = cut_step(batch, 3)
    cached = sum(len(part.chunks) for part in parts if len(part.chunks) > 1)
    assert cached >= 4 and any(len(part.chunks) == 1 for part in parts)
    seen, score = [], trainer._scores
    trainer._scores = lambda model, *chunk: seen.append(torch.get_rng_state()) or score(model, *chunk)
    trainer.training_step(trainer.model, batch, 4)
    first, second, rest = seen[:cached], seen[cached : 2 * cached], seen[2 * cached :]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(first + rest, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("tokens", [10, 40, 100])
def test_a_chunk_keeps_to_its_tokens_unless_one_pair_has_more(tokens, tmp_path):
    trainer = make_trainer(tmp_path, make_groups(8), group_size=6)
    batch = trainer.data_collator([{**row, "epoch": 0} for row in trainer.train_dataset])
    chunks = [chunk.pairs for part in cut_step(batch, None, tokens=tokens) for chunk in part.chunks]
    assert all(chunk.lengths.sum() <= tokens or len(chunk) == 1 for chunk in chunks)
    assert sum(map(len, chunks)) == len(batch.pairs)


def test_what_is_logged_is_counted_once(tmp_path):
    run = {
        "max_length": 24,
        "group_size": 6,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "bucket_overhead": 0,
    }
    logs = []
    for pairs in (None, 6, 2):
        trainer = make_trainer(tmp_path, make_groups(4), micro_batch_size=pairs, **run)
        collected = []
        collect = trainer.step_sums.collect
        trainer.step_sums.collect = lambda accelerator, collect=collect, collected=collected: (
            collected.append(collect(accelerator)) or collected[-1]
        )
        trainer.train()
        logs.append({**collected[0], "logged": trainer.state.log_history[0]["loss"]})
    assert logs[0]["cut_pairs"] > 0
    for log in logs:
        for name in log.keys() - {"seconds"}:
            assert log[name] == pytest.approx(logs[0][name], rel=1e-5, abs=1e-6), name


def test_a_nan_in_a_large_group_names_its_query_and_changes_nothing(tmp_path):
    model = build_model()
    trainer = make_trainer(tmp_path, make_groups(4), model=model, micro_batch_size=2, per_device_train_batch_size=4)
    torch.nn.init.constant_(model.classifier.bias, torch.nan)
    before = weights(trainer)
    with pytest.raises(TrainingError, match=r"step 1: the loss of queries 'q[0-3]'"):
        trainer.train()
    for name, tensor in weights(trainer).items():
        torch.testing.assert_close(tensor, before[name], equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize(("pairs", "ranks"), [(None, 1), (5, 1), (3, 1), (1, 1), (None, 2), (2, 2), (1, 3), (None, 9)])
def test_ranks_cut_a_step_alike_and_every_pair_goes_through_once(pairs, ranks, tmp_path):
    trainer = make_trainer(tmp_path, make_groups(4), group_size=6)
    batch = trainer.data_collator(list(trainer.train_dataset))
    cuts = [cut_step(batch, pairs, rank, ranks) for rank in range(ranks)]
    assert len({tuple(len(part.chunks) for part in parts) for parts in cuts}) == 1
    texts = []
    for of_ranks in zip(*cuts, strict=True):
        assert len({part.batch.query_ids for part in of_ranks}) == 1
        chunks = [chunk for part in of_ranks for chunk in part.chunks]
        assert sorted(np.concatenate([chunk.rows for chunk in chunks])) == list(range(len(of_ranks[0].batch.labels)))
        for chunk in chunks:
            assert pairs is None or len(chunk.pairs) <= pairs
            assert len(chunk.pairs) == max(len(chunk.rows), 1)
            texts += ids_of_pairs(chunk.pairs)[: len(chunk.rows)]
    assert sorted(texts) == sorted(ids_of_pairs(batch.pairs))


def test_a_batch_of_no_group_adds_nothing(tmp_path):
    trainer = make_trainer(tmp_path, make_groups(4), model=lively_model())
    batch = trainer.data_collator(list(trainer.train_dataset))
    loss = trainer.training_step(trainer.model, batch.take([]), 4)
    assert float(loss) == 0
    assert all(float(gradient.abs().max()) == 0 for gradient in gradients(trainer).values())
    assert trainer.step_sums.collect(trainer.accelerator)["pairs"] == 0


MEMORY = """
import json, resource, sys
sys.path.insert(0, {tests!r})
import torch
from helpers.tiny import build_tokenizer
from helpers.steps import large_groups
from transformers import BertConfig, BertForSequenceClassification
from lce_trainer import LCETrainer, LCETrainingArguments

torch.manual_seed(0)
config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, num_labels=1)
trainer = LCETrainer(
    BertForSequenceClassification(config),
    LCETrainingArguments({out!r}, group_size=257, max_length=256, max_query_length=16, max_steps=1,
                         per_device_train_batch_size=1, micro_batch_size={pairs}, save_strategy="no",
                         report_to="none", disable_tqdm=True, logging_steps=1),
    train_dataset=large_groups(), processing_class=build_tokenizer(),
)
def held(name):
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(name + ":"))) * 1024
before, limit = held("VmRSS"), held("VmData") + 4 * 2**30
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
trainer.train()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
log = trainer.state.log_history[0]
print(json.dumps(dict(growth=peak - before, loss=log["loss"], cut=log["cut_pairs"])))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measures memory as Linux tells it")
def test_256_negatives_of_256_tokens_train_in_4_gib_and_would_not_without_the_cache(tmp_path):
    """A model of MiniLM-L6's size; memory that grows by more than 4 GiB is refused to both runs."""
    root = ROOT
    done = []
    for pairs in (16, None):
        code = MEMORY.format(tests=str(root / "tests"), out=str(tmp_path), pairs=pairs)
        environment = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": str(root)}
        done.append(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment))
    assert done[0].returncode == 0, done[0].stderr[-2000:]
    result = json.loads(done[0].stdout.splitlines()[-1])
    assert result["growth"] < 4 * 2**30
    assert result["cut"] == 1.0 and result["loss"] > 0
    assert done[1].returncode != 0 and "can't allocate memory" in done[1].stderr
