import json
import sys

import numpy as np
import pytest
import torch
from peft import LoraConfig, TaskType
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig

from helpers.backbones import MAX_LENGTH, base_folder, make_trainer, pairs_of_all_lengths, some_groups
from helpers.tiny_models import (
    ASKING,
    FAMILIES,
    tiny_language_model,
    tiny_model,
    tiny_tokenizer,
)
from helpers.trainers import assert_same
from lce_trainer.errors import TrainingError
from lce_trainer.model.adapters import head_modules, merge_adapters
from lce_trainer.model.reranker import Reranker
from lce_trainer.model.yes_no import answers_of

LORA = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1)
FAST = {"learning_rate": 0.05, "max_grad_norm": 1.0}


@pytest.fixture(scope="module", params=FAMILIES)
def trained(request, tmp_path_factory):
    """The trainer of a base's adapters after a step, and the folder they are saved in."""
    base = base_folder(request.param, tmp_path_factory.mktemp("base"))
    folder = tmp_path_factory.mktemp(request.param)
    trainer = make_trainer(request.param, folder, model=base, tokenizer=None, peft_config=LORA, **FAST)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.train()
    trainer.save_model()
    return trainer, before, folder


def test_the_head_and_the_adapters_learn_and_nothing_else(trained):
    trainer, before, _ = trained
    after = trainer.model.state_dict()
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert moved and all("lora_" in name or "modules_to_save" in name for name in moved)
    heads = head_modules(trainer.model.get_base_model())
    for head in heads:
        assert any(f".{head}.modules_to_save." in name for name in moved), head
    assert not any("lora_" in name and f".{head}." in name for name in after for head in heads)
    assert any("lora_B" in name for name in moved)


def test_an_adapter_and_a_merged_model_score_as_the_trained_one(trained, tmp_path):
    from sentence_transformers import CrossEncoder

    trainer, _, folder = trained
    pairs = pairs_of_all_lengths()
    scores = Reranker(trainer.model, trainer.processing_class).score(pairs)
    assert scores.std() > 1e-4
    names = {path.name for path in folder.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= names
    assert not {"model.safetensors", "training_args.bin"} & names
    loaded = Reranker.from_pretrained(folder, device="cpu")
    assert loaded.max_length == MAX_LENGTH
    np.testing.assert_allclose(loaded.score(pairs), scores, atol=1e-5)

    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.save_merged(tmp_path / "merged")
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())
    loaded.save_pretrained(tmp_path / "merged-later")
    for merged in (tmp_path / "merged", tmp_path / "merged-later"):
        assert not (merged / "adapter_config.json").exists()
        assert json.loads((merged / "config.json").read_text())["architectures"][0].endswith("SequenceClassification")
        assert not any("lora" in name or "modules_to_save" in name for name in load_file(merged / "model.safetensors"))
        np.testing.assert_allclose(Reranker.from_pretrained(merged, device="cpu").score(pairs), scores, atol=1e-5)
    AutoModelForSequenceClassification.from_pretrained(merged)
    # Given an adapter, CrossEncoder takes the config of its base, and that of Llama names no pad token.
    for saved in (merged,) if "llama" in folder.name else (folder, merged):
        crossed = CrossEncoder(str(saved), device="cpu").predict(pairs, show_progress_bar=False)
        np.testing.assert_allclose(crossed, scores, atol=1e-5)


def test_what_was_gathered_from_several_processes_is_merged_alike(trained):
    model = trained[0].model
    drawn = torch.get_rng_state()
    merged = merge_adapters(model, model.state_dict())
    assert torch.equal(torch.get_rng_state(), drawn)
    assert_same(merged.state_dict(), merge_adapters(model).state_dict(), 0)


def test_resumed_adapters_end_bit_equal(tmp_path):
    base = base_folder("qwen3", tmp_path / "base")

    def trainer():
        return make_trainer(
            "qwen3", tmp_path, base, None, peft_config=LORA, per_device_train_batch_size=2, num_train_epochs=2,
            save_strategy="steps", save_steps=2, optim="adamw_torch", learning_rate=1e-2,
        )  # fmt: skip

    whole, resumed = trainer(), trainer()
    whole.train()
    torch.manual_seed(99)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert whole.state.global_step == resumed.state.global_step == 6
    ends = [kept.model.state_dict() for kept in (whole, resumed)]
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


