"""Several trainers in one process, one step at a time each, in turn.

A machine is not equally fast all day. Steps taken in turn, on the same data, are: their ratio says
more than two runs' averages do. All run in the main thread, as a script has it: memory that another thread asks for is
taken from the system anew in every step.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from greenlet import getcurrent, greenlet
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
    """Hands over to whoever measures before the first step, and after each."""

    def __init__(self, measuring: greenlet) -> None:
        self._measuring = measuring

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._measuring.switch()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        synchronize()
        self._measuring.switch()


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
    turns: dict[str, greenlet] = {}
    for name, trainer in trainers.items():
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_Turn(getcurrent()))
        turns[name] = greenlet(trainer.train)
        turns[name].switch()
    names = list(trainers)
    for step in range(warmup + steps):
        for name in names[step % len(names) :] + names[: step % len(names)]:
            started, cpu = time.perf_counter(), time.process_time()
            turns[name].switch()
            if step >= warmup:
                timed[name].seconds.append(time.perf_counter() - started)
                timed[name].cpu_seconds.append(time.process_time() - cpu)
    for name, trainer in trainers.items():
        turns[name].switch()  # from its last step to its end
        timed[name].losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return timed
