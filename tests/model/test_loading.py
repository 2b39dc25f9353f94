"""What a checkpoint does not supply is an error of one line: each is made on disk, and met by the API."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSequenceClassification, BertForMaskedLM

import lce_trainer
from helpers.tiny import build_model, build_tokenizer
from helpers.tiny_models import tiny_config, tiny_model, tiny_tokenizer
from lce_trainer.cli import main
from lce_trainer.errors import ConfigError, LCETrainerError, TrainingError
from lce_trainer.model.loading import load_model, load_tokenizer
from lce_trainer.model.reranker import Reranker
from lce_trainer.training.arguments import LCETrainingArguments
from lce_trainer.training.trainer import LCETrainer

POINTER = (
    "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1\nsize 12345\n"
)


@pytest.fixture
def folder(tmp_path):
    """A whole reranker, to be damaged."""
    build_model().save_pretrained(tmp_path / "model")
    build_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def rewrite(folder, change):
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def edit(folder, **settings):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def without(*parts):
    return lambda weights: {key: value for key, value in weights.items() if not any(part in key for part in parts)}


def prefixed(weights):
    return {f"module.{key}": value for key, value in weights.items()}


def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def as_pickle(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def own_code(folder):
    """Architecture and code come with the checkpoint; running it would leave a file."""
    edit(folder, model_type="mine", auto_map={"AutoConfig": "mine.Config", "AutoModel": "mine.Model"})
    (folder / "mine.py").write_text("open('ran', 'w')\n")


def without_tokenizer(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()


def save_a_larger_tokenizer(folder):
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["moonshine"])
    tokenizer.save_pretrained(folder)


DAMAGE = {
    "no tokenizer": (without_tokenizer, r"no tokenizer at .*"),
    "a tokenizer's settings alone": (
        lambda f: (f / "tokenizer.json").unlink(),
        "no tokenizer at .*tokenizer.json.*|no tokenizer at .*",
    ),
    "a prefix": (
        lambda f: rewrite(f, prefixed),
        r"lacks \d+ of the model's \d+ weights.*other names, such as module\..*; save the model itself",
    ),
    "no head": (
        lambda f: rewrite(f, without("classifier")),
        r"lacks 2 of .* such as classifier.bias, classifier.weight",
    ),
    "no layer": (lambda f: rewrite(f, without("layer.1.")), r"lacks 16 of .* such as bert.encoder.layer.1."),
    "no pooler": (lambda f: rewrite(f, without("pooler")), r"lacks 2 of .* such as bert.pooler"),
    "another shape": (
        lambda f: edit(f, intermediate_size=48),
        r"intermediate.dense.bias has the shape \(64,\) in the checkpoint and \(48,\) by its config.json",
    ),
    "a tokenizer larger than the embedding": (
        save_a_larger_tokenizer,
        "token ids up to 41, but the model embeds 41 tokens",
    ),
    "cut weights": (cut, "safetensors file is damaged or cut short .*: download it again"),
    "a git-lfs pointer": (
        lambda f: (f / "model.safetensors").write_text(POINTER),
        "model.safetensors is a git-lfs pointer, not the file itself: run `git lfs pull`",
    ),
    "a git-lfs pointer for the tokenizer": (
        lambda f: (f / "tokenizer.json").write_text(POINTER),
        "tokenizer.json is a git-lfs pointer, not the file itself",
    ),
    "a pickle": (as_pickle, r"holds its weights as a pickle \(pytorch_model.bin\), which can run code"),
    "its own code": (own_code, r"needs code that comes with the checkpoint \(auto_map in its config.json\)"),
    "a config that is no JSON": (lambda f: (f / "config.json").write_text("{"), "is not a valid JSON file"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_what_a_checkpoint_lacks_is_an_error_of_one_line(case, folder, tmp_path, monkeypatch, capsys):
    damage, message = DAMAGE[case]
    Reranker.from_pretrained(folder, device="cpu")
    damage(folder)
    monkeypatch.chdir(tmp_path)
    args = LCETrainingArguments(str(tmp_path / "out"), report_to="none")
    for use in (lambda: Reranker.from_pretrained(folder, device="cpu"), lambda: LCETrainer(str(folder), args)):
        with pytest.raises(TrainingError, match=message) as error:
            use()
        assert "\n" not in str(error.value)
    assert main(["convert", str(folder), str(tmp_path / "plain")]) == 2
    printed = capsys.readouterr().err.splitlines()
    assert printed[-1].startswith("error: ") and re.search(message, printed[-1])
    assert not (tmp_path / "ran").exists() and not (tmp_path / "plain").exists()


def test_a_model_with_its_own_code_asks_nothing_on_the_terminal(folder):
    own_code(folder)
    code = f"from lce_trainer import Reranker; Reranker.from_pretrained({str(folder)!r}, device='cpu')"
    environment = {**os.environ, "PYTHONPATH": str(Path(lce_trainer.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code], input="y\n", capture_output=True, text=True, cwd=folder, env=environment
    )
    assert done.returncode == 1 and "which is not run" in done.stderr and "[y/N]" not in done.stdout + done.stderr
    assert not (folder / "ran").exists()


def test_a_base_gets_a_new_head_and_that_is_logged_once(tmp_path, caplog):
    caplog.set_level("INFO", logger="lce_trainer")
    BertForMaskedLM(build_model().config).save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert type(model).__name__ == "BertForSequenceClassification"
    message = (
        "is a base model without a head to score with: bert.pooler.dense.bias, bert.pooler.dense.weight, "
        "classifier.bias, classifier.weight are new, and are to be trained"
    )
    assert caplog.text.count(message) == 1
    rewrite(tmp_path, without("layer.0.output"))
    with pytest.raises(TrainingError, match=r"lacks 4 of .* such as bert.encoder.layer.0.output"):
        load_model(tmp_path)


def test_weights_that_no_part_of_the_model_takes_are_logged(folder, caplog):
    edit(folder, num_hidden_layers=1)
    load_model(folder)
    assert "16 weights of the checkpoint are not part of the model and are not used, such as bert.enc" in caplog.text


def test_two_loads_give_one_score(folder):
    pair = [("what is the moon", "red tree")]
    first, second = (Reranker.from_pretrained(folder, device="cpu").score(pair) for _ in range(2))
    assert first == second


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """A base without a head, and the folder of adapters that were trained on it with a head."""
    base, folder = (tmp_path_factory.mktemp(name) for name in ("base", "adapters"))
    AutoModel.from_config(tiny_config("bert"), add_pooling_layer=False).save_pretrained(base)
    tiny_tokenizer("bert").save_pretrained(base)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["query"], modules_to_save=["classifier", "pooler"])
    get_peft_model(model, config).save_pretrained(folder)
    tiny_tokenizer("bert").save_pretrained(folder)
    return folder


def change_adapters(folder, change):
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def edit_adapters(folder, **settings):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def adapters_as_pickle(folder):
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


ADAPTERS = {
    "no task": (lambda f: edit_adapters(f, task_type=None), "must have task_type SEQ_CLS or CAUSAL_LM"),
    "no base": (lambda f: edit_adapters(f, base_model_name_or_path=None), "and base_model_name_or_path"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "the adapters have no weights"),
    "a pickle": (adapters_as_pickle, r"a pickle \(adapter_model.bin\) is not read"),
    "no head": (lambda f: change_adapters(f, without("classifier")), "lack weights, .*classifier"),
    "no pooler": (lambda f: change_adapters(f, without("pooler")), "lack weights, .*pooler.dense"),
    "a layer less": (lambda f: change_adapters(f, without("layer.1.")), "lack weights, .*layer.1."),
    "cut weights": (
        lambda f: (f / "adapter_model.safetensors").write_bytes((f / "adapter_model.safetensors").read_bytes()[:-99]),
        "safetensors file is damaged or cut short",
    ),
    "an unknown method": (lambda f: edit_adapters(f, peft_type="MAGIC"), "no model at "),
    "settings that are no JSON": (lambda f: (f / "adapter_config.json").write_text("{"), "adapter_config.json"),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_what_adapters_lack_is_an_error_of_one_line(case, adapters, tmp_path):
    folder = tmp_path / "adapters"
    shutil.copytree(adapters, folder)
    assert Reranker.from_pretrained(folder, device="cpu").score([("moon", "red")]).shape == (1,)
    damage, message = ADAPTERS[case]
    damage(folder)
    with pytest.raises(TrainingError, match=message) as error:
        Reranker.from_pretrained(folder, device="cpu")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "cuda"}, "device='cuda': this machine has no such device; the best that it has is cpu"),
        ({"device": "nonsense"}, "device='nonsense': this machine has no such device"),
        ({"device": "cpu:7"}, "device='cpu:7': this machine has no such device"),
        ({"max_length": "64"}, "max_length must be a number of tokens, 1 or more, not '64'"),
        ({"max_length": 0}, "max_length must be a number of tokens, 1 or more, not 0"),
        ({"dtype": "bf16"}, "dtype must be 'auto' or one of float32, bfloat16, float16, float64, not 'bf16'"),
        ({"packing": "yes"}, "packing must be 'auto' or 'none', not 'yes'"),
    ],
)
def test_a_setting_that_cannot_be_is_an_error_of_one_line(settings, message, folder):
    with pytest.raises(ConfigError) as error:
        Reranker.from_pretrained(folder, **settings)
    assert message in str(error.value)


def test_a_tokenizer_of_a_family_without_vocabulary_files_is_loaded(tmp_path):
    from transformers import ByT5Tokenizer

    ByT5Tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    assert load_tokenizer(tmp_path)("a")["input_ids"]


@pytest.mark.parametrize("family", ["bert", "modernbert", "qwen3", "deberta-v2"])
def test_a_tied_or_untied_family_lacks_nothing(family, tmp_path, caplog):
    tiny_model(family).save_pretrained(tmp_path)
    load_model(tmp_path)
    assert not [record for record in caplog.records if record.name.startswith("lce_trainer")]


def test_every_error_here_is_ours():
    assert issubclass(ConfigError, LCETrainerError) and issubclass(TrainingError, LCETrainerError)
