"""Processes that kill themselves with SIGKILL while they write a checkpoint."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import modeling_utils

_FORKS = multiprocessing.get_context("forkserver")  # processes that have imported torch already
_FORKS.set_forkserver_preload(["lce_trainer.pipeline.stages"])
_EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}


def moments_of(work: Callable[[Path], None], folder: Path) -> list[bool]:
    """Run it to its end; returns the moments there were to kill it at, True where a file would be half written."""
    receives, sends = _FORKS.Pipe(duplex=False)
    process = _FORKS.Process(target=_count, args=(work, folder, sends))
    process.start()
    process.join(timeout=280)
    assert process.exitcode == 0
    return list(receives.recv())


def killed_at(moment: int, work: Callable[[Path], None], folder: Path) -> None:
    """Run it, and see it die at one of its moments, counted from 0."""
    process = _FORKS.Process(target=_die_at, args=(work, folder, moment))
    process.start()
    process.join(timeout=280)
    assert process.exitcode == -signal.SIGKILL


def _count(work: Callable[[Path], None], folder: Path, sends: Any) -> None:
    passed = []
    _watch(lambda path, is_written: passed.append(is_written))
    work(folder)
    sends.send(passed)


def _die_at(work: Callable[[Path], None], folder: Path, moment: int) -> None:
    left = moment

    def pass_by(path: str, is_written: bool) -> None:
        nonlocal left
        if not left:
            if is_written:
                os.truncate(path, Path(path).stat().st_size * (moment % 7) // 7)
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1

    _watch(pass_by)
    work(folder)


def _watch(pass_by: Callable[[str, bool], None]) -> None:
    """Call with every path of a checkpoint that something is about to be done to, or that was just written."""

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _EVENTS and "checkpoint-" in str(arguments[0]):
            pass_by(str(arguments[0]), False)

    def watched(write: Callable[..., None]) -> Callable[..., None]:
        def written(content: Any, path: Any, *more: Any, **settings: Any) -> None:
            write(content, path, *more, **settings)
            if "checkpoint-" in str(path):
                pass_by(str(path), True)

        return written

    sys.addaudithook(audit)
    # These two write without Python's help.
    torch.save = watched(torch.save)
    modeling_utils.safe_save_file = watched(modeling_utils.safe_save_file)
