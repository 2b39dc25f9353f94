"""What a stage leaves behind: parquet files, and a manifest written last.

A folder whose manifest is missing or does not match its files is unfinished work. A manifest
holds no clock time and no path of a machine, so the same inputs give the same bytes. What is read
is verified by its SHA-256, once per process.
"""

import errno
import functools
import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from lce_trainer.errors import ArtifactError, LCETrainerError

if TYPE_CHECKING:  # who only wants a digest, as scoring does, need not have it
    import datasets

MANIFEST = "manifest.json"
_LIBRARIES = ("lce-trainer", "datasets", "transformers", "torch")
_ARROW = "data.arrow"
_NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS}
# SHA-256 of each file that this process has read whole, by path, size and time of its last change in nanoseconds.
_HASHED: dict[tuple[str, int, int], str] = {}
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}
_OS_ERROR = re.compile(r"os error (\d+)")  # of safetensors, which is written in Rust
# What torch and NumPy raise when a file takes only a part of what is written.
_CUT_SHORT = re.compile(r"PytorchStreamWriter|inline_container|requested and \d+ written|iostream error")
_CLOCK_TICK = 10**8  # nanoseconds; a file that changed so recently may change again and keep its time


@dataclass(frozen=True)
class Manifest:
    """What made an artifact, and what it holds.

    Attributes:
        kind: Which artifact, e.g. ``"groups"``.
        config: Digest of the settings that shaped it, one per setting.
        inputs: Digest of each artifact it was made from.
        counts: What was kept, and what was dropped and why.
        libraries: Version of each library that took part.
        files: Size in bytes and SHA-256 of each file, by name.
        facts: Figures worth showing beside the data, e.g. the shortcut probe.
    """

    kind: str
    config: dict[str, Any]
    inputs: dict[str, str]
    counts: dict[str, int]
    libraries: dict[str, str]
    files: dict[str, dict[str, Any]]
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """SHA-256 over the contents and what made them, 16 hex digits; library versions and cost apart."""
        made = {key: value for key, value in asdict(self).items() if key != "libraries"}
        made["facts"] = {key: value for key, value in self.facts.items() if key != "cost"}
        return digest(made)


def digest(value: Any) -> str:
    """SHA-256 of a JSON-able value, 16 hex digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, as hex."""
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha256.update(block)
    return sha256.hexdigest()


def _sha256_once(path: Path) -> str:
    """SHA-256 of a file, computed again only if the file has changed since this process computed it."""
    stat = path.stat()
    key = (str(path.resolve()), stat.st_size, stat.st_mtime_ns)
    if key not in _HASHED:
        sha256 = file_sha256(path)
        if time.time_ns() - stat.st_mtime_ns < _CLOCK_TICK:
            return sha256
        _HASHED[key] = sha256
    return _HASHED[key]


