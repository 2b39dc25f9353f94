"""A recipe as a job: over HTTP against a server that speaks the Hub's protocol and really runs the command."""

import json
import signal
import sys
import threading
import time
import zipfile
from io import BytesIO
from pathlib import Path

import pytest
from huggingface_hub import constants

from helpers.hub_client import READER, TOKEN
from helpers.hub_server import Blob, Repo
from helpers.jobs_server import ENDED, JobsServer
from helpers.paths import ROOT
from lce_trainer.artifacts import read_manifest, write_manifest
from lce_trainer.errors import JobError
from lce_trainer.hub.jobs import EXTRAS, JobSettings, Submission, build_wheel, job_command, run_remotely, visible_files

REPO = "user/runs"
SECRET = "sk-A0secret0that0nobody0may0read"
# What stands in for lce-trainer in a job: two stages, each with a journal, made unless they are there.
STAGES = """
import os, sys, time
from pathlib import Path
from lce_trainer.artifacts import write_manifest

print("arguments", *sys.argv[1:], flush=True)
print("my key is", os.environ.get("MY_KEY"), flush=True)
run = Path(sys.argv[-1].removeprefix("run_dir="))
for part in ("queries", "groups"):
    folder = run / part
    if (folder / "manifest.json").exists():
        print(part, "already made", flush=True)
        continue
    folder.mkdir(exist_ok=True)
    with (folder / "journal.jsonl").open("a") as journal:
        journal.write("paid for\\n")
    if f"die={part}" in sys.argv and not (run / "tried").exists():
        (run / "tried").write_text("")
        print("error: the LLM is down", flush=True)
        sys.exit(2)
    while f"hang={part}" in sys.argv:
        time.sleep(0.05)
    (folder / "train.parquet").write_bytes(part.encode() * 1000)
    (folder / ".cache").mkdir(exist_ok=True)
    (folder / ".cache" / "data.arrow").write_bytes(b"cache")
    write_manifest(folder, ["train.parquet"], kind=part, config={}, inputs={}, counts={})
    print("made", part, flush=True)
    if f"leak={part}" in sys.argv:
        (run / "leak.txt").write_text(os.environ["MY_KEY"])
"""
JOB = """
import sys
from pathlib import Path
from lce_trainer.hub.jobs import work
sys.exit(work(sys.argv[1], Path("job").absolute(), (sys.executable, sys.argv[2]), pause=0.1))
"""


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The server; the client of this process may use the network, and finds no token of whoever runs the tests."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(tmp_path / "no-tokens"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MY_KEY", SECRET)
    (tmp_path / "stages.py").write_text(STAGES)
    container = [sys.executable, "-c", JOB, REPO, str(tmp_path / "stages.py")]
    with JobsServer({TOKEN: "user", READER: "someone"}, tmp_path / "jobs", lambda job: container) as server:
        yield server


def shell(server: JobsServer, script: str) -> None:
    """Have jobs run a shell script, for tests of what happens here."""
    server.container = lambda job: ["sh", "-c", script]


