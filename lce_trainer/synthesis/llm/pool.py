"""Requests to one server or several: as many at once as they take, tried again as long as that can help.

Each server has a limit of requests in flight. It falls to what the server took when it refuses one more, and when
answers do not come in time, and rises while answers come as fast as they did with fewer. A server that is down is
left alone for a while, and its requests go to the others.
"""

import asyncio
import collections
import email.utils
import itertools
import json
import logging
import math
import random
import time
import urllib.request
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

import aiohttp

from lce_trainer.errors import LLMError

logger = logging.getLogger(__name__)

_LONGEST_WAIT = 120.0  # seconds; a server that asks for more is not waited for
_BUSY = {408, 425, 429, 502, 503, 504, 529}  # of the server, not of the request
_TRY_AGAIN = {409, 500}
_SLOWER = 1.5  # answers that take so many times as long as the fastest mean: more at once would only queue
_CUT = 0.7
_START = 64
_REST = 8  # answers for each request in flight before a server that refused one more is tried with more again
_T = TypeVar("_T")


class NoAnswerError(Exception):
    """A response that came through, but holds no answer."""


class _BadStatusError(Exception):
    def __init__(self, status: int, text: str, after: float | None) -> None:
        super().__init__(f"HTTP {status} {text[:200]}")
        self.status = status
        self.after = after


# Besides connections: JSON that is none, or of another shape than the protocol's.
_EXPECTED = (
    aiohttp.ClientError,
    _BadStatusError,
    NoAnswerError,
    OSError,
    asyncio.TimeoutError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
)


@dataclass
class Request:
    """One POST, and how its answer is read."""

    path: str
    payload: Mapping[str, Any]
    read: Callable[[Any, Mapping[str, str]], Any]


@dataclass
class _Lane:
    """What is known about one server while requests are sent."""

    url: str
    most: int
    limit: float
    proxy: str | None
    in_flight: int = 0
    failures: int = 0
    closed_until: float = 0.0
    cut_at: float = 0.0
    resting: float = 0.0  # answers until the limit may rise again
    before: float | None = None  # the limit before refusals with no answer between them
    means: list[float] = field(default_factory=lambda: [math.inf, math.nan])  # the fastest, the latest

    @property
    def room(self) -> float:
        return int(self.limit) - self.in_flight

    def served(self, seconds: float) -> None:
        """Raise the limit while answers do not take longer for it."""
        self.failures, self.before = 0, None
        self.resting -= 1
        fastest, latest = self.means
        latest = seconds if math.isnan(latest) else 0.9 * latest + 0.1 * seconds
        self.means = [min(fastest, latest), latest]
        if latest <= _SLOWER * self.means[0] and self.in_flight >= int(self.limit) - 1 and self.resting <= 0:
            self.limit = min(self.limit + 1, float(self.most))

    def full(self) -> bool:
        """Lower the limit to what else is in flight, where a refusal can mean that there is no room for one more."""
        if self.in_flight < 2:
            return False
        self.before = self.limit if self.before is None else self.before
        self.limit = min(self.limit, self.in_flight - 1.0)
        self.resting = _REST * self.limit
        return True

    def refused(self, now: float, wait: float) -> None:
        """Lower the limit, once for all that were in flight together, and leave the server alone."""
        if self.before is not None:  # none was taken: the server has not too little room, it is down
            self.limit, self.before = self.before, None
        if now >= self.cut_at:
            self.limit = max(1.0, self.limit * _CUT)
            self.failures += 1
            self.cut_at = now + wait
        self.closed_until = max(self.closed_until, now + wait)


