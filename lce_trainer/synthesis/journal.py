"""The crash-safe record of every answer a language model gave, and the loop that gets the rest.

A line of JSON is a record: ``{"sha256": digest of the answers, "answers": {key: answer}}``. Answers that are
computed together are one record, since each may depend in its last bits on the others; a server's are recorded one
by one, as they come. A record is written before the next call, so a killed run loses at most the calls in
flight, and half a line at the end of the file, which the next run drops.
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm.auto import tqdm

from lce_trainer.artifacts import digest
from lce_trainer.errors import ArtifactError, LCETrainerError
from lce_trainer.synthesis.cost import Meter, Usage, is_usage, total

try:
    import fcntl
except ImportError:  # Windows has no advisory locks of this kind; one writer at a time is then up to the user.
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

# Seconds between two times that single answers are forced to the disk: a killed process loses none of them, and a
# power cut those of the last second.
_SYNC_SECONDS = 1.0
_HEAD = b'{"sha256": "0123456789abcdef", "answers": '
_WAVE = 4096  # answers that come alone and are asked for together; their prompts are in memory at the same time

Call = Callable[[Sequence[int], Callable[[int, Any], None]], Sequence[Any]]


def answer_all(
    journal: "Journal",
    keys: Sequence[str],
    batches: Sequence[Sequence[int]],
    call: Call,
    desc: str,
    later: int = 0,
) -> list[Any]:
    """The answer to every key: from the journal where it is known, else from ``call``.

    An answer that is computed here can depend in its last bits on what shares its batch, so a resumed run is equal
    to an uninterrupted one because both plan the same batches, and each is recorded whole. What depends on nothing
    else is recorded as it comes.

    Args:
        journal: Where answers are kept.
        keys: Digest of everything each answer depends on. Equal keys are answered by one call.
        batches: Indices into ``keys``, in the order of the calls; a function of the inputs alone, never
            of what is already answered.
        call: Answers some indices; returns one JSON-able answer for each, in order. Its second argument is to be
            called with the place and the answer of each that comes alone, before the others.
        desc: Label of the progress bar.
        later: Calls of the same kind that come after these, which the quote of a dry run includes.

    Returns:
        Answers in the order of ``keys``.
    """
    known = sum(key in journal for key in keys)
    if known:
        logger.info("%s: %d of %d already answered, in %s", desc, known, len(keys), journal.path.name)
    left = _not_answered(journal, keys, batches)
    total = sum(map(len, batches))
    with tqdm(total=total, desc=desc, initial=total - sum(map(len, left))) as progress:
        if journal.at_once > 1 and not (journal.meter is not None and journal.meter.samples):
            _answer_at_once(journal, keys, left, call, progress)
        else:
            for batch in _waves(journal, left):
                _answer(journal, keys, batch, call, progress, later)
    return [journal[key] for key in keys]


def _not_answered(journal: "Journal", keys: Sequence[str], batches: Sequence[Sequence[int]]) -> list[list[int]]:
    """What each batch has to answer; a key of several batches belongs to the first of them."""
    planned: set[str] = set()
    left = []
    for batch in batches:
        missing = {keys[index]: index for index in batch if keys[index] not in journal and keys[index] not in planned}
        planned.update(missing)
        if missing:
            left.append(list(missing.values()))
    return left


def _waves(journal: "Journal", batches: Sequence[list[int]]) -> Iterator[list[int]]:
    """Batches, several together where each answer comes alone: or many requests would wait for the last of a few.

    Of what the budget pays for, half goes into one, since the next calls may cost more than those so far.
    """
    wave: list[int] = []
    for batch in batches:
        most = float(_WAVE if journal.answers_alone else 0)
        if journal.meter is not None:
            most = min(most, journal.meter.affords() / 2)
        if wave and len(wave) + len(batch) > most:
            yield wave
            wave = []
        wave = [*wave, *batch]
    if wave:
        yield wave


def _answer(journal: "Journal", keys: Sequence[str], missing: list[int], call: Call, progress: Any, later: int) -> None:
    """Have a batch answered, and record what comes."""
    meter = journal.meter
    alone, counted = 0, time.monotonic()

    def record(place: int, answer: Any) -> None:
        nonlocal alone, counted
        used: Mapping[str, Any] = {}
        if meter is not None and time.monotonic() - counted > _SYNC_SECONDS:
            used, counted = meter.used(), time.monotonic()
        journal.append({keys[missing[place]]: answer, **used}, sync=False)
        alone += 1
        progress.update()

    if meter is not None:
        missing = missing[: meter.before(len(missing))]
    try:
        answers = call(missing, record)
    except BaseException:
        if meter is not None and alone:  # what came before is kept, and so is what it cost
            journal.append(meter.used())
        raise
    _record(journal, [keys[index] for index in missing], answers)
    if meter is not None and meter.samples:
        answered = sum(key in journal for key in set(keys))
        meter.after(answered, len(set(keys)) - answered + later)
    progress.update(len(missing) - alone)


def _answer_at_once(
    journal: "Journal", keys: Sequence[str], batches: Sequence[list[int]], call: Call, progress: Any
) -> None:
    """Have several batches answered at the same time, and record each when it is whole.

    Raises:
        Exception: As the first call that fails; the others that are under way are waited for, and recorded.
    """
    meter = journal.meter
    waiting = iter(batches)
    running: dict[Future[Sequence[Any]], list[int]] = {}
    failed: BaseException | None = None
    with ThreadPoolExecutor(journal.at_once) as threads:
        while True:
            while failed is None and len(running) < journal.at_once and (batch := next(waiting, None)) is not None:
                try:
                    if meter is not None:
                        meter.before(len(batch) + sum(map(len, running.values())))
                except LCETrainerError as error:
                    failed = error
                else:
                    running[threads.submit(call, batch, _comes_with_others)] = batch
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                batch = running.pop(future)
                if (raised := future.exception()) is not None:
                    failed = failed or raised
                    continue
                _record(journal, [keys[index] for index in batch], future.result())
                progress.update(len(batch))
    if failed is not None:
        raise failed


def _comes_with_others(place: int, answer: Any) -> None:
    raise AssertionError("an answer that comes alone, of a model that answers batches")


def _record(journal: "Journal", keys: Sequence[str], answers: Sequence[Any]) -> None:
    """Record the answers of a batch, but for those that came alone, and what the journal's have cost."""
    together = {key: answer for key, answer in zip(keys, answers, strict=True) if key not in journal}
    journal.append(together if journal.meter is None else {**together, **journal.meter.used()})


