"""Which device is used: one that is really there."""

from pathlib import Path

import pytest
import torch

import lce_trainer
from lce_trainer import LCETrainingArguments, Reranker
from lce_trainer.hardware import best_device


@pytest.fixture
def cuda_build_without_gpu(monkeypatch):
    """PyTorch as PyPI gives it by default, a CUDA build, on a machine without a GPU.

    ``current_accelerator()`` names ``cuda`` for every such build, and only ``is_available()`` asks the driver.
    """
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *args, **kwargs: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)


def test_a_cuda_build_without_a_gpu_runs_on_the_cpu(cuda_build_without_gpu, tiny_reranker, tmp_path):
    assert best_device() == torch.device("cpu")
    assert LCETrainingArguments(str(tmp_path)).use_cpu
    ranked = Reranker.from_pretrained(tiny_reranker).rank("red fish", ["a red fish", "a moon"])
    assert sorted(found.index for found in ranked) == [0, 1]


def test_an_accelerator_that_is_there_is_used(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *args, **kwargs: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert best_device() == torch.device("cuda")


def test_no_other_module_names_the_accelerator_by_itself():
    package = Path(lce_trainer.__file__).parent
    users = [path.name for path in package.rglob("*.py") if "current_accelerator" in path.read_text(encoding="utf-8")]
    assert users == ["hardware.py"]
