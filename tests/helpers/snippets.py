"""Code of a document, run in a process of its own that is forked from one that has imported torch already."""

import multiprocessing
import os
import sys
import traceback
from pathlib import Path

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["lce_trainer.pipeline.stages", "lce_trainer.training.trainer"])


def run_code(code: str, folder: Path) -> str:
    """Run code in a folder, and return what it prints; it must not fail."""
    log = folder / "printed.log"
    process = _FORKS.Process(target=_run, args=(code, str(folder), str(log)))
    process.start()
    process.join(timeout=280)
    printed = log.read_text(encoding="utf-8") if log.exists() else ""
    assert process.exitcode == 0, f"status {process.exitcode}:\n{printed[-3000:]}"
    return printed


def _run(code: str, folder: str, log: str) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(folder)
    try:
        exec(compile(code, "document", "exec"), {"__name__": "document"})
    except BaseException:
        traceback.print_exc()
        sys.stdout.flush()
        sys.exit(1)
    sys.stdout.flush()
