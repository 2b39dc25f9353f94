"""A language model behind a server, through ``huggingface_hub``'s own client.

That client has no retries and no default timeout, takes a 200 with an error in its body for an
answer of None, and raises raw HTTP and JSON errors. All of that ends here: a request is tried
again as long as that can help, and what remains is an LLMError, which holds no token.
"""

import asyncio
import email.utils
import logging
import math
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, TypeVar
from urllib.parse import urlsplit

import tenacity
from huggingface_hub import AsyncInferenceClient, errors, get_session, get_token

from lce_trainer.errors import LLMError
from lce_trainer.synthesis.llm.protocol import Each, LLMConfig

logger = logging.getLogger(__name__)

_TOP_TOKENS = {"tgi": 5, "openai": 20}  # what servers report at most, unless started with another limit
_LONGEST_WAIT = 120.0  # seconds; a server that asks for more is not waited for
_TRY_AGAIN = {408, 409, 425, 429, 500, 502, 503, 504}
# httpx in huggingface_hub 1, httpx2 since: the base of the hub's own errors, and of connection errors.
_HTTPError: type[Exception] = errors.HfHubHTTPError.__mro__[1]
_T = TypeVar("_T")


class _NoAnswerError(Exception):
    """A response that came through, but holds no answer."""


# Besides HTTP errors: JSON that is none, or of another shape than the protocol's.
_EXPECTED = (
    _HTTPError,
    _NoAnswerError,
    OSError,
    asyncio.TimeoutError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
)


