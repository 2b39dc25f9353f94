"""A language model behind a server, or behind several that serve the same one.

Any of TGI, vLLM, llama.cpp's server, ``transformers serve``, Inference Endpoints, Inference Providers and what else
speaks OpenAI's protocol, by any of their URLs: :mod:`lce_trainer.synthesis.llm.server` finds out which it is, and
:mod:`lce_trainer.synthesis.llm.pool` gets requests through. A base model is given texts to go on with, an instruct
model the turns of a chat.
"""

import ipaddress
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import constants, get_token

from lce_trainer.errors import LLMError
from lce_trainer.synthesis.cost import Usage
from lce_trainer.synthesis.llm.pool import NoAnswerError, Pool, Request
from lce_trainer.synthesis.llm.protocol import Each, LLMConfig, Need
from lce_trainer.synthesis.llm.replies import without_thinking
from lce_trainer.synthesis.llm.server import Server, base_of, likely_tokens, probe, speaks_chat
from lce_trainer.synthesis.prompts import take_apart, turns_of

logger = logging.getLogger(__name__)

_ALL_SILENT = 20  # answers, all without text, after which a stage is not worth its cost
_NO_SAMPLER = {"llama.cpp": {"top_k": 0, "min_p": 0.0}, "vLLM": {"top_k": -1, "min_p": 0.0}}


