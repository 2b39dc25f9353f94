"""One step: the same update however it is cut, shared out, interrupted or rounded."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from helpers.paths import TESTS
from helpers.ranks import run_on_two_ranks
from helpers.reference_loss import reference_group
from helpers.tiny import build_tokenizer, ids_of_pairs
from helpers.trainers import DISTILLED, assert_same, easy_groups, lively_model, make_groups, make_trainer, weights
from lce_trainer.training.collator import GroupCollator
from lce_trainer.training.trainer import LCETrainer

WAYS = {
    "accumulated batches of one": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
    "accumulated batches of three": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    "micro-batches of 5 pairs": {"micro_batch_size": 5},
    "micro-batches of 100 tokens": {"micro_batch_tokens": 100},
    "micro-batches of 40 tokens, less than a group": {"micro_batch_tokens": 40},
    "groups of 4 through the score cache, 3 pairs at once": {"micro_batch_size": 3},
    "the score cache, one pair at once": {
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 4,
    },
    "one padded forward pass": {"packing": "none", "bucket_overhead": 10**9},
    "one padded forward pass a length": {"packing": "none", "bucket_overhead": 0},
    "padded to a multiple of 8": {"packing": "none", "pad_to_multiple_of": 8},
    "padded micro-batches": {"packing": "none", "micro_batch_size": 5},
}

CUT = ["accumulated batches of one", "micro-batches of 5 pairs", "the score cache, one pair at once"]


def trained_whole(folder: Path, **settings) -> dict[str, torch.Tensor]:
    """Weights after an epoch over 11 groups in steps of 8, the last one of 3."""
    trainer = make_trainer(folder, make_groups(11), per_device_train_batch_size=8, **settings)
    before = weights(trainer)
    trainer.train()
    after = weights(trainer)
    assert trainer.state.global_step == 2
    assert max((after[name] - before[name]).abs().max() for name in after) > 5e-3
    return after


@pytest.fixture(scope="module")
def whole_batches(tmp_path_factory) -> dict[str, torch.Tensor]:
    return trained_whole(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def whole_distilled(tmp_path_factory) -> dict[str, torch.Tensor]:
    return trained_whole(tmp_path_factory.mktemp("distilled"), **DISTILLED)


@pytest.mark.parametrize("way", WAYS)
def test_the_update_does_not_depend_on_how_a_step_is_cut(way, whole_batches, tmp_path):
    trainer = make_trainer(tmp_path, make_groups(11), **{"per_device_train_batch_size": 8, **WAYS[way]})
    trainer.train()
    assert trainer.state.global_step == 2
    assert_same(weights(trainer), whole_batches, 1e-6)


@pytest.mark.parametrize("way", CUT)
def test_the_update_does_not_depend_on_how_a_distilled_step_is_cut(way, whole_distilled, tmp_path):
    run = {"per_device_train_batch_size": 8, **DISTILLED, **WAYS[way]}
    trainer = make_trainer(tmp_path, make_groups(11), **run)
    trainer.train()
    assert_same(weights(trainer), whole_distilled, 1e-6)


@pytest.mark.parametrize("settings", [{}, DISTILLED], ids=["labels", "distilled"])
def test_the_step_is_that_of_a_reference_written_in_plain_torch(settings, tmp_path):
    """One step of SGD over groups of every kind, against autograd on one pair at a time."""
    run = {"per_device_train_batch_size": 5, "group_size": 6, "weight_decay": 0, **settings, "max_grad_norm": 0}
    trainer = make_trainer(tmp_path, make_groups(5), **run)
    weight, scale, teachers = (
        settings.get(name, default)
        for name, default in (("distillation_weight", 0), ("temperature", 1), ("distillation_temperature", 1))
    )
    reference = lively_model()
    batch = trainer.data_collator([{**row, "epoch": 0} for row in trainer.train_dataset])
    trainer.train()
    total, first = torch.zeros(()), 0
    labels_by_group = batch.by_group(batch.labels).tolist()
    teacher_by_group = batch.by_group(batch.teacher_scores, np.nan)
    pairs = ids_of_pairs(batch.pairs)
    for size, labels, told in zip(batch.group_sizes.tolist(), labels_by_group, teacher_by_group, strict=True):
        assert all(label < labels[0] for label in labels[1:size])
        scores = []
        for row in range(first, first + size):
            scores.append(reference(input_ids=torch.tensor([pairs[row]])).logits[0, 0] / scale)
        lce = torch.stack(scores).exp().sum().log() - scores[0]
        known = [i for i in range(size) if not told[i].isnan()]
        if weight and len(known) > 1:
            held = torch.stack([scores[i] for i in known]).exp()
            wanted = (told[known] / teachers).exp()
            held, wanted = held / held.sum(), wanted / wanted.sum()
            lce = (1 - weight) * lce + weight * (wanted * (wanted / held).log()).sum()
        total = total + lce
        first += size
    (total / 5).backward()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter -= 0.1 * parameter.grad
    assert_same(weights(trainer), reference.state_dict(), 1e-6)


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import torch
from helpers.trainers import make_groups, make_trainer, weights
from helpers.trainers import DISTILLED

out = Path({out!r})
run = dict(per_device_train_batch_size=4, gradient_accumulation_steps=1)
trainer = make_trainer(out / "ranks", make_groups(11), eval_dataset=make_groups(5, seed=9), **run)
trainer.train()
metrics = trainer.evaluate()
micro = make_trainer(out / "micro", make_groups(11), micro_batch_size=5, **run)
micro.train()
cached = make_trainer(out / "cached", make_groups(11), micro_batch_size=3, per_device_train_batch_size=2,
                      gradient_accumulation_steps=2)
cached.train()
distilled = make_trainer(out / "distilled", make_groups(11), micro_batch_size=3, **run, **DISTILLED)
distilled.train()
shared = dict()
for pairs in (None, 3, 1):
    split = make_trainer(out / "split", make_groups(11), split_groups=True, micro_batch_size=pairs,
                         per_device_train_batch_size=8, logging_steps=1)
    split.train()
    shared[pairs] = (weights(split), split.state.log_history[0])
split = make_trainer(out / "split", make_groups(11), split_groups=True, per_device_train_batch_size=8, **DISTILLED)
split.train()
share = dict(split_groups=True, micro_batch_size=2, per_device_train_batch_size=4, num_train_epochs=2)
shares = make_trainer(out / "shares", make_groups(11), save_strategy="steps", save_steps=2, **share)
shares.train()
shared["straight"] = weights(shares)
shares = make_trainer(out / "shares", make_groups(11), **share)
shares.train(resume_from_checkpoint=str(out / "shares" / "checkpoint-4"))
run |= dict(dropout=0.1, num_train_epochs=3)
resumed = make_trainer(out / "long", make_groups(11), save_strategy="steps", save_steps=3, **run)
resumed.train()
straight = weights(resumed)
again = make_trainer(out / "long", make_groups(11), **run)
again.train(resume_from_checkpoint=str(out / "long" / "checkpoint-3"))
if trainer.is_world_process_zero():
    torch.save(dict(ranks=weights(trainer), micro=weights(micro), cached=weights(cached), straight=straight,
                    resumed=weights(again), metrics=metrics, shared=shared, shared_resumed=weights(shares),
                    distilled=weights(distilled), shared_distilled=weights(split),
                    ranks_used=trainer.args.world_size), out / "result.pt")
trainer.end()
"""


