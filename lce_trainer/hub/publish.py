"""Every upload to the Hugging Face Hub: a model and the groups it was trained on."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError: httpx's or httpx2's, by version
    HfHubHTTPError,
    HTTPError,
    OfflineModeIsEnabled,
)

from lce_trainer.errors import PublishError
from lce_trainer.hub.contents import WEIGHTS, Repo, matches
from lce_trainer.hub.privacy import private_paths, refuse_private
from lce_trainer.settings import option

logger = logging.getLogger(__name__)


@dataclass
class PublishConfig:
    """Where the model and the groups go."""

    model_id: str | None = option(None, "Hub repo of the model, as user/name.")
    dataset_id: str | None = option(None, "Hub repo of the groups, as user/name.")
    private: bool = option(True, "Make new repos private.")
    license: str | None = option(None, "License of model and dataset, by the Hub's identifier; null: none is given.")
    language: str | None = option(
        None, "Language of queries and passages, by ISO 639 code (en; de, fr), where the corpus does not say."
    )


@dataclass(frozen=True)
class Upload:
    """What goes, or went, to one repo.

    Attributes:
        repo_id: ``user/name``.
        repo_type: Model or dataset.
        files: Size in bytes of each file, by name.
        left_out: What could have gone and does not, each with the reason.
        url: The repo's page; None in a dry run.
        commit: Commit the repo is at; None in a dry run.
        changed: Whether this upload made that commit; False when the repo held the same files.
    """

    repo_id: str
    repo_type: Literal["model", "dataset"]
    files: dict[str, int]
    left_out: tuple[str, ...] = ()
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
            lines += [f"  left out: {what}" for what in upload.left_out]
        return "\n".join(lines)


def publish(
    *repos: Repo,
    private: bool = True,
    token: str | None = None,
    dry_run: bool = False,
    endpoint: str | None = None,
    folders: Sequence[Path] = (),
) -> Published:
    """Upload to one Hub repo or several, one commit each.

    Everything is checked before the first byte goes, and all repos are made before the first upload. Publishing
    again uploads only what changed, and makes no commit when nothing did. Weights that an earlier publish left
    in the repo and that would be loaded in place of the new ones are deleted in the same commit.

    Args:
        repos: What goes where: the dataset first, since the model's card links to it.
        private: Make new repos private; a repo that is public already is then refused, not written to.
        token: Hub token; the one of ``hf auth login`` or ``HF_TOKEN`` if None. It is written nowhere.
        dry_run: List what would go; contacts nobody and needs no token.
        endpoint: The Hub's address, if not ``HF_ENDPOINT`` or huggingface.co.
        folders: Paths of this machine that no file may hold, besides the home folder.

    Raises:
        PublishError: A file holds a token or a path of this machine, the Hub refuses, or it cannot be reached.
    """
    token = (token or (None if dry_run else get_token()) or "").strip()
    for repo in repos:
        refuse_private(repo.files, token, private_paths(*folders))
    if dry_run:
        return Published(tuple(Upload(repo.repo_id, repo.repo_type, repo.sizes, repo.left_out) for repo in repos))
    if not token:
        raise PublishError("there is no Hub token: run `hf auth login`, or set HF_TOKEN to one with write access")

    api = HfApi(endpoint=endpoint, token=token, library_name="lce-trainer")
    for repo in repos:
        _make_repo(api, repo, private, token)
    uploads: list[Upload] = []
    for repo in repos:
        done = "".join(f" ({upload.repo_id} is published already; run again for the rest)" for upload in uploads)
        uploads.append(_upload(api, repo, token, done))
    return Published(tuple(uploads))


def _make_repo(api: HfApi, repo: Repo, private: bool, token: str) -> None:
    with _one_line_errors(repo, token):
        api.create_repo(repo.repo_id, repo_type=repo.repo_type, private=private, exist_ok=True)
        is_private = api.repo_info(repo.repo_id, repo_type=repo.repo_type).private
    if private and is_private is False:
        raise PublishError(
            f"the {repo.repo_type} repo {repo.repo_id} exists and is public, and a private one was asked for: "
            "make it private in its settings on the Hub, or publish openly with publish.private=false"
        )
    if is_private and not private:
        logger.warning("%s was made private before and stays so; its settings on the Hub change that", repo.repo_id)


def _upload(api: HfApi, repo: Repo, token: str, done: str) -> Upload:
    with _one_line_errors(repo, token, done):
        head = api.repo_info(repo.repo_id, repo_type=repo.repo_type).sha
        stale: list[str] = []
        if repo.repo_type == "model":
            there = api.list_repo_files(repo.repo_id)
            stale = sorted(name for name in there if matches(name, WEIGHTS) and name not in repo.files)
        commit = api.create_commit(
            repo.repo_id,
            [
                *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=at) for name, at in repo.files.items()),
                *(CommitOperationDelete(path_in_repo=name) for name in stale),
            ],
            commit_message=f"Upload {'reranker' if repo.repo_type == 'model' else 'groups'} with lce-trainer",
            repo_type=repo.repo_type,
            parent_commit=head,
        )
    url = f"{api.endpoint}/{'datasets/' if repo.repo_type == 'dataset' else ''}{repo.repo_id}"
    return Upload(repo.repo_id, repo.repo_type, repo.sizes, repo.left_out, url, commit.oid, commit.oid != head)


@contextmanager
def _one_line_errors(repo: Repo, token: str, done: str = "") -> Iterator[None]:
    """Turn whatever the client raises into a PublishError of one line that never holds the token."""
    try:
        yield
    except (HTTPError, OSError, ValueError, KeyError, RuntimeError) as error:
        what = _one_line(_explain(error, repo)).replace(token, "hf_***")
        raise PublishError(f"the {repo.repo_type} {repo.repo_id} was not published: {what}{done}") from None


def _explain(error: BaseException, repo: Repo) -> str:
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
        owner = repo.repo_id.partition("/")[0]
        return f"the token may not write to {owner!r}{said}: make one with write access there, or name another owner"
    if status == 404:
        return f"the Hub has no such repo or owner{said}, or hides it from this token: check {repo.repo_id!r}"
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
