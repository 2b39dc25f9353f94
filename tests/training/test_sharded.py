"""Models of which each rank holds a part: FSDP2 and DeepSpeed, with two processes on the CPU."""

from importlib.util import find_spec
from pathlib import Path
from shutil import which

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from helpers.paths import TESTS
from helpers.ranks import run_on_two_ranks
from helpers.sharded import FSDP, KINDS, WAYS, ZERO
from helpers.tiny import build_tokenizer
from helpers.tiny_models import FAMILIES, tiny_model
from helpers.trainers import assert_same, easy_groups, lively_model, make_groups, make_trainer, weights
from lce_trainer import Reranker
from lce_trainer.distributed import shard_by_layer
from lce_trainer.training.checkpoints import verify

TRAIN = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import torch
from helpers.ranks import run_on_two_ranks
from helpers.sharded import RUN, WAYS, end_of, is_shared_out
from helpers.trainers import easy_groups, make_groups, make_trainer
from transformers import EarlyStoppingCallback

out, result = Path({out!r}), dict()
for name, way in WAYS.items():
    if "model" in way:
        way = {{**way, "model": str(out / way["model"])}}
    trainer = make_trainer(out / name, make_groups(11), eval_dataset=make_groups(5, seed=9), **way)
    if name == "evaluated before":
        result["metrics before"] = trainer.evaluate()
    trainer.train()
    assert is_shared_out(trainer)
    result[name] = end_of(trainer)
    result[name + " metrics"] = trainer.evaluate()
    if name == "by name":
        trainer.save_model(str(out / "named"))
"""


RESUME = """
def trainer():
    return make_trainer(out / "run", easy_groups(24), eval_dataset=easy_groups(9), **RUN,
                        callbacks=[EarlyStoppingCallback(2, 10.0)])
whole = trainer()
whole.train()
result |= dict(whole=end_of(whole), steps=whole.state.global_step, best=whole.state.best_metric,
              log=[entry["eval_loss"] for entry in whole.state.log_history if "eval_loss" in entry],
              measured=whole.evaluate())
whole.save_model(str(out / "model"))
over = trainer()
over.train(resume_from_checkpoint=True)
result |= dict(over=end_of(over), over_steps=over.state.global_step, over_measured=over.evaluate())
resumed = trainer()
resumed.train(resume_from_checkpoint=out / "run" / "checkpoint-2")
result |= dict(resumed=end_of(resumed), resumed_log=[
    entry["eval_loss"] for entry in resumed.state.log_history if "eval_loss" in entry])
if whole.is_world_process_zero():
    torch.save(result, out / "result.pt")
whole.end()
"""


def run_sharded(kind: str, out: Path) -> dict:
    """What two processes that share a model save as ``result.pt``."""
    lively_model().save_pretrained(out / "base")
    build_tokenizer().save_pretrained(out / "base")
    script = out / "run.py"
    script.write_text((TRAIN + RESUME).format(tests=str(TESTS), out=str(out)))
    environment = {**(FSDP if kind.startswith("fsdp") else ZERO), **KINDS[kind]}
    run_on_two_ranks(script, environment, timeout=580)
    return torch.load(out / "result.pt", weights_only=True)


@pytest.fixture(
    scope="module", params=[kind if kind == "fsdp2" else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def sharded(request, tmp_path_factory) -> tuple[dict, Path]:
    """What the runs ended with, and where."""
    if request.param.startswith("zero") and not (find_spec("deepspeed") and which("ninja") and which("c++")):
        pytest.skip("needs deepspeed, and ninja and a C++ compiler, with which it makes its communication on a CPU")
    folder = tmp_path_factory.mktemp("sharded")
    return run_sharded(request.param, folder), folder


def test_a_sharded_model_is_trained_and_measured_as_a_whole_one(sharded, tmp_path):
    """Ragged groups: the ranks differ in how many passes a step and an evaluation take them."""
    result, _ = sharded
    alone = make_trainer(
        tmp_path / "alone", make_groups(11), per_device_train_batch_size=8, eval_dataset=make_groups(5, seed=9)
    )
    before = alone.evaluate()
    alone.train()
    after = alone.evaluate()
    for name in WAYS:
        assert_same(result[name], weights(alone), 1e-5)
    for wanted, got in [(before, "metrics before")] + [(after, f"{name} metrics") for name in WAYS]:
        for key in wanted:
            if key.endswith(("@10", "_loss")):
                assert result[got][key] == pytest.approx(wanted[key], abs=1e-5), (got, key)


def test_a_sharded_run_stops_early_resumes_and_saves_a_plain_checkpoint(sharded):
    result, folder = sharded
    curve, steps = result["log"], result["steps"]
    assert steps == 3 and result["best"] == curve[0] > curve[-1]
    assert result["measured"]["eval_loss"] == pytest.approx(curve[0], abs=1e-5)
    assert_same(result["resumed"], result["whole"], 0)
    assert result["resumed_log"] == curve
    assert result["over_steps"] == steps
    assert_same(result["over"], result["whole"], 0)
    assert result["over_measured"]["eval_loss"] == pytest.approx(curve[0], abs=1e-5)
    for checkpoint in (folder / "run").glob("checkpoint-*"):
        verify(checkpoint)
    model = AutoModelForSequenceClassification.from_pretrained(folder / "model")
    assert type(model).__name__ == model.config.architectures[0] == "BertForSequenceClassification"
    assert_same(model.state_dict(), result["whole"], 0)
    names = lively_model().state_dict().keys()
    for saved in ("model", "named"):
        assert load_file(folder / saved / "model.safetensors").keys() == names
    groups = easy_groups(9)
    reranker = Reranker.from_pretrained(folder / "model")
    losses = []
    for row in groups:
        scores = reranker.score([(row["query"], text) for text in row["passages"]]).astype(np.float64)
        losses.append(np.log(np.exp(scores).sum()) - scores[0])
    assert np.mean(losses) == pytest.approx(curve[0], abs=1e-5)


class Plugin:
    """The part of accelerate's plugin that shard_by_layer sets."""

    transformer_cls_names_to_wrap = None


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_sharded_one_by_one(family, monkeypatch):
    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr(accelerator.state, "fsdp_plugin", Plugin(), raising=False)
    model = tiny_model(family)
    shard_by_layer(accelerator, model)
    (name,) = accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap
    chosen = [module for module in model.modules() if type(module).__name__ == name]
    assert len(chosen) == 2 and not any(model.get_input_embeddings() in set(module.modules()) for module in chosen)


def test_fsdp_that_accelerate_does_not_offer_is_warned_of(monkeypatch, caplog):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    shard_by_layer(Accelerator(cpu=True), tiny_model("bert"))
    assert "every process holds the whole model" in caplog.text
