"""How fast requests get through: 1,000 of them to a server that takes 50 ms for each, and 64 at once."""

import json
import time
import urllib.request

import pytest

from helpers.throughput import LATENCY, ROOM, bare_seconds, serving
from lce_trainer.synthesis.journal import Journal, answer_all
from lce_trainer.synthesis.llm.endpoint import EndpointLLM
from lce_trainer.synthesis.llm.protocol import LLMConfig

REQUESTS = 1000
IDEAL = REQUESTS / ROOM * LATENCY  # seconds
PROMPTS = [f"{number} {'word ' * 150}" for number in range(REQUESTS)]


def connect(port: int) -> EndpointLLM:
    llm = EndpointLLM(LLMConfig(endpoint=f"http://127.0.0.1:{port}", model="org/served"))
    llm.check("complete")
    return llm


def complete(llm: EndpointLLM, places, each=None) -> list:
    return llm.complete(
        [PROMPTS[place] for place in places],
        max_new_tokens=24,
        temperature=0.7,
        top_p=0.95,
        seeds=list(places),
        stop=["\n"],
        each=each,
    )


def journalled(llm: EndpointLLM, path) -> list:
    """As a stage asks: in batches of 128, each answer recorded as it comes."""
    batches = [range(start, min(start + 128, REQUESTS)) for start in range(0, REQUESTS, 128)]
    with Journal(path) as journal:
        journal.answers_alone = True
        keys = [f"{place:064}" for place in range(REQUESTS)]
        return answer_all(journal, keys, batches, lambda batch, each: complete(llm, batch, each), "asking")


def test_the_client_leaves_most_of_the_processor_idle(tmp_path):
    """Its own time for a request bounds what gets through, however many cores others keep busy meanwhile."""
    with serving(refuses=False) as port:
        llm = connect(port)
        began = time.process_time()
        assert journalled(llm, tmp_path / "journal.jsonl") == [" what is a star"] * REQUESTS
        assert time.process_time() - began < 0.6 * IDEAL


@pytest.mark.slow
@pytest.mark.parametrize("refuses", [False, True], ids=["queues", "refuses"])
def test_a_thousand_requests_reach_nine_tenths_of_the_ideal_throughput(refuses, tmp_path):
    with serving(refuses) as port:
        llm, body = connect(port), json.dumps({"prompt": PROMPTS[0]}).encode()
        bare, ours, in_stage = [], [], []
        for attempt in range(5):
            bare.append(IDEAL / bare_seconds(port, REQUESTS, body))
            began = time.monotonic()
            assert len(complete(llm, range(REQUESTS))) == REQUESTS
            ours.append(IDEAL / (time.monotonic() - began))
            began = time.monotonic()
            assert len(journalled(llm, tmp_path / f"{attempt}.jsonl")) == REQUESTS
            in_stage.append(IDEAL / (time.monotonic() - began))
    figures = f"of the ideal: bare client {max(bare):.1%}, ours {max(ours):.1%}, in a stage {max(in_stage):.1%}"
    print(figures)
    if max(bare) < 0.95:
        pytest.skip(f"this machine is too busy to measure on ({figures})")
    assert max(ours) >= 0.9 and max(in_stage) >= 0.9, figures


def test_a_server_that_refuses_more_than_it_has_room_for_is_sent_no_more_than_that():
    with serving(refuses=True, room=16) as port:
        assert complete(connect(port), range(REQUESTS)) == [" what is a star"] * REQUESTS
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/refused") as response:
            refused = json.load(response)
    assert 48 <= refused <= 100  # the first 64 at once, and then one more now and again
