"""An HTTP server on this machine that speaks TGI's and OpenAI's JSON, for the endpoint model."""

import json
import math
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

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
            planned = server.plan.pop(0) if server.plan and payload else None
        if isinstance(planned, float):
            time.sleep(planned)
        if isinstance(planned, tuple):
            status, headers, body = planned
        else:
            body = server.healthy(self.path, payload)
            status, headers = (404 if body is None else 200), {}
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
    if path != "/generate":
        return None
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
    if path != "/v1/chat/completions":
        return None
    choice: dict[str, Any] = {
        "index": 0,
        "finish_reason": "stop",
        "message": {"role": "assistant", "content": f"about {payload['messages'][0]['content']}\nmore"},
    }
    if payload.get("logprobs"):
        top = [{"token": "Yes", "logprob": math.log(0.3)}, {"token": "No", "logprob": math.log(0.1)}]
        choice["logprobs"] = {"content": [{"token": "Yes", "logprob": math.log(0.3), "top_logprobs": top}]}
    return {"id": "1", "created": 0, "model": payload["model"], "choices": [choice]}
