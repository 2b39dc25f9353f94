"""The ``lce-trainer`` command as a process of its own, which can be told when to die.

Processes are forked from one that has imported torch already, so each starts in no time.
"""

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from lce_trainer.cli import main
from lce_trainer.synthesis.journal import Journal

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["lce_trainer.pipeline.stages"])


class Moment(NamedTuple):
    """A process kills itself when it is about to do this.

    Attributes:
        event: One of Python's audit events on files: ``open``, ``os.mkdir``, ``os.rename``, ``shutil.rmtree``;
            or ``journal``: a batch of answers is on disk.
        path: Part of the path it happens to.
        nth: At which time.
    """

    event: str
    path: str
    nth: int = 1


def command(
    *arguments: str | Path, log: Path, die: Moment | None = None, largest_file: int | None = None
) -> tuple[int, str]:
    """Run one command.

    Args:
        arguments: What is typed after ``lce-trainer``.
        log: File for what it prints.
        die: When it kills itself with SIGKILL.
        largest_file: Bytes that any file it writes may hold; a write past them fails as on a full disk.

    Returns:
        Exit status, negative for a signal, and what it printed.
    """
    return ended(started(*arguments, log=log, die=die, largest_file=largest_file), log)


def started(
    *arguments: str | Path, log: Path, die: Moment | None = None, largest_file: int | None = None
) -> BaseProcess:
    """Start one command; the arguments are those of :func:`command`."""
    process = _FORKS.Process(target=_run, args=(list(map(str, arguments)), str(log), die, largest_file))
    process.start()
    return process


def ended(process: BaseProcess, log: Path) -> tuple[int, str]:
    """Wait for the end of a command that was started; returns as :func:`command`."""
    process.join(timeout=280)
    assert process.exitcode is not None, f"still running: {log.read_text()[-2000:]}"
    return process.exitcode, log.read_text(encoding="utf-8")


def _run(arguments: Sequence[str], log: str, die: Moment | None, largest_file: int | None) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if die is not None:
        _die_at(die)
    if largest_file is not None:
        writer = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=file)  # the log may be larger
        for stream in (1, 2):
            os.dup2(writer.stdin.fileno(), stream)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
        status = main(arguments)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os.closerange(1, 3)
        writer.stdin.close()
        writer.wait()
        os._exit(status)
    sys.exit(main(arguments))


def _die_at(moment: Moment) -> None:
    left = moment.nth

    def watch(event: str, arguments: Sequence[Any]) -> None:
        nonlocal left
        if event == moment.event and any(moment.path in str(argument) for argument in arguments[:2]):
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)

    append = Journal.append

    def watched(journal: Journal, records: dict[str, Any], *, sync: bool = True) -> None:
        append(journal, records, sync=sync)
        watch("journal", [journal.path])

    sys.addaudithook(watch)
    Journal.append = watched  # type: ignore[method-assign,assignment]
