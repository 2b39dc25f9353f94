"""The scripts, settings and accelerate configs that ship in ``recipes/``."""

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file
from test_trainer import assert_same

from lce_trainer.config import load_recipe
from lce_trainer.training_args import LCETrainingArguments

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes"
CONFIGS = RECIPES / "accelerate_configs"
SCRIPTS = {
    "generate_queries": "generate",
    "mine_candidates": "mine",
    "label_candidates": "label",
    "train_reranker": "train",
    "evaluate_reranker": "evaluate",
    "publish": "publish",
}


def test_every_script_is_known():
    assert {path.stem for path in RECIPES.glob("*.py")} == set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_its_stage(script):
    command = [sys.executable, str(RECIPES / f"{script}.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: lce-trainer {SCRIPTS[script]} ")


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*/recipe.yaml")), ids=lambda path: path.parent.name)
def test_a_recipe_is_readable_and_has_the_files_it_names(path):
    recipe = load_recipe(path, (), [item.name for item in fields(LCETrainingArguments)])
    beside = [recipe.corpus.script, recipe.evaluate.queries, recipe.evaluate.dev_queries]
    for name in filter(None, beside):
        assert (path.parent / name).is_file(), name


@pytest.mark.parametrize(
    ("name", "processes", "several", "on_cpu"),
    [
        ("cpu", 1, False, True),
        ("ddp_cpu", 2, True, True),
        ("one_gpu", 1, False, False),
        ("ddp_gpus", 8, True, False),
    ],
)
def test_an_accelerate_config_says_what_its_name_does(name, processes, several, on_cpu):
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert config.num_processes == processes
    assert (config.distributed_type == "MULTI_GPU") == several
    assert config.use_cpu == on_cpu


def launch(config: str, *arguments: str) -> str:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{config}.yaml")]
    command += ["--main_process_port", "0"]  # any free one
    done = subprocess.run(
        [*command, str(RECIPES / "train_reranker.py"), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def test_two_processes_train_as_one_with_twice_the_batch(finished, tmp_path):
    """The warm start's groups as well are made once, by one of them."""
    settings = (str(finished.recipe), "train.optim=sgd", "train.learning_rate=0.05", "train.dropout=0.0")
    settings += ("train.warm_start.learning_rate=0.05", "train.max_steps=8")
    made = {}
    for config, batch in (("cpu", 4), ("ddp_cpu", 2)):
        root = finished.copy(tmp_path / config, "passages", "queries", "candidates", "groups")
        made[config] = launch(
            config, *settings, f"run_dir={root}", f"train.per_device_train_batch_size={batch}", "train.logging_steps=1"
        )
    for phase, steps in (("warm_start_model", 12), ("model", 8)):
        one, two = (json.loads((tmp_path / config / "logs" / f"{phase}.json").read_text()) for config in made)
        losses = [[entry["loss"] for entry in state["log_history"] if "loss" in entry] for state in (one, two)]
        assert len(losses[0]) == steps
        assert losses[1] == pytest.approx(losses[0], abs=1e-5)
        assert two["best_metric"] == pytest.approx(one["best_metric"], abs=1e-5)
        assert_same(*(load_file(tmp_path / config / phase / "model.safetensors") for config in made), 1e-5)
    for printed in made.values():
        assert printed.count("INFO: warm_start: ") == printed.count("INFO: train took ") == 1
        assert "Warning" not in printed
