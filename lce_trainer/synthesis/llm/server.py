"""What a server is and what it can do, found out by a few requests of one token before anything is paid for."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal
from urllib.parse import urlsplit

from lce_trainer.errors import LLMError
from lce_trainer.names import names_a_base
from lce_trainer.synthesis.llm.pool import Pool

logger = logging.getLogger(__name__)

Kind = Literal["TGI", "vLLM", "llama.cpp", "transformers serve", "OpenAI protocol"]

# llama.cpp reports this one for a model that has none of its own.
_LLAMA_DEFAULT = "{%- for message in messages -%}\n  {{- '<|im_start|>' + message.role + '\\n' + message.content"
_SCHEMA = {
    "type": "json_schema",
    "json_schema": {
        "name": "answer",
        "schema": {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]},
    },
}
_NO_THOUGHT = {"chat_template_kwargs": {"enable_thinking": False}}


@dataclass(frozen=True)
class Server:
    """A server, and how it is spoken to.

    Attributes:
        base: Its URL, without what the protocol adds.
        api: Path from ``base`` to the OpenAI protocol: ``/v1``, or nothing.
        kind: The program.
        served: The model's id as the server has it, which requests name.
        chat: Whether it takes turns.
        completion: Whether it goes on with a text.
        template: Whether the model has a chat template of its own; None where the server does not say.
        logprobs: Log-probabilities of likely tokens, most per token, in a chat and in a completion; 0 for none.
        prompt_logprobs: How it reports those of its input: ``details`` (TGI), ``prompt_logprobs`` (vLLM), ``echo``,
            ``grammar`` (llama.cpp, which is made to write the continuation); None where it does not.
        structured: Whether it keeps to a JSON schema.
        thinking: Whether it takes the switch that turns thinking off.
        slots: Requests that it works on at once; None where it does not say.
    """

    base: str
    api: str
    kind: Kind
    served: str
    chat: bool
    completion: bool
    template: bool | None
    logprobs: tuple[int, int]
    prompt_logprobs: str | None
    structured: bool
    thinking: bool
    slots: int | None

    @property
    def model(self) -> str:
        """The model's name, never a path of the server's machine."""
        return PurePosixPath(self.served).name if self.served.startswith(("/", ".", "~")) else self.served

    def __str__(self) -> str:
        able = {
            "completion": self.completion,
            "chat": self.chat,
            "log-probabilities": any(self.logprobs),
            "those of its input": self.prompt_logprobs is not None,
            "structured output": self.structured,
        }
        can = ", ".join(name for name, has in able.items() if has)
        cannot = ", ".join(name for name, has in able.items() if not has)
        return f"{self.base}: {self.kind}, model {self.model}; can {can}" + (f"; cannot {cannot}" if cannot else "")


def base_of(endpoint: str) -> str:
    """A server's URL without what its protocol adds.

    Raises:
        LLMError: The endpoint is not a plain URL.
    """
    url = urlsplit(endpoint)
    if url.scheme not in ("http", "https") or not url.hostname or "@" in url.netloc or url.query:
        raise LLMError(
            "llm.endpoint must be a plain URL such as http://localhost:8080 or https://host/v1, with no user, "
            "password or query: a token goes into HF_TOKEN"
        )
    base = endpoint.rstrip("/")
    for suffix in ("/chat/completions", "/completions", "/generate", "/v1"):
        base = base.removesuffix(suffix)
    return base.rstrip("/")


def probe(pool: Pool, base: str, model: str | None) -> Server:
    """Find out what a server is and can do; it is waited for while it loads its model.

    Args:
        pool: Sends to the server alone.
        base: Its URL.
        model: The model's id where the recipe names it.

    Raises:
        LLMError: Nothing answers, the server does not say which model it serves, or it speaks no known protocol.
    """
    (_, info), (models_status, models), (_, props), (_, version) = pool.fetch(
        [("GET", path, None) for path in ("/info", "/v1/models", "/props", "/version")]
    )
    api = "/v1"
    if models_status == 404:
        ((models_status, models),) = pool.fetch([("GET", "/models", None)])
        api = "" if models_status == 200 else api
    listed = [entry for entry in _get(models, "data", []) if isinstance(entry, Mapping) and "id" in entry]
    owners = {str(entry.get("owned_by", "")).lower() for entry in listed}
    kind: Kind = "OpenAI protocol"
    if isinstance(_get(info, "model_id"), str):
        kind = "TGI"
    elif _get(props, "default_generation_settings") is not None or "llamacpp" in owners:
        kind = "llama.cpp"
    elif "vllm" in owners or (isinstance(_get(version, "version"), str) and models_status == 200):
        kind = "vLLM"
    elif "transformers" in owners or _speaks_transformers(pool):
        kind = "transformers serve"
    if kind == "TGI":
        served = str(_get(info, "model_id"))
    else:
        ids = [str(entry["id"]) for entry in listed]
        if model is not None and (model in ids or kind != "vLLM" or len(ids) != 1):
            served = model  # a router lists thousands, transformers serve loads what it is asked for
        elif len(ids) == 1 or (ids and kind in ("vLLM", "llama.cpp")):
            served = ids[0]
        else:
            what = "lists no model" if not ids else f"lists {len(ids)} models ({', '.join(ids[:4])}, …)"
            raise LLMError(f"{base} does not say which model it serves (it {what}): set llm.model to its id")
    template = None
    if kind == "llama.cpp":
        text = _get(props, "chat_template")
        template = isinstance(text, str) and bool(text.strip()) and not text.lstrip().startswith(_LLAMA_DEFAULT)
    found = _abilities(pool, kind, api, served, template)
    if not found["chat"] and not found["completion"]:
        raise LLMError(
            f"{base} neither completes a text nor chats with {served!r} ({found.pop('said')}): is the URL right, and "
            "llm.model the id that it serves?"
        )
    found.pop("said")
    slots = _get(props, "total_slots")
    return Server(
        base=base,
        api=api,
        kind=kind,
        served=served,
        slots=slots if isinstance(slots, int) and slots > 0 else None,
        **{"template": template, **found},
    )


def speaks_chat(server: Server, wanted: Any) -> bool:
    """Whether a server's model is spoken to in its chat template.

    Args:
        server: What was found out about it.
        wanted: The recipe's ``llm.chat``.

    Raises:
        LLMError: The recipe wants what the server does not have.
    """
    if wanted == "auto":
        own = server.chat and server.template is not False and not names_a_base(server.model)
        return own or not server.completion
    if wanted and not server.chat:
        raise LLMError(f"{server.base} does not take chat turns, and llm.chat is true: set llm.chat=false")
    if not wanted and not server.completion:
        raise LLMError(f"{server.base} does not complete texts, and llm.chat is false: set llm.chat=true")
    return bool(wanted)


def _abilities(pool: Pool, kind: Kind, api: str, served: str, template: bool | None) -> dict[str, Any]:
    """What the server answers to requests of one token."""
    turns = [{"role": "user", "content": "Hello"}]
    chat = {"model": served, "messages": turns, "max_tokens": 1, "temperature": 0.0}
    text = {"model": served, "prompt": "Hello, my", "max_tokens": 1, "temperature": 0.0}

    def post(path: str, *payloads: Mapping[str, Any]) -> tuple[int, Any]:
        """The first that the server takes, and its place; else -1 and what it says."""
        said: Any = None
        for place, payload in enumerate(payloads):
            ((status, answer),) = pool.fetch([("POST", path, payload)])
            if status == 200 and not _get(answer, "error"):
                return place, answer
            said = said or answer or f"HTTP {status}"
        return -1, said

    place, chatted = post(
        f"{api}/chat/completions",
        {**chat, "logprobs": True, "top_logprobs": 20, **_NO_THOUGHT},
        {**chat, "logprobs": True, "top_logprobs": 20},
        {**chat, "logprobs": True, "top_logprobs": 5},
        {**chat, **_NO_THOUGHT},
        chat,
    )
    chats = isinstance(_choice(chatted).get("message"), Mapping)
    found: dict[str, Any] = {"chat": chats, "thinking": chats and place in (0, 3), "said": _short(chatted)}
    in_chat = len(_likely(_choice(chatted), 20)) if chats else 0
    if kind == "TGI":
        parameters = {"max_new_tokens": 1, "do_sample": False, "details": True}
        details = {
            "inputs": "Hello, my",
            "parameters": {**parameters, "decoder_input_details": True, "top_n_tokens": 5},
        }
        place, answer = post("/generate", details, {"inputs": "Hello, my", "parameters": parameters})
        answer = answer[0] if isinstance(answer, list) and answer else answer
        detailed = _get(answer, "details", {})
        found["completion"] = isinstance(_get(answer, "generated_text"), str)
        found["logprobs"] = (5 if in_chat else 0, 5 if _get(detailed, "top_tokens") else 0)
        found["prompt_logprobs"] = "details" if _get(detailed, "prefill") else None
        found["structured"] = found["completion"]  # by its grammar parameter, in all versions that report themselves
        found["template"] = chats
        return found
    place, completed = post(f"{api}/completions", {**text, "logprobs": 20}, {**text, "logprobs": 5}, text)
    completes = isinstance(_choice(completed).get("text"), str)
    found["completion"] = completes
    most = (20, 5, 0)[place] if completes and _likely(_choice(completed), 1) else 0
    found["logprobs"] = (in_chat and max(in_chat, 5), most)
    found["prompt_logprobs"] = None
    if kind == "llama.cpp":
        place, answer = post("/completion", {"prompt": [1], "n_predict": 1, "n_probs": 1, "grammar": "root ::= <[2]>"})
        found["prompt_logprobs"] = "grammar" if _get(answer, "completion_probabilities") else None
    else:
        _, answer = post(f"{api}/completions", {**text, "prompt_logprobs": 0}) if completes else (-1, None)
        if _choice(answer).get("prompt_logprobs"):
            found["prompt_logprobs"] = "prompt_logprobs"
        elif completes:
            _, answer = post(f"{api}/completions", {**text, "logprobs": 1, "echo": True})
            if len(_get(_choice(answer).get("logprobs"), "token_logprobs", None) or []) > 1:
                found["prompt_logprobs"] = "echo"
    path, payload = (
        ("chat/completions", {**chat, "max_tokens": 12}) if chats else ("completions", {**text, "max_tokens": 12})
    )
    place, answer = post(f"{api}/{path}", {**payload, "response_format": _SCHEMA})
    written = _get(_choice(answer).get("message"), "content", None) if chats else _choice(answer).get("text")
    found["structured"] = (
        place == 0 and isinstance(written, str) and written.lstrip().startswith('{"a"' if '"a"' in written[:6] else "{")
    )
    if kind != "llama.cpp":
        found["template"] = True if chats else None
    return found


def _speaks_transformers(pool: Pool) -> bool:
    """Whether the server names ``transformers serve`` in its own description."""
    ((_, description),) = pool.fetch([("GET", "/openapi.json", None)])
    paths = _get(description, "paths", {})
    return isinstance(paths, Mapping) and "/load_model" in paths


def _get(value: Any, key: str, default: Any = None) -> Any:
    return value.get(key, default) if isinstance(value, Mapping) else default


def _choice(answer: Any) -> Mapping[str, Any]:
    choices = _get(answer, "choices")
    return choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], Mapping) else {}


def _likely(choice: Mapping[str, Any], most: int) -> Sequence[tuple[str, float]]:
    try:
        return likely_tokens(choice)[:most]
    except (KeyError, TypeError, IndexError, ValueError):
        return []


def likely_tokens(choice: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Likely first tokens of a choice and their log-probabilities, in either form that servers report them in."""
    logprobs = choice.get("logprobs")
    if not isinstance(logprobs, Mapping):
        return []
    if logprobs.get("content"):
        return [(token["token"], float(token["logprob"])) for token in logprobs["content"][0]["top_logprobs"]]
    if logprobs.get("top_logprobs"):
        return [(token, float(logprob)) for token, logprob in logprobs["top_logprobs"][0].items()]
    return []


def _short(value: Any) -> str:
    return " ".join(str(value).split())[:160]
