"""What the command says of loaders is what they do."""

import json
import shutil
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from helpers.backbones import base_folder
from helpers.modular import save_modular
from helpers.tiny_models import ASKING, tiny_model, tiny_tokenizer
from lce_trainer.cli import main
from lce_trainer.model.check import check_model
from lce_trainer.model.export import export_reranker
from lce_trainer.model.reranker import Reranker
from lce_trainer.model.saving import save_reranker

AUTO, PIPE = "transformers, AutoModelForSequenceClassification", 'transformers, pipeline("text-classification")'
CROSS, TEI, VLLM, GGUF = (
    "sentence-transformers, CrossEncoder",
    "text-embeddings-inference, /rerank",
    "vLLM, /score",
    "llama.cpp, as GGUF",
)
OURS = "lce_trainer.Reranker"


def outcomes(folder) -> dict[str, tuple[str, str]]:
    return {one.name: (one.outcome, one.detail) for one in check_model(str(folder))}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "model"
    save_reranker(tiny_model("bert"), tiny_tokenizer("bert"), 96, folder)
    return folder


def test_what_we_save_scores_the_same_everywhere(plain, capsys):
    found = outcomes(plain)
    assert [found[name][0] for name in (OURS, AUTO, CROSS)] == ["same scores"] * 3
    assert found[PIPE] == ("other scores", found[PIPE][1]) and 'function_to_apply="none"' in found[PIPE][1]
    for name, to in (("ONNX Runtime", "onnx"), ("OpenVINO", "openvino")):
        outcome, detail = found[name]
        assert outcome == "not tried" and f"lce-trainer export {plain} --to {to} writes it" in detail
    assert [found[name][0] for name in (TEI, VLLM, GGUF)] == ["should load", "should load", "does not load"]
    assert main(["check", str(plain)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 1 + len(found) and all(line.startswith("  ") for line in printed[1:])


def test_without_the_activation_in_its_config_sentence_transformers_squashes_scores(plain, tmp_path):
    folder = shutil.copytree(plain, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    del config["sentence_transformers"]
    (folder / "config.json").write_text(json.dumps(config))
    assert outcomes(folder)[CROSS] == ("other scores", "the sigmoid of the score, in the same order")


def test_a_family_that_servers_cannot_score_with_is_said(tmp_path):
    save_reranker(tiny_model("mpnet"), tiny_tokenizer("mpnet"), 96, tmp_path)
    found = outcomes(tmp_path)
    assert [found[name][0] for name in (AUTO, CROSS)] == ["same scores"] * 2
    for name in (TEI, VLLM, GGUF):
        assert found[name][0] == "does not load" and "mpnet" in found[name][1]


def test_a_modular_head_is_made_up_by_transformers_until_it_is_converted(tmp_path):
    modular = save_modular(tmp_path)
    found = outcomes(modular)
    for name in (AUTO, PIPE):
        assert found[name][0] == "does not load" and "it makes up weights: classifier" in found[name][1]
    for name in (TEI, VLLM):
        assert found[name] == (
            "does not load",
            "it does not read modular heads: lce-trainer convert writes a plain checkpoint",
        )
    assert main(["convert", str(modular), str(tmp_path / "plain")]) == 0
    found = outcomes(tmp_path / "plain")
    assert [found[name][0] for name in (AUTO, CROSS, TEI, VLLM)] == ["same scores"] * 2 + ["should load"] * 2


def test_a_language_model_that_answers_is_no_classifier(tmp_path):
    base, tokenizer = base_folder("qwen3", tmp_path / "base"), tiny_tokenizer("qwen3")
    tokenizer.chat_template = ASKING
    tokenizer.save_pretrained(base)
    Reranker.from_pretrained(base, device="cpu", yes_no=True).save_pretrained(tmp_path / "model")
    found = outcomes(tmp_path / "model")
    assert found[CROSS][0] == "same scores"
    for name in (AUTO, PIPE):
        assert found[name] == ("does not load", "it is a language model that answers yes or no, and no classifier")
    assert found[TEI] == ("does not load", "it has no classification head for qwen3")
    assert "--hf-overrides" in found[VLLM][1]


def test_adapters_are_read_by_no_server(tmp_path):
    base = base_folder("bert", tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["query"], modules_to_save=["classifier", "pooler"])
    get_peft_model(model, config).save_pretrained(tmp_path / "adapters")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "adapters")
    found = outcomes(tmp_path / "adapters")
    for name in (TEI, VLLM):
        assert found[name][0] == "does not load" and "lce-trainer convert" in found[name][1]


@pytest.mark.skipif(not find_spec("onnxscript"), reason="of the export extra")
def test_an_onnx_file_is_compared_and_one_of_another_model_is_found_out(plain, tmp_path):
    folder = shutil.copytree(plain, tmp_path / "model")
    export_reranker(str(folder), "onnx")
    file = "ONNX Runtime, onnx/model.onnx"
    assert outcomes(folder)[file][0] == "same scores"
    other = tiny_model("bert", seed=5)
    save_reranker(other, tiny_tokenizer("bert"), 96, tmp_path / "other")
    shutil.copytree(folder / "onnx", tmp_path / "other" / "onnx")
    outcome, detail = outcomes(tmp_path / "other")[file]
    assert outcome == "other scores" and detail.startswith("largest difference ")


def test_nothing_is_tried_with_a_checkpoint_that_we_do_not_load(tmp_path, capsys):
    base = base_folder("bert", tmp_path / "base")
    capsys.readouterr()
    assert main(["check", str(base)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_same_scores_are_those_of_the_loader_itself(plain):
    """The command's own way of asking transformers is that of its documentation."""
    pairs = [("red fish", "moon tree"), ("star", "hill tree red")]
    model, tokenizer = (kind.from_pretrained(plain) for kind in (AutoModelForSequenceClassification, AutoTokenizer))
    with torch.inference_mode():
        encoded = tokenizer(*map(list, zip(*pairs, strict=True)), padding=True, return_tensors="pt")
        scores = model(**encoded).logits[:, 0]
    np.testing.assert_allclose(Reranker.from_pretrained(plain, device="cpu").score(pairs), scores, atol=1e-5)
