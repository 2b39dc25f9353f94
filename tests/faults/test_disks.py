"""Disks that are full, and folders that may not be written to: one line that names the path, and earlier work stays."""

import ctypes
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.command import command
from helpers.tiny import build_model, build_tokenizer
from helpers.tiny_recipe import ARTIFACTS, assert_same_run, contents
from lce_trainer.artifacts import writing
from lce_trainer.errors import ArtifactError
from lce_trainer.model.saving import save_reranker

# What a full disk refuses: no file may grow larger than so many bytes. The first file that does not fit is met at
# another place of the run each time.
SHORT = [("label", 3, 2_000), ("train", 6, 30_000)]
WHOLE = [("generate", 0, size) for size in (500, 4_000, 12_000)]
WHOLE += [("label", 3, size) for size in (200, 1_000, 4_000, 8_000)]
WHOLE += [("train", 4, size) for size in (1_000, 10_000, 60_000, 100_000, 150_000, 190_000, 220_000)]


def check_full_disk(stage: str, made: int, size: int, finished, folder: Path) -> None:
    root = finished.copy(folder / "run", *ARTIFACTS[:made])
    arguments = ("run", finished.recipe, f"run_dir={root}")
    status, printed = command(stage, *arguments[1:], log=folder / "log", largest_file=size)
    assert status == 2, (size, printed)
    assert "Traceback" not in printed
    (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert str(root) in line and "cannot write" in line, line
    status, printed = command(*arguments, log=folder / "log")
    assert status == 0, printed
    for name in ARTIFACTS[:made]:
        assert f"{name}: already made" in printed
    assert_same_run(root, contents(finished.root))


@pytest.mark.parametrize(("stage", "made", "size"), SHORT)
def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(stage, made, size, finished, tmp_path):
    check_full_disk(stage, made, size, finished, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "made", "size"), WHOLE)
def test_disks_of_many_sizes_are_one_line_and_the_run_goes_on(stage, made, size, finished, tmp_path):
    check_full_disk(stage, made, size, finished, tmp_path)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device", "/a/file"), "cannot write /a/file: No space left on device"),
        (OSError(28, "No space left on device"), "cannot write here: No space left on device"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "cannot write here: No space left"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"), "the disk is likely full"),
        (OSError("1024 requested and 12 written"), "the disk is likely full"),
    ],
)
def test_what_libraries_raise_of_a_full_disk_is_one_error(error, message):
    with pytest.raises(ArtifactError, match=re.escape(message)), writing(Path("here")):
        raise error
    with pytest.raises(ArtifactError, match=re.escape(message)), writing(Path("here")):
        try:
            raise error
        except Exception as cause:
            raise RuntimeError("while saving") from cause


def test_other_errors_pass():
    for error in (RuntimeError("CUDA out of memory"), FileNotFoundError(2, "No such file", "a"), ValueError("x")):
        with pytest.raises(type(error)), writing(Path("here")):
            raise error


def obey_permissions() -> None:
    """Have root obey the permissions of files as everyone does, from the next program on."""
    if os.getuid() == 0 and ctypes.CDLL(None).prctl(24, 1, 0, 0, 0):  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE
        os._exit(77)


def read_only(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    """Run a command as a user who may not write into the run's folder."""
    return subprocess.run(
        [sys.executable, "-m", "lce_trainer.cli", *map(str, arguments)],
        preexec_fn=obey_permissions,
        capture_output=True,
        text=True,
    )


def test_a_finished_run_that_may_not_be_written_to_is_evaluated_and_dry_run(finished, tmp_path):
    folder = tmp_path / "given"
    shutil.copytree(finished.recipe.parent, folder, ignore=shutil.ignore_patterns(".cache"))
    names = ("publish.model_id=me/model", "publish.dataset_id=me/groups")
    recipe = (folder / "recipe.yaml", f"run_dir={folder / 'run'}")
    before = contents(folder / "run")
    for path in sorted(folder.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    folder.chmod(0o555)
    try:
        evaluated = read_only("evaluate", *recipe)
        assert evaluated.returncode == 0, evaluated.stderr
        assert "\nreranker " in evaluated.stdout
        dry = read_only("publish", *recipe, *names, "--dry-run")
        assert dry.returncode == 0, dry.stderr
        assert "model.safetensors" in dry.stdout
        again = read_only("label", *recipe, "label.negatives=3")
        assert again.returncode == 2 and "Traceback" not in again.stderr
        assert f"{folder / 'run'} may not be written to" in again.stderr
    finally:
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o755)
    assert contents(folder / "run") == before
    assert not list((folder / "run").rglob(".cache"))


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_weights_are_for_whom_the_umask_lets_read_them(umask, tmp_path):
    before = os.umask(umask)
    try:
        save_reranker(build_model(), build_tokenizer(), 64, tmp_path / "model")
    finally:
        os.umask(before)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "model").iterdir()}
    assert set(modes.values()) == {0o666 & ~umask}, modes
