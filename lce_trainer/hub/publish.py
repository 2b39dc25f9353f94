"""Every upload to the Hugging Face Hub: a model and the groups it was trained on.

Only files that the Hub's users need go, by an allow list: no optimizer state, no pickled arguments, no journal.
"""

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError: httpx's or httpx2's, by version
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from lce_trainer.artifacts import MANIFEST, read_manifest
from lce_trainer.errors import PublishError
from lce_trainer.settings import option

logger = logging.getLogger(__name__)

CARD = "README.md"
_WEIGHTS = (
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
_MODEL_FILES = (CARD, "config.json", *_WEIGHTS, *_TOKENIZER, *_SENTENCE_TRANSFORMERS)
_NOT_TEXT = (".safetensors", ".parquet")
_TOKEN = re.compile(rb"hf_[A-Za-z0-9]{30,}")


@dataclass
class PublishConfig:
    """Where the model and the groups go."""

    model_id: str | None = option(None, "Hub repo of the model, as user/name.")
    dataset_id: str | None = option(None, "Hub repo of the groups, as user/name.")
    private: bool = option(True, "Make new repos private.")
    license: str = option("apache-2.0", "License named on both cards.")


@dataclass(frozen=True)
class Upload:
    """What goes, or went, to one repo.

    Attributes:
        repo_id: ``user/name``.
        repo_type: Model or dataset.
        files: Size in bytes of each file, by name.
        url: The repo's page; None in a dry run.
        commit: Commit the repo is at; None in a dry run.
        changed: Whether this upload made that commit; False when the repo held the same files.
    """

    repo_id: str
    repo_type: Literal["model", "dataset"]
    files: dict[str, int]
    url: str | None = None
    commit: str | None = None
    changed: bool = False


@dataclass(frozen=True)
class Published:
    """The uploads in their order: the dataset first, since the model's card links to it."""

    uploads: tuple[Upload, ...]

    def __str__(self) -> str:
        lines = []
        for upload in self.uploads:
            if upload.url is None:
                state = "would go (dry run)"
            else:
                state = f"{'published' if upload.changed else 'nothing changed'}: {upload.url}"
            lines.append(f"{upload.repo_type} {upload.repo_id}, {sum(upload.files.values()):,} bytes, {state}")
            lines += [f"  {size:>15,}  {name}" for name, size in upload.files.items()]
        return "\n".join(lines)


@dataclass(frozen=True)
class _Plan:
    repo_id: str
    repo_type: Literal["model", "dataset"]
    paths: tuple[Path, ...]

    @property
    def files(self) -> dict[str, int]:
        return {_in_repo(path): path.stat().st_size for path in self.paths}


def publish(
    model_dir: Path | None,
    groups_dir: Path | None,
    *,
    model_id: str | None,
    dataset_id: str | None,
    private: bool = True,
    token: str | None = None,
    dry_run: bool = False,
    endpoint: str | None = None,
) -> Published:
    """Upload a reranker and its groups, each with its card, to two Hub repos, one commit each.

    Everything is checked before the first byte goes, and both repos are made before the first upload. Publishing
    again uploads only what changed, and makes no commit when nothing did. Weights that an earlier publish left
    in the repo and that would be loaded in place of the new ones are deleted in the same commit.

    Args:
        model_dir: Folder of the model with its ``README.md``; None, with ``model_id``, to publish groups alone.
        groups_dir: The groups artifact with its ``README.md``; None, with ``dataset_id``, to publish a model alone.
        model_id: Hub repo of the model, ``user/name``.
        dataset_id: Hub repo of the groups, ``user/name``.
        private: Make new repos private; a repo that is public already is then refused, not written to.
        token: Hub token; the one of ``hf auth login`` or ``HF_TOKEN`` if None. It is written nowhere.
        dry_run: List what would go; contacts nobody and needs no token.
        endpoint: The Hub's address, if not ``HF_ENDPOINT`` or huggingface.co.

    Raises:
        PublishError: A file is missing or holds a token, the Hub refuses, or it cannot be reached.
        ArtifactError: The groups are missing, unfinished or damaged.
    """
    token = (token or (None if dry_run else get_token()) or "").strip()
    plans = []
    if groups_dir is not None and dataset_id is not None:
        plans.append(_Plan(_repo_id(dataset_id), "dataset", _groups_files(groups_dir)))
    if model_dir is not None and model_id is not None:
        plans.append(_Plan(_repo_id(model_id), "model", _model_files(model_dir)))
    if not plans or (model_dir is None) != (model_id is None) or (groups_dir is None) != (dataset_id is None):
        raise PublishError("name the repos to publish to: publish.model_id=user/name, publish.dataset_id=user/name")
    for plan in plans:
        _refuse_tokens(plan.paths, token)
    if dry_run:
        return Published(tuple(Upload(plan.repo_id, plan.repo_type, plan.files) for plan in plans))
    if not token:
        raise PublishError("there is no Hub token: run `hf auth login`, or set HF_TOKEN to one with write access")

    api = HfApi(endpoint=endpoint, token=token, library_name="lce-trainer")
    for plan in plans:
        _make_repo(api, plan, private, token)
    uploads: list[Upload] = []
    for plan in plans:
        done = "".join(f" ({upload.repo_id} is published already; run again for the rest)" for upload in uploads)
        uploads.append(_upload(api, plan, token, done))
    return Published(tuple(uploads))


def _repo_id(name: str) -> str:
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise PublishError(f"{name!r} is not a Hub repo: {_one_line(str(error))}") from None
    if "/" not in name:
        raise PublishError(f"{name!r} names no owner: write user/{name} or organization/{name}")
    return name


def _model_files(folder: Path) -> tuple[Path, ...]:
    if not folder.is_dir():
        raise PublishError(f"no model at {folder}: train one first")
    paths = sorted(path for path in folder.iterdir() if path.is_file() and _matches(path.name, _MODEL_FILES))
    paths += (folder / _LOGIT_SCORE).glob("config.json")
    names = [path.name for path in paths]
    for what, patterns in (
        ("model card", (CARD,)),
        ("configuration", ("config.json", "adapter_config.json")),
        ("safetensors weights", ("*.safetensors",)),
        ("tokenizer", ("tokenizer.json", "tokenizer_config.json")),
    ):
        if not any(_matches(name, patterns) for name in names):
            raise PublishError(f"{folder} has no {what} ({' or '.join(patterns)}), so it cannot be published")
    return tuple(paths)


def _groups_files(folder: Path) -> tuple[Path, ...]:
    tables = sorted(read_manifest(folder, "groups").files)
    if not (folder / CARD).is_file():
        raise PublishError(f"{folder} has no dataset card ({CARD}), so it cannot be published")
    return tuple(folder / name for name in (CARD, MANIFEST, *tables))


def _in_repo(path: Path) -> str:
    return f"{_LOGIT_SCORE}/{path.name}" if path.parent.name == _LOGIT_SCORE else path.name


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _refuse_tokens(paths: Sequence[Path], token: str) -> None:
    for path in paths:
        if path.suffix in _NOT_TEXT:
            continue
        content = path.read_bytes()
        if (token and token.encode() in content) or _TOKEN.search(content):
            raise PublishError(f"{path} holds a Hub token: remove it, revoke the token, and publish again")


def _make_repo(api: HfApi, plan: _Plan, private: bool, token: str) -> None:
    with _one_line_errors(plan, token):
        api.create_repo(plan.repo_id, repo_type=plan.repo_type, private=private, exist_ok=True)
        is_private = api.repo_info(plan.repo_id, repo_type=plan.repo_type).private
    if private and is_private is False:
        raise PublishError(
            f"the {plan.repo_type} repo {plan.repo_id} exists and is public, and a private one was asked for: "
            "make it private in its settings on the Hub, or publish openly with publish.private=false"
        )
    if is_private and not private:
        logger.warning("%s was made private before and stays so; its settings on the Hub change that", plan.repo_id)


def _upload(api: HfApi, plan: _Plan, token: str, done: str) -> Upload:
    with _one_line_errors(plan, token, done):
        head = api.repo_info(plan.repo_id, repo_type=plan.repo_type).sha
        files = plan.files
        stale: list[str] = []
        if plan.repo_type == "model":
            there = api.list_repo_files(plan.repo_id)
            stale = sorted(name for name in there if _matches(name, _WEIGHTS) and name not in files)
        commit = api.create_commit(
            plan.repo_id,
            [
                *(CommitOperationAdd(path_in_repo=_in_repo(path), path_or_fileobj=path) for path in plan.paths),
                *(CommitOperationDelete(path_in_repo=name) for name in stale),
            ],
            commit_message=f"Upload {'reranker' if plan.repo_type == 'model' else 'groups'} with lce-trainer",
            repo_type=plan.repo_type,
            parent_commit=head,
        )
    url = f"{api.endpoint}/{'datasets/' if plan.repo_type == 'dataset' else ''}{plan.repo_id}"
    return Upload(plan.repo_id, plan.repo_type, files, url, commit.oid, changed=commit.oid != head)


@contextmanager
def _one_line_errors(plan: _Plan, token: str, done: str = "") -> Iterator[None]:
    """Turn whatever the client raises into a PublishError of one line that never holds the token."""
    try:
        yield
    except (HTTPError, OSError, ValueError, KeyError, RuntimeError) as error:
        what = _one_line(_explain(error, plan)).replace(token, "hf_***")
        raise PublishError(f"the {plan.repo_type} {plan.repo_id} was not published: {what}{done}") from None


def _explain(error: BaseException, plan: _Plan) -> str:
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, HfHubHTTPError):  # an upload thread wraps it in a RuntimeError
        cause = cause.__cause__
    if cause is None:
        if isinstance(error, OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set: unset it to reach the Hub"
        if isinstance(error, HTTPError):
            return f"the Hub cannot be reached ({error}): check the network and HF_ENDPOINT, then run again"
        return str(error)
    status = cause.response.status_code
    said = f" ({status}: {cause.server_message})" if cause.server_message else f" ({status})"
    if status == 401:
        return f"the Hub does not know the token{said}: log in with `hf auth login`, or set HF_TOKEN to a valid one"
    if status == 403:
        owner = plan.repo_id.partition("/")[0]
        return f"the token may not write to {owner!r}{said}: make one with write access there, or name another owner"
    if status == 404:
        return f"the Hub has no such repo or owner{said}, or hides it from this token: check {plan.repo_id!r}"
    if status in (409, 412):
        return f"the repo changed while this upload ran{said}: run again"
    if status == 429:
        return f"the Hub has had too many requests{said}: wait some minutes, then run again"
    if status >= 500:
        return f"the Hub has trouble{said}: run again later"
    if type(error) is ValueError:
        return str(error)  # the client's own words: which metadata of the card is not valid
    return f"the Hub refused{said}"


def _one_line(text: str) -> str:
    return " ".join(text.split())