class EndpointLLM:
    """A model served by one server, or by several that share the work."""

    def __init__(self, config: LLMConfig, token: str | None = None) -> None:
        """Check the URLs; nothing is sent yet.

        Args:
            config: ``endpoint`` is the server's URL, or a list of them. ``model`` names the model; left at its
                default, the server is asked.
            token: Sent as bearer token; by default the one of ``hf auth login`` or ``HF_TOKEN``, and
                that only over https: a server next door needs none, and must not be given one.

        Raises:
            LLMError: An endpoint is not a plain URL.
        """
        endpoints = [config.endpoint] if isinstance(config.endpoint, str) else list(config.endpoint or [])
        self._bases = list(dict.fromkeys(base_of(str(endpoint)) for endpoint in endpoints))
        if not self._bases:
            raise LLMError("llm.endpoint is an empty list: name a URL, or null for a model that runs here")
        self._config = config
        secure = all(urlsplit(base).scheme == "https" for base in self._bases)
        self._token = token or (get_token() if secure else None)
        self._model = config.model if config.model != LLMConfig().model else None
        self._usage = Usage()
        self._answers = 0

    @property
    def name(self) -> str:
        """The recipe's ``llm.model``, or what the server says it runs.

        Raises:
            LLMError: The recipe names none and the server does not say.
        """
        return self._model or self.server.model

    @property
    def identity(self) -> str:
        """The model, the server's program and whether it chats: TGI's answers are not those of a chat over ``/v1``.

        Texts that TGI goes on with are those of the name alone, as in the journals of version 0.1.
        """
        if self.server.kind == "TGI" and not self._chats:
            return self.name
        return f"{self.name} by {self.server.kind} {'chat' if self._chats else 'completion'}"

    @property
    def usage(self) -> Usage:
        """What the servers counted."""
        return self._usage

    @property
    def server(self) -> Server:
        """What the first server is and can do.

        Raises:
            LLMError: It does not answer, or several servers serve different models.
        """
        return self._servers[0]

    def is_up(self) -> bool:
        """Whether the first server answers at once; nothing is paid for, and nothing waited for."""
        if "_servers" in self.__dict__:
            return True
        pool = Pool(self._bases[:1], token=self._token, timeout=5.0, retries=1, patience=0.0, most=[1])
        try:
            pool.fetch([("GET", "/v1/models", None)])
        except LLMError:
            return False
        return True

    def check(self, need: Need) -> None:
        """See :meth:`lce_trainer.synthesis.llm.protocol.LLM.check`."""
        server = self.server
        if need == "choose" and not server.logprobs[0 if self._chats else 1]:
            other = "; its completions do: set llm.chat=false" if server.logprobs[1] and self._chats else ""
            raise LLMError(
                f"{server.base} ({server.kind}) reports no log-probabilities of likely tokens, which a verdict needs"
                f"{other or self._instead('verdict')}"
            )
        if need == "score" and self._scores_by is None:
            raise LLMError(
                f"{server.base} ({server.kind}) does not report the log-probabilities of its input, which "
                f"label.judge=likelihood needs{self._instead('likelihood')}"
            )

    def reads(self, prompt: str) -> Any:
        """See :meth:`lce_trainer.synthesis.llm.protocol.LLM.reads`."""
        return turns_of(prompt) if self._chats else str(prompt)

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
    ) -> list[str | None]:
        """See :meth:`lce_trainer.synthesis.llm.protocol.LLM.complete`.

        Whether a seed repeats its answer is up to the server.
        """
        tgi = self.server.kind == "TGI" and not self._chats

        def request(index: int) -> Request:
            seed = seeds[index] % 2**31  # some servers keep it in 32 bits
            if tgi:
                how: dict[str, Any] = {"do_sample": temperature > 0, "seed": seed}
                if temperature > 0:
                    how |= {"temperature": temperature} | ({"top_p": top_p} if 0 < top_p < 1 else {})
                return self._generate(str(prompts[index]), text, max_new_tokens=max_new_tokens, stop=[*stop], **how)
            how = {"temperature": temperature, "seed": seed, "max_tokens": max_new_tokens}
            if temperature > 0:
                how |= {"top_p": top_p} if 0 < top_p < 1 else {}
                how |= _NO_SAMPLER.get(self.server.kind, {})
            if not self._chats and stop:
                how["stop"] = [*stop]
            return self._ask(prompts[index], text, **how)

        def text(answer: Any) -> str | None:
            if tgi:
                said = answer["generated_text"]
            else:
                choice = answer["choices"][0]
                said = choice["message"].get("content") if self._chats else choice["text"]
            if said is not None and not isinstance(said, str):
                raise NoAnswerError("an answer whose text is none")
            said = _whole_characters(said or "")
            if self._chats:
                said = without_thinking(said)
            elif not said and not answer.get("choices", [{}])[0].get("finish_reason") and not tgi:
                raise NoAnswerError("an answer without text")
            return said[: min((place for place in map(said.find, stop) if place >= 0), default=len(said))] or None

        answers = self._all([request(index) for index in range(len(prompts))], each)
        self._answers += len(answers)
        silent = sum(answer is None for answer in answers)
        self._usage += Usage(without_text=silent)
        if silent == len(answers) and self._usage.without_text == self._answers >= _ALL_SILENT:
            raise LLMError(
                f"none of the first {self._answers} answers of {self.server.base} holds text: a model that thinks uses "
                "up its tokens before it writes; switch its thinking off, or raise generate.max_new_tokens"
            )
        return answers

    def choose(
        self,
        prompts: Sequence[str],
        options: Sequence[Sequence[str]],
        each: Each | None = None,
    ) -> list[list[float] | None]:
        """See :meth:`lce_trainer.synthesis.llm.protocol.LLM.choose`; only reported forms of one token count."""
        self.check("choose")
        most = self.server.logprobs[0 if self._chats else 1]
        tgi = self.server.kind == "TGI" and not self._chats

        def request(prompt: str) -> Request:
            if tgi:
                return self._generate(str(prompt), shares, max_new_tokens=1, do_sample=False, top_n_tokens=most)
            likely = {"logprobs": True, "top_logprobs": most} if self._chats else {"logprobs": most}
            return self._ask(prompt, shares, max_tokens=1, temperature=0.0, **likely)

        def shares(answer: Any) -> list[float] | None:
            if tgi:
                top = answer["details"].get("top_tokens") or [[]]
                likely = [(token["text"], float(token["logprob"])) for token in top[0]]
            else:
                likely = likely_tokens(answer["choices"][0])
            if not likely:
                raise LLMError(
                    f"{self.server.base} reports no log-probabilities of likely tokens, which a verdict needs"
                )
            found = {token: math.exp(logprob) for token, logprob in likely}
            masses = [sum(found.get(form, 0.0) for form in dict.fromkeys(forms)) for forms in options]
            return [mass / sum(masses) for mass in masses] if sum(masses) > 0 else None

        return self._all([request(prompt) for prompt in prompts], each)

    def score(
        self,
        prompts: Sequence[str],
        continuations: Sequence[str],
        each: Each | None = None,
    ) -> list[float]:
        """See :meth:`lce_trainer.synthesis.llm.protocol.LLM.score`.

        A token that the prompt and the continuation share, where a tokenizer joins the two, counts as the
        continuation's.

        Raises:
            LLMError: Besides the usual, the server does not report the log-probabilities of its input.
        """
        self.check("score")
        texts = [take_apart(text) for text in continuations]
        if self._chats:
            texts = [text.strip() for text in texts]
        if self._scores_by == "grammar":
            return self._score_by_grammar(prompts, texts, each)
        pairs = list(zip(map(str, prompts), texts, strict=True))
        rendered = {str(prompt): prompt for prompt in prompts}
        wanted = list(dict.fromkeys([*((prompt, "") for prompt in rendered), *pairs]))
        pairs_of: dict[tuple[str, str], list[int]] = {}  # each text is sent once, and may belong to many pairs
        for index, (prompt, text) in enumerate(pairs):
            pairs_of.setdefault((prompt, ""), []).append(index)
            pairs_of.setdefault((prompt, text), []).append(index)
        prefills: dict[tuple[str, str], list[tuple[Any, float | None]]] = {}
        scores: dict[int, float] = {}

        def came(place: int, prefill: list[tuple[Any, float | None]]) -> None:
            prefills[wanted[place]] = prefill
            for index in pairs_of[wanted[place]]:
                alone, whole = prefills.get((pairs[index][0], "")), prefills.get(pairs[index])
                if index in scores or alone is None or whole is None:
                    continue
                start = _alike([token for token, _ in whole], [token for token, _ in alone])
                scores[index] = _mean([logprob for _, logprob in whole[start:]], start, index, len(pairs))
                if each is not None:
                    each(index, scores[index])

        self._all([self._prefill(rendered[prompt], text) for prompt, text in wanted], came, counts=len(prompts))
        return [scores[index] for index in range(len(pairs))]

    @cached_property
    def _servers(self) -> list[Server]:
        found = []
        for base in self._bases:
            if constants.HF_HUB_OFFLINE and not _is_near(base):
                raise LLMError(f"{base} is not asked: HF_HUB_OFFLINE is set, and it is no machine of a local network")
            server = probe(self._pool_of([base], [1]), base, self._model)
            logger.info("%s", server)
            found.append(server)
        speak = {(server.model, server.kind, speaks_chat(server, self._config.chat)) for server in found}
        if len(speak) > 1:
            raise LLMError(
                "the servers of llm.endpoint must serve one model in one way, not "
                + "; ".join(
                    f"{model} ({kind}, {'chat' if chat else 'completion'})" for model, kind, chat in sorted(speak)
                )
            )
        chats = speaks_chat(found[0], self._config.chat)
        logger.info(
            "%s is spoken to by %s (llm.chat: %s)", found[0].model, "chat" if chats else "completion", self._config.chat
        )
        return found

    @cached_property
    def _chats(self) -> bool:
        return speaks_chat(self.server, self._config.chat)

    @property
    def _scores_by(self) -> str | None:
        by = self.server.prompt_logprobs
        return None if self._chats and by in ("details", "echo") else by

    def _instead(self, judge: str) -> str:
        """What to use where a judge cannot be served."""
        server = self.server
        if judge == "likelihood" and self._chats and server.prompt_logprobs and server.completion:
            return ": set llm.chat=false"
        if judge == "likelihood" and server.logprobs[0 if self._chats else 1]:
            return ": set label.judge=verdict, or run the judge's model locally (llm.endpoint=null)"
        if judge == "verdict" and self._scores_by is not None:
            return ": set label.judge=likelihood"
        return ": serve the model with vLLM or llama.cpp, or run it locally (llm.endpoint=null)"

    @cached_property
    def _pool(self) -> Pool:
        most = [min(self._config.concurrency, 2 * server.slots if server.slots else 10**6) for server in self._servers]
        if self.server.kind == "transformers serve":
            most = [min(limit, 4) for limit in most]
        return self._pool_of(self._bases, most)

    def _pool_of(self, bases: Sequence[str], most: Sequence[int]) -> Pool:
        return Pool(
            bases,
            token=self._token,
            timeout=self._config.timeout,
            retries=self._config.retries,
            patience=self._config.patience,
            most=most,
        )

    def _all(self, requests: Sequence[Request], each: Any = None, counts: int | None = None) -> list[Any]:
        if not requests:
            return []
        began = time.monotonic()
        answers = self._pool.run(requests, each)
        calls = len(requests) if counts is None else counts
        self._usage += Usage(calls=calls, seconds=time.monotonic() - began)
        return answers

    def _ask(self, prompt: str, read: Callable[[Any], Any], **parameters: Any) -> Request:
        """A request of OpenAI's protocol: a chat, or a text to go on with."""
        server = self.server
        payload: dict[str, Any] = {"model": server.served, **parameters}
        if self._chats:
            payload["messages"] = turns_of(prompt)
            if server.thinking:
                payload["chat_template_kwargs"] = {"enable_thinking": False}
        else:
            payload["prompt"] = str(prompt)
        return Request(f"{server.api}/{'chat/' if self._chats else ''}completions", payload, self._counted(read))

    def _generate(self, text: str, read: Callable[[Any], Any], **parameters: Any) -> Request:
        """A request of TGI's own."""
        payload = {"inputs": text, "parameters": {"details": True, **parameters}}
        return Request("/generate", payload, self._counted(read))

    def _counted(self, read: Callable[[Any], Any]) -> Callable[[Any, Mapping[str, str]], Any]:
        def count(answer: Any, headers: Mapping[str, str]) -> Any:
            found = read(answer)
            used = answer.get("usage") or {}
            details = answer.get("details") or {}
            tokens_in = used.get("prompt_tokens") or answer.get("tokens_evaluated") or headers.get("x-prompt-tokens")
            tokens_in = tokens_in or len(details.get("prefill") or [])
            tokens_out = used.get("completion_tokens") or answer.get("tokens_predicted")
            tokens_out = tokens_out or details.get("generated_tokens") or 0
            self._usage += Usage(tokens_in=int(tokens_in), tokens_out=int(tokens_out))
            return found

        return count

    def _prefill(self, prompt: str, text: str) -> Request:
        """A request for tokens and log-probabilities of a prompt with the beginning of its answer."""
        by = self._scores_by
        if by == "details":

            def details(answer: Any) -> list[tuple[Any, float | None]]:
                tokens = answer["details"].get("prefill")
                if not tokens:
                    raise LLMError(
                        f"{self.server.base} does not report the log-probabilities of its input "
                        "(decoder_input_details): set label.judge=verdict, or run the judge's model locally"
                    )
                return [(token["id"], token["logprob"]) for token in tokens]

            return self._generate(
                str(prompt) + text, details, max_new_tokens=1, do_sample=False, decoder_input_details=True
            )
        if by == "echo":

            def echoed(answer: Any) -> list[tuple[Any, float | None]]:
                logprobs = answer["choices"][0]["logprobs"]
                written = int((answer.get("usage") or {}).get("completion_tokens") or 1)
                tokens = list(zip(logprobs["tokens"], logprobs["token_logprobs"], strict=True))
                return tokens[: len(tokens) - written]

            return self._ask(str(prompt) + text, echoed, max_tokens=1, temperature=0.0, logprobs=1, echo=True)

        def reported(answer: Any) -> list[tuple[Any, float | None]]:
            at = answer.get("prompt_logprobs") or answer["choices"][0]["prompt_logprobs"]
            # At each place the prompt's own token comes first.
            first = [next(iter(place.items())) if place else ("", {"logprob": None}) for place in at]
            return [(token, found["logprob"]) for token, found in first]

        if not self._chats:
            return self._ask(str(prompt) + text, reported, max_tokens=1, temperature=0.0, prompt_logprobs=0)
        request = self._ask(prompt, reported, max_tokens=1, temperature=0.0, prompt_logprobs=0)
        if text:
            turns = [*request.payload["messages"], {"role": "assistant", "content": text}]
            going_on = {"messages": turns, "add_generation_prompt": False, "continue_final_message": True}
            return Request(request.path, {**request.payload, **going_on}, request.read)
        return request

    def _score_by_grammar(self, prompts: Sequence[str], texts: Sequence[str], each: Any) -> list[float]:
        """Scores by llama.cpp: a grammar of single tokens has it write the continuation, which it reports as such."""
        distinct = list(dict.fromkeys(map(str, prompts)))
        rendered = {str(prompt): prompt for prompt in prompts}
        if self._chats:
            turns = [
                Request(
                    "/apply-template",
                    {"messages": turns_of(rendered[prompt]), "chat_template_kwargs": {"enable_thinking": False}},
                    lambda answer, _: answer["prompt"],
                )
                for prompt in distinct
            ]
            before = dict(zip(distinct, self._pool.run(turns), strict=True))
        else:
            before = {prompt: prompt for prompt in distinct}
        both = [before[str(prompt)] + text for prompt, text in zip(prompts, texts, strict=True)]
        wanted = list(dict.fromkeys([*before.values(), *both]))
        tokenize = [
            Request(
                "/tokenize",
                {"content": text, "add_special": True, "parse_special": self._chats},
                lambda answer, _: answer["tokens"],
            )
            for text in wanted
        ]
        tokens = dict(zip(wanted, self._pool.run(tokenize), strict=True))
        requests = []
        for index, (prompt, text) in enumerate(zip(prompts, both, strict=True)):
            whole, alone = tokens[text], tokens[before[str(prompt)]]
            start = _alike(whole, alone)
            if start == 0 or start == len(whole):
                raise LLMError(f"pair {index + 1} of {len(prompts)} has an empty prompt or continuation")
            payload = {
                "prompt": whole[:start],
                "n_predict": len(whole) - start,
                "grammar": "root ::= " + " ".join(f"<[{token}]>" for token in whole[start:]),
                "n_probs": 1,
                "temperature": 0.0,
                "cache_prompt": True,
            }
            requests.append(Request("/completion", payload, self._counted(_written_as(whole[start:]))))
        return self._all(requests, each)


