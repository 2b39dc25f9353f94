"""Models are calibrated by the command: real rerankers, all tiny, and labels that are drawn by their own scores."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from helpers.tiny import make_pairs
from helpers.trainers import make_groups
from lce_trainer.artifacts import read_manifest, write_manifest
from lce_trainer.cli import main
from lce_trainer.model.reranker import Reranker
from lce_trainer.model.saving import write_first_stage_weight
from lce_trainer.pipeline.facts import repos
from lce_trainer.pipeline.run import open_run
from lce_trainer.training.arguments import LCETrainingArguments
from lce_trainer.training.trainer import LCETrainer


def label(model: Path, path: Path, wanted: str | None = None) -> Path:
    """Pairs of 40 queries, each with four passages, whose labels are drawn by a model's scores."""
    reranker, rng = Reranker.from_pretrained(model), np.random.default_rng(0)
    words = [passage for _, passage in make_pairs(200)]
    pairs = [(f"query {words[i]}", words[40 + (4 * i + j) % 160]) for i in range(40) for j in range(4)]
    scores = reranker.score(pairs)
    deviations = (scores - scores.mean()) / scores.std()
    relevant = rng.random(160) < 1 / (1 + np.exp(-(3 * deviations - 0.5)))
    rows = [
        {"query": query, "passage": passage, "label": int(one)}
        for (query, passage), one in zip(pairs, relevant, strict=True)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def calibrate(root: Path, *arguments: str) -> None:
    """Calibrate the model of a run, whose scores are nearly random: they are negated where they rank the wrong way."""
    if main(["calibrate", *arguments]) == 2:
        folder, made = root / "model", read_manifest(root / "model")
        weights = load_file(folder / "model.safetensors")
        turned = {name: -value if name.startswith("classifier.") else value for name, value in weights.items()}
        save_file(turned, folder / "model.safetensors", metadata={"format": "pt"})
        about = {"config": made.config, "inputs": made.inputs, "counts": made.counts, "facts": made.facts}
        write_manifest(folder, made.files, kind="model", **about)
        assert main(["calibrate", *arguments]) == 0


@pytest.fixture
def model(tiny_reranker, tmp_path):
    return Path(shutil.copytree(tiny_reranker, tmp_path / "model"))


@pytest.fixture
def labelled(model, tmp_path):
    return label(model, tmp_path / "labelled.jsonl")


def test_a_model_is_calibrated_where_it_lies_and_gives_probabilities_then(model, labelled, capsys):
    rows = [json.loads(line) for line in labelled.read_text().splitlines()]
    pairs = [(row["query"], row["passage"]) for row in rows]
    logits = Reranker.from_pretrained(model).score(pairs)
    assert main(["calibrate", str(model), "--pairs", str(labelled), "--precision", "0.7"]) == 0
    captured = capsys.readouterr()
    found = json.loads((model / "calibration.json").read_text())
    config = json.loads((model / "config.json").read_text())["calibration"]
    assert config == {
        "slope": found["slope"],
        "intercept": found["intercept"],
        "cut_off": found["cut_off"]["probability"],
        "cut_off_precision": 0.7,
    }
    assert (found["pairs"], found["queries"], found["from"], found["labelled_by"]) == (
        160,
        40,
        "labelled.jsonl",
        "people",
    )
    assert found["after"]["log_loss"] < found["before"]["log_loss"]
    reranker = Reranker.from_pretrained(model)
    np.testing.assert_array_equal(reranker.score(pairs), logits)
    chances = reranker.score(pairs, calibrated=True)
    np.testing.assert_allclose(
        chances, 1 / (1 + np.exp(-(found["slope"] * logits + found["intercept"]))), atol=1e-3
    )  # of tiny logits
    assert chances.mean() == pytest.approx(np.mean([row["label"] for row in rows]), abs=0.02)
    for text in ("160 pairs of 40 queries", "\ncalibrated ", "cut-off for a precision of 0.7: probability", "report: "):
        assert text in captured.out
    assert "relevant pairs are few" in captured.err
    assert max(map(len, captured.out.partition("report:")[0].splitlines())) <= 120
    page = (model / "calibration.html").read_text()
    assert page.count("<circle") == 30 and "Calibrated" in page and "Not evaluated" not in page
    assert str(model.parent) not in page and f"ECE {found['after']['ece']:.3f}" in page


def test_a_copy_is_calibrated_and_the_model_stays_as_it_is(model, labelled, tmp_path):
    before = (model / "config.json").read_bytes()
    copy = tmp_path / "copy"
    assert main(["calibrate", str(model), "--pairs", str(labelled), "--output", str(copy)]) == 0
    assert (model / "config.json").read_bytes() == before and not (model / "calibration.json").exists()
    pairs = make_pairs(6)
    np.testing.assert_array_equal(
        Reranker.from_pretrained(copy).score(pairs), Reranker.from_pretrained(model).score(pairs)
    )
    assert Reranker.from_pretrained(copy).score(pairs, calibrated=True).min() > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{model}"], "name a file of them by --pairs"),
        (["{model}", "--pairs", "{pairs}", "--precision", "1.5"], "--precision must be above 0 and up to 1, not 1.5"),
        (["{model}", "--pairs", "{pairs}", "--output", "{model}"], "is not empty: name a new folder"),
        (["{model}", "--pairs", "{model}/none.csv"], "no file at"),
        (["{model}", "seed=4", "--pairs", "{pairs}"], "seed=4 overrides a recipe"),
        (["some/model", "--pairs", "{pairs}"], "is no folder that a calibration can be written into; or name a new"),
        (["{model}", "--pairs", "{few}"], "are too few to fit probabilities to"),
        (["{model}", "--pairs", "{wrong}"], "a higher score does not make a passage more likely to be relevant"),
    ],
)
def test_what_cannot_be_calibrated_is_refused_and_nothing_is_written(
    arguments, message, model, labelled, tmp_path, capsys
):
    before = sorted(path.name for path in model.iterdir()), (model / "config.json").read_bytes()
    lines = labelled.read_text().splitlines(keepends=True)
    (tmp_path / "few.jsonl").write_text("".join(lines[:12]))
    wrong = "".join(line.replace('"label": 1', '"label": 2').replace('"label": 0', '"label": 1') for line in lines)
    (tmp_path / "wrong.jsonl").write_text(wrong.replace('"label": 2', '"label": 0'))
    names = {"model": model, "pairs": labelled, "few": tmp_path / "few.jsonl", "wrong": tmp_path / "wrong.jsonl"}
    assert main(["calibrate", *(word.format_map(names) for word in arguments)]) == 2
    assert message in capsys.readouterr().err
    assert (sorted(path.name for path in model.iterdir()), (model / "config.json").read_bytes()) == before