class EndpointLLM:
    """A model served by TGI, or by anything that speaks OpenAI's protocol.

    A URL that ends in ``/v1`` (vLLM, llama.cpp, ``transformers serve``, the router of Inference
    Providers) is asked for chat completions: the server wraps the prompt in the model's chat
    template. Any other URL is TGI's, which goes on with the prompt as it is.
    """

    def __init__(self, config: LLMConfig, token: str | None = None) -> None:
        """Take note of the server; nothing is sent yet.

        Args:
            config: ``endpoint`` is the server's URL. ``model`` names the model; left at its default,
                the server is asked.
            token: Sent as bearer token; by default the one of ``hf auth login`` or ``HF_TOKEN``, and
                that only over https: a server next door needs none, and must not be shown one.

        Raises:
            LLMError: The endpoint is not a plain URL.
        """
        self._url = (config.endpoint or "").rstrip("/")
        url = urlsplit(self._url)
        if url.scheme not in ("http", "https") or not url.hostname or "@" in url.netloc or url.query:
            raise LLMError(
                "llm.endpoint must be a plain URL such as http://localhost:8080 or https://host/v1, with no user, "
                "password or query: a token goes into HF_TOKEN"
            )
        self._protocol = "openai" if url.path.endswith(("/v1", "/v1/chat/completions")) else "tgi"
        self._config = config
        self._token = token or (get_token() if url.scheme == "https" else None)

    @cached_property
    def name(self) -> str:
        """The recipe's ``llm.model``, or what the server says it runs.

        Raises:
            LLMError: The recipe names none and the server does not say.
        """
        if self._config.model != LLMConfig().model:
            return self._config.model
        base = self._url.removesuffix("/generate").removesuffix("/chat/completions")
        path = {"tgi": "/info", "openai": "/models"}[self._protocol]
        headers = {"authorization": f"Bearer {self._token}"} if self._token else {}
        try:
            response = get_session().get(base + path, headers=headers, timeout=self._config.timeout)
            response.raise_for_status()
            facts = response.json()
            name = str(facts["model_id"] if self._protocol == "tgi" else facts["data"][0]["id"])
        except _EXPECTED as error:
            raise LLMError(
                f"{base}{path} does not say which model it serves ({self._reason(error)}): set llm.model to its Hub id"
            ) from None
        return name.rstrip("/").rpartition("/")[2] if name.startswith(("/", ".")) else name

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
    ) -> list[str]:
        """See :meth:`lce_trainer.synthesis.llm.LLM.complete`; whether a seed repeats its answer is up to the server."""
        sampling: dict[str, Any] = {"stop": list(stop) or None}
        if temperature > 0:
            sampling |= {"temperature": temperature, "top_p": top_p if 0 < top_p < 1 else None}

        async def one(client: AsyncInferenceClient, index: int) -> str:
            seed = seeds[index] % 2**31  # some servers keep it in 32 bits
            if self._protocol == "tgi":
                sampling.setdefault("do_sample", temperature > 0)
                answer = await client.text_generation(
                    prompts[index], details=True, max_new_tokens=max_new_tokens, seed=seed, **sampling
                )
                text = _answered(answer).generated_text
            else:
                sampling.setdefault("temperature", 0.0)
                chat = await self._chat(client, prompts[index], max_tokens=max_new_tokens, seed=seed, **sampling)
                text = chat.message.content
            if not isinstance(text, str):
                raise _NoAnswerError("an answer without text")
            return text[: min((place for place in map(text.find, stop) if place >= 0), default=len(text))]

        return self._all(one, len(prompts), each)

    def choose(
        self, prompts: Sequence[str], options: Sequence[Sequence[str]], each: Each | None = None
    ) -> list[list[float] | None]:
        """See :meth:`lce_trainer.synthesis.llm.LLM.choose`; only forms that are one token and reported are counted."""

        async def one(client: AsyncInferenceClient, index: int) -> list[float] | None:
            most = _TOP_TOKENS[self._protocol]
            if self._protocol == "tgi":
                answer = await client.text_generation(
                    prompts[index], details=True, max_new_tokens=1, do_sample=False, top_n_tokens=most
                )
                tokens = getattr(_answered(answer).details, "top_tokens", None)
                likely, text = tokens[0] if tokens else [], "text"
            else:
                chat = await self._chat(
                    client, prompts[index], max_tokens=1, temperature=0.0, logprobs=True, top_logprobs=most
                )
                tokens = getattr(chat.logprobs, "content", None)
                likely, text = tokens[0].top_logprobs if tokens else [], "token"
            if not likely:
                raise LLMError(f"{self._url} reports no log-probabilities of likely tokens, which a verdict needs")
            shares = {token[text]: math.exp(token["logprob"]) for token in likely}
            masses = [sum(shares.get(form, 0.0) for form in dict.fromkeys(forms)) for forms in options]
            return [mass / sum(masses) for mass in masses] if sum(masses) > 0 else None

        return self._all(one, len(prompts), each)

    def score(self, prompts: Sequence[str], continuations: Sequence[str], each: Each | None = None) -> list[float]:
        """See :meth:`lce_trainer.synthesis.llm.LLM.score`; only TGI reports what it needs.

        Raises:
            LLMError: Besides the usual, the server does not report the log-probabilities of its input.
        """
        if self._protocol != "tgi":
            raise LLMError(
                f"{self._url} cannot score: chat servers do not report the log-probabilities of their input; "
                "set label.judge=verdict, or run the judge's model locally"
            )

        async def one(client: AsyncInferenceClient, index: int) -> list[tuple[int, float]]:
            answer = await client.text_generation(
                texts[index], details=True, max_new_tokens=1, do_sample=False, decoder_input_details=True
            )
            tokens = getattr(_answered(answer).details, "prefill", None)
            if not tokens:
                raise LLMError(
                    f"{self._url} does not report the log-probabilities of its input (decoder_input_details): "
                    "set label.judge=verdict, or run the judge's model locally"
                )
            return [(token["id"], token["logprob"]) for token in tokens]

        both = [prompt + text for prompt, text in zip(prompts, continuations, strict=True)]
        texts = list(dict.fromkeys([*prompts, *both]))
        scores: dict[int, float] = {}
        pairs_of: dict[str, list[int]] = {}  # each text is sent once, and may belong to many pairs
        for index, (prompt, text) in enumerate(zip(prompts, both, strict=True)):
            pairs_of.setdefault(prompt, []).append(index)
            pairs_of.setdefault(text, []).append(index)
        prefills: dict[str, list[Any]] = {}

        def scored(index: int) -> float:
            whole, alone = prefills[both[index]], prefills[prompts[index]]
            pairs = enumerate(zip(whole, alone, strict=False))
            start = next((i for i, (a, b) in pairs if a[0] != b[0]), min(len(whole), len(alone)))
            logprobs = [logprob for _, logprob in whole[start:]]
            if start == 0 or not logprobs or None in logprobs:
                raise LLMError(f"pair {index + 1} of {len(prompts)} has an empty prompt or continuation")
            return float(sum(logprobs) / len(logprobs))

        def came(place: int, prefill: list[Any]) -> None:
            prefills[texts[place]] = prefill
            for index in pairs_of[texts[place]]:
                if index not in scores and prompts[index] in prefills and both[index] in prefills:
                    scores[index] = scored(index)
                    if each is not None:
                        each(index, scores[index])

        self._all(one, len(texts), came)
        return [scores[index] for index in range(len(prompts))]

    async def _chat(self, client: AsyncInferenceClient, prompt: str, **parameters: Any) -> Any:
        """The first choice of a chat completion."""
        chat = await client.chat_completion([{"role": "user", "content": prompt}], model=self.name, **parameters)
        return _answered(chat).choices[0]

    def _all(
        self,
        one: Callable[[AsyncInferenceClient, int], Coroutine[Any, Any, _T]],
        count: int,
        each: Callable[[int, _T], None] | None,
    ) -> list[_T]:
        """The answers of requests 0 to ``count``, so many at once as the recipe allows."""
        if self._protocol == "openai":
            _ = self.name  # asked for here, where it blocks no event loop

        async def every() -> list[_T]:
            gate = asyncio.Semaphore(self._config.concurrency)
            # Given no token the client would send the saved one.
            token = self._token or "none"
            async with AsyncInferenceClient(self._url, token=token, timeout=self._config.timeout) as client:

                async def patiently(index: int) -> _T:
                    async with gate:
                        answer = await self._patiently(lambda: one(client, index))
                    if each is not None:
                        each(index, answer)
                    return answer

                tasks = [asyncio.ensure_future(patiently(index)) for index in range(count)]
                try:
                    return list(await asyncio.gather(*tasks))
                finally:  # once one has failed for good, the others are not worth their cost
                    for task in tasks:
                        task.cancel()
                    await asyncio.gather(*tasks, return_exceptions=True)

        if not _has_loop():
            return asyncio.run(every())
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(asyncio.run, every()).result()

    async def _patiently(self, request: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
        tries = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(max(1, self._config.retries)),
            retry=tenacity.retry_if_exception(_worth_another_try),
            wait=_wait,
            before_sleep=lambda state: logger.info(
                "%s: %s; trying again", self._url, self._reason(state.outcome.exception() if state.outcome else None)
            ),
            reraise=True,
        )

        async def once() -> _T:
            # The client's own timeout is for each read: a server that drips would never meet it.
            return await asyncio.wait_for(request(), self._config.timeout)

        try:
            return await tries(once)
        except _EXPECTED as error:
            count = tries.statistics.get("attempt_number", 1)
            again = f" after {count} tries" if count > 1 else ""
            raise LLMError(f"{self._url} did not answer{again}: {self._reason(error)}") from None

    def _reason(self, error: BaseException | None) -> str:
        """What went wrong in one line, without the token."""
        response = _response(error)
        if isinstance(error, (asyncio.TimeoutError, TimeoutError)):
            text = f"nothing within {self._config.timeout:g} s (llm.timeout)"
        elif response is not None:
            hints = {401: "is HF_TOKEN right?", 403: "may this token use it?", 404: "is the URL right?"}
            said = f"HTTP {response.status_code} {response.text[:200]}"
            hint = hints.get(response.status_code)
            after = _retry_after(error)
            text = f"{said} ({hint})" if hint else said
            if after is not None and after > _LONGEST_WAIT:
                text += f" (asks to come back in {after:.0f} s)"
        elif isinstance(error, (_NoAnswerError, _HTTPError, OSError)):
            text = str(error) or type(error).__name__
        else:
            text = f"not the JSON of its protocol ({type(error).__name__}: {error})"
        text = " ".join(text.split())
        return text.replace(self._token, "***") if self._token else text


