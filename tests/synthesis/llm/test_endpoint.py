"""The endpoint model against a real HTTP server on this machine that speaks TGI's and OpenAI's JSON."""

import asyncio
import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator
from email.utils import formatdate
from typing import Any

import pytest

from helpers.llm_server import Server, openai, tgi
from lce_trainer.errors import LLMError
from lce_trainer.synthesis.llm.endpoint import EndpointLLM
from lce_trainer.synthesis.llm.protocol import LLMConfig

TOKEN = "hf_neverwritten0123456789"
OPTIONS = [[" yes", "Yes"], [" no", "No"]]


@pytest.fixture(params=[tgi, openai], ids=["tgi", "openai"])
def server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server(request.param)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


only_tgi = pytest.mark.parametrize("server", [tgi], indirect=True, ids=["tgi"])


def connect(server: Server, **changes: Any) -> EndpointLLM:
    path = "/v1" if server.healthy is openai else ""
    settings = {"endpoint": server.url + path, "timeout": 5.0, "retries": 3, "model": "org/mine"} | changes
    llm = EndpointLLM(LLMConfig(**settings), token=TOKEN)
    plan, server.plan = server.plan, []
    _ = llm.server  # the probe, before what is planned
    server.plan = plan
    server.requests.clear()
    server.times.clear()
    return llm


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
    assert (drawn["temperature"], drawn["top_p"], drawn["seed"]) == (0.7, 0.9, 5)
    # A chat's answer may begin with a newline, so it is cut here.
    assert drawn.get("stop") == (["\n"] if server.healthy is tgi else None)
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
    llm = connect(server)
    server.plan = [(503, {"retry-after": formatdate(time.time() + 3, usegmt=True)}, {})]
    complete(llm, ["p"])
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
    server.plan = [2.0, 2.0, 2.0]
    start = time.monotonic()
    with pytest.raises(LLMError, match=r"after 2 tries: nothing within 0\.2 s \(llm\.timeout\)"):
        complete(connect(server, timeout=0.2, retries=2, patience=0.3), ["p"])
    assert time.monotonic() - start < 5


def test_offline_mode_does_not_block_a_server_on_this_machine(server, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert [answer.strip() for answer in complete(connect(server), ["p"])] == ["about p"]
    with pytest.raises(LLMError, match=r"https://api\.example\.org is not asked: HF_HUB_OFFLINE is set"):
        _ = EndpointLLM(LLMConfig(endpoint="https://api.example.org/v1")).name


@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/", "/v1/chat/completions", "/generate"])
def test_any_url_of_a_server_will_do(server, path):
    llm = EndpointLLM(LLMConfig(endpoint=server.url + path, timeout=5.0))
    assert llm.server.kind == ("TGI" if server.healthy is tgi else "OpenAI protocol")
    assert llm.name == ("org/served-model" if server.healthy is tgi else "some.gguf")


def test_tgi_and_a_chat_under_one_name_do_not_share_answers(server):
    llm = connect(server)
    assert llm.name == "org/mine"
    # What TGI completed before there were chats is still found in journals.
    assert llm.identity == ("org/mine" if server.healthy is tgi else "org/mine by OpenAI protocol chat")


def test_an_answer_without_text_is_none_and_asked_once(server):
    empty = {
        "choices": [{"message": {"role": "assistant", "content": None, "reasoning": "hm"}, "finish_reason": "length"}]
    }
    llm = connect(server)
    server.plan = [(200, {}, [{"generated_text": "", "details": {}}] if server.healthy is tgi else empty)]
    answers = complete(llm, [f"p{number}" for number in range(5)])
    assert sum(answer is None for answer in answers) == 1 == llm.usage.without_text
    assert len(asked(server)) == 5


def test_a_server_that_is_not_there_is_an_error(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    llm = EndpointLLM(LLMConfig(endpoint="http://127.0.0.1:9", patience=1.0, timeout=2.0))
    with pytest.raises(LLMError, match=r"did not answer after 2 tries: .+is the server up"):
        complete(llm, ["p"])


@only_tgi
def test_no_more_requests_are_in_flight_than_the_recipe_allows(server):
    server.plan = [0.05] * 20
    complete(connect(server, concurrency=3), ["p"] * 20)
    assert 2 <= server.most <= 3


def test_the_name_is_the_recipes_or_what_the_server_says(server):
    assert connect(server).name == "org/mine"
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
