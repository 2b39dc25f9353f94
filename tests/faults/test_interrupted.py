"""A command that is stopped while a server answers: every answer that came is kept, and what was stopped goes on."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from helpers.tiny import WORDS
from helpers.tiny_recipe import write_recipe
from lce_trainer.artifacts import load_table
from lce_trainer.synthesis.journal import Journal

IN_FLIGHT, ASKED = 8, 120
STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: -signal.SIGKILL}


class Server(ThreadingHTTPServer):
    """Speaks TGI's JSON, takes its time for each answer, and counts those; some end in half an emoji."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answered = 0
        self.lock = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.reply({"model_id": "org/served"} if self.path == "/info" else None)

    def do_POST(self) -> None:
        payload = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path != "/generate":
            return self.reply(None)
        if payload["parameters"]["max_new_tokens"] == 1:  # the probe
            return self.reply([{"generated_text": "a", "details": {"finish_reason": "length", "generated_tokens": 1}}])
        time.sleep(0.03)
        key = f"{payload['inputs']} {payload['parameters']['seed']}"
        draw = random.Random(hashlib.sha256(key.encode()).hexdigest())
        text = " ".join(draw.choices(WORDS, k=5)) + ("\ud83d" if draw.random() < 0.1 else "")
        with self.server.lock:
            self.server.answered += 1
        self.reply([{"generated_text": text, "details": {"finish_reason": "length", "generated_tokens": 5}}])

    def reply(self, answer: object) -> None:
        data = json.dumps(answer).encode()
        try:
            self.send_response(200 if answer is not None else 404)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except OSError:
            pass  # the client is gone

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def start(recipe: Path, server: Server, root: Path) -> "subprocess.Popen[str]":
    settings = [f"run_dir={root}", f"llm.endpoint=http://127.0.0.1:{server.server_port}"]
    settings += [f"llm.concurrency={IN_FLIGHT}", "llm.model=org/served"]
    return subprocess.Popen(
        [sys.executable, "-m", "lce_trainer.cli", "generate", str(recipe), *settings],
        env={**os.environ, "HF_HUB_OFFLINE": "0"},
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def whole(server: Server, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    """A recipe, and the queries of a run of it that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    recipe = write_recipe(folder)
    process = start(recipe, server, folder / "run")
    assert process.wait() == 0, process.stderr.read()
    assert server.answered == ASKED
    rows = load_table(folder / "run" / "queries", "queries").to_list()
    assert 0 < sum("\ufffd" in row["query"] for row in rows) < len(rows)
    return recipe, rows


def check(sent: signal.Signals, after: int, whole: tuple[Path, list[dict]], server: Server, folder: Path) -> None:
    """Stop a run after so many answers; it ends with the signal's status, and loses what was in flight at most."""
    recipe, rows = whole
    server.answered = 0
    process = start(recipe, server, folder / "run")
    while server.answered < after and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(sent)
    assert process.wait() == STATUS[sent]
    printed = process.stderr.read()
    assert "Traceback" not in printed
    assert sent == signal.SIGKILL or printed.endswith("interrupted: run the same command again to continue\n")
    stopped = server.answered
    with Journal(folder / "run" / "queries" / "journal.jsonl") as journal:
        assert stopped - IN_FLIGHT <= len(journal) <= stopped
    process = start(recipe, server, folder / "run")
    assert process.wait() == 0, process.stderr.read()
    assert server.answered <= ASKED + IN_FLIGHT
    assert load_table(folder / "run" / "queries", "queries").to_list() == rows


def test_a_terminated_run_asks_again_what_was_in_flight_at_most(whole, server, tmp_path):
    check(signal.SIGTERM, 50, whole, server, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("draw", range(20))
def test_a_stopped_run_asks_again_what_was_in_flight_at_most(draw, whole, server, tmp_path):
    check(list(STATUS)[draw % 3], random.Random(draw).randrange(1, ASKED - IN_FLIGHT), whole, server, tmp_path)
