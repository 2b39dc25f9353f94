"""Modular CrossEncoders, saved by the real sentence-transformers, become plain checkpoints of the same scores."""

import json
import shutil

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from helpers.backbones import pairs_of_all_lengths, some_groups
from helpers.modular import save_modular
from helpers.tiny_models import tiny_config, tiny_tokenizer
from lce_trainer.cli import main
from lce_trainer.errors import TrainingError
from lce_trainer.model.loading import has_head
from lce_trainer.model.packed.packing import packs
from lce_trainer.model.reranker import Reranker
from lce_trainer.model.saving import write_first_stage_weight
from lce_trainer.training.arguments import LCETrainingArguments
from lce_trainer.training.trainer import LCETrainer

SIZES = {
    "32 dimensions, 2 layers": {},
    "48 dimensions, 3 layers": {"hidden_size": 48, "num_hidden_layers": 3, "intermediate_size": 72, "norm_bias": True},
}


def crossed(folder, pairs):
    from sentence_transformers import CrossEncoder

    model = CrossEncoder(str(folder), device="cpu")
    return model.predict(pairs, activation_fn=torch.nn.Identity(), show_progress_bar=False)


@pytest.fixture(scope="module", params=SIZES)
def modular(request, tmp_path_factory):
    return save_modular(tmp_path_factory.mktemp("modular"), **SIZES[request.param])


