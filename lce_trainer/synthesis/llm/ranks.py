"""A language model that runs in each process of a launch: calls made at the same time share the work.

The first process leads. It makes every call, answers some of them itself, and sends the others to processes that wait
for them. A call is a batch that was planned without regard to how many processes there are, and its answers depend
on nothing but the batch: so they are the same, whichever process computes them.
"""

import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from lce_trainer.compat import without_sharding
from lce_trainer.errors import LCETrainerError, LLMError
from lce_trainer.synthesis.cost import Usage
from lce_trainer.synthesis.llm.protocol import LLM, Each, Need

logger = logging.getLogger(__name__)

_FSDP_LOADS_ONE = "FSDP_CPU_RAM_EFFICIENT_LOADING"  # under which transformers gives other processes empty weights


class Ranks:
    """Messages between the process that leads and each of the others, which follow it."""

    def __init__(self) -> None:
        """Connect; all processes do so at the same time."""
        # By the CPU, so that a process that waits keeps no accelerator busy; and for as long as a stage takes.
        self._group = dist.new_group(backend="gloo", timeout=timedelta(hours=24))
        self.size = dist.get_world_size()

    def send(self, message: Any, rank: int) -> None:
        """Send a message to a process.

        Raises:
            LLMError: The process has ended.
        """
        with _ended(rank):
            dist.send_object_list([message], dst=rank, group=self._group)

    def receive(self, rank: int) -> Any:
        """Wait for a message of a process.

        Raises:
            LLMError: The process has ended.
        """
        received: list[Any] = [None]
        with _ended(rank):
            dist.recv_object_list(received, src=rank, group=self._group)
        return received[0]


class RankedLLM:
    """The model of the process that leads, and those of the others as one; it can be called by several threads."""

    def __init__(self, llm: LLM, ranks: Ranks) -> None:
        """Take the model of this process, and the way to the others."""
        self._llm, self._ranks = llm, ranks
        self._free: queue.PriorityQueue[int] = queue.PriorityQueue()  # one call at a time is answered here
        for rank in range(ranks.size):
            self._free.put(rank)
        self._elsewhere = Usage()
        self._lock = threading.Lock()

    @property
    def at_once(self) -> int:
        """How many calls are answered at the same time."""
        return self._ranks.size

    @property
    def name(self) -> str:
        """See :attr:`lce_trainer.synthesis.llm.protocol.LLM.name`."""
        return self._llm.name

    @property
    def identity(self) -> str:
        """See :attr:`lce_trainer.synthesis.llm.protocol.LLM.identity`."""
        return self._llm.identity

    @property
    def usage(self) -> Usage:
        """What answers have cost in all processes; seconds are those of the processes together."""
        with self._lock:
            return self._llm.usage + self._elsewhere

    def check(self, need: Need) -> None:
        """See :meth:`lce_trainer.synthesis.llm.protocol.LLM.check`."""
        self._llm.check(need)

    def reads(self, prompt: str) -> Any:
        """See :meth:`lce_trainer.synthesis.llm.protocol.LLM.reads`."""
        return self._llm.reads(prompt)

    def complete(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        seeds: Sequence[int],
        stop: Sequence[str],
        each: Each | None = None,
    ) -> Sequence[str | None]:
        """See :meth:`lce_trainer.synthesis.llm.protocol.LLM.complete`."""
        answers: Sequence[str | None] = self._call(
            "complete",
            list(prompts),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seeds=list(seeds),
            stop=list(stop),
        )
        return answers

    def choose(
        self, prompts: Sequence[str], options: Sequence[Sequence[str]], each: Each | None = None
    ) -> list[list[float] | None]:
        """See :meth:`lce_trainer.synthesis.llm.protocol.LLM.choose`."""
        answers: list[list[float] | None] = self._call("choose", list(prompts), options)
        return answers

    def score(self, prompts: Sequence[str], continuations: Sequence[str], each: Each | None = None) -> list[float]:
        """See :meth:`lce_trainer.synthesis.llm.protocol.LLM.score`."""
        answers: list[float] = self._call("score", list(prompts), list(continuations))
        return answers

    def _call(self, method: str, *arguments: Any, **settings: Any) -> Any:
        rank = self._free.get()
        try:
            if rank == 0:
                return getattr(self._llm, method)(*arguments, **settings)
            began = time.monotonic()
            self._ranks.send((method, arguments, settings), rank)
            answers, used = self._ranks.receive(rank)
            if isinstance(answers, LCETrainerError):
                raise answers
            logger.debug("process %d answered %d prompts in %.1f s", rank, used.calls, time.monotonic() - began)
            with self._lock:
                self._elsewhere += used
            return answers
        finally:
            self._free.put(rank)


def dismiss(ranks: Ranks, last: Any) -> None:
    """Send the other processes a last message, at which they stop to follow; those that have ended need none."""
    for rank in range(1, ranks.size):
        with suppress(LLMError):
            ranks.send(last, rank)


def follow(ranks: Ranks, load: Callable[[], LLM]) -> Any:
    """Answer what the process that leads sends, until it dismisses this one; returns its last message.

    Args:
        ranks: The way to it.
        load: Gives the model, at the first call.
    """
    while isinstance(message := ranks.receive(0), tuple):
        method, arguments, settings = message
        before = Usage()
        try:
            with _whole():
                llm = load()
                before = llm.usage
                answers = getattr(llm, method)(*arguments, **settings)
        except Exception as error:  # the process that leads ends the run, and says why
            logger.debug("where it happened", exc_info=True)
            reason = str(error) if isinstance(error, LCETrainerError) else f"{type(error).__name__}: {error}"
            ranks.send((LLMError(f"process {dist.get_rank()}: {reason}"), Usage()), 0)
        else:
            used = llm.usage - before
            ranks.send((answers, replace(used, seconds=round(used.seconds, 3))), 0)
    return message


@contextmanager
def _whole() -> Iterator[None]:
    """Load whole models, also where FSDP or DeepSpeed will shard the one that is trained."""
    before = os.environ.get(_FSDP_LOADS_ONE)
    os.environ[_FSDP_LOADS_ONE] = "false"
    try:
        with without_sharding():
            yield
    finally:
        if before is None:
            del os.environ[_FSDP_LOADS_ONE]
        else:
            os.environ[_FSDP_LOADS_ONE] = before


@contextmanager
def _ended(rank: int) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:160]
        raise LLMError(f"process {rank} has ended, and with it the run ({reason})") from None
