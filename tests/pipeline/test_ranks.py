"""Two processes write and judge as one does: the same artifacts, and they go on with what was interrupted."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.command import command
from helpers.llm_server import Server, tgi
from helpers.paths import ROOT, TESTS
from helpers.tiny_recipe import contents, write_recipe
from lce_trainer.synthesis.cost import is_usage

CONFIG = ROOT / "recipes" / "accelerate_configs" / "ddp_cpu.yaml"
MADE = ("passages", "queries", "candidates", "groups")


def start(script: Path, *arguments: Any) -> subprocess.Popen:
    launch = ["-m", "accelerate.commands.launch", "--config_file", CONFIG, "--main_process_port", "0"]
    return subprocess.Popen(
        [sys.executable, *map(str, (*launch, script, *arguments))],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # As many threads as one process has: products of matrices may depend on it in their last bits.
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )


def finish(process: subprocess.Popen, status: int = 0) -> str:
    printed = process.communicate(timeout=580)[0]
    assert process.returncode == status, printed[-5000:]
    return printed


def job(stage: str, root: Path, *overrides: str, **more: bool) -> str:
    return json.dumps({"stage": stage, "overrides": [f"run_dir={root}", *overrides], **more})


def tables(root: Path) -> dict[str, bytes]:
    """The artifacts, without the journals, whose lines stand in the order that answers came."""
    made = {name: data for name, data in contents(root).items() if name.split("/")[0] in MADE}
    return {name: data for name, data in made.items() if not name.endswith("journal.jsonl")}


def answers(root: Path, name: str) -> dict[str, Any]:
    lines = (root / name / "journal.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line)["answers"] for line in lines]
    return {key: answer for record in records for key, answer in record.items() if not is_usage(key)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A recipe of several batches of work, and what one process makes of it."""
    folder = tmp_path_factory.mktemp("whole")
    recipe = write_recipe(folder)
    text = recipe.read_text(encoding="utf-8")
    assert "per_passage: 2" in text
    recipe.write_text(text.replace("per_passage: 2", "per_passage: 8"), encoding="utf-8")
    for stage in ("generate", "mine", "label"):
        status, printed = command(stage, recipe, log=folder / "log")
        assert status == 0, printed
    return recipe, folder / "run"


@pytest.mark.timeout(600)
def test_two_processes_make_the_bytes_of_one_and_go_on_with_what_was_interrupted(whole, tmp_path):
    recipe, one = whole
    root = tmp_path / "run"
    killed = start(ROOT / "recipes" / "generate_queries.py", recipe, f"run_dir={root}")
    journal = root / "queries" / "journal.jsonl"
    while killed.poll() is None and not (journal.exists() and b"\n" in journal.read_bytes()):
        time.sleep(0.02)
    os.kill(json.loads((root / ".lock.json").read_bytes())["pid"], signal.SIGKILL)
    finish(killed, status=1)
    paid = answers(root, "queries")
    assert 0 < len(paid) < 480

    jobs = [job(stage, root) for stage in ("generate", "mine", "label")]
    printed = finish(start(TESTS / "helpers" / "ranked.py", recipe, *jobs))
    assert f"{len(paid)} of 480 already answered" in printed
    assert "process 1 answered " in printed
    for rank in (0, 1):
        assert [f"process {rank} {stage}: done" in printed for stage in ("generate", "mine", "label")] == [True] * 3
    made, wanted = tables(root), tables(one)
    assert sorted(made) == sorted(wanted)
    assert [name for name in wanted if made[name] != wanted[name]] == []
    for name in ("queries", "groups"):
        assert answers(root, name) == answers(one, name)
    assert paid.items() <= answers(root, "queries").items()


@pytest.mark.timeout(600)
def test_all_processes_end_with_the_first_and_a_server_is_probed_once(whole, tmp_path):
    recipe, _ = whole
    server = Server(tgi)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    price = ["llm.price={input: 1000, output: 1000}", "llm.budget=60"]
    jobs = [
        job("generate", tmp_path / "quoted", dry_run=True),
        job("generate", tmp_path / "bounded", *price),
        job("generate", tmp_path / "served", f"llm.endpoint={server.url}", "llm.model=org/served"),
    ]
    printed = finish(start(TESTS / "helpers" / "ranked.py", recipe, *jobs))
    server.shutdown()
    server.server_close()
    for rank, kind in ((0, "LLMError"), (1, "FirstProcessError")):
        assert f"process {rank} generate: QuoteReadyError: 352 calls are left of 480: about " in printed
        assert f"process {rank} generate: {kind}: llm.budget is 60: " in printed
        assert f"process {rank} generate: {kind}: none of the 480 queries that org/served wrote is usable" in printed
    assert 0 < len(answers(tmp_path / "bounded", "queries")) < 480
    assert [path for path, _, _ in server.requests].count("/info") == 1


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_budget_ends_the_command_with_one_message(whole, tmp_path):
    recipe, _ = whole
    settings = [f"run_dir={tmp_path}/run", "llm.price={input: 1000, output: 1000}", "llm.budget=60"]
    printed = finish(start(ROOT / "recipes" / "generate_queries.py", recipe, *settings), status=1)
    assert printed.count("error: llm.budget is 60: ") == 1
    assert "Connection closed" not in printed
