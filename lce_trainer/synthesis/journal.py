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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm.auto import tqdm

from lce_trainer.artifacts import digest
from lce_trainer.errors import ArtifactError
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


def answer_all(
    journal: "Journal",
    keys: Sequence[str],
    batches: Sequence[Sequence[int]],
    call: Callable[[Sequence[int], Callable[[int, Any], None]], Sequence[Any]],
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
    meter = journal.meter
    with tqdm(total=sum(map(len, batches)), desc=desc) as progress:
        for batch in batches:
            missing = list({keys[index]: index for index in batch if keys[index] not in journal}.values())
            alone, counted = 0, time.monotonic()

            def record(place: int, answer: Any, missing: Sequence[int] = missing) -> None:
                nonlocal alone, counted
                used: Mapping[str, Any] = {}
                if meter is not None and time.monotonic() - counted > _SYNC_SECONDS:
                    used, counted = meter.used(), time.monotonic()
                journal.append({keys[missing[place]]: answer, **used}, sync=False)
                alone += 1
                progress.update()

            if missing:
                if meter is not None:
                    missing[meter.before(len(missing)) :] = []
                try:
                    answers = call(missing, record)
                except BaseException:
                    if meter is not None and alone:  # what came before is kept, and so is what it cost
                        journal.append(meter.used())
                    raise
                together = {keys[index]: answer for index, answer in zip(missing, answers, strict=True)}
                together = {key: answer for key, answer in together.items() if key not in journal}
                journal.append(together if meter is None else {**together, **meter.used()})
                if meter is not None and meter.samples:
                    answered = sum(key in journal for key in set(keys))
                    meter.after(answered, len(set(keys)) - answered + later)
            progress.update(len(batch) - alone)
    return [journal[key] for key in keys]


class Journal:
    """Answers by key, on disk before :meth:`append` returns. One process at a time may hold it."""

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
