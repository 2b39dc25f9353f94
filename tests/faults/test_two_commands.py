"""Two commands of one recipe at once: the run folder is held by one of them at a time."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers.command import Moment, command, ended, started
from helpers.paths import ROOT
from helpers.tiny_recipe import ARTIFACTS, assert_same_run, contents
from lce_trainer.pipeline.run import open_run

SETTINGS = ("train.max_steps=4",)
# What each command makes, besides what the commands before it make.
MADE = {
    "generate": ("passages", "queries"),
    "mine": ("candidates",),
    "label": ("groups",),
    "train": ("model",),
    "evaluate": ("evaluation",),
    "run": ARTIFACTS,
    "publish": (),
}


def both(first: tuple, second: tuple, folder: Path) -> list[tuple[int, str]]:
    """Start two commands at the same moment; returns how each ended."""
    logs = [folder / "first.log", folder / "second.log"]
    processes = [started(*arguments, log=log) for arguments, log in zip((first, second), logs, strict=True)]
    return [ended(process, log) for process, log in zip(processes, logs, strict=True)]


@pytest.mark.parametrize("second", ["train", "evaluate"])
def test_a_second_command_waits_and_logs_who_holds_the_folder(second, finished, tmp_path):
    for name in ("alone", "both"):
        finished.copy(tmp_path / name, *ARTIFACTS[:4])
    alone = ("train", finished.recipe, *SETTINGS, f"run_dir={tmp_path / 'alone'}")
    assert command(*alone, log=tmp_path / "log")[0] == 0
    train = ("train", finished.recipe, *SETTINGS, f"run_dir={tmp_path / 'both'}")
    first = started(*train, log=tmp_path / "first.log")
    holder = tmp_path / "both" / ".lock.json"
    while not holder.exists() and first.is_alive():
        time.sleep(0.05)
    status, printed = command(second, *train[1:], log=tmp_path / "second.log")
    assert status == 0, printed
    assert f"{tmp_path / 'both'} is in use by process {first.pid} on " in printed
    assert " since 2" in printed and ": waiting until it is done" in printed
    assert ("model: already made" in printed) == (second == "train")
    assert ended(first, tmp_path / "first.log")[0] == 0
    made = contents(tmp_path / "both")
    wanted = contents(tmp_path / "alone")
    assert {name: made[name] for name in wanted} == wanted
    assert not holder.exists()


def test_a_command_that_shall_not_wait_is_one_line(finished, tmp_path):
    root = finished.copy(tmp_path / "run", *ARTIFACTS[:2])
    # A whole run takes long after the folder is held: there the process stops, and holds it.
    holds = started("run", finished.recipe, f"run_dir={root}", log=tmp_path / "holds")
    while not (root / ".lock.json").exists() and holds.is_alive():
        time.sleep(0.02)
    os.kill(holds.pid, signal.SIGSTOP)
    try:
        status, printed = command("mine", finished.recipe, f"run_dir={root}", "--no-wait", log=tmp_path / "log")
    finally:
        os.kill(holds.pid, signal.SIGCONT)
    assert status == 2 and "Traceback" not in printed
    assert f"error: {root} is in use by process {holds.pid} on" in printed and "or stop it" in printed
    ended(holds, tmp_path / "holds")


def test_a_killed_command_holds_nothing(finished, tmp_path):
    root = finished.copy(tmp_path / "run", "passages")
    arguments = ("generate", finished.recipe, f"run_dir={root}")
    assert command(*arguments, log=tmp_path / "log", die=Moment("journal", "queries"))[0] == -signal.SIGKILL
    assert json.loads((root / ".lock.json").read_text())["pid"]
    status, printed = command(*arguments, "--no-wait", log=tmp_path / "log")
    assert status == 0, printed


@pytest.mark.timeout(600)
def test_two_ranks_of_a_launch_hold_the_folder_together_and_wait_together(finished, tmp_path):
    root = finished.copy(tmp_path / "run", *ARTIFACTS[:4])
    settings = (finished.recipe, f"run_dir={root}", "train.max_steps=30", "train.per_device_train_batch_size=2")

    # This process holds the folder: both ranks wait for it, and log so once.
    holder = root / ".lock.json"
    with open_run(finished.recipe, [f"run_dir={root}"]).held():
        launch = launched(*settings, log=tmp_path / "launched")
        while launch.poll() is None and "waiting until it is done" not in (tmp_path / "launched").read_text():
            time.sleep(0.1)
        assert launch.poll() is None and not (root / "model" / "manifest.json").exists()

    # Now the launch holds it, under the id of its first rank, and a third command is refused.
    while launch.poll() is None and (not holder.exists() or json.loads(holder.read_text())["pid"] == os.getpid()):
        time.sleep(0.02)
    first = json.loads(holder.read_text())["pid"]
    os.kill(first, signal.SIGSTOP)
    try:
        status, printed = command("mine", *settings, "--no-wait", log=tmp_path / "third")
    finally:
        os.kill(first, signal.SIGCONT)
    assert status == 2 and f"error: {root} is in use by process {first} on" in printed, printed
    assert launch.wait(timeout=280) == 0, (tmp_path / "launched").read_text()[-3000:]
    printed = (tmp_path / "launched").read_text()
    assert printed.count(f"is in use by process {os.getpid()} on ") == printed.count("waiting until it is done") == 1
    assert printed.count("INFO: train took ") == 1
    assert not holder.exists()
    status, printed = command("train", *settings, "--no-wait", log=tmp_path / "log")
    assert status == 0 and "model: already made" in printed, printed


def launched(*arguments: str | Path, log: Path) -> "subprocess.Popen[bytes]":
    """Start ``train`` on two processes, as a user does."""
    config = ROOT / "recipes" / "accelerate_configs" / "ddp_cpu.yaml"
    launch = ["-m", "accelerate.commands.launch", "--config_file", config, "--main_process_port", "0"]
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, *map(str, (*launch, ROOT / "recipes" / "train_reranker.py", *arguments))],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )


@pytest.mark.slow
@pytest.mark.parametrize("draw", range(20))
def test_any_two_commands_at_once_leave_what_one_after_the_other_leaves(draw, finished, tmp_path):
    first, second = random.Random(draw).choices(list(MADE), k=2)
    root = finished.copy(tmp_path / "run", *ARTIFACTS)
    for name in {*MADE[first], *MADE[second]}:
        (root / name / "manifest.json").unlink()
    settings = (finished.recipe, f"run_dir={root}", "publish.model_id=me/model", "publish.dataset_id=me/groups")
    arguments = [(name, *settings, *(["--dry-run"] if name == "publish" else [])) for name in (first, second)]
    for status, printed in both(*arguments, tmp_path):
        assert "Traceback" not in printed
        assert status == 0 or "with this recipe first" in printed, printed
    assert command("run", *settings, log=tmp_path / "log")[0] == 0
    for name in ("model", "groups"):
        (root / name / "README.md").unlink(missing_ok=True)
    assert_same_run(root, contents(finished.root))