def test_adapters_and_the_model_of_a_run_have_no_config_to_write_into(finished, model, labelled, capsys):
    sealed = finished.root / "model"
    assert main(["calibrate", str(sealed), "--pairs", str(labelled)]) == 2
    assert "is the model of a run, which its manifest seals: name the recipe" in capsys.readouterr().err
    (model / "config.json").rename(model / "adapter_config.json")
    assert main(["calibrate", str(model), "--pairs", str(labelled)]) == 2
    assert "has no config.json to keep a calibration in; or name a new folder" in capsys.readouterr().err


def test_the_model_of_a_run_is_calibrated_and_its_evaluation_stays_valid(finished, tmp_path, capsys):
    root = finished.copy(tmp_path / "run", "passages", "queries", "candidates", "groups", "model", "evaluation")
    pairs, recipe = label(root / "model", tmp_path / "labelled.jsonl"), [str(finished.recipe), f"run_dir={root}"]
    trained = open_run(finished.recipe).table("groups")["query"][0]
    with pairs.open("a") as file:
        file.write(json.dumps({"query": trained, "passage": "a red fish", "label": 1}) + "\n")
    assert main(["calibrate", *recipe, "--pairs", str(pairs), "--precision", "0.6"]) == 0
    captured = capsys.readouterr()
    assert "1 of 161 pairs are left out: the model was trained on their queries" in captured.err
    assert "160 pairs of 40 queries" in captured.out
    model, evaluation = read_manifest(root / "model", "model"), read_manifest(root / "evaluation", "evaluation")
    assert evaluation.inputs["model"] == model.digest
    assert model.digest != read_manifest(finished.root / "model").digest
    Reranker.from_pretrained(root / "model").score([("what", "a fish")], calibrated=True)
    assert main(["evaluate", *recipe]) == 0  # of the figures that are there
    captured = capsys.readouterr()
    assert "evaluation: already made" in captured.err
    page = (root / "report.html").read_text()
    assert "<h2>Calibration</h2>" in page and "<h2>Comparison, in domain</h2>" in page
    assert main(["publish", *recipe, "--dry-run", "publish.model_id=me/fish"]) == 0
    assert "calibration" not in capsys.readouterr().out  # it is in config.json
    (repo,) = repos(open_run(finished.recipe, [*recipe[1:], "publish.model_id=me/fish"]))
    card, found = repo.files["README.md"].decode(), json.loads((root / "model" / "calibration.json").read_text())
    assert (
        "## Calibration" in card
        and "160 pairs of 40 queries" in card
        and "`labelled.jsonl`, labelled by people" in card
    )
    assert "| calibrated | {ece:.3f} [{ece_low:.3f}, {ece_high:.3f}] |".format_map(found["after"]) in card
    assert f"`sigmoid({found['slope']:.4g} × logit {found['intercept']:+.4g})`" in card
    cut = found["cut_off"]
    assert f"Recommended cut-off for a precision of 0.6: a probability of **{cut['probability']:.3f}**" in card
    assert f"{cut['precision']:.3f} [{cut['precision_low']:.3f}" in card and "\n\n\n" not in card


