"""The endpoint model against a real HTTP server on this machine that speaks TGI's and OpenAI's JSON."""

import asyncio
import json
import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from lce_trainer.errors import LLMError
from lce_trainer.synthesis.llm.endpoint import EndpointLLM
from lce_trainer.synthesis.llm.protocol import LLMConfig

TOKEN = "hf_neverwritten0123456789"
OPTIONS = [[" yes", "Yes"], [" no", "No"]]
# What a reply is: status, headers, body; a number instead is a silence of so many seconds.
Reply = tuple[int, dict[str, str], Any] | float


class Server(ThreadingHTTPServer):
    """Replies what ``plan`` says for each request in turn, then as a healthy server would."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, healthy: Callable[[str, dict], Any]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.healthy = healthy
        self.plan: list[Reply] = []
        self.requests: list[tuple[str, dict, str | None]] = []
        self.times: list[float] = []
        self.now = self.most = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        self.reply(json.loads(self.rfile.read(int(self.headers["content-length"]))))

    def do_GET(self) -> None:
        self.reply({})

    def reply(self, payload: dict) -> None:
        server = self.server
        with server.lock:
            server.now += 1
            server.most = max(server.most, server.now)
            server.times.append(time.monotonic())
            server.requests.append((self.path, payload, self.headers["authorization"]))
            planned = server.plan.pop(0) if server.plan else None
        if isinstance(planned, float):
            time.sleep(planned)
        status, headers, body = planned if isinstance(planned, tuple) else (200, {}, server.healthy(self.path, payload))
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        with server.lock:
            server.now -= 1
        try:
            self.send_response(status)
            for key, value in {**headers, "content-length": str(len(data))}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(data)
        except OSError:
            pass  # the client hung up

    def log_message(self, format: str, *args: Any) -> None:
        pass


def words(text: str) -> list[dict]:
    """Tokens of the fake model: a word with the space before it; its log-probability is minus its length."""
    parts = text.replace(" ", "\0 ").split("\0")
    return [{"id": sum(map(ord, part)), "text": part, "logprob": -float(len(part))} for part in parts if part]


def tgi(path: str, payload: dict) -> Any:
    if path == "/info":
        return {"model_id": "org/served-model", "version": "3.3"}
    parameters = payload["parameters"]
    details: dict[str, Any] = {"finish_reason": "length", "generated_tokens": 1, "prefill": [], "tokens": []}
    if parameters.get("decoder_input_details"):
        details["prefill"] = words(payload["inputs"])
        details["prefill"][0]["logprob"] = None
    if parameters.get("top_n_tokens"):
        mass = {" yes": 0.5, "Yes": 0.1, " no": 0.2, " the": 0.1}
        if "abstain" in payload["inputs"]:
            mass = {" the": 0.9}
        details["top_tokens"] = [
            [{"id": 1, "text": text, "logprob": math.log(share), "special": False} for text, share in mass.items()]
        ]
    return [{"generated_text": f" about {payload['inputs']}\nmore", "details": details}]


def openai(path: str, payload: dict) -> Any:
    if path == "/v1/models":
        return {"data": [{"id": "/models/some.gguf"}]}
    choice: dict[str, Any] = {
        "index": 0,
        "finish_reason": "stop",
        "message": {"role": "assistant", "content": f"about {payload['messages'][0]['content']}\nmore"},
    }
    if payload.get("logprobs"):
        top = [{"token": "Yes", "logprob": math.log(0.3)}, {"token": "No", "logprob": math.log(0.1)}]
        choice["logprobs"] = {"content": [{"token": "Yes", "logprob": math.log(0.3), "top_logprobs": top}]}
    return {"id": "1", "created": 0, "model": payload["model"], "choices": [choice]}


@pytest.fixture(params=[tgi, openai], ids=["tgi", "openai"])
def server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # its client refuses this machine too
    server = Server(request.param)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


only_tgi = pytest.mark.parametrize("server", [tgi], indirect=True, ids=["tgi"])


def connect(server: Server, **changes: Any) -> EndpointLLM:
    path = "/v1" if server.healthy is openai else ""
    settings = {"endpoint": server.url + path, "timeout": 5.0, "retries": 3, "model": "org/mine"} | changes
    return EndpointLLM(LLMConfig(**settings), token=TOKEN)


def complete(llm: EndpointLLM, prompts: list[str], **changes: Any) -> list[str]:
    settings = {"max_new_tokens": 9, "temperature": 0.7, "top_p": 0.9, "seeds": range(len(prompts)), "stop": ["\n"]}
    return llm.complete(prompts, **(settings | changes))


def asked(server: Server) -> list[dict]:
    """What the model itself was asked, without questions about the model."""
    return [payload for _, payload, _ in server.requests if payload]


def test_answers_come_in_order_and_end_at_the_stop(server):
    prompts = [f"p{number}" for number in range(20)]
    answers = complete(connect(server), prompts)
    assert [answer.strip() for answer in answers] == [f"about {prompt}" for prompt in prompts]


def test_the_saved_token_is_not_sent_over_plain_http(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_saved_by_the_user")
    path = "/v1" if server.healthy is openai else ""
    complete(EndpointLLM(LLMConfig(endpoint=server.url + path, timeout=5.0, model="org/mine")), ["p"])
    assert server.requests
    assert not [sent for _, _, sent in server.requests if "hf_saved" in (sent or "")]


def test_sampling_settings_reach_the_server(server):
    llm = connect(server)
    complete(llm, ["p"], seeds=[2**40 + 5])
    complete(llm, ["p"], temperature=0.0, top_p=1.0, seeds=[6])
    drawn, greedy = (payload.get("parameters", payload) for payload in asked(server))
    assert (drawn["temperature"], drawn["top_p"], drawn["seed"], drawn["stop"]) == (0.7, 0.9, 5, ["\n"])
    assert (drawn.get("max_new_tokens") or drawn["max_tokens"]) == 9
    if server.healthy is tgi:
        assert drawn["do_sample"] is True and greedy["do_sample"] is False and "temperature" not in greedy
    else:
        assert greedy["temperature"] == 0.0 and drawn["model"] == "org/mine"


def test_a_choice_is_normalised_over_the_options_that_the_server_reports(server):
    expected = [0.6 / 0.8, 0.2 / 0.8] if server.healthy is tgi else [0.75, 0.25]
    assert connect(server).choose(["p"], OPTIONS) == [pytest.approx(expected)]


@only_tgi
def test_the_model_abstains_when_no_option_is_reported(server):
    answers = connect(server).choose(["abstain", "p"], OPTIONS)
    assert answers[0] is None and answers[1] is not None


@only_tgi
def test_a_score_is_the_mean_over_the_continuations_tokens(server):
    scores = connect(server).score(["one two", "one two", "x"], [" three", " to fourteen", " y z"])
    assert scores == [-6.0, -6.0, -2.0]
    assert max(Counter(payload["inputs"] for payload in asked(server)).values()) == 1


def test_a_server_that_cannot_score_says_what_to_do(server):
    if server.healthy is tgi:
        server.plan = [(200, {}, [{"generated_text": "x", "details": {"prefill": [], "tokens": []}}])] * 2
    with pytest.raises(LLMError, match=r"set label\.judge=verdict"):
        connect(server).score(["p"], [" q"])
    assert len(asked(server)) <= 2  # trying again would not help


@only_tgi
def test_a_server_that_reports_no_likely_tokens_says_so(server):
    server.plan = [(200, {}, [{"generated_text": "x", "details": {"prefill": [], "tokens": []}}])]
    with pytest.raises(LLMError, match="reports no log-probabilities"):
        connect(server).choose(["p"], OPTIONS)
    assert len(asked(server)) == 1


def test_a_busy_server_is_asked_again_after_the_time_it_names(server):
    server.plan = [(429, {"retry-after": "1"}, {"error": "busy", "error_type": "overloaded"})]
    assert [answer.strip() for answer in complete(connect(server), ["p"])] == ["about p"]
    assert server.times[1] - server.times[0] >= 0.99


@only_tgi
def test_retry_after_may_be_a_date(server):
    server.plan = [(503, {"retry-after": formatdate(time.time() + 2, usegmt=True)}, {})]
    complete(connect(server), ["p"])
    assert server.times[1] - server.times[0] >= 0.9


@only_tgi
def test_a_server_that_asks_for_an_hour_is_not_waited_for(server):
    server.plan = [(429, {"retry-after": "3600"}, {"error": "quota"})]
    with pytest.raises(LLMError, match=r"HTTP 429 .*quota.* \(asks to come back in 3600 s\)"):
        complete(connect(server), ["p"])
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        ((500, {}, b"Internal <b>error</b>"), r"after 2 tries: HTTP 500 Internal <b>error</b>"),
        ((424, {}, {"error": "CUDA", "error_type": "generation"}), "HTTP 424"),
        ((200, {}, {"error": "model is loading"}), "after 2 tries: an error with status 200: model is loading"),
        ((200, {}, b"<html>gateway</html>"), "after 2 tries: not the JSON of its protocol"),
        ((200, {}, []), "after 2 tries: not the JSON"),
        ((200, {}, {"unexpected": 1}), "after 2 tries: "),
        ((200, {}, b"\xff\xfe"), "after 2 tries: not the JSON"),
        (
            (401, {}, {"error": f"bad token {TOKEN}"}),
            r"did not answer: HTTP 401 .*bad token \*\*\*.*is HF_TOKEN right\?",
        ),
        ((404, {}, {}), r"is the URL right\?"),
        ((422, {}, {"error": "inputs too long", "error_type": "validation"}), "did not answer: HTTP 422 .*too long"),
    ],
)
def test_what_cannot_be_used_is_one_line_without_the_token(server, reply, says, caplog):
    caplog.set_level(logging.DEBUG)
    server.plan = [reply] * 2
    with pytest.raises(LLMError, match=says) as caught:
        complete(connect(server, retries=2), ["p"])
    assert "\n" not in str(caught.value)
    assert server.requests[0][2] == f"Bearer {TOKEN}"
    assert TOKEN not in str(caught.value) + caplog.text
    assert caught.value.__suppress_context__


def test_an_error_among_good_answers_is_asked_again_alone(server):
    server.plan = [(200, {}, {"error": "once"})]
    assert len(complete(connect(server), [f"p{number}" for number in range(5)])) == 5
    assert len(asked(server)) == 6


@only_tgi
def test_a_silent_server_times_out(server):
    server.plan = [2.0, 2.0]
    start = time.monotonic()
    with pytest.raises(LLMError, match=r"after 2 tries: nothing within 0\.2 s \(llm\.timeout\)"):
        complete(connect(server, timeout=0.2, retries=2), ["p"])
    assert time.monotonic() - start < 5


@only_tgi
def test_offline_mode_is_named_at_once(server, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(LLMError, match=r"did not answer: .*HF_HUB_OFFLINE"):
        complete(connect(server), ["p"])


def test_a_server_that_is_not_there_is_an_error(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    llm = EndpointLLM(LLMConfig(endpoint="http://127.0.0.1:9", retries=2, timeout=2.0))
    with pytest.raises(LLMError, match=r"after 2 tries: .+"):
        complete(llm, ["p"])
    with pytest.raises(LLMError, match=r"does not say which model it serves .*: set llm\.model to its Hub id"):
        _ = llm.name


@only_tgi
def test_no_more_requests_are_in_flight_than_the_recipe_allows(server):
    server.plan = [0.05] * 20
    complete(connect(server, concurrency=3), ["p"] * 20)
    assert 2 <= server.most <= 3


def test_the_name_is_the_recipes_or_what_the_server_says(server):
    assert connect(server).name == "org/mine"
    assert server.requests == []
    said = connect(server, model=LLMConfig().model).name
    assert said == ("org/served-model" if server.healthy is tgi else "some.gguf")


@pytest.mark.parametrize(
    "url", ["localhost:8080", "ftp://host", "http://", "http://me:pw@host", "https://host/v1?key=pw"]
)
def test_an_endpoint_is_a_plain_url_without_secrets(url):
    with pytest.raises(LLMError, match=r"llm\.endpoint must be a plain URL") as caught:
        EndpointLLM(LLMConfig(endpoint=url))
    assert "pw" not in str(caught.value)


@only_tgi
def test_it_answers_inside_a_running_event_loop(server):
    async def notebook_cell() -> list[str]:
        return complete(connect(server), ["p"])

    assert asyncio.run(notebook_cell()) == [" about p"]