class Pool:
    """Sends requests to servers that give the same answers."""

    def __init__(
        self,
        urls: Sequence[str],
        *,
        token: str | None,
        timeout: float,
        retries: int,
        patience: float,
        most: Sequence[int],
    ) -> None:
        """Take the settings; nothing is sent yet.

        Args:
            urls: Of the servers.
            token: Sent as bearer token.
            timeout: Seconds for one answer.
            retries: Tries of a request that is answered with an error.
            patience: Seconds without an answer of any server after which a request is given up.
            most: Requests in flight at each server.
        """
        self._lanes = [
            _Lane(url, limit, float(min(limit, _START)), _proxy_of(url)) for url, limit in zip(urls, most, strict=True)
        ]
        self._token = token
        self._timeout = timeout
        self._retries = max(1, retries)
        self._patience = patience
        self._waiting: collections.deque[asyncio.Future[_Lane]] = collections.deque()
        self._alarm: asyncio.TimerHandle | None = None
        self._last_answer = -math.inf

    def run(self, requests: Sequence[Request], done: Callable[[int, Any], None] | None = None) -> list[Any]:
        """The answers of some requests, in order.

        Args:
            requests: What is sent.
            done: Called with a request's place and its answer as soon as that is there.

        Raises:
            LLMError: A request has no answer; those in flight are given up.
        """
        answers: list[Any] = [None] * len(requests)
        left = iter(range(len(requests)))
        # Some of those that are under way wait before they are tried again, and hold up no other.
        at_once = 2 * sum(lane.most for lane in self._lanes)

        async def every() -> list[Any]:
            self._waiting.clear()
            self._alarm = None
            for lane in self._lanes:
                lane.in_flight = 0
            async with self._session() as session:

                async def send() -> None:
                    for index in left:
                        answers[index] = await self._patiently(session, requests[index])
                        if done is not None:
                            done(index, answers[index])

                # A task for each request would take its time before the first is sent.
                tasks = [asyncio.ensure_future(send()) for _ in range(min(len(requests), at_once))]
                try:
                    await asyncio.gather(*tasks)
                    return answers
                finally:  # once one has failed for good, the others are not worth their cost
                    for task in tasks:
                        task.cancel()
                    await asyncio.gather(*tasks, return_exceptions=True)

        return run_anywhere(every())

    def fetch(self, calls: Sequence[tuple[str, str, Any]]) -> list[tuple[int, Any]]:
        """Status and JSON of some questions to the first server, in order; a busy or absent one is waited for.

        Args:
            calls: Method, path below the server's URL, and JSON or None.

        Raises:
            LLMError: Nothing came within the patience.
        """

        async def every() -> list[tuple[int, Any]]:
            async with self._session() as session:
                return [await self._question(session, *call) for call in calls]

        return run_anywhere(every())

    def _session(self) -> aiohttp.ClientSession:
        headers = {"authorization": f"Bearer {self._token}"} if self._token else {}
        return aiohttp.ClientSession(
            headers=headers,
            timeout=aiohttp.ClientTimeout(total=self._timeout),
            connector=aiohttp.TCPConnector(limit=0),
        )

    async def _question(self, session: aiohttp.ClientSession, method: str, path: str, payload: Any) -> tuple[int, Any]:
        url, proxy = self._lanes[0].url, self._lanes[0].proxy
        began = time.monotonic()
        for number in itertools.count(1):
            try:
                async with session.request(method, url + path, json=payload, proxy=proxy) as response:
                    body = await response.read()
                    if response.status not in _BUSY:
                        try:
                            return response.status, json.loads(body)
                        except ValueError:
                            return response.status, None
                    error: Exception = _bad_status(response, body)
            except (aiohttp.ClientError, OSError, asyncio.TimeoutError) as caught:
                error = caught
            wait = _wait(error, number)
            if time.monotonic() + wait - began > self._patience or wait > _LONGEST_WAIT:
                raise LLMError(
                    f"{url} did not answer{_tries(number)}: {self._reason(error)}; "
                    "is the server up, and llm.endpoint right? (llm.patience is how long it is waited for)"
                ) from None
            if number == 1:
                logger.info("%s: %s; waiting for it", url, self._reason(error))
            await asyncio.sleep(wait)
        raise AssertionError("unreachable")

    async def _patiently(self, session: aiohttp.ClientSession, request: Request) -> Any:
        first = math.nan
        for number in itertools.count(1):
            lane = await self._enter()
            began = time.monotonic()
            try:
                async with session.post(lane.url + request.path, json=request.payload, proxy=lane.proxy) as response:
                    body = await response.read()
                    if response.status != 200:
                        raise _bad_status(response, body)
                    answer = request.read(_answered(json.loads(body)), response.headers)
                lane.served(time.monotonic() - began)
                self._last_answer = time.monotonic()
                return answer
            except _EXPECTED as error:
                now = time.monotonic()
                first = now if math.isnan(first) else first
                wait = _wait(error, max(number, lane.failures + 1))
                # Without an answer to anything, the server is the trouble; with some, this request may be.
                if _is_busy(error):
                    if not (_names_no_time(error) and lane.full()):
                        lane.refused(now, min(wait, _LONGEST_WAIT))
                    silent = now - max(first, self._last_answer) > self._patience
                    poison = not isinstance(error, _BadStatusError) and self._last_answer > first
                    over = silent or wait > _LONGEST_WAIT or (poison and number >= self._retries)
                else:
                    again = not isinstance(error, _BadStatusError) or error.status in _TRY_AGAIN
                    over = not again or number >= self._retries
                reason = self._reason(error)
                if over:
                    raise LLMError(f"{lane.url} did not answer{_tries(number)}: {reason}") from None
                logger.info("%s: %s; trying again", lane.url, reason)
                # A busy server is closed to all requests for that time: another one may take this.
                pause = 0.0 if _is_busy(error) else min(wait, 30.0)
            finally:
                self._leave(lane)
            await asyncio.sleep(pause)
        raise AssertionError("unreachable")

    async def _enter(self) -> _Lane:
        """A server with room; waits until there is one."""
        lane = self._with_room()
        if lane is not None:
            lane.in_flight += 1
            return lane
        turn: asyncio.Future[_Lane] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        self._wake_when_open()
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._leave(turn.result())
            raise

    def _leave(self, lane: _Lane) -> None:
        lane.in_flight -= 1
        self._hand_out()

    def _hand_out(self) -> None:
        """Give those that wait the servers that have room, which are taken from then on."""
        while self._waiting and (lane := self._with_room()) is not None:
            turn = self._waiting.popleft()
            if not turn.done():
                lane.in_flight += 1
                turn.set_result(lane)
        if self._waiting:
            self._wake_when_open()

    def _with_room(self) -> _Lane | None:
        """The open server that has most room; None where none has any."""
        now = time.monotonic()
        open_lanes = [lane for lane in self._lanes if lane.closed_until <= now]
        lane = max(open_lanes, key=lambda lane: lane.room, default=None)
        return lane if lane is not None and lane.room > 0 else None

    def _wake_when_open(self) -> None:
        """Come back when the next closed server opens: what is in flight elsewhere may take longer."""
        now = time.monotonic()
        opens = [lane.closed_until for lane in self._lanes if lane.closed_until > now]
        if opens and self._alarm is None:
            self._alarm = asyncio.get_running_loop().call_later(max(min(opens) - now, 0.001), self._open)

    def _open(self) -> None:
        self._alarm = None
        self._hand_out()

    def _reason(self, error: BaseException) -> str:
        """What went wrong in one line, without the token."""
        if isinstance(error, (asyncio.TimeoutError, TimeoutError)):
            text = f"nothing within {self._timeout:g} s (llm.timeout)"
        elif isinstance(error, _BadStatusError):
            hints = {401: "is HF_TOKEN right?", 403: "may this token use it?", 404: "is the URL right?"}
            hint = hints.get(error.status)
            text = f"{error} ({hint})" if hint else str(error)
            if error.after is not None and error.after > _LONGEST_WAIT:
                text += f" (asks to come back in {error.after:.0f} s)"
        elif isinstance(error, (NoAnswerError, aiohttp.ClientError, OSError)):
            text = str(error) or type(error).__name__
        else:
            text = f"not the JSON of its protocol ({type(error).__name__}: {error})"
        text = " ".join(text.split())
        return text.replace(self._token, "***") if self._token else text