def test_the_best_adapters_are_the_ones_kept(tmp_path):
    base = base_folder("bert", tmp_path / "base")
    trainer = make_trainer(
        "bert", tmp_path, base, None, peft_config=LORA, num_train_epochs=3, per_device_train_batch_size=2,
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True,
        eval_dataset=some_groups(6), **FAST,
    )  # fmt: skip
    trainer.train()
    best = load_file(tmp_path / f"checkpoint-{trainer.state.best_global_step}" / "adapter_model.safetensors")
    trainer.save_model()
    kept = load_file(tmp_path / "adapter_model.safetensors")
    assert all(torch.equal(tensor, best[name]) for name, tensor in kept.items())


def test_a_language_model_that_answers_is_adapted_and_merged(tmp_path):
    base = tmp_path / "base"
    tiny_language_model("qwen3").save_pretrained(base)
    tokenizer = tiny_tokenizer("qwen3")
    tokenizer.chat_template = ASKING
    tokenizer.save_pretrained(base)
    folder = tmp_path / "adapter"
    trainer = make_trainer("qwen3", folder, base, None, peft_config=LORA, yes_no=True, **FAST)
    trainer.train()
    trainer.save_model()
    pairs = pairs_of_all_lengths()
    scores = Reranker(trainer.model, trainer.processing_class).score(pairs)
    loaded = Reranker.from_pretrained(folder)
    assert answers_of(loaded.model) == answers_of(trainer.model) is not None
    np.testing.assert_allclose(loaded.score(pairs), scores, atol=1e-5)
    trainer.save_merged(tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["architectures"] == ["Qwen3ForCausalLM"]
    np.testing.assert_allclose(Reranker.from_pretrained(tmp_path / "merged").score(pairs), scores, atol=1e-5)
    gathered = merge_adapters(trainer.model, trainer.model.state_dict())
    assert gathered.lm_head.weight is gathered.model.embed_tokens.weight
    assert_same(gathered.state_dict(), merge_adapters(trainer.model).state_dict(), 0)


def test_a_base_in_half_precision_stays_as_it_is_and_what_is_trained_is_float32(tmp_path):
    with pytest.raises(TrainingError, match="in bfloat16 and what is trained in float32: set bf16=True"):
        make_trainer("qwen3", tmp_path, tiny_model("qwen3").bfloat16(), peft_config=LORA)
    model = tiny_model("qwen3").bfloat16()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = make_trainer("qwen3", tmp_path, model, peft_config=LORA, bf16=True, **FAST)
    assert np.isfinite(trainer.train().training_loss)
    trained = {parameter.dtype for parameter in trainer.model.parameters() if parameter.requires_grad}
    assert trained == {torch.float32}
    frozen = {
        name.replace("base_model.model.", "").replace(".base_layer", "").replace(".original_module", ""): parameter
        for name, parameter in trainer.model.named_parameters()
        if not parameter.requires_grad
    }
    assert frozen.keys() == before.keys()
    assert all(torch.equal(parameter, before[name]) for name, parameter in frozen.items())


def quantized(base):
    """A base in 4 bits, its new head drawn from a seed."""
    pytest.importorskip("bitsandbytes", reason="quantizes the base")
    torch.manual_seed(0)
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    return AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, quantization_config=how)


