"""The scripts, settings and accelerate configs that ship in ``recipes/``."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from safetensors.torch import load_file

from helpers.paths import ROOT, TESTS
from helpers.trainers import assert_same
from lce_trainer.pipeline.config import load_recipe
from lce_trainer.training.arguments import LCETrainingArguments

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


KINDS = {
    "cpu": ("NO", 1, 1, True),
    "one_gpu": ("NO", 1, 1, False),
    "ddp_cpu": ("MULTI_GPU", 2, 1, True),
    "ddp_gpus": ("MULTI_GPU", 8, 1, False),
    "ddp_nodes": ("MULTI_GPU", 16, 2, False),
    "fsdp2": ("FSDP", 8, 1, False),
    "fsdp2_nodes": ("FSDP", 16, 2, False),
    "zero2": ("DEEPSPEED", 8, 1, False),
    "zero3": ("DEEPSPEED", 8, 1, False),
}


def test_every_accelerate_config_is_known():
    assert {path.stem for path in CONFIGS.iterdir()} == set(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_an_accelerate_config_says_what_its_name_does(name):
    """As accelerate's own launcher reads it; it refuses keys that it does not know."""
    kind, processes, machines, on_cpu = KINDS[name]
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert config.distributed_type == kind
    assert (config.num_processes, config.num_machines, config.use_cpu) == (processes, machines, on_cpu)
    parser = launch_command_parser()
    known = {action.dest for action in parser._actions}
    for section in ("fsdp_config", "deepspeed_config"):
        assert set(getattr(config, section, None) or {}) <= known
    arguments = parser.parse_args(["--config_file", str(CONFIGS / f"{name}.yaml"), "train.py"])
    arguments, *_ = _validate_launch_command(arguments)
    assert arguments.num_processes == processes
    if kind == "FSDP":
        assert arguments.use_fsdp and arguments.fsdp_version == 2
        assert arguments.fsdp_auto_wrap_policy == "TRANSFORMER_BASED_WRAP"
    if kind == "DEEPSPEED":
        assert arguments.use_deepspeed and arguments.zero_stage == int(name[-1])


def start(config: Path, *arguments: str, script: Path = RECIPES / "train_reranker.py", **more: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    for name, value in {"main_process_port": "0", **more}.items():  # 0: any free one
        command += [f"--{name}", value]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    return subprocess.Popen(
        [*command, str(script), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )


def finish(*launched: subprocess.Popen) -> str:
    printed = [process.communicate(timeout=280)[0] for process in launched]
    assert all(process.returncode == 0 for process in launched), "".join(printed)[-5000:]
    return "".join(printed)


def settings(finished, root: Path, processes: int) -> list[str]:
    """Of a run with four groups a step, whatever the processes."""
    chosen = [str(finished.recipe), f"run_dir={root}", f"train.per_device_train_batch_size={4 // processes}"]
    chosen += ["train.optim=sgd", "train.learning_rate=0.05", "train.dropout=0.0", "train.logging_steps=1"]
    return [*chosen, "train.max_steps=8"]


def test_two_processes_train_as_one_with_twice_the_batch(finished, tmp_path):
    made = {}
    for config, processes in (("cpu", 1), ("ddp_cpu", 2)):
        root = finished.copy(tmp_path / config, "passages", "queries", "candidates", "groups")
        made[config] = finish(start(CONFIGS / f"{config}.yaml", *settings(finished, root, processes)))
    one, two = (json.loads((tmp_path / config / "logs" / "model.json").read_text()) for config in made)
    losses = [[entry["loss"] for entry in state["log_history"] if "loss" in entry] for state in (one, two)]
    assert len(losses[0]) == 8
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert two["best_metric"] == pytest.approx(one["best_metric"], abs=1e-5)
    assert_same(*(load_file(tmp_path / config / "model" / "model.safetensors") for config in made), 1e-5)
    for printed in made.values():
        assert printed.count("INFO: train took ") == 1
        assert "Warning" not in printed


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_torchrun_trains_as_one_process_too(finished, tmp_path):
    for name, processes in (("one", 1), ("two", 2)):
        root = finished.copy(tmp_path / name, "passages", "queries", "candidates", "groups")
        chosen = settings(finished, root, processes)
        if processes == 1:
            finish(start(CONFIGS / "cpu.yaml", *chosen))
            continue
        launch = ["--nproc_per_node", "2", "--master_addr", "127.0.0.1", "--master_port", free_port()]
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", *launch, str(RECIPES / "train_reranker.py"), *chosen],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    assert_same(*(load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two")), 1e-5)