def test_two_ranks_train_resume_and_evaluate_as_one(whole_batches, whole_distilled, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(SCRIPT.format(tests=str(TESTS), out=str(tmp_path)))
    run_on_two_ranks(script, {"ACCELERATE_USE_CPU": "true"})
    result = torch.load(tmp_path / "result.pt")
    assert result["ranks_used"] == 2
    assert_same(result["ranks"], whole_batches, 1e-6)
    assert_same(result["micro"], whole_batches, 1e-6)
    assert_same(result["cached"], whole_batches, 1e-6)
    assert_same(result["distilled"], whole_distilled, 1e-6)
    assert_same(result["shared_distilled"], whole_distilled, 1e-6)
    straight = result["shared"].pop("straight")
    assert_same(result["shared_resumed"], straight, 0)
    alone = make_trainer(tmp_path / "alone", make_groups(11), per_device_train_batch_size=8, logging_steps=1)
    alone.train()
    for got, log in result["shared"].values():
        assert_same(got, whole_batches, 1e-6)
        for name, value in alone.state.log_history[0].items():
            if "second" not in name:
                assert log[name] == pytest.approx(value, abs=1e-5), name
    # Step 3 lies inside the second epoch: the resumed order must be that epoch's.
    assert_same(result["resumed"], result["straight"], 0)
    alone = make_trainer(tmp_path / "alone", None, eval_dataset=make_groups(5, seed=9))
    alone.model.load_state_dict(whole_batches)
    for name, value in alone.evaluate().items():
        if name.endswith(("@10", "_loss")):
            assert result["metrics"][name] == pytest.approx(value, abs=1e-5), name


@pytest.mark.parametrize(
    ("at", "more"), [(3, {}), (4, {}), (3, {"curriculum_epochs": 3, "group_size": 2}), (3, {"stuffed_negatives": 0.5})]
)
def test_a_resumed_run_ends_bit_equal_with_dropout_on(at, more, tmp_path):
    """In the middle of the second epoch, and at its end."""
    run = more | {
        "num_train_epochs": 3,
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "dropout": 0.1,
    }
    run |= {"optim": "adamw_torch", "learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 1}
    whole = make_trainer(tmp_path / "run", make_groups(11), **run)
    whole.train()
    assert whole.state.global_step == 6
    resumed = make_trainer(tmp_path / "run", make_groups(11), **run, seed=42)
    torch.manual_seed(999)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{at}"))
    assert_same(weights(resumed), weights(whole), 0)


def test_transformers_that_knows_no_loss_scaled_for_accumulation_does_not_divide_it(
    whole_batches, tmp_path, monkeypatch
):
    """Older releases go by what the model's forward takes."""
    monkeypatch.setattr(LCETrainer, "loss_is_scaled_for_ga", None)
    model = lively_model()
    model.accepts_loss_kwargs = False
    run = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    trainer = make_trainer(tmp_path, make_groups(11), model=model, **run)
    trainer.train()
    assert_same(weights(trainer), whole_batches, 1e-6)


class Recorder(GroupCollator):
    """Writes down which queries came in which epoch."""

    def __call__(self, rows):
        self.seen = [*getattr(self, "seen", []), *((row["epoch"], row["query_id"]) for row in rows if "epoch" in row)]
        return super().__call__(rows)


class EndFirstEpoch(TrainerCallback):
    """Ends the first epoch after its second step."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_epoch_stop = state.global_step == 2


def test_an_epoch_that_a_callback_ends_early_is_followed_by_the_next(tmp_path):
    run = {"per_device_train_batch_size": 1, "num_train_epochs": 2}
    seen = []
    for callbacks in ([], [EndFirstEpoch()]):
        trainer = make_trainer(tmp_path, make_groups(8), callbacks=callbacks, **run)
        trainer.data_collator = Recorder(build_tokenizer(), 4, 48, 10)
        trainer.train()
        seen.append(trainer.data_collator.seen)
    whole, ended = seen
    assert [epoch for epoch, _ in whole] == [0] * 8 + [1] * 8
    assert ended[:2] == whole[:2] and ended[-8:] == whole[8:]


def test_a_run_without_dropout_differs_from_one_with(tmp_path, whole_batches):
    trainer = make_trainer(tmp_path, make_groups(11), per_device_train_batch_size=8, dropout=0.1)
    trainer.train()
    with pytest.raises(AssertionError):
        assert_same(weights(trainer), whole_batches, 1e-6)


@pytest.mark.parametrize("rounded", ["the arithmetic", "the weights"])
def test_the_loss_of_half_precision_scores_is_computed_in_float32(rounded, tmp_path):
    model = lively_model().to(torch.float32 if rounded == "the arithmetic" else torch.bfloat16)
    run = {"group_size": 6, "bf16": rounded == "the arithmetic", **DISTILLED}
    trainer = make_trainer(tmp_path, make_groups(6), model=model, **run)
    batch = trainer.data_collator(list(trainer.train_dataset))
    with trainer.compute_loss_context_manager():
        model = trainer.accelerator.prepare(trainer.model)
        loss, grid = trainer.compute_loss(model, batch, return_outputs=True, num_items_in_batch=6)
    assert torch.equal(grid, grid.bfloat16().to(grid.dtype)) and loss.dtype == torch.float32
    wanted = 0.0
    by_group = (batch.by_group(batch.labels), batch.by_group(batch.teacher_scores, np.nan))
    for row, labels, told, size in zip(grid, *by_group, batch.group_sizes.tolist(), strict=True):
        told = [None if score.isnan() else float(score) for score in told[:size]]
        wanted += reference_group(row.tolist()[:size], labels.tolist()[:size], 0, told, 0.6, 0.4, 0.3)[0] / 6
    assert loss.item() == pytest.approx(wanted, rel=1e-6)


def test_bf16_trains_on_a_cpu_and_keeps_its_weights_in_float32(tmp_path):
    trainer = make_trainer(tmp_path, easy_groups(32), bf16=True, num_train_epochs=2)
    trainer.train()
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    assert trainer.state.log_history[-1]["train_loss"] < np.log(4)
