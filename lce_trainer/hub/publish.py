"""Every upload to the Hugging Face Hub: a model, the groups it was trained on, and a Space that shows it."""

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError: httpx's or httpx2's, by version
    HfHubHTTPError,
    HTTPError,
    OfflineModeIsEnabled,
)
from huggingface_hub.hf_api import RepoFile

from lce_trainer.errors import PublishError
from lce_trainer.hub.contents import Repo, RepoType, is_ours
from lce_trainer.hub.privacy import private_paths, refuse_private

logger = logging.getLogger(__name__)

_MAIN = "main"
_STAGING = "lce-trainer-upload"
_DESCRIPTION = "Uploaded by `lce-trainer publish --create-pr`."


@dataclass
class PublishConfig:
    """Where the model, the groups and a Space go."""

    model_id: str | None = field(default=None, metadata={"help": "Hub repo of the model, as user/name."})
    dataset_id: str | None = field(default=None, metadata={"help": "Hub repo of the groups, as user/name."})
    space_id: str | None = field(
        default=None,
        metadata={
            "help": "Hub repo of a Space that shows the order before and after reranking, as user/name; it loads the "
            "model from publish.model_id. --space sets it."
        },
    )
    private: bool = field(default=True, metadata={"help": "Make new repos private."})
    license: str | None = field(
        default=None, metadata={"help": "License of model and dataset, by the Hub's identifier; null: none is given."}
    )
    language: str | None = field(
        default=None,
        metadata={
            "help": "Language of queries and passages, by ISO 639 code (en; de, fr), where the corpus does not say."
        },
    )


@dataclass(frozen=True)
class Upload:
    """What goes, or went, to one repo.

    Attributes:
        repo_id: ``user/name``.
        repo_type: Model, dataset or Space.
        files: Size in bytes of each file, by name.
        left_out: What could have gone and does not, each with the reason.
        target: Where it goes: ``"main"``, another branch, or ``"a pull request"``.
        url: The repo's page, or the pull request's; None in a dry run.
        commit: Commit the target is at; None in a dry run.
        changed: Whether this upload made that commit; False when the target held the same files.
    """

    repo_id: str
    repo_type: RepoType
    files: dict[str, int]
    left_out: tuple[str, ...] = ()
    target: str = _MAIN
    url: str | None = None
    commit: str | None = None
    changed: bool = False


@dataclass(frozen=True)
class Published:
    """The uploads in their order: dataset, model, Space, since each links to those before it."""

    uploads: tuple[Upload, ...]

    def __str__(self) -> str:
        lines = []
        for upload in self.uploads:
            where = "" if upload.target == _MAIN else f" to {upload.target}"
            if upload.url is None:
                state = f"would go{where} (dry run)"
            else:
                state = f"{f'published{where}' if upload.changed else 'nothing changed'}: {upload.url}"
            lines.append(f"{upload.repo_type} {upload.repo_id}, {sum(upload.files.values()):,} bytes, {state}")
            lines += [f"  {size:>15,}  {name}" for name, size in upload.files.items()]
            lines += [f"  left out: {what}" for what in upload.left_out]
        if self.uploads and all(upload.url is None for upload in self.uploads):
            lines.append(f"{sum(sum(upload.files.values()) for upload in self.uploads):,} bytes in all")
        return "\n".join(lines)


@dataclass(frozen=True)
class _Staged:
    """An upload that is on the Hub, where no reader of the target comes by.

    Attributes:
        ref: Branch or pull request that holds it.
        head: Commit that the target was at.
        changed: Names of the files that the target lacks or holds otherwise.
        stale: Names of files of the target that go.
        pull: Number and status of the pull request, if it is one.
    """

    ref: str
    head: str
    changed: tuple[str, ...]
    stale: tuple[str, ...]
    pull: tuple[int, str] | None = None


