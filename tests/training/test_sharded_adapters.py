"""Adapters trained by two processes on the CPU: each with the whole model (DDP), or with a part of it."""

from importlib.util import find_spec
from shutil import which

import numpy as np
import pytest
from safetensors.torch import load_file

from helpers.backbones import base_folder, pairs_of_all_lengths
from helpers.paths import TESTS
from helpers.ranks import run_on_two_ranks
from helpers.sharded import FSDP, KINDS, ZERO
from helpers.sharded_adapters import adapt
from helpers.tiny_models import tiny_model
from helpers.trainers import assert_same
from lce_trainer import Reranker

TRAIN = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import torch
from helpers.sharded_adapters import adapt

out = Path({out!r})
trainer = adapt(out / "run", 3)
trainer.train()
trainer.save_model(str(out / "adapter"))
trainer.save_merged(out / "merged")
again = adapt(out / "run", 3)
again.train(resume_from_checkpoint=str(out / "run" / "checkpoint-2"))
again.save_model(str(out / "resumed"))
over = adapt(out / "run", 3)  # as a run that died while it wrote the model
over.train(resume_from_checkpoint=True)
over.save_merged(out / "merged-later")
trainer.end()
"""


@pytest.mark.parametrize(
    "kind", ["ddp", *(kind if kind == "fsdp2" else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS)]
)
def test_adapters_on_two_ranks_are_trained_resumed_and_merged_as_on_one(kind, tmp_path):
    if kind.startswith("zero") and not (find_spec("deepspeed") and which("ninja") and which("c++")):
        pytest.skip("needs deepspeed, and ninja and a C++ compiler, with which it makes its communication on a CPU")
    base_folder("qwen3", tmp_path / "base")
    script = tmp_path / "run.py"
    script.write_text(TRAIN.format(tests=str(TESTS), out=str(tmp_path)))
    environment = {"ACCELERATE_USE_CPU": "true"}
    if kind != "ddp":
        environment |= {**(FSDP if kind.startswith("fsdp2") else ZERO), **KINDS[kind]}
    run_on_two_ranks(script, environment)

    alone = adapt(tmp_path / "alone", 6)
    alone.train()
    alone.save_model()
    adapters = {
        name: load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "resumed", "alone")
    }
    assert any(tensor.any() for name, tensor in adapters["alone"].items() if "lora_B" in name)
    assert_same(adapters["adapter"], adapters["alone"], 1e-5)
    assert_same(adapters["resumed"], adapters["adapter"], 0)
    pairs = pairs_of_all_lengths()
    scores = Reranker.from_pretrained(tmp_path / "alone").score(pairs)
    assert scores.std() > 1e-3
    names = tiny_model("qwen3").state_dict().keys()
    for merged in ("merged", "merged-later"):
        assert load_file(tmp_path / merged / "model.safetensors").keys() == names
        np.testing.assert_allclose(Reranker.from_pretrained(tmp_path / merged).score(pairs), scores, atol=1e-5)
