"""Files that would run code when they are unpickled are refused with the reason, and the code never runs."""

import os
import pickle
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from helpers.tiny_recipe import build_llm
from helpers.trainers import make_groups, make_trainer
from lce_trainer import Reranker
from lce_trainer.errors import LCETrainerError, TrainingError
from lce_trainer.model.loading import load_model
from lce_trainer.synthesis.llm.local import TransformersLLM
from lce_trainer.synthesis.llm.protocol import LLMConfig
from lce_trainer.training.checkpoints import seal


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    path = tmp_path / "executed"
    for write in (pickle.dump, torch.save):
        with (tmp_path / "check").open("wb") as file:
            write(Malicious(path), file)
        with suppress(RuntimeError):  # a plain pickle is none of torch's, which it finds out too late
            torch.load(tmp_path / "check", weights_only=False)
        path.rmdir()  # what would happen
    return path


@pytest.mark.parametrize("write", [pickle.dump, torch.save])
def test_weights_that_are_a_malicious_pickle_are_refused(write, mark, tiny_reranker, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_reranker, folder)
    (folder / "model.safetensors").unlink()
    with (folder / "pytorch_model.bin").open("wb") as file:
        write({"classifier.weight": Malicious(mark)}, file)
    for load in (Reranker.from_pretrained, load_model):
        with pytest.raises(LCETrainerError):
            load(folder)
    assert not mark.exists()


def test_a_language_model_that_is_a_malicious_pickle_is_refused(mark, tmp_path):
    folder = tmp_path / "llm"
    build_llm().save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    with (folder / "pytorch_model.bin").open("wb") as file:
        torch.save({"lm_head.weight": Malicious(mark)}, file)
    llm = TransformersLLM(LLMConfig(model=str(folder), dtype="float32"))
    with pytest.raises(LCETrainerError):
        llm.score(["what"], [" is a moon"])
    assert not mark.exists()


RUN = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 3}


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
@pytest.mark.parametrize("sealed", [False, True], ids=["damaged", "sealed again"])
def test_a_checkpoint_with_a_malicious_pickle_is_never_executed(name, sealed, mark, tmp_path):
    make_trainer(tmp_path / "run", make_groups(4), **RUN).train()
    checkpoint = tmp_path / "run" / "checkpoint-1"
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    with (checkpoint / name).open("wb") as file:
        torch.save(Malicious(mark), file)
    if sealed:
        (checkpoint / "manifest.json").unlink()
        seal(checkpoint)
    trainer = make_trainer(tmp_path / "run", make_groups(4), **RUN)
    if name == "training_args.bin":
        trainer.train(resume_from_checkpoint=True)  # which reads no such file
    else:
        with pytest.raises(TrainingError, match=r"holds more than tensors|is damaged|bytes where its manifest says"):
            trainer.train(resume_from_checkpoint=str(checkpoint))
    assert not mark.exists()
