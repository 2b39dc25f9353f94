"""What other libraries do not promise to keep is still there, and takes what this package gives it."""

import dataclasses
import importlib
import inspect
from functools import cache
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import nn
from transformers import BertConfig, Trainer, TrainingArguments

from helpers.tiny import build_model
from lce_trainer import compat
from lce_trainer.training.trainer import LCETrainer


@cache
def instance_of(path: str) -> Any:
    """An object whose attributes are made when it is; None where the class has them itself."""
    if path == "torch.nn.Module":
        return nn.Linear(1, 1)
    if path == "transformers.PreTrainedConfig":
        return BertConfig()
    if path == "transformers.TrainingArguments":
        return TrainingArguments("unused", report_to="none")
    if path == "transformers.Trainer":
        return Trainer(build_model(), TrainingArguments("unused", report_to="none"))
    if path == "accelerate.Accelerator":
        return Accelerator()
    if path == "datasets.Dataset":
        return Dataset.from_dict({"a": [1]})
    if path == "bitsandbytes.nn.Linear4bit":
        return importlib.import_module("bitsandbytes").nn.Linear4bit(4, 4)
    return None


def find(path: str) -> Any:
    """The object of a dotted path; raises if a part of it is gone."""
    parts = path.split(".")
    for size in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:size]))
        except ModuleNotFoundError:
            continue
        break
    for place in range(size, len(parts)):
        owner = instance_of(".".join(parts[:place]))
        name = parts[place]
        if inspect.isfunction(found):
            return inspect.signature(found).parameters[name]
        if dataclasses.is_dataclass(found) and name in found.__dataclass_fields__:
            return found.__dataclass_fields__[name]
        if inspect.isclass(found) and f"self.{name} = " in inspect.getsource(found):
            return None  # made when it is needed
        found = getattr(owner if owner is not None else found, name)
    return found


def parameters_of(found: Any) -> set[str]:
    if isinstance(found, torch._ops.OpOverloadPacket):
        return {argument.name for argument in found.default._schema.arguments}
    return set(inspect.signature(found).parameters)


@pytest.mark.parametrize("name", compat.NAMES, ids=lambda name: name.path)
def test_a_name_of_another_library_is_there_and_takes_what_it_is_given(name):
    used = f"lce_trainer.{name.used_in} uses it: {name.reason}"
    importlib.import_module(f"lce_trainer.{name.used_in}")
    try:
        found = find(name.path)
    except (AttributeError, KeyError, ImportError):
        pytest.fail(f"{name.path} is gone; {used}", pytrace=False)
    if name.parameters is not None and (missing := set(name.parameters) - parameters_of(found)):
        pytest.fail(f"{name.path} no longer takes {sorted(missing)}; {used}", pytrace=False)


def test_a_name_that_is_gone_is_reported_in_one_line():
    gone = compat.Name("transformers.Trainer._gone", "training.trainer", "for nothing")
    with pytest.raises(
        pytest.fail.Exception,
        match=r"^transformers.Trainer._gone is gone; lce_trainer.training.trainer uses it: for nothing$",
    ):
        test_a_name_of_another_library_is_there_and_takes_what_it_is_given(gone)
    renamed = compat.Name("transformers.Trainer._save", "training.trainer", "for nothing", ("folder",))
    with pytest.raises(pytest.fail.Exception, match=r"_save no longer takes \['folder'\]; "):
        test_a_name_of_another_library_is_there_and_takes_what_it_is_given(renamed)


def test_every_private_method_that_the_trainer_overrides_is_listed():
    listed = {name.path.removeprefix("transformers.Trainer.") for name in compat.NAMES}
    overridden = {name for name in vars(LCETrainer) if name.startswith("_") and not name.startswith("__")}
    assert {name for name in overridden if hasattr(Trainer, name)} <= listed


def test_accessors_give_what_their_libraries_hold():
    rows = Dataset.from_dict({"a": [1, 2, 3]})
    assert compat.row_selection(rows) is None
    assert compat.row_selection(rows.select([2, 0])).column(0).to_pylist() == [2, 0]
    assert compat.fingerprint(rows) != compat.fingerprint(rows.select([0, 2]))
    layer = nn.Linear(2, 2)
    assert not compat.has_forward_hooks(layer)
    layer.register_forward_pre_hook(print)
    assert compat.has_forward_hooks(layer)
    state = Accelerator().gradient_state
    assert state.sync_gradients
    with compat.gradients_held_back(state):
        assert not state.sync_gradients
    assert state.sync_gradients


def test_a_file_that_is_not_there_is_none(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert compat.find_file(str(tmp_path), "config.json") == str(tmp_path / "config.json")
    assert compat.find_file(str(tmp_path), "modules.json") is None