def publish(
    *repos: Repo,
    private: bool = True,
    token: str | None = None,
    dry_run: bool = False,
    endpoint: str | None = None,
    folders: Sequence[Path] = (),
    revision: str | None = None,
    create_pr: bool = False,
) -> Published:
    """Upload to one Hub repo or several, each in one commit.

    Everything is checked before the first byte goes, and all repos are made before the first upload. Files go to a
    branch of their own first, or to the draft of a pull request. When the Hub's hashes of all of them, in all repos,
    are those of the files here, one commit a repo shows them to readers, and the branch is deleted. So no reader sees
    half of an upload, and one that was interrupted goes on when it is run again: files that arrived are not sent
    twice. Publishing again uploads only what changed, and makes no commit when nothing did. Weights and tables that
    an earlier publish left in the repo, and that would be loaded in place of the new ones, are deleted in the same
    commit.

    Args:
        repos: What goes where: dataset, model, Space, since each links to those before it.
        private: Make new repos private; a repo that is public already is then refused, not written to.
        token: Hub token; the one of ``hf auth login`` or ``HF_TOKEN`` if None. It is written nowhere.
        dry_run: List what would go; contacts nobody and needs no token.
        endpoint: The Hub's address, if not ``HF_ENDPOINT`` or huggingface.co.
        folders: Paths of this machine that no file may hold, besides the home folder.
        revision: Branch to publish to, made if it is not there; main if None.
        create_pr: Open a pull request in place of a commit; needs no right to write to the repo.

    Raises:
        PublishError: A file holds a token or a path of this machine, the Hub refuses, or it cannot be reached.
    """
    if create_pr and revision is not None:
        raise PublishError("--create-pr and --revision exclude each other: the Hub's pull requests are for main")
    if revision is not None and (revision.startswith("refs/") or not re.fullmatch(r"[\w./-]+", revision)):
        raise PublishError(f"--revision must be the name of a branch, such as v2, not {revision!r}")
    target = "a pull request" if create_pr else revision or _MAIN
    token = (token or (None if dry_run else get_token()) or "").strip()
    for repo in repos:
        refuse_private(repo.files, token, private_paths(*folders))
    if dry_run:
        listed = (Upload(repo.repo_id, repo.repo_type, repo.sizes, repo.left_out, target) for repo in repos)
        return Published(tuple(listed))
    if not token:
        raise PublishError("there is no Hub token: run `hf auth login`, or set HF_TOKEN to one with write access")

    api = HfApi(endpoint=endpoint, token=token, library_name="lce-trainer")
    for repo in repos:
        _make_repo(api, repo, private, token, create_pr)
    staged: list[_Staged | None] = []
    for repo in repos:
        with _one_line_errors(repo, token):
            staged.append(_stage_pull(api, repo) if create_pr else _stage(api, repo, revision or _MAIN))
    uploads: list[Upload] = []
    for repo, stage in zip(repos, staged, strict=True):
        done = "".join(f" ({upload.repo_id} is published already; run again for the rest)" for upload in uploads)
        url = f"{api.endpoint}/{'' if repo.repo_type == 'model' else f'{repo.repo_type}s/'}{repo.repo_id}"
        if stage is not None and stage.pull is not None:
            url += f"/discussions/{stage.pull[0]}"
        elif revision not in (None, _MAIN):
            url += f"/tree/{revision}"
        with _one_line_errors(repo, token, done):
            commit, changed = _show(api, repo, revision or _MAIN, stage)
        uploads.append(Upload(repo.repo_id, repo.repo_type, repo.sizes, repo.left_out, target, url, commit, changed))
    return Published(tuple(uploads))


def _make_repo(api: HfApi, repo: Repo, private: bool, token: str, create_pr: bool) -> None:
    with _one_line_errors(repo, token):
        if not create_pr or not api.repo_exists(repo.repo_id, repo_type=repo.repo_type):
            sdk = "gradio" if repo.repo_type == "space" else None
            api.create_repo(repo.repo_id, repo_type=repo.repo_type, private=private, exist_ok=True, space_sdk=sdk)
        is_private = api.repo_info(repo.repo_id, repo_type=repo.repo_type).private
    if private and is_private is False:
        raise PublishError(
            f"the {repo.repo_type} repo {repo.repo_id} exists and is public, and a private one was asked for: "
            "make it private in its settings on the Hub, or publish openly with publish.private=false"
        )
    if is_private and not private:
        logger.warning("%s was made private before and stays so; its settings on the Hub change that", repo.repo_id)


def _stage(api: HfApi, repo: Repo, target: str) -> _Staged | None:
    """Bring an upload to a branch of its own; None if the target holds the same files already."""
    if target != _MAIN:
        api.create_branch(repo.repo_id, branch=target, repo_type=repo.repo_type, exist_ok=True)
    head = str(api.repo_info(repo.repo_id, repo_type=repo.repo_type, revision=target).sha)
    changed, stale = _differences(api, repo, target)
    refs = api.list_repo_refs(repo.repo_id, repo_type=repo.repo_type)
    left = any(branch.name == _STAGING for branch in refs.branches)
    if not changed and not stale:
        if left:  # by an upload that was interrupted when all but this was done
            api.delete_branch(repo.repo_id, branch=_STAGING, repo_type=repo.repo_type)
        return None
    if left and _differences(api, repo, _STAGING) == ((), ()):
        return _Staged(_STAGING, head, changed, stale)
    if left:
        api.delete_branch(repo.repo_id, branch=_STAGING, repo_type=repo.repo_type)
    api.create_branch(repo.repo_id, branch=_STAGING, revision=head, repo_type=repo.repo_type)
    _commit(api, repo, changed, stale, _STAGING, head)
    _verify(api, repo, _STAGING)
    return _Staged(_STAGING, head, changed, stale)


