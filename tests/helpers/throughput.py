"""A server as fast as Python has one, in a process of its own: 50 ms an answer, and room for some at once."""

import asyncio
import contextlib
import json
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from typing import ClassVar

LATENCY, ROOM = 0.05, 64
_ANSWER = {
    "choices": [{"index": 0, "text": " what is a star\n", "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 100, "completion_tokens": 5},
}


def respond(status: int, body: object) -> bytes:
    data = json.dumps(body).encode()
    head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    return head.encode() + data


ANSWER, BUSY, NOTHING = respond(200, _ANSWER), respond(503, {"error": "busy"}), respond(404, {})
MODELS = respond(200, {"data": [{"id": "org/served", "owned_by": "vllm"}]})


class Connection(asyncio.Protocol):
    """Requests of one client, one after another; those beyond the room wait, or are refused."""

    room, refuses = ROOM, False
    now = refused = 0
    waiting: ClassVar[deque["Connection"]] = deque()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport, self.buffer = transport, b""

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, end, body = self.buffer.partition(b"\r\n\r\n")
        if not end:
            return
        lower = head.lower()
        length = int(lower.partition(b"content-length:")[2].partition(b"\r")[0] or 0)
        if len(body) < length:
            return
        self.buffer = body[length:]
        path = head.split(b" ", 2)[1]
        if path == b"/refused":
            self.transport.write(respond(200, Connection.refused))
        elif path != b"/v1/completions":
            self.transport.write(MODELS if path == b"/v1/models" else NOTHING)
        elif Connection.now < self.room:
            self.work()
        elif self.refuses:
            Connection.refused += 1
            self.transport.write(BUSY)
        else:
            self.waiting.append(self)

    def work(self) -> None:
        Connection.now += 1
        asyncio.get_running_loop().call_later(LATENCY, self.done)

    def done(self) -> None:
        Connection.now -= 1
        self.transport.write(ANSWER)
        if self.waiting:
            self.waiting.popleft().work()


@contextlib.contextmanager
def serving(refuses: bool, room: int = ROOM) -> Iterator[int]:
    """Start a server; yields its port.

    Args:
        refuses: Requests beyond its room get status 503; otherwise they wait. ``GET /refused`` counts them.
        room: Requests that it works on at once.
    """
    command = [sys.executable, __file__, str(int(refuses)), str(room)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield int(process.stdout.readline())
        finally:
            process.kill()


def bare_seconds(port: int, requests: int, body: bytes) -> float:
    """Seconds that the leanest client takes: as many connections as the server has room, and nothing read but bytes."""
    head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n".encode()

    class Client(asyncio.Protocol):
        left, done = requests, 0

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self.transport = transport
            self.send()

        def send(self) -> None:
            if Client.left:
                Client.left -= 1
                self.transport.write(head + body)

        def data_received(self, data: bytes) -> None:
            Client.done += 1
            self.send()
            if Client.done == requests:
                finished.set_result(None)

    async def run() -> float:
        nonlocal finished
        loop = asyncio.get_running_loop()
        finished = loop.create_future()
        began = time.monotonic()
        made = [await loop.create_connection(Client, "127.0.0.1", port) for _ in range(ROOM)]
        await finished
        seconds = time.monotonic() - began
        for transport, _ in made:
            transport.close()
        return seconds

    finished: asyncio.Future[None]
    return asyncio.run(run())


async def _main() -> None:
    server = await asyncio.get_running_loop().create_server(Connection, "127.0.0.1", 0, backlog=512)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    Connection.refuses, Connection.room = sys.argv[1] == "1", int(sys.argv[2])
    asyncio.run(_main())