def _written_as(tokens: Sequence[int]) -> Callable[[Any], float]:
    """The mean log-probability of tokens that a server was made to write."""

    def read(answer: Any) -> float:
        written = answer["completion_probabilities"]
        if [token["id"] for token in written] != list(tokens):
            raise NoAnswerError("the grammar's tokens were not written")
        return sum(float(token["logprob"]) for token in written) / len(written)

    return read


def _alike(first: Sequence[Any], second: Sequence[Any]) -> int:
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(first), len(second)))


def _mean(logprobs: Sequence[float | None], start: int, index: int, count: int) -> float:
    known = [logprob for logprob in logprobs if logprob is not None]
    if start == 0 or not logprobs or len(known) < len(logprobs):
        raise LLMError(f"pair {index + 1} of {count} has an empty prompt or continuation")
    return sum(known) / len(known)


def _whole_characters(text: str) -> str:
    """A text that is UTF-8: halves of a surrogate pair that lost the other half are replaced."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _is_near(base: str) -> bool:
    """Whether a URL is of this machine or its network, which offline mode does not mean."""
    host = urlsplit(base).hostname or ""
    try:
        return ipaddress.ip_address(host).is_private
    except ValueError:
        return "." not in host or host.endswith((".local", ".internal", ".localhost"))