def read_usage(path: Path) -> Usage | None:
    """Return what all answers of a journal have cost, without holding it; None where there is no such file.

    Args:
        path: The file; no other process may write it meanwhile.
    """
    if not path.is_file():
        return None
    used: dict[str, Any] = {}
    mark = b'"usage '
    with path.open("rb") as lines:
        for line in lines:
            if mark in line:
                used |= {key: answer for key, answer in (_parse(line[:-1]) or {}).items() if is_usage(key)}
    return total(used.values())


class Journal:
    """Answers by key, on disk before :meth:`append` returns. One process at a time may hold it.

    Attributes:
        path: The file.
        meter: Counts what answers cost; None where they cost nothing.
        answers_alone: Whether an answer depends on nothing else that is asked, as a server's does.
        at_once: Batches that are answered at the same time, each by another process.
    """

    def __init__(self, path: Path) -> None:
        """Open a journal, or start one.

        Args:
            path: The file; its folder is made.

        Raises:
            ArtifactError: Another process holds it, a line other than the last is damaged, or it
                cannot be opened.
        """
        self.path = path
        self.meter: Meter | None = None
        self.answers_alone = False
        self.at_once = 1
        self._answers: dict[str, Any] = {}
        self._synced = time.monotonic()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b", buffering=0)
        except OSError as error:
            raise ArtifactError(f"cannot open {path}: {error.strerror}") from None
        try:
            self._lock()
            self._read()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        return sum(not is_usage(key) for key in self._answers)

    def __contains__(self, key: str) -> bool:
        return key in self._answers

    def __getitem__(self, key: str) -> Any:
        return self._answers[key]

    def get(self, key: str) -> Any | None:
        """The answer to a key; None when there is none, or when None is the answer (``in`` tells)."""
        return self._answers.get(key)

    @property
    def usage(self) -> Usage:
        """What all answers in it have cost."""
        return total(answer for key, answer in self._answers.items() if is_usage(key))

    def append(self, records: Mapping[str, Any], *, sync: bool = True) -> None:
        """Write one record of answers: all of it is in the file when this returns, or none.

        Args:
            records: JSON-able answers by key; none only forces to the disk what was written before.
            sync: Force it to the disk before this returns; otherwise once a second, and when the journal is closed.

        Raises:
            ArtifactError: The disk is full or fails; the file is left as it was.
        """
        size = self._file.seek(0, os.SEEK_END)
        try:
            if records:
                text = json.dumps(dict(records), allow_nan=False, sort_keys=True)
                # Read back from JSON, so that a fresh run and a resumed one have the same types.
                answers = json.loads(text)
                line = f'{{"sha256": "{digest(answers)}", "answers": {text}}}\n'.encode()
                if self._file.write(line) != len(line):
                    raise OSError(0, "only part of the line was written; the disk is likely full")
            self._sync(now=sync)
        except OSError as error:
            self._file.truncate(size)
            raise ArtifactError(f"cannot write {self.path}: {error.strerror}") from None
        if records:
            self._answers.update(answers)

    def close(self) -> None:
        """Let go of the file; another process may open it."""
        if not self._file.closed:
            try:
                self._sync(now=True)
            except OSError as error:
                raise ArtifactError(f"cannot write {self.path}: {error.strerror}") from None
            finally:
                self._file.close()

    def _sync(self, now: bool) -> None:
        if now or time.monotonic() - self._synced > _SYNC_SECONDS:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ArtifactError(
                f"{self.path} is in use by another process: wait until it is done, or stop it"
            ) from None
        except OSError as error:  # some network file systems have no locks
            logger.warning("%s cannot be locked (%s): do not start a second run on it", self.path, error.strerror)

    def _read(self) -> None:
        end, dropped = 0, None
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if dropped is not None:
                    raise ArtifactError(
                        f"{self.path}:{number - 1} is damaged: delete that line to have its answers written again, "
                        "or the file to have all of them"
                    )
                answers = _parse(line[:-1]) if line.endswith(b"\n") else None
                if answers is None:
                    dropped = len(line)
                else:
                    self._answers.update(answers)
                    end += len(line)
        if dropped is not None:
            logger.warning("%s: dropped %d bytes of a batch that was cut off while written", self.path, dropped)
            self._file.truncate(end)


def _parse(line: bytes) -> dict[str, Any] | None:
    """The answers of a journal line; None when it is not whole."""
    try:
        record = json.loads(line)
        answers = record["answers"]
        if not isinstance(answers, dict):
            return None
        # A line of this version is hashed as it stands, without writing its answers again.
        whole = hashlib.sha256(line[len(_HEAD) : -1]).hexdigest()[:16] == record["sha256"]
        whole = whole or record["sha256"] == digest(answers)
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return answers if whole else None
