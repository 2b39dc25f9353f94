"""What a server is and can do is found out before the first paid call, for each kind of server."""

import math
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from helpers.llm_server import Server, openai, tgi
from lce_trainer.errors import LLMError
from lce_trainer.synthesis.llm.endpoint import EndpointLLM
from lce_trainer.synthesis.llm.protocol import LLMConfig


def _chat(payload: dict) -> dict:
    choice: dict[str, Any] = {"message": {"role": "assistant", "content": "Hi"}, "finish_reason": "length"}
    if "response_format" in payload:
        choice["message"]["content"] = '{"a": true}'
    if payload.get("logprobs"):
        top = [{"token": "Hi", "logprob": math.log(0.3)}]
        choice["logprobs"] = {"content": [{**top[0], "top_logprobs": top}]}
    return {"choices": [choice]}


def _completion(payload: dict) -> dict:
    choice: dict[str, Any] = {"text": " name", "finish_reason": "length"}
    if payload.get("logprobs"):
        choice["logprobs"] = {"tokens": [" name"], "token_logprobs": [-0.5], "top_logprobs": [{" name": -0.5}]}
    if payload.get("prompt_logprobs") is not None:
        choice["prompt_logprobs"] = [None, {"5": {"logprob": -1.0}}]
    return {"choices": [choice]}


def vllm(path: str, payload: dict) -> Any:
    return {
        "/v1/models": lambda: {"data": [{"id": "org/served", "owned_by": "vllm"}]},
        "/version": lambda: {"version": "0.32"},
        "/v1/completions": lambda: _completion(payload),
        "/v1/chat/completions": lambda: _chat(payload),
    }.get(path, lambda: None)()


def llama_cpp(path: str, payload: dict) -> Any:
    return {
        "/v1/models": lambda: {"data": [{"id": "/models/some.gguf", "owned_by": "llamacpp"}]},
        "/props": lambda: {"default_generation_settings": {}, "chat_template": "{{ own }}", "total_slots": 4},
        "/completion": lambda: {"completion_probabilities": [{"id": 2, "logprob": -1.0}]},
        "/v1/completions": lambda: _completion({**payload, "prompt_logprobs": None}),
        "/v1/chat/completions": lambda: _chat(payload),
    }.get(path, lambda: None)()


def transformers_serve(path: str, payload: dict) -> Any:
    if path == "/v1/models":
        return {"data": [{"id": "org/served", "owned_by": "transformers"}]}
    silent = {"messages": payload.get("messages")}  # it knows neither log-probabilities nor schemas
    return _chat(silent) if path == "/v1/chat/completions" else None


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    server = Server(request.param)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def connect(server: Server, **changes: Any) -> EndpointLLM:
    return EndpointLLM(LLMConfig(**{"endpoint": server.url, "timeout": 5.0} | changes))


@pytest.mark.parametrize(
    ("server", "line"),
    [
        (
            tgi,
            "TGI, model org/served-model; can completion, log-probabilities, those of its input, structured output; "
            "cannot chat",
        ),
        (
            vllm,
            "vLLM, model org/served; can completion, chat, log-probabilities, those of its input, structured output",
        ),
        (
            llama_cpp,
            "llama.cpp, model some.gguf; can completion, chat, log-probabilities, those of its input, "
            "structured output",
        ),
        (
            transformers_serve,
            "transformers serve, model org/served; can chat; cannot completion, log-probabilities, those of its input, "
            "structured output",
        ),
        (
            openai,
            "OpenAI protocol, model some.gguf; can chat, log-probabilities; cannot completion, those of its input, "
            "structured output",
        ),
    ],
    indirect=["server"],
)
def test_the_line_of_each_kind_of_server(server, line):
    assert str(connect(server).server) == f"{server.url}: {line}"


@pytest.mark.parametrize(
    ("server", "need", "says"),
    [
        (transformers_serve, "score", "label.judge=likelihood needs: serve the model with vLLM or llama.cpp"),
        (transformers_serve, "choose", "which a verdict needs: serve the model with vLLM or llama.cpp"),
        (openai, "score", "label.judge=likelihood needs: set label.judge=verdict"),
    ],
    indirect=["server"],
)
def test_a_judge_that_a_server_cannot_serve_is_refused_before_the_run(server, need, says):
    with pytest.raises(LLMError) as caught:
        connect(server).check(need)
    assert says in str(caught.value)


@pytest.mark.parametrize("server", [tgi, vllm, llama_cpp], indirect=True)
@pytest.mark.parametrize("need", ["complete", "choose", "score"])
def test_what_a_server_can_is_not_refused(server, need):
    connect(server).check(need)


@pytest.mark.parametrize("server", [openai], indirect=True)
def test_each_answer_of_a_server_is_handed_over_as_it_comes(server):
    came = {}
    answers = connect(server).complete(
        ["a", "b", "c"], max_new_tokens=4, temperature=0.0, top_p=1.0, seeds=[1, 2, 3], stop=["\n"],
        each=came.__setitem__,
    )  # fmt: skip
    assert [came[place] for place in range(3)] == answers == ["about a", "about b", "about c"]


def router(path: str, payload: dict) -> Any:
    return {"data": [{"id": f"org/model-{number}"} for number in range(5)]} if path == "/v1/models" else None


def silent(path: str, payload: dict) -> Any:
    return _chat(payload) if path == "/v1/chat/completions" else None


@pytest.mark.parametrize(
    ("server", "lists"),
    [(router, "lists 5 models (org/model-0, org/model-1, org/model-2, org/model-3, …)"), (silent, "lists no model")],
    indirect=["server"],
)
def test_a_server_that_does_not_say_which_model_it_serves_is_refused(server, lists):
    with pytest.raises(LLMError) as caught:
        _ = connect(server).name
    assert str(caught.value) == (
        f"{server.url} does not say which model it serves (it {lists}): set llm.model to its id"
    )


@pytest.mark.parametrize("server", [silent], indirect=True)
def test_the_recipe_s_model_is_what_a_server_that_lists_none_is_asked_for(server):
    assert connect(server, model="org/mine").server.served == "org/mine"
