"""Several trainers in one process, one step at a time each, in turn.

A machine is not equally fast all day. Steps taken in turn, on the same data, are: their ratio says
more than two runs' averages do.
"""

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback

from benchmarks.measure import synchronize


@dataclass
class Timed:
    """What a trainer did.

    Attributes:
        seconds: Of each measured step: reading its data, forward, backward, update, logging.
        cpu_seconds: The same on all cores of this process; where other processes take cores away, these
            tell more.
        losses: Of each step, the unmeasured first ones included.
    """

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


class _Turn(TrainerCallback):
    """Holds a trainer, running in a thread of its own, at the end of each step until its next turn."""

    def __init__(self) -> None:
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.error: BaseException | None = None
        self.aborted = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._wait(control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        synchronize()
        self._wait(control)

    def _wait(self, control: Any) -> None:
        self.done.release()
        self.go.acquire()
        if self.aborted:
            raise InterruptedError


def take_turns(trainers: Mapping[str, Trainer], steps: int, warmup: int = 1) -> dict[str, Timed]:
    """Train all, a step each in turn; who goes first changes from step to step.

    Args:
        trainers: By name, each with ``max_steps`` of ``warmup + steps`` and the same data, in the same order.
        steps: Measured.
        warmup: First steps, not measured: memory is found and kernels are chosen in them.

    Returns:
        By name.
    """
    timed = {name: Timed() for name in trainers}
    turns, threads = {}, []
    for name, trainer in trainers.items():
        trainer.remove_callback(PrinterCallback)
        turns[name] = turn = _Turn()
        trainer.add_callback(turn)
        thread = threading.Thread(target=_train, args=(trainer, turn, torch.get_num_threads()), daemon=True)
        threads.append(thread)
        thread.start()
        turn.done.acquire()
    try:
        names = list(trainers)
        for step in range(warmup + steps):
            for name in names[step % len(names) :] + names[: step % len(names)]:
                seconds, cpu_seconds = _step(turns[name])
                if step >= warmup:
                    timed[name].seconds.append(seconds)
                    timed[name].cpu_seconds.append(cpu_seconds)
    finally:
        failed = next((turn.error for turn in turns.values() if turn.error), None)
        for turn in turns.values():
            turn.aborted = failed is not None
            turn.go.release()
        for thread in threads:
            thread.join()
    for name, trainer in trainers.items():
        timed[name].losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return timed


def _step(turn: _Turn) -> tuple[float, float]:
    started, cpu = time.perf_counter(), time.process_time()
    turn.go.release()
    turn.done.acquire()
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
    if turn.error is not None:
        raise turn.error
    return seconds, cpu_seconds


def _train(trainer: Trainer, turn: _Turn, n_threads: int) -> None:
    torch.set_num_threads(n_threads)  # a new thread starts with the system's number, not the process's
    try:
        trainer.train()
    except InterruptedError:
        pass
    except BaseException as error:  # it has to come up in the thread that waits
        turn.error = error
    finally:
        turn.done.release()