def _has_loop() -> bool:
    """Whether this thread runs an event loop already, as a notebook's does."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _answered(answer: Any) -> Any:
    """The answer, unless it is an error that came with status 200."""
    said = getattr(answer, "error", None)
    if said:
        raise _NoAnswerError(f"an error with status 200: {said}")
    return answer


def _response(error: BaseException | None) -> Any:
    """The HTTP response behind an error; the hub's text generation errors have it in their cause."""
    response = getattr(error, "response", None)
    return response if response is not None or error is None else getattr(error.__cause__, "response", None)


def _worth_another_try(error: BaseException) -> bool:
    if not isinstance(error, _EXPECTED) or isinstance(error, errors.OfflineModeIsEnabled):
        return False
    if (_retry_after(error) or 0) > _LONGEST_WAIT:
        return False
    response = _response(error)
    return response is None or response.status_code in _TRY_AGAIN


def _wait(state: tenacity.RetryCallState) -> float:
    """Seconds before the next try: what the server asks for, else more each time."""
    after = _retry_after(state.outcome.exception() if state.outcome else None)
    return tenacity.wait_exponential_jitter(initial=0.5, max=30)(state) if after is None else after


def _retry_after(error: BaseException | None) -> float | None:
    """The Retry-After header in seconds; it holds seconds or a date."""
    response = _response(error)
    headers: Mapping[str, str] = response.headers if response is not None else {}
    value = headers.get("retry-after", "")
    if value.strip().isdigit():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return None