def test_scores_are_the_same_before_and_after_conversion(modular, tmp_path):
    pairs = pairs_of_all_lengths()
    wanted = crossed(modular, pairs)
    reranker = Reranker.from_pretrained(modular, device="cpu")
    assert packs(reranker.model) and wanted.std() > 1e-2
    assert has_head(modular)  # so the untouched base is compared with where it is the base
    np.testing.assert_allclose(reranker.score(pairs), wanted, rtol=0, atol=1e-6)

    assert main(["convert", str(modular), str(tmp_path / "plain")]) == 0
    plain = tmp_path / "plain"
    assert json.loads((plain / "config.json").read_text())["architectures"] == ["ModernBertForSequenceClassification"]
    np.testing.assert_allclose(Reranker.from_pretrained(plain, device="cpu").score(pairs), wanted, rtol=0, atol=1e-6)
    np.testing.assert_allclose(crossed(plain, pairs), wanted, rtol=0, atol=1e-6)
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(plain), AutoTokenizer.from_pretrained(plain)
    inputs = tokenizer(*map(list, zip(*pairs, strict=True)), padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        logits = model.eval()(**inputs).logits[:, 0].numpy()
    np.testing.assert_allclose(logits, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [{"pooling": "mean"}, {"bias": True}, {"activation": torch.nn.Tanh()}, {"activation": torch.nn.SiLU()}],
    ids=["mean", "bias", "tanh", "silu"],
)
def test_other_heads_of_the_same_form_are_read_too(settings, tmp_path):
    folder, pairs = save_modular(tmp_path, **settings), pairs_of_all_lengths()
    scores = Reranker.from_pretrained(folder, device="cpu").score(pairs)
    np.testing.assert_allclose(scores, crossed(folder, pairs), rtol=0, atol=1e-6)


def test_one_training_step_ends_where_the_modules_own_step_ends(modular, tmp_path):
    """By SGD with one gradient for both; a norm's bias that is folded has no counterpart, and is frozen in theirs."""
    from sentence_transformers import CrossEncoder

    pairs, rate = pairs_of_all_lengths()[:6], 1e-3
    theirs, ours = CrossEncoder(str(modular), device="cpu"), Reranker.from_pretrained(modular, device="cpu")
    if not ours.model.config.norm_bias:
        for parameter in theirs[3].parameters():
            if parameter is theirs[3].norm.bias:
                parameter.requires_grad = False
    weight = torch.linspace(-1, 1, len(pairs))
    features = theirs.preprocess(pairs)
    inputs = ours.tokenizer(*map(list, zip(*pairs, strict=True)), padding=True, truncation=True, return_tensors="pt")
    assert torch.equal(features["input_ids"], inputs["input_ids"])
    scores = theirs(features)["scores"][:, 0], ours.model(**inputs).logits[:, 0]
    for model, score in zip((theirs, ours.model), scores, strict=True):
        (score * weight).sum().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= rate * parameter.grad
    before, (first, second) = scores[0].detach(), (crossed_of(theirs, pairs), ours.score(pairs))
    assert np.abs(first - before.numpy()).max() > 1e-3
    # A folded bias no longer moves with the classifier's weight, so there the steps agree but for a few percent.
    tolerance = 1e-5 if ours.model.config.norm_bias else 0.05 * np.abs(first - before.numpy()).max()
    np.testing.assert_allclose(second, first, rtol=0, atol=tolerance)


def crossed_of(model, pairs):
    return model.predict(pairs, activation_fn=torch.nn.Identity(), show_progress_bar=False)


def test_the_trainer_keeps_the_head_and_saves_a_plain_checkpoint(modular, tmp_path):
    pairs = pairs_of_all_lengths()
    args = LCETrainingArguments(
        str(tmp_path), group_size=4, max_length=112, max_query_length=16, max_steps=1, learning_rate=1e-3,
        save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = LCETrainer(str(modular), args, train_dataset=Dataset.from_list(list(some_groups(6))))
    np.testing.assert_allclose(
        Reranker(trainer.model, trainer.processing_class).score(pairs), crossed(modular, pairs), rtol=0, atol=1e-6
    )
    trainer.train()
    trainer.save_model()
    assert not (tmp_path / "modules.json").exists()
    scores = Reranker(trainer.model, trainer.processing_class).score(pairs)
    np.testing.assert_allclose(Reranker.from_pretrained(tmp_path, device="cpu").score(pairs), scores, rtol=0, atol=1e-6)
    np.testing.assert_allclose(crossed(tmp_path, pairs), scores, rtol=0, atol=1e-5)
    assert np.abs(scores - crossed(modular, pairs)).max() > 1e-4


@pytest.mark.parametrize("settings", [{}, {"pooling": "mean", "bias": True, "activation": torch.nn.SiLU()}], ids=str)
def test_a_trained_model_goes_back_into_modules_with_its_scores_and_settings(settings, tmp_path):
    source, pairs = save_modular(tmp_path, **settings), pairs_of_all_lengths()
    assert main(["convert", str(source), str(tmp_path / "plain")]) == 0
    write_first_stage_weight(tmp_path / "plain", 0.75)
    plain = Reranker.from_pretrained(tmp_path / "plain", device="cpu", max_length=40)
    plain.save_pretrained(tmp_path / "again", modular=True)
    kinds = [module["type"].rpartition(".")[2] for module in json.loads((tmp_path / "again/modules.json").read_text())]
    assert kinds == ["Transformer", "Pooling", "Dense", "LayerNorm", "Dense"]
    again = Reranker.from_pretrained(tmp_path / "again", device="cpu")
    assert again.max_length == 40 and again.model.config.first_stage_weight == 0.75
    wanted = plain.score(pairs)
    np.testing.assert_allclose(again.score(pairs), wanted, rtol=0, atol=1e-6)
    from sentence_transformers import CrossEncoder

    theirs = CrossEncoder(str(tmp_path / "again"), device="cpu")  # raw, with no setting of the caller's
    np.testing.assert_allclose(theirs.predict(pairs, show_progress_bar=False), wanted, rtol=0, atol=1e-6)


def test_a_head_that_modules_cannot_say_is_refused(tiny_reranker, tmp_path, capsys):
    assert main(["convert", str(tiny_reranker), str(tmp_path / "modules"), "--modular"]) == 2
    assert "a bert model is not saved as modules" in capsys.readouterr().err
    assert not (tmp_path / "modules").exists()


def edit(folder, name, **settings):
    file = folder / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def without_norm(folder):
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps([modules[place] for place in (0, 1, 2, 4)]))


def shrink(folder):
    file = folder / "4_Dense" / "model.safetensors"
    save_file({name: value[..., :5] for name, value in load_file(file).items()}, file)


REFUSED = {
    "another pooling": (lambda f: edit(f, "1_Pooling/config.json", pooling_mode="max"), "pools tokens by 'max'"),
    "no norm": (without_norm, "a plain head is Transformer, Pooling, Dense, LayerNorm, Dense"),
    "an unknown activation": (
        lambda f: edit(f, "2_Dense/config.json", activation_function="torch.nn.modules.activation.ELU"),
        "activation torch.nn.modules.activation.ELU has no counterpart",
    ),
    "a squashed score": (
        lambda f: edit(f, "4_Dense/config.json", activation_function="torch.nn.modules.activation.Sigmoid"),
        "puts torch.nn.modules.activation.Sigmoid on the score",
    ),
    "two scores": (lambda f: edit(f, "4_Dense/config.json", out_features=2), "gives 2 scores"),
    "a residual": (lambda f: edit(f, "2_Dense/config.json", use_residual=True), "has a residual connection"),
    "another epsilon": (lambda f: edit(f, "config.json", norm_eps=1e-6), "adds 1e-05 to the variance"),
    "a prompt": (
        lambda f: edit(f, "config_sentence_transformers.json", prompts={"q": "find: "}, default_prompt_name="q"),
        "puts the prompt 'find: ' before its texts",
    ),
    "no weights": (lambda f: (f / "2_Dense/model.safetensors").unlink(), "2_Dense/model.safetensors is missing"),
    "no bias": (
        lambda f: save_file({"linear.weight": torch.ones(1, 32)}, f / "4_Dense/model.safetensors"),
        "linear.bias of its module 4, Dense, is missing",
    ),
    "cut weights": (
        lambda f: (f / "4_Dense/model.safetensors").write_bytes(b"\x10"),
        "4_Dense/model.safetensors': its safetensors file is damaged",
    ),
    "weights of another model": (shrink, "linear.weight of its module 4, Dense, has the shape (1, 5), and"),
}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return save_modular(tmp_path_factory.mktemp("small"))


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_plain_head_is_refused_with_the_reason(case, small, tmp_path, capsys):
    change, reason = REFUSED[case]
    folder = tmp_path / "modular"
    shutil.copytree(small, folder)
    change(folder)
    with pytest.raises(TrainingError) as error:
        Reranker.from_pretrained(folder, device="cpu")
    assert reason in str(error.value) and "\n" not in str(error.value)
    assert main(["convert", str(folder), str(tmp_path / "plain")]) == 2
    assert reason in capsys.readouterr().err and not (tmp_path / "plain").exists()


def test_a_modular_head_of_another_family_is_refused(tmp_path):
    from sentence_transformers import CrossEncoder
    from sentence_transformers.base.modules import Dense, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    AutoModel.from_config(tiny_config("bert")).save_pretrained(tmp_path / "base")
    tiny_tokenizer("bert").save_pretrained(tmp_path / "base")
    last = Dense(32, 1, activation_function=torch.nn.Identity(), module_output_name="scores")
    model = CrossEncoder(modules=[Transformer(str(tmp_path / "base")), Pooling(32, "cls"), last], device="cpu")
    model.save_pretrained(str(tmp_path / "modular"), create_model_card=False)
    with pytest.raises(TrainingError, match="transformers' head of a bert model is built otherwise"):
        Reranker.from_pretrained(tmp_path / "modular")


def test_a_bi_encoder_is_a_base_and_its_new_head_is_logged_once(tmp_path, caplog):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    from lce_trainer.model.loading import load_model

    AutoModel.from_config(tiny_config("modernbert")).save_pretrained(tmp_path / "base")
    tiny_tokenizer("modernbert").save_pretrained(tmp_path / "base")
    encoder = SentenceTransformer(modules=[Transformer(str(tmp_path / "base")), Pooling(32, "cls")], device="cpu")
    encoder.save_pretrained(str(tmp_path / "encoder"), create_model_card=False)
    with caplog.at_level("INFO", logger="lce_trainer"):
        load_model(tmp_path / "encoder")
    assert caplog.text.count("is a base model without a head to score with: classifier.bias, classifier.weight") == 1
    with pytest.raises(TrainingError, match="no head to score with: train it first"):
        Reranker.from_pretrained(tmp_path / "encoder")


def test_a_folder_that_holds_something_is_not_overwritten(small, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("keep")
    assert main(["convert", str(small), str(tmp_path)]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]
