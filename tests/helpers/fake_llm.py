"""A language model that answers from a plan: what was not planned is a KeyError."""

import json
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lce_trainer.synthesis.cost import Usage


class FakeLLM:
    """Answers are looked up, counted, and written to a log that outlives the process.

    Args:
        completions: By prompt: texts, of which the seed picks one.
        choices: By prompt: the probability of each option, or None to abstain.
        scores: By prompt and continuation, nats a token.
        kill_after: Batches answered before the process kills itself with SIGKILL.
        log: File that gets one JSON line for each prompt answered.
    """

    def __init__(
        self,
        *,
        completions: Mapping[str, Sequence[str]] | None = None,
        choices: Mapping[str, list[float] | None] | None = None,
        scores: Mapping[tuple[str, str], float] | None = None,
        kill_after: int | None = None,
        log: Path | None = None,
        name: str = "fake",
    ) -> None:
        self.name = self.identity = name
        self.usage = Usage()
        self.asked: list[tuple[str, ...]] = []
        self.seeds: list[int] = []
        self.calls = 0
        self._completions = completions or {}
        self._choices = choices or {}
        self._scores = scores or {}
        self._kill_after = kill_after
        self._log = log

    def check(self, need: str) -> None:
        """Everything that is planned can be served."""

    def reads(self, prompt: str) -> str:
        return str(prompt)

    def complete(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        seeds: Sequence[int],
        stop: Sequence[str],
        each: Callable[[int, Any], None] | None = None,
    ) -> list[str]:
        planned = [self._completions[prompt] for prompt in prompts]
        self._count([(prompt, str(seed)) for prompt, seed in zip(prompts, seeds, strict=True)])
        self.seeds += seeds
        return [texts[seed % len(texts)] for texts, seed in zip(planned, seeds, strict=True)]

    def choose(
        self, prompts: Sequence[str], options: Sequence[Sequence[str]], each: Callable[[int, Any], None] | None = None
    ) -> list[list[float] | None]:
        planned = [self._choices[prompt] for prompt in prompts]
        self._count([(prompt,) for prompt in prompts])
        return planned

    def score(
        self, prompts: Sequence[str], continuations: Sequence[str], each: Callable[[int, Any], None] | None = None
    ) -> list[float]:
        pairs = list(zip(prompts, continuations, strict=True))
        planned = [self._scores[pair] for pair in pairs]
        self._count(pairs)
        return planned

    def _count(self, asked: list[tuple[str, ...]]) -> None:
        if self.calls == self._kill_after:
            os.kill(os.getpid(), signal.SIGKILL)
        self.calls += 1
        self.asked += asked
        if self._log is not None:
            with self._log.open("a") as file:
                file.writelines(json.dumps(one) + "\n" for one in asked)