@pytest.fixture
def folder(tmp_path) -> Path:
    """A recipe and a file that it names."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "recipe.yaml").write_text("corpus: {source: docs.jsonl}\n")
    (tmp_path / "mine" / "docs.jsonl").write_text('{"text": "Sand is fine."}\n')
    return tmp_path / "mine"


def submission(folder: Path, *overrides: str, **settings) -> Submission:
    files = {"recipe.yaml": folder / "recipe.yaml", "docs.jsonl": folder / "docs.jsonl"}
    named_by = {"recipe.yaml": "the recipe", "docs.jsonl": "corpus.source"}
    # A wheel takes half a second to make.
    usual = {"flavor": "cpu-basic", "run_repo": REPO, "secrets": ("MY_KEY",), "package": "lce-trainer"}
    chosen = JobSettings(**{**usual, **settings})
    return Submission("recipe.yaml", overrides, files, named_by, folder / "run", chosen)


def run(hub: JobsServer, folder: Path, *overrides: str, **settings) -> list[str]:
    """Run the recipe as a job; returns what the job printed, and last what is said of it."""
    lines: list[str] = []
    said = run_remotely(submission(folder, *overrides, **settings), lines.append, token=TOKEN, endpoint=hub.url)
    return [*lines, said]


def test_a_job_fails_in_one_line_goes_on_from_what_it_had_finished_and_is_not_paid_for_again(hub, folder, caplog):
    with pytest.raises(JobError) as failed:
        run(hub, folder, "die=groups", "leak=groups", package=None)
    assert "ended as ERROR (Job failed with exit code: 2; error: the LLM is down)" in str(failed.value)
    assert hub.url in str(failed.value) and "\n" not in str(failed.value)
    assert read_manifest(folder / "run" / "queries")

    printed = run(hub, folder, "die=groups", "leak=groups", package=None)
    assert printed[:2] == ["arguments run recipe.yaml die=groups leak=groups run_dir=../run", "my key is [MY_KEY]"]
    assert printed[2:4] == ["queries already made", "made groups"]
    assert printed[4:] == [
        "error: leak.txt holds the value of MY_KEY, and is not sent",
        f"{folder / 'run'} is that of user/runs: 3 files came back",
    ]
    assert (folder / "run" / "groups" / "journal.jsonl").read_text() == "paid for\npaid for\n"
    made = {f"{part}/{name}" for part in ("queries", "groups") for name in ("manifest.json", "train.parquet")}
    made |= {"queries/journal.jsonl", "groups/journal.jsonl", "tried"}
    assert visible_files(folder / "run").keys() == made
    assert read_manifest(folder / "run" / "groups", "groups")
    assert hub.repos["dataset", REPO].private
    there = hub.files("dataset", REPO)
    assert there["inputs/docs.jsonl"] == (folder / "docs.jsonl").read_bytes()
    assert {name[4:] for name in there if name.startswith("run/")} == made
    _, job = hub.jobs
    assert job.spec["secrets"] == {"HF_TOKEN": TOKEN, "MY_KEY": SECRET} and job.spec["timeoutSeconds"] == 6 * 3600
    assert job.spec["command"] == job_command(REPO, submission(folder, package=None))
    again = run(hub, folder, "die=groups", "leak=groups", package=None)
    assert "nothing had changed" in again[-1] and len(hub.jobs) == 2  # it is finished

    # Secrets are in no byte of the repo, past commits included, of the run folder, of logs and messages.
    kept = [blob.content for _, _, files in hub.repos["dataset", REPO].commits for blob in files.values()]
    kept += [*hub.large.values(), *(path.read_bytes() for path in folder.rglob("*") if path.is_file())]
    kept += [line.encode() for line in (*job.lines, *printed, str(failed.value), caplog.text, json.dumps(job.shown()))]
    assert len(kept) > 20
    assert not [content for content in kept if SECRET.encode() in content or TOKEN.encode() in content]


def test_the_second_command_goes_on_with_the_running_job(hub, folder, caplog):
    """What that has made, and what the LLM has answered, is on the Hub before it ends."""
    lines: list[str] = []

    def interrupt(line: str) -> None:
        if line == "made queries":
            raise KeyboardInterrupt

    waiting = submission(folder, "hang=groups")
    with pytest.raises(KeyboardInterrupt):
        run_remotely(waiting, interrupt, token=TOKEN, endpoint=hub.url)
    (job,) = hub.jobs
    assert f"the job {job.id} goes on and is paid for: cancel it with `hf jobs cancel --namespace user {job.id}`" in (
        caplog.text
    )
    with pytest.raises(JobError, match=f"the job {job.id} works in user/runs with another recipe"):
        run(hub, folder)
    wait_for(lambda: {"run/queries/manifest.json", "run/groups/journal.jsonl"} <= hub.files("dataset", REPO).keys())
    threading.Timer(0.3, job.process.send_signal, (signal.SIGTERM,)).start()  # the machine is needed elsewhere
    with pytest.raises(JobError, match="exit code: 143"):
        run_remotely(waiting, lines.append, token=TOKEN, endpoint=hub.url)
    assert len(hub.jobs) == 1 and "made queries" in lines
    assert read_manifest(folder / "run" / "queries")
    assert (folder / "run" / "groups" / "journal.jsonl").read_text() == "paid for\n"


def test_a_job_whose_answer_or_whose_state_is_lost_is_found_again(hub, folder):
    shell(hub, "echo started; while [ ! -e go ]; do sleep 0.02; done")
    hub.lose_answer = "/api/jobs/user"
    with pytest.raises(JobError, match="user/runs: the Hub cannot be reached"):
        run(hub, folder)
    hub.lose_answer = None
    (job,) = hub.jobs
    hub.failures = {f"GET /api/jobs/user/{job.id}": 503}

    def go(line: str) -> None:
        (job.folder / "go").touch()

    with pytest.raises(JobError, match=rf"run again later; the job {job.id} may go on: run the same command again"):
        run_remotely(submission(folder), go, token=TOKEN, endpoint=hub.url)
    assert len(hub.jobs) == 1


def wait_for(happened) -> None:
    until = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < until
        time.sleep(0.02)


def finished_part(folder: Path, name: str, content: bytes) -> None:
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / "train.parquet").write_bytes(content)
    write_manifest(folder / name, ["train.parquet"], kind=name, config={}, inputs={}, counts={})


def test_of_a_stage_made_on_both_sides_the_newer_one_stays_and_two_new_ones_are_refused(hub, folder):
    shell(hub, "true")
    finished_part(folder / "run", "queries", b"mine")
    run(hub, folder)
    repo = hub.repos["dataset", REPO]
    assert hub.files("dataset", REPO)["run/queries/train.parquet"] == b"mine"
    finished_part(folder / "run", "queries", b"mine, newer")
    run(hub, folder)
    assert hub.files("dataset", REPO)["run/queries/train.parquet"] == b"mine, newer"

    finished_part(folder / "theirs", "queries", b"theirs")
    files = {
        f"run/queries/{path.name}": Blob(path.read_bytes(), path.suffix == ".parquet")
        for path in (folder / "theirs" / "queries").iterdir()
    }
    repo.commit("a job's", {**repo.commits[-1][2], **files})
    run(hub, folder)
    assert (folder / "run" / "queries" / "train.parquet").read_bytes() == b"theirs"

    finished_part(folder / "run", "queries", b"mine again")
    files["run/queries/train.parquet"] = Blob(b"theirs again", True)
    repo.commit("a job's", {**repo.commits[-1][2], **files})
    with pytest.raises(JobError, match=r"run/queries and run/queries of the dataset user/runs have both changed"):
        run(hub, folder)
    assert (folder / "run" / "queries" / "train.parquet").read_bytes() == b"mine again"


def test_what_comes_back_damaged_replaces_nothing(hub, folder):
    shell(hub, "true")
    finished_part(folder / "run", "queries", b"mine")
    run(hub, folder)
    repo = hub.repos["dataset", REPO]
    repo.commit("bits that fell over", {**repo.commits[-1][2], "run/queries/train.parquet": Blob(b"mIne", True)})
    with pytest.raises(JobError, match=r"user/runs: .*run/queries/train.parquet is damaged .*: delete run/queries and"):
        run(hub, folder)
    assert (folder / "run" / "queries" / "train.parquet").read_bytes() == b"mine"


def test_what_must_not_go_up_is_refused_before_anything_does(hub, folder, monkeypatch):
    (folder / "docs.jsonl").write_text(f'{{"text": "{SECRET}"}}\n')
    with pytest.raises(JobError, match=r"docs.jsonl holds the value of MY_KEY") as held:
        run(hub, folder)
    (folder / "docs.jsonl").write_text("")
    with pytest.raises(JobError, match="an override holds the value of MY_KEY") as overridden:
        run(hub, folder, f"llm.endpoint=https://{SECRET}@x")
    assert SECRET not in str(held.value) + str(overridden.value)
    monkeypatch.delenv("MY_KEY")
    with pytest.raises(JobError, match="MY_KEY is not set"):
        run(hub, folder)
    with pytest.raises(JobError, match="what was given is no name") as given:
        JobSettings("cpu-basic", secrets=(f"MY_KEY={SECRET}",))
    assert SECRET not in str(given.value)
    with pytest.raises(JobError, match="there is no Hub token"):
        run_remotely(submission(folder, secrets=()), print, endpoint=hub.url)
    for timeout in ("long", "0h"):  # the client would read the second as none
        with pytest.raises(
            JobError, match=f"--timeout must be a number with s, m, h or d, such as 90m, not '{timeout}'"
        ):
            JobSettings("cpu-basic", timeout)
    assert hub.requests == [] and hub.jobs == []


def test_a_repo_that_is_public_or_not_ours_is_refused(hub, folder):
    hub.repos["dataset", REPO] = repo = Repo(private=False)
    repo.commit("initial commit", {})
    with pytest.raises(JobError, match="the dataset user/runs is public"):
        run(hub, folder)
    repo.private = True
    repo.commit("data", {"train.parquet": Blob(b"", True)})
    with pytest.raises(JobError, match=r"holds other things than a run folder, such as train.parquet"):
        run(hub, folder)
    with pytest.raises(JobError, match=r"someone/runs: the token may not write to 'someone' \(403"):
        run(hub, folder, run_repo="someone/runs")
    with pytest.raises(JobError, match=r"no machine 'a10g'; --flavor is one of cpu-basic, a10g-small"):
        run(hub, folder, run_repo="user/new", flavor="a10g")
    assert hub.jobs == []


def test_a_job_that_is_cancelled_or_out_of_time_is_an_error(hub, folder):
    shell(hub, "echo hello; sleep 60")
    with pytest.raises(JobError, match=r"ended as ERROR \(Job timeout\)"):
        run(hub, folder, timeout="1s")
    timer = threading.Thread(target=cancel_next, args=(hub,))
    timer.start()
    with pytest.raises(JobError, match="ended as CANCELED"):
        run(hub, folder)
    timer.join()
    assert all(job.stage in ENDED for job in hub.jobs)


def cancel_next(hub: JobsServer) -> None:
    wait_for(lambda: len(hub.jobs) == 2 and hub.jobs[1].lines)
    hub.jobs[1].stage = "CANCELED"
    hub.stop(hub.jobs[1], signal.SIGTERM)


def test_a_dry_run_lists_command_machine_names_and_sizes_and_contacts_nobody(hub, folder):
    finished_part(folder / "run", "queries", b"mine")
    text = submission(folder, "train.seed=1", flavor="a10g-small", timeout="90m", package=None).describe()
    assert hub.requests == []
    assert "job on a10g-small, image python:3.12, at most 90m" in text
    assert "secrets: HF_TOKEN, MY_KEY (by name; their values are not shown)" in text and SECRET not in text
    assert f"{(folder / 'docs.jsonl').stat().st_size}  inputs/docs.jsonl  (corpus.source)" in text
    assert f"run/  (2 files of {folder / 'run'}" in text
    assert "package/lce_trainer-" in text and "exec python3 -m lce_trainer.hub.jobs user/runs" in text
    other = submission(folder, package="lce-trainer[dense]==0.2.0").describe()
    assert "\n  python3 -m pip install --quiet --disable-pip-version-check 'lce-trainer[dense]==0.2.0' && \n" in other
    assert "package/" not in other
    assert "private dataset YOU/lce-trainer-run" in submission(folder, run_repo=None).describe()


def test_the_wheel_holds_the_package_and_its_records_and_is_the_same_each_time():
    name, content = build_wheel()
    assert build_wheel() == (name, content)
    with zipfile.ZipFile(BytesIO(content)) as archive:
        names = set(archive.namelist())
        record = {
            line.split(",")[0]
            for line in archive.read(f"{name.rpartition('-py3')[0]}.dist-info/RECORD").decode().split()
        }
    assert names == record
    assert {"lce_trainer/cli.py", "lce_trainer/hub/model_card_template.md", "lce_trainer/py.typed"} <= names
    assert not [name for name in names if "__pycache__" in name]


def test_the_extras_of_a_job_are_those_of_the_package():
    tomllib = pytest.importorskip("tomllib", reason="part of Python from 3.11 on")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra, packages in EXTRAS.items():
        assert all(any(line.startswith(package) for line in extras[extra]) for package in packages), extra
