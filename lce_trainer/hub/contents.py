"""What goes into the Hub repos of a model, of its dataset and of a Space, by an allow list.

Only files that the Hub's users need go: no optimizer state, no pickled arguments, no journal. Manifests go with the
names of files in place of their paths.
"""

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from lce_trainer.artifacts import MANIFEST, manifest_text, read_manifest
from lce_trainer.errors import PublishError
from lce_trainer.hub.privacy import is_local, names_only

CARD = "README.md"
RECIPE = "recipe.yaml"
WEIGHTS = (
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "adapter_config.json",
    "adapter_model.safetensors",
)
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "*.model",  # SentencePiece
    "chat_template.jinja",
)
_SENTENCE_TRANSFORMERS = ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json")
_LOGIT_SCORE = "1_LogitScore"  # sentence-transformers' module of a language model that answers yes or no
_MODEL_FILES = ("config.json", *WEIGHTS, *_TOKENIZER, *_SENTENCE_TRANSFORMERS)
# Configs of the dataset in the order of its card.
CONFIGS = ("groups", "queries", "candidates", "passages")
_TEXTS = ("passages",)  # a column of candidates that holds whole passages
RepoType = Literal["model", "dataset", "space"]
SPACE_PASSAGES = "passages.jsonl"


@dataclass(frozen=True)
class Repo:
    """What goes to one repo.

    Attributes:
        repo_id: ``user/name``.
        repo_type: Model, dataset or Space.
        files: Each file's path here, or its bytes, by its name in the repo.
        left_out: What could go and does not, each with the reason.
    """

    repo_id: str
    repo_type: RepoType
    files: Mapping[str, Path | bytes]
    left_out: tuple[str, ...] = ()

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file, by its name in the repo."""
        return {
            name: content.stat().st_size if isinstance(content, Path) else len(content)
            for name, content in self.files.items()
        }

    @cached_property
    def hashes(self) -> dict[str, tuple[str, str]]:
        """SHA-256 of each file, and the SHA-1 by which git names it, by its name in the repo."""
        return {name: _hashes(content) for name, content in self.files.items()}


def _hashes(content: Path | bytes) -> tuple[str, str]:
    size = content.stat().st_size if isinstance(content, Path) else len(content)
    sha256, sha1 = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with content.open("rb") if isinstance(content, Path) else io.BytesIO(content) as file:
        while block := file.read(1 << 20):
            sha256.update(block)
            sha1.update(block)
    return sha256.hexdigest(), sha1.hexdigest()


def is_ours(repo_type: str, name: str) -> bool:
    """Whether a file of a repo is one that a publish leaves there, and that would be loaded in place of new ones."""
    if repo_type == "model":
        return matches(name, WEIGHTS)
    if repo_type == "space":
        return name == SPACE_PASSAGES
    folder, _, file = name.rpartition("/")
    if not folder:  # where the groups lay before they were a config among others
        return name in (MANIFEST, "train.parquet")
    return folder in CONFIGS and (file == MANIFEST or file.endswith(".parquet"))


def model_repo(
    repo_id: str, folder: Path, card: str, recipe: str | None = None, pictures: Mapping[str, str] | None = None
) -> Repo:
    """Return what goes to a model's repo.

    Args:
        repo_id: ``user/name``.
        folder: The model, as training saves it.
        card: Text of its ``README.md``.
        recipe: The recipe that made it, as YAML; None to send none.
        pictures: SVG of each picture of the card, by its name.

    Raises:
        PublishError: The id is none, or the folder lacks what a model needs to be loaded.
    """
    if not folder.is_dir():
        raise PublishError(f"no model at {folder}: train one first")
    paths = sorted(path for path in folder.iterdir() if path.is_file() and matches(path.name, _MODEL_FILES))
    files: dict[str, Path | bytes] = {CARD: card.encode(), **{path.name: path for path in paths}}
    if (folder / _LOGIT_SCORE / "config.json").is_file():
        files[f"{_LOGIT_SCORE}/config.json"] = folder / _LOGIT_SCORE / "config.json"
    if recipe is not None:
        files[RECIPE] = recipe.encode()
    files |= {name: text.encode() for name, text in (pictures or {}).items()}
    for what, patterns in (
        ("configuration", ("config.json", "adapter_config.json")),
        ("safetensors weights", ("*.safetensors",)),
        ("tokenizer", ("tokenizer.json", "tokenizer_config.json")),
    ):
        if not any(matches(name, patterns) for name in files):
            raise PublishError(f"{folder} has no {what} ({' or '.join(patterns)}), so it cannot be published")
    if (folder / "adapter_config.json").is_file():
        base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
        if base is not None and is_local(base):
            raise PublishError(
                f"{folder / 'adapter_config.json'} names the base model {base!r}, which is on this machine alone: "
                "publish the merged model, or name the base by its Hub id"
            )
    return Repo(check_repo_id(repo_id), "model", files)


def dataset_repo(
    repo_id: str,
    artifacts: Mapping[str, Path],
    card: str,
    left_out: Sequence[str] = (),
    pictures: Mapping[str, str] | None = None,
) -> Repo:
    """Return what goes to the dataset's repo: a folder a config, with its tables and its manifest.

    Args:
        repo_id: ``user/name``.
        artifacts: Folder of each artifact, by config: ``groups``, and ``queries``, ``candidates`` and ``passages``
            if they are to go. Without ``passages`` the candidates go without their texts.
        card: Text of its ``README.md``.
        left_out: What does not go and why, for the report.
        pictures: SVG of each picture of the card, by its name.

    Raises:
        PublishError: The id is none.
        ArtifactError: An artifact is missing, unfinished or damaged.
    """
    files: dict[str, Path | bytes] = {CARD: card.encode()}
    files |= {name: text.encode() for name, text in (pictures or {}).items()}
    for config, folder in artifacts.items():
        manifest = read_manifest(folder, config)
        tables: dict[str, Path | bytes] = {name: folder / name for name in sorted(manifest.files)}
        if config != "groups":
            tables = {name: _public_table(folder / name, "passages" in artifacts) for name in tables}
        about = {
            name: _about(content) if isinstance(content, bytes) else manifest.files[name]
            for name, content in tables.items()
        }
        public = replace(manifest, config=names_only(manifest.config), facts=names_only(manifest.facts), files=about)
        files |= {
            f"{config}/{MANIFEST}": manifest_text(public).encode(),
            **{f"{config}/{name}": at for name, at in tables.items()},
        }
    return Repo(check_repo_id(repo_id), "dataset", files, tuple(left_out))


def _public_table(path: Path, with_texts: bool) -> Path | bytes:
    """Return a table without whole passages, and with names in place of paths; its file if that changes nothing."""
    names = pq.read_schema(path).names
    hidden = [] if with_texts else [name for name in names if name in _TEXTS]
    table = pq.read_table(path, columns=[name for name in names if name not in hidden])
    renamed = False
    if "model" in names:  # the language model, which a server may name by its path
        models = table["model"].to_pylist()
        public = [names_only(model) for model in models]
        if renamed := public != models:
            table = table.set_column(table.column_names.index("model"), "model", pa.array(public, pa.string()))
    if not hidden and not renamed:
        return path
    buffer = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(None), buffer)  # the old metadata names the old columns
    return buffer.getvalue()


def _about(content: bytes) -> dict[str, Any]:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def check_repo_id(name: str) -> str:
    """Return the name of a repo, if it can be one.

    Raises:
        PublishError: The Hub has no such names, or it lacks the owner.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise PublishError(f"{name!r} is not a Hub repo: {' '.join(str(error).split())}") from None
    if "/" not in name:
        raise PublishError(f"{name!r} names no owner: write user/{name} or organization/{name}")
    return name


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a file's name is one of the patterns'."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)