def content_digest(path: Path) -> str:
    """Digest of a file, or of a folder's files and their names, wherever it lies; 16 hex digits."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return digest({file.relative_to(path).as_posix(): file_sha256(file) for file in files})


def save_artifact(
    path: Path,
    tables: Mapping[str, "datasets.Dataset"],
    *,
    kind: str,
    config: Mapping[str, Any],
    inputs: Mapping[str, str],
    counts: Mapping[str, int],
    facts: Mapping[str, Any] | None = None,
) -> Manifest:
    """Write one parquet file a table, then the manifest.

    Args:
        path: The artifact's folder; files in it that are not the artifact's (a journal) stay.
        tables: Datasets by split name; ``{"train": ds}`` becomes ``train.parquet``.
        kind: Which artifact.
        config: The settings that shaped it.
        inputs: Digest of each artifact it was made from, by kind.
        counts: What was kept and dropped.
        facts: Figures worth showing beside the data.
    """
    path.mkdir(parents=True, exist_ok=True)
    (path / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(path / ".cache", ignore_errors=True)  # of the tables before these
    for split, table in tables.items():
        part = path / f".{split}.parquet.part"
        table.to_parquet(part)
        part.replace(path / f"{split}.parquet")
    names = [f"{split}.parquet" for split in tables]
    return write_manifest(path, names, kind=kind, config=config, inputs=inputs, counts=counts, facts=facts)


def write_manifest(
    path: Path,
    names: Iterable[str],
    *,
    kind: str,
    config: Mapping[str, Any],
    inputs: Mapping[str, str],
    counts: Mapping[str, int],
    facts: Mapping[str, Any] | None = None,
) -> Manifest:
    """Declare a folder finished: the files named are on disk, and nothing changes them from here on.

    Args:
        path: The artifact's folder.
        names: Its files, relative to it.
        kind: As in :func:`save_artifact`, like the rest.
        config: The settings that shaped it.
        inputs: Digest of each artifact it was made from, by kind.
        counts: What was kept and dropped.
        facts: Figures worth showing beside the data.
    """
    manifest = Manifest(
        kind=kind,
        config=dict(config),
        inputs=dict(inputs),
        counts=dict(counts),
        libraries={name: version(name) for name in _LIBRARIES},
        files={
            name: {"bytes": (path / name).stat().st_size, "sha256": file_sha256(path / name)} for name in sorted(names)
        },
        facts=dict(facts or {}),
    )
    replace_manifest(path, manifest)
    return manifest


def replace_manifest(path: Path, manifest: Manifest) -> None:
    """Write an artifact's manifest in place of the one in its folder, whole or not at all."""
    part = path / f".{MANIFEST}.part"
    with part.open("w", encoding="utf-8") as file:
        file.write(manifest_text(manifest))
        file.flush()
        os.fsync(file.fileno())
    part.replace(path / MANIFEST)


def manifest_text(manifest: Manifest) -> str:
    """Return what stands in a manifest's file: JSON, with a SHA-256 over the rest of it."""
    record = asdict(manifest)
    return json.dumps({**record, "sha256": _own_sha256(record)}, indent=2, sort_keys=True) + "\n"


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Around what writes files under a folder: a disk that is full or fails is one error, whichever library meets it.

    Args:
        folder: Named where the library does not name the file.

    Raises:
        ArtifactError: The disk is full, fails, or may not be written to.
    """
    try:
        yield
    except LCETrainerError:
        raise
    except Exception as error:
        failed: BaseException | None = error
        while failed is not None:
            if (reason := _why_not_written(failed)) is not None:
                path = getattr(failed, "filename", None) or folder
                raise ArtifactError(
                    f"cannot write {path}: {reason}; what was finished before is kept: run again when there is room"
                ) from error
            failed = failed.__cause__ or failed.__context__
        raise


def _why_not_written(error: BaseException) -> str | None:
    """Return what an error says of the disk; None if it is about something else."""
    text = str(error)
    code = error.errno if isinstance(error, OSError) else None
    if code is None and (found := _OS_ERROR.search(text)):
        code = int(found[1])
    if code in _FULL:
        return os.strerror(code)
    return "the disk is likely full" if _CUT_SHORT.search(text) and "PytorchStreamReader" not in text else None


def _own_sha256(record: Mapping[str, Any]) -> str:
    """SHA-256 of what a manifest says, as hex."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def read_manifest(path: Path, kind: str | None = None) -> Manifest:
    """The manifest of a finished artifact, its files verified by size and SHA-256.

    Each file is read whole once per process, and again only if it has changed. A manifest that was written before
    manifests carried a SHA-256 of their own is taken as it is.

    Raises:
        ArtifactError: The folder is missing, unfinished, damaged, or holds another kind.
    """
    file = path / MANIFEST
    if not file.is_file():
        what = "is unfinished (it has no manifest.json)" if path.is_dir() else "does not exist"
        raise ArtifactError(f"{path} {what}: run the stage that makes it first")
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        own = record.pop("sha256", None)
        damaged = own is not None and own != _own_sha256(record)
        manifest = Manifest(**record)
        sizes = {name: (int(facts["bytes"]), str(facts["sha256"])) for name, facts in manifest.files.items()}
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ArtifactError(f"{file} is not a manifest: {error}") from None
    if damaged:
        raise ArtifactError(f"{file} is damaged (its SHA-256 does not match): delete it and run its stage again")
    if kind is not None and manifest.kind != kind:
        raise ArtifactError(f"{path} holds {manifest.kind}, not {kind}")
    for name, (size, sha256) in sizes.items():
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise ArtifactError(f"{file} is not a manifest: it names {name!r}, which lies outside its folder")
        have = (path / name).stat().st_size if (path / name).is_file() else None
        if have != size:
            raise ArtifactError(
                f"{path / name} has {have} bytes where its manifest says {size}: delete it and run its stage again"
            )
        if _sha256_once(path / name) != sha256:
            raise ArtifactError(
                f"{path / name} is damaged (its SHA-256 is not the one in its manifest): "
                "delete it and run its stage again"
            )
    return manifest