def test_adapters_of_a_quantized_base_are_trained_resumed_and_loaded_onto_the_published_base(tmp_path):
    base = base_folder("qwen3", tmp_path / "base")

    def trainer():
        return make_trainer(
            "qwen3", tmp_path / "run", quantized(base), peft_config=LORA, bf16=True, per_device_train_batch_size=2,
            num_train_epochs=2, eval_dataset=some_groups(3), eval_strategy="steps", eval_steps=1, save_strategy="steps",
            save_steps=2, optim="adamw_torch", learning_rate=1e-2,
        )  # fmt: skip

    whole, resumed = trainer(), trainer()
    before = {name: tensor.clone() for name, tensor in whole.model.state_dict().items()}
    assert {tensor.dtype for name, tensor in before.items() if name.endswith("base_layer.weight")} == {torch.uint8}
    whole.train()
    torch.manual_seed(99)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    after, again = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in after.items())
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in after if "lora_" in name or "modules_to_save" in name}

    with pytest.raises(TrainingError, match="not merged into a quantized base: save them with save_model"):
        whole.save_merged(tmp_path / "merged")
    pairs = pairs_of_all_lengths()
    scores = Reranker(whole.model, whole.processing_class).score(pairs)
    whole.save_model()
    loaded = Reranker.from_pretrained(tmp_path / "run", device="cpu")
    assert np.corrcoef(loaded.score(pairs), scores)[0, 1] > 0.9
    loaded.save_pretrained(tmp_path / "published")
    plain = load_file(tmp_path / "published" / "model.safetensors")
    layer = "model.layers.0.mlp.up_proj"
    down, up = (after[f"base_model.model.{layer}.lora_{which}.default.weight"] for which in "AB")
    wanted = load_file(base / "model.safetensors")[f"{layer}.weight"] + up @ down * (LORA.lora_alpha / LORA.r)
    torch.testing.assert_close(plain[f"{layer}.weight"], wanted, rtol=0, atol=1e-6)


def test_an_evaluation_takes_no_gradient_from_a_quantized_base(tmp_path):
    base, found = base_folder("qwen3", tmp_path / "base"), []
    for evaluated in (False, True):
        trainer = make_trainer(
            "qwen3", tmp_path, quantized(base), peft_config=LoraConfig(r=4), bf16=True, eval_dataset=some_groups(3)
        )
        if evaluated:
            trainer.evaluate()
        model = trainer.accelerator.prepare(trainer.model)
        trainer.training_step(model, trainer.data_collator(list(trainer.train_dataset)), 6)
        found.append({n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None and "lora_B" in n})
    assert found[0] and all(gradient.abs().max() > 1e-6 for gradient in found[0].values())
    assert_same(found[1], found[0], 0)


def test_a_quantized_model_that_lets_no_gradient_through_is_an_error(tmp_path):
    model = quantized(base_folder("qwen3", tmp_path / "base"))
    layer = model.model.layers[0].mlp.up_proj
    layer.weight.quant_state.packing_format_for_cpu = True  # as an evaluation leaves it on some CPUs
    with pytest.raises(TrainingError, match=r"has been used on the CPU, .*: load it anew"):
        make_trainer("qwen3", tmp_path, model, peft_config=LORA, bf16=True)


def test_adapters_of_a_given_model_are_drawn_from_the_seed(tmp_path):
    drawn = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        model = make_trainer("bert", tmp_path, tiny_model("bert"), peft_config=LORA).model
        drawn.append({name: tensor for name, tensor in model.state_dict().items() if "lora_A" in name})
    assert drawn[0] and all(torch.equal(tensor, drawn[1][name]) for name, tensor in drawn[0].items())


def test_what_the_user_chooses_is_kept_and_the_config_is_not_touched(tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"], task_type=TaskType.SEQ_CLS)
    shown = str(config)
    trainer = make_trainer("qwen3", tmp_path, peft_config=config)
    assert str(config) == shown
    names = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    assert {name.split(".")[-4] for name in names if "lora_" in name} == {"q_proj"}
    assert any("embed_tokens.modules_to_save" in name for name in names)
    assert any("score.modules_to_save" in name for name in names)


def test_what_cannot_be_adapted_or_merged_is_an_error(tmp_path, monkeypatch):
    with pytest.raises(TrainingError, match=r"must be a peft.PeftConfig, like LoraConfig, not dict"):
        make_trainer("bert", tmp_path, peft_config={"r": 4})
    trainer = make_trainer("bert", tmp_path, peft_config=LORA)
    with pytest.raises(TrainingError, match="has adapters already"):
        make_trainer("bert", tmp_path, trainer.model, peft_config=LORA)
    trainer.model.get_base_model().is_quantized = True
    with pytest.raises(TrainingError, match="not merged into a quantized base: save them with save_model"):
        trainer.save_merged(tmp_path)
    with pytest.raises(TrainingError, match="no adapters to merge"):
        make_trainer("bert", tmp_path).save_merged(tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(TrainingError, match=r"pip install 'lce-trainer\[peft\]'"):
        make_trainer("bert", tmp_path, peft_config=LORA)
