"""What a stage leaves behind: parquet files, and a manifest written last.

A folder whose manifest is missing or does not match its files is unfinished work. A manifest
holds no clock time and no path of a machine, so the same inputs give the same bytes.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets

from lce_trainer.errors import ArtifactError

MANIFEST = "manifest.json"
_LIBRARIES = ("lce-trainer", "datasets", "transformers", "torch")


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
        """SHA-256 over the contents and what made them, 16 hex digits; library versions apart."""
        made = {key: value for key, value in asdict(self).items() if key != "libraries"}
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


def content_digest(path: Path) -> str:
    """Digest of a file, or of a folder's files and their names, wherever it lies; 16 hex digits."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return digest({file.relative_to(path).as_posix(): file_sha256(file) for file in files})


def save_artifact(
    path: Path,
    tables: Mapping[str, datasets.Dataset],
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
    part = path / f".{MANIFEST}.part"
    with part.open("w", encoding="utf-8") as file:
        file.write(json.dumps(asdict(manifest), indent=2, sort_keys=True) + "\n")
        file.flush()
        os.fsync(file.fileno())
    part.replace(path / MANIFEST)
    return manifest


def read_manifest(path: Path, kind: str | None = None) -> Manifest:
    """The manifest of a finished artifact, its files checked against it by size.

    Raises:
        ArtifactError: The folder is missing, unfinished, damaged, or holds another kind.
    """
    file = path / MANIFEST
    if not file.is_file():
        what = "is unfinished (it has no manifest.json)" if path.is_dir() else "does not exist"
        raise ArtifactError(f"{path} {what}: run the stage that makes it first")
    try:
        manifest = Manifest(**json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ArtifactError(f"{file} is not a manifest: {error}") from None
    if kind is not None and manifest.kind != kind:
        raise ArtifactError(f"{path} holds {manifest.kind}, not {kind}")
    for name, facts in manifest.files.items():
        have = (path / name).stat().st_size if (path / name).is_file() else None
        if have != facts["bytes"]:
            raise ArtifactError(
                f"{path / name} has {have} bytes where its manifest says {facts['bytes']}: "
                f"delete {path} and run its stage again"
            )
    return manifest


def why_stale(path: Path, kind: str, config: Mapping[str, Any], inputs: Mapping[str, str]) -> str | None:
    """Why a stage has to run: None when its artifact is already there, made from the same things."""
    try:
        manifest = read_manifest(path, kind)
    except ArtifactError as error:
        return str(error)
    wanted = json.loads(json.dumps(dict(config)))
    changed = sorted(key for key in wanted | manifest.config if wanted.get(key) != manifest.config.get(key))
    if changed:
        return f"{path}: changed since it was made: {', '.join(changed)}"
    if dict(inputs) != manifest.inputs:
        return f"{path}: made from other inputs"
    return None


def load_table(path: Path, kind: str, split: str = "train") -> datasets.Dataset:
    """One table of a finished artifact, memory-mapped from an Arrow cache beside it.

    Raises:
        ArtifactError: As :func:`read_manifest`, or there is no such split.
    """
    manifest = read_manifest(path, kind)
    name = f"{split}.parquet"
    if name not in manifest.files:
        raise ArtifactError(f"{path} has no split {split!r}, only {', '.join(sorted(manifest.files))}")
    cache = path / ".cache" / manifest.files[name]["sha256"][:16]
    return datasets.Dataset.from_parquet(str(path / name), cache_dir=str(cache))