def run_anywhere(work: Coroutine[Any, Any, _T]) -> _T:
    """Run to the end, also in a thread that has an event loop already, as a notebook's has."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(_without_traces_of_an_end(work))
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, _without_traces_of_an_end(work)).result()


async def _without_traces_of_an_end(work: Coroutine[Any, Any, _T]) -> _T:
    """Await, and log no trace of a task that Ctrl-C or SIGTERM came upon: the end is on its way to the caller."""

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if error is None or isinstance(error, Exception):
            loop.default_exception_handler(context)

    asyncio.get_running_loop().set_exception_handler(handle)
    return await work


def _answered(answer: Any) -> Any:
    """The answer, unless it is an error that came with status 200; TGI's root gives a list of one."""
    if isinstance(answer, list):
        answer = answer[0]
    said = answer.get("error")
    if said:
        raise NoAnswerError(f"an error with status 200: {said}")
    return answer


def _bad_status(response: aiohttp.ClientResponse, body: bytes) -> _BadStatusError:
    return _BadStatusError(response.status, body.decode("utf-8", "replace"), _retry_after(response.headers))


def _is_busy(error: BaseException) -> bool:
    if isinstance(error, _BadStatusError):
        return error.status in _BUSY
    return isinstance(error, (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, OSError, asyncio.TimeoutError))


def _names_no_time(error: BaseException) -> bool:
    """Whether a server refused a request, and did not say for how long it refuses more."""
    return isinstance(error, _BadStatusError) and error.status in (429, 503) and error.after is None


def _proxy_of(url: str) -> str | None:
    """The proxy that the environment names for a URL. aiohttp would find it out for each request, in a thread."""
    parts = urlsplit(url)
    if urllib.request.proxy_bypass(parts.hostname or ""):
        return None
    proxy = urllib.request.getproxies().get(parts.scheme)
    return proxy if proxy is not None and proxy.startswith("http") else None


def _wait(error: BaseException, number: int) -> float:
    """Seconds before the next try: what the server asks for, else more each time."""
    after = getattr(error, "after", None)
    return min(0.5 * 2.0 ** min(number - 1, 6), 30.0) * random.uniform(0.8, 1.2) if after is None else after


def _tries(number: int) -> str:
    return f" after {number} tries" if number > 1 else ""


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """The Retry-After header in seconds; it holds seconds or a date."""
    value = headers.get("retry-after", "")
    if value.strip().isdigit():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return None