def _stage_pull(api: HfApi, repo: Repo) -> _Staged | None:
    """Bring an upload to the draft of a pull request, or one of ours that is open; None if main holds it already."""
    if _differences(api, repo, _MAIN) == ((), ()):
        return None
    pulls = api.get_repo_discussions(
        repo.repo_id,
        repo_type=repo.repo_type,
        author=api.whoami()["name"],
        discussion_type="pull_request",
        discussion_status="open",
    )
    title = _message(repo)
    pull = next((pull for pull in pulls if pull.title == title), None)
    if pull is None:
        pull = api.create_pull_request(repo.repo_id, title, description=_DESCRIPTION, repo_type=repo.repo_type)
    ref = f"refs/pr/{pull.num}"
    head = str(api.repo_info(repo.repo_id, repo_type=repo.repo_type, revision=ref).sha)
    changed, stale = _differences(api, repo, ref)
    if changed or stale:
        _commit(api, repo, changed, stale, ref, head)
        _verify(api, repo, ref)
    return _Staged(ref, head, changed, stale, (pull.num, pull.status))


def _show(api: HfApi, repo: Repo, target: str, staged: _Staged | None) -> tuple[str, bool]:
    """Make a staged upload visible; returns the commit and whether anything changed."""
    if staged is not None and staged.pull is not None:
        num, status = staged.pull
        if status == "draft":
            api.change_discussion_status(repo.repo_id, num, "open", repo_type=repo.repo_type)
        info = api.repo_info(repo.repo_id, repo_type=repo.repo_type, revision=staged.ref)
        return str(info.sha), bool(staged.changed or staged.stale or status == "draft")
    if staged is None:
        return str(api.repo_info(repo.repo_id, repo_type=repo.repo_type, revision=target).sha), False
    try:
        commit = _commit(api, repo, staged.changed, staged.stale, target, staged.head)
    except HTTPError as error:
        if isinstance(error, HfHubHTTPError):
            raise
        try:  # the commit may have been made, and its answer lost
            made = _differences(api, repo, target) == ((), ())
        except HTTPError:
            raise PublishError(
                f"the connection was lost while the {repo.repo_type} {repo.repo_id} was being published, and whether "
                "it was is not known: run again, which changes nothing if it was"
            ) from None
        if not made:
            raise
        commit = str(api.repo_info(repo.repo_id, repo_type=repo.repo_type, revision=target).sha)
    api.delete_branch(repo.repo_id, branch=_STAGING, repo_type=repo.repo_type)
    return commit, True


def _commit(api: HfApi, repo: Repo, changed: Sequence[str], stale: Sequence[str], revision: str, parent: str) -> str:
    """Make one commit of the changed and the stale files; large ones that the Hub holds are not sent again."""
    commit = api.create_commit(
        repo.repo_id,
        [
            *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=repo.files[name]) for name in changed),
            *(CommitOperationDelete(path_in_repo=name) for name in stale),
        ],
        commit_message=_message(repo),
        repo_type=repo.repo_type,
        revision=revision,
        parent_commit=parent,
    )
    return str(commit.oid)


def _message(repo: Repo) -> str:
    what = {"model": "reranker", "dataset": "groups", "space": "Space"}
    return f"Upload {what[repo.repo_type]} with lce-trainer"


def _differences(api: HfApi, repo: Repo, revision: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names of the files that a revision lacks or holds otherwise, and of those that have to go."""
    tree = api.list_repo_tree(repo.repo_id, recursive=True, revision=revision, repo_type=repo.repo_type)
    there = {
        entry.path: entry.lfs.sha256 if entry.lfs is not None else entry.blob_id
        for entry in tree
        if isinstance(entry, RepoFile)
    }
    changed = tuple(name for name in repo.files if there.get(name) not in repo.hashes[name])
    return changed, tuple(name for name in sorted(there) if name not in repo.files and is_ours(repo.repo_type, name))


def _verify(api: HfApi, repo: Repo, revision: str) -> None:
    changed, stale = _differences(api, repo, revision)
    if changed or stale:
        raise PublishError(
            f"the {repo.repo_type} {repo.repo_id} was not published: the Hub holds other bytes than those sent of "
            f"{', '.join((*changed, *stale))}; run again"
        )


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
    reason = f" ({status}: {cause.server_message})" if cause.server_message else f" ({status})"
    if status == 401:
        return f"the Hub does not know the token{reason}: log in with `hf auth login`, or set HF_TOKEN to a valid one"
    if status == 403:
        owner = repo.repo_id.partition("/")[0]
        return f"the token may not write to {owner!r}{reason}: make one with write access there, or name another owner"
    if status == 404:
        return f"the Hub has no such repo or owner{reason}, or hides it from this token: check {repo.repo_id!r}"
    if status in (409, 412):
        return f"the repo changed while this upload ran{reason}: run again"
    if status == 429:
        return f"the Hub has had too many requests{reason}: wait some minutes, then run again"
    if status >= 500:
        return f"the Hub has trouble{reason}: run again later"
    if type(error) is ValueError:
        return str(error)  # the client's own words: which metadata of the card is not valid
    return f"the Hub refused{reason}"


def _one_line(text: str) -> str:
    return " ".join(text.split())