def on_cpu(name: str, folder: Path) -> Path:
    """A shipped config for two processes on the CPU, and otherwise as it is."""
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    # accelerate leaves DeepSpeed aside where it is told to use the CPU; there is nothing else here to be used.
    config |= {"use_cpu": config["distributed_type"] != "DEEPSPEED", "num_processes": 2}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sharded_models_and_several_machines_train_as_one_process(finished, tmp_path):
    """Two launchers on 127.0.0.1 stand for two machines."""
    train, sharded = RECIPES / "train_reranker.py", TESTS / "helpers" / "rank.py"
    runs = {"cpu": (train, 1), "ddp_nodes": (train, 2), "fsdp2": (sharded, 2), "fsdp2_nodes": (sharded, 2)}
    if find_spec("deepspeed"):
        runs |= {"zero2": (train, 2), "zero3": (train, 2)}
    printed = {}
    for name, (script, processes) in runs.items():
        root = finished.copy(tmp_path / name, "passages", "queries", "candidates", "groups")
        arguments = settings(finished, root, processes)
        if script == sharded:
            arguments.insert(0, str(train))
        config = CONFIGS / "cpu.yaml" if name == "cpu" else on_cpu(name, tmp_path)
        machines = [{}]
        if name.endswith("_nodes"):
            port = free_port()
            machines = [{"machine_rank": str(rank), "main_process_port": port} for rank in range(2)]
        printed[name] = finish(*(start(config, *arguments, script=script, **machine) for machine in machines))
    one = load_file(tmp_path / "cpu" / "model" / "model.safetensors")
    logs = {name: json.loads((tmp_path / name / "logs" / "model.json").read_text()) for name in runs}
    for name in runs:
        assert_same(load_file(tmp_path / name / "model" / "model.safetensors"), one, 1e-5)
        assert logs[name]["best_metric"] == pytest.approx(logs["cpu"]["best_metric"], abs=1e-5)
        assert printed[name].count("INFO: train took ") == 1


SRUN = """\
#!/bin/sh
shift
for node in 0 1 2; do SLURM_NODEID=$node "$@"; done
"""
ACCELERATE = """\
#!/bin/sh
for word in "$@"; do echo "$word"; done > "$OUT/$SLURM_NODEID"
"""


def test_the_slurm_script_launches_a_recipe_on_each_machine(tmp_path):
    """Read by accelerate's own launcher; what Slurm does is done by stand-ins."""
    for name, text in {"srun": SRUN, "accelerate": ACCELERATE, "scontrol": "#!/bin/sh\necho n1\necho n2\n"}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "OUT": str(tmp_path), "SLURM_NNODES": "3"}
    environment |= {"SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "n[1-3]"}
    script = ["bash", str(RECIPES / "slurm" / "run.sbatch")]
    words = ["a recipe.yaml", "train.seed=1"]
    done = subprocess.run([*script, *words], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for rank in range(3):
        launch, *rest = (tmp_path / str(rank)).read_text().splitlines()
        arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(rest))
        assert launch == "launch" and arguments.multi_gpu
        assert (arguments.num_machines, arguments.num_processes, arguments.machine_rank) == (3, 12, rank)
        assert (arguments.main_process_ip, arguments.main_process_port) == ("n1", 20000 + 123456 % 20000)
        assert arguments.module and [arguments.training_script, *arguments.training_script_args] == [
            "lce_trainer.cli",
            "run",
            *words,
        ]
    done = subprocess.run(script, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "name a recipe" in done.stderr