def test_without_pairs_they_are_the_dev_queries_with_all_candidates(finished, tmp_path, capsys):
    root = finished.copy(tmp_path / "run", "passages", "model")
    recipe = [str(finished.recipe), f"run_dir={root}"]
    assert main(["calibrate", *recipe]) == 2
    assert "relevant pairs are too few to fit probabilities to" in capsys.readouterr().err  # 8 dev queries
    queries = f"evaluate.dev_queries={finished.recipe.parent / 'test.jsonl'}"
    calibrate(root, *recipe, queries)
    found = json.loads((root / "model" / "calibration.json").read_text())
    assert (found["queries"], found["from"], found["labelled_by"]) == (12, "test.jsonl", "people")
    assert found["relevant"] >= 10 and found["pairs"] >= 120


def test_without_dev_queries_they_are_the_groups_held_out_from_training(finished, tmp_path, capsys):
    root = finished.copy(tmp_path / "run", "passages", "queries", "candidates", "groups", "model")
    recipe = [str(finished.recipe), f"run_dir={root}", "evaluate.dev_queries=null", "train.dev_fraction=0.5"]
    assert main(["calibrate", *recipe]) == 2
    assert "was trained when other groups were held out" in capsys.readouterr().err
    assert main(["train", *recipe]) == 0
    capsys.readouterr()
    calibrate(root, *recipe)
    captured = capsys.readouterr()
    assert "labelled by the judge of the groups" in captured.out and "the judge's labels" in captured.err
    found = json.loads((root / "model" / "calibration.json").read_text())
    groups = len(open_run(finished.recipe).table("groups"))
    assert found["queries"] <= groups / 2 + 1 and found["from"] == "the groups held out from training"


def test_training_a_calibrated_model_further_drops_what_was_fitted_to_other_weights(model, labelled, tmp_path):
    assert main(["calibrate", str(model), "--pairs", str(labelled)]) == 0
    write_first_stage_weight(model, 0.3)
    settings = LCETrainingArguments(
        str(tmp_path / "out"), max_steps=1, max_length=48, max_query_length=12, report_to="none"
    )
    trainer = LCETrainer(str(model), settings, train_dataset=make_groups(8))
    trainer.save_model()
    assert not {"calibration", "first_stage_weight"} & json.loads((tmp_path / "out" / "config.json").read_text()).keys()