def why_stale(
    path: Path, kind: str, config: Mapping[str, Any], inputs: Mapping[str, str], parts: Iterable[str] = ()
) -> str | None:
    """Why a stage has to run: None when its artifact is already there, whole, made from the same things.

    Args:
        path: The artifact's folder.
        kind: Which artifact.
        config: The settings that shape it.
        inputs: Digest of each artifact it is made from, by kind.
        parts: Folders in it that have manifests of their own.
    """
    try:
        manifest = read_manifest(path, kind)
        for part in parts:
            read_manifest(path / part)
    except ArtifactError as error:
        return str(error)
    wanted = json.loads(json.dumps(dict(config)))
    changed = sorted(key for key in wanted | manifest.config if wanted.get(key) != manifest.config.get(key))
    if changed:
        return f"{path}: changed since it was made: {', '.join(changed)}"
    if dict(inputs) != manifest.inputs:
        return f"{path}: made from other inputs"
    return None


def load_table(path: Path, kind: str, split: str = "train") -> "datasets.Dataset":
    """One table of a finished artifact, memory-mapped from an Arrow file in ``.cache`` beside it.

    Where the folder is not writable the Arrow file lies in a temporary folder that ends with the process.

    Raises:
        ArtifactError: As :func:`read_manifest`, or there is no such split.
    """
    import datasets

    manifest = read_manifest(path, kind)
    name = f"{split}.parquet"
    if name not in manifest.files:
        raise ArtifactError(f"{path} has no split {split!r}, only {', '.join(sorted(manifest.files))}")
    key = manifest.files[name]["sha256"][:16]
    try:
        folder = _unpack(path / name, path / ".cache" / key)
    except OSError as error:
        if error.errno not in _NOT_WRITABLE:
            raise
        folder = _unpack(path / name, Path(_temporary_folder().name) / key)
    return datasets.Dataset.from_file(str(folder / _ARROW))


def _unpack(parquet: Path, folder: Path) -> Path:
    """The folder of a parquet file's Arrow file, which is written unless it is there and verifies."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets.arrow_writer import ArrowWriter

    with suppress(ArtifactError):
        read_manifest(folder, "arrow")
        return folder
    part = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    part.mkdir(parents=True)
    try:
        rows = pq.ParquetFile(parquet)
        features = datasets.Features.from_arrow_schema(rows.schema_arrow)
        with ArrowWriter(features=features, path=str(part / _ARROW)) as writer:
            for batch in rows.iter_batches():
                writer.write_table(pa.Table.from_batches([batch]))
            writer.finalize()
        write_manifest(part, [_ARROW], kind="arrow", config={}, inputs={}, counts={})
        try:
            part.rename(folder)
        except OSError:
            # Another process of this command was faster, and may have its file open: only a damaged one is replaced.
            try:
                read_manifest(folder, "arrow")
            except ArtifactError:
                shutil.rmtree(folder)
                part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


@functools.cache
def _temporary_folder() -> "tempfile.TemporaryDirectory[str]":
    """The folder for what cannot be written beside the data; it is deleted when the process ends."""
    return tempfile.TemporaryDirectory(prefix="lce-trainer-")
