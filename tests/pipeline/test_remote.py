"""What goes up with a recipe that a job runs, and a whole tiny run as a job."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.hub_client import TOKEN
from helpers.jobs_server import JobsServer
from helpers.tiny_recipe import ARTIFACTS, contents, write_recipe
from lce_trainer.artifacts import read_manifest
from lce_trainer.cli import main
from lce_trainer.errors import ConfigError
from lce_trainer.hub.jobs import JobSettings, Submission
from lce_trainer.pipeline.reference import recipe_sections
from lce_trainer.pipeline.remote import NAMING, prepare_job
from lce_trainer.pipeline.run import open_run


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A project: it is started at its top, and the recipe lies in a folder of it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    for name in ("mine/docs.jsonl", "mine/dev.jsonl", "mine/asks.jinja", "mine/asks.chat.jinja", "mine/terms/a.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(name)
    groups = ("runs/first/groups/manifest.json", "runs/first/groups/.cache/data.arrow")
    for name in ("models/llm/config.json", "models/llm/.cache/lock", "extra.csv", *groups):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "mine" / "recipe.yaml").write_text("corpus: {source: docs.jsonl}\n")
    (tmp_path / "empty").mkdir()
    return tmp_path


def prepare(*overrides: str, include: tuple[str, ...] = (), settings: JobSettings | None = None) -> Submission:
    recipe = Path("mine/recipe.yaml")
    return prepare_job(open_run(recipe, overrides), recipe, overrides, settings or JobSettings("cpu-basic"), include)


def test_files_keep_the_names_that_the_recipe_has_for_them(folder):
    found = prepare(
        "evaluate.dev_queries=dev.jsonl",
        "generate.prompt=asks.jinja",
        "evaluate.benchmark=[nano_beir, terms]",
        "llm.model=models/llm",
        "train.groups=runs/first/groups",
        "mine.encoder=user/encoder",
        "label.reranker=package:name/folder",
        include=("extra.csv",),
    )
    mine = ("docs.jsonl", "dev.jsonl", "asks.jinja", "asks.chat.jinja", "recipe.yaml", "terms/a.md")
    wanted = {name: Path("mine") / name for name in mine}
    wanted |= {name: Path(name) for name in ("models/llm/config.json", "extra.csv", "runs/first/groups/manifest.json")}
    assert found.files == wanted
    text = found.describe()
    assert "inputs/terms  (1 file, evaluate.benchmark)" in text and "inputs/models/llm  (1 file, llm.model)" in text
    assert "inputs/extra.csv  (--include)" in text and "inputs/asks.chat.jinja  (generate.prompt)" in text


def test_a_job_installs_what_the_recipe_needs(folder):
    (folder / "mine" / "asks.gguf").touch()
    assert prepare("train.model=user/model", "llm.endpoint=https://llm.example").extras == ()
    assert prepare("train.model=user/model", "train.groups=user/groups").extras == ()
    assert prepare("train.lora.r=8", "mine.encoder=user/encoder").extras == ("dense", "peft", "quickstart")
    assert prepare("train.model=user/model", "llm.model=mine/asks.gguf").extras == ("gguf",)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["corpus.source=/data/docs.jsonl"], "corpus.source names /data/docs.jsonl, and a job has only what lies in"),
        (["corpus.source=../docs.jsonl"], "corpus.source names ../docs.jsonl, and a job has only"),
        (["train.model=~/model"], "train.model names ~/model, and a job has only"),
        (["corpus.source=dosc.jsonl"], "corpus.source names dosc.jsonl, and there is no such file"),
        (["evaluate.dev_queries=none"], "evaluate.dev_queries names none, and there is no such file"),
        (["train.model=./gone"], "train.model names ./gone, and there is no such file"),
        (["corpus.source=mine"], "corpus.source names the folder mine, which holds the recipe"),
        (["corpus.source=models"], r"which holds hidden files, such as llm/.cache/lock: they may be private"),
        (["corpus.source=empty"], "corpus.source names the folder empty, which holds no files"),
        (["run_dir=mine/terms/run", "corpus.source=mine/terms"], "the folder mine/terms, which holds the run folder"),
        (["evaluate.queries=mine/dev.jsonl", "corpus.source=mine/none.csv"], "there is no such file"),
        (["llm.endpoint=http://localhost:8080"], "http://localhost:8080 is a server on this machine"),
        (["train.deepspeed=/etc/zero3.json"], "train.deepspeed is /etc/zero3.json, a path of this machine"),
    ],
)
def test_what_a_job_could_not_have_is_refused_by_name(folder, overrides, message):
    with pytest.raises(ConfigError, match=re.escape(message) if "\\" not in message else message):
        prepare(*overrides)


def test_the_home_folder_never_goes_up(folder, monkeypatch):
    (folder / "home").mkdir()
    (folder / "home" / "me").mkdir()
    monkeypatch.setenv("HOME", str(folder / "home" / "me"))
    for name in ("home", "home/me"):
        with pytest.raises(ConfigError, match="which holds the home folder"):
            prepare(f"corpus.source={name}")
    (folder / "link").symlink_to(folder / "home")
    with pytest.raises(ConfigError, match="which holds the home folder"):
        prepare("corpus.source=docs.jsonl", include=("link",))


def test_two_files_of_one_name_are_refused(folder):
    (folder / "recipe.yaml").write_text("another")
    with pytest.raises(ConfigError, match=r"would both be recipe.yaml in the job: rename one of them"):
        prepare("corpus.source=recipe.yaml")


def test_every_key_that_names_files_is_known():
    """A key that is added with a file or a folder in its help goes along with a job, or this test says so."""
    other = {"run_dir", "corpus.text_column", "mine.first_stage", "evaluate.relevant_from", "label.judge"}
    keys = [key for section in recipe_sections() for key in section.keys if not key.inherited]
    naming = [key.name for key in keys if "str" in key.type and re.search(r"\b(file|folder|jinja|Hub id)", key.help)]
    assert set(naming) - other <= set(NAMING), set(naming) - other - set(NAMING)
    assert set(NAMING) <= {key.name for key in keys}


def test_the_command_says_what_it_would_submit_and_what_its_flags_need(folder, capsys, monkeypatch):
    monkeypatch.setenv("MY_KEY", "a-secret-value")
    run = ["run", "mine/recipe.yaml"]
    job = ["--on", "hf-jobs", "--dry-run", "--secret", "MY_KEY"]
    assert main([*run, *job, "--flavor", "a10g-small", "train.seed=3"]) == 0
    printed = capsys.readouterr().out
    assert "job on a10g-small" in printed and "inputs/docs.jsonl  (corpus.source)" in printed
    assert "secrets: HF_TOKEN, MY_KEY" in printed and "a-secret-value" not in printed
    assert main([*run, *job]) == 2
    assert "--on hf-jobs needs --flavor" in capsys.readouterr().err
    assert main([*run, "--run-repo", "user/runs"]) == 2
    assert "--run-repo is for a run on another machine: add --on hf-jobs" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "0")
    assert main([*run, *job, "--flavor", "a10g-small"]) == 2
    assert "start the command without accelerate launch or torchrun" in capsys.readouterr().err
    assert not (folder / "runs" / "recipe").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_whole_run_as_a_job_whose_artifacts_a_local_run_takes_up(tmp_path):
    """The wheel of this source is installed by pip and runs; what it makes comes back, and nothing is made again."""
    folder = tmp_path / "mine"
    folder.mkdir()
    recipe = write_recipe(folder)
    recipe.write_text(recipe.read_text().replace(f"{folder}/", ""))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    command = [sys.executable, "-m", "lce_trainer.cli", "run", "recipe.yaml"]
    with JobsServer({TOKEN: "user"}, tmp_path / "jobs") as hub:
        environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        environment["HF_TOKEN"] = TOKEN
        job = [*command, "--on", "hf-jobs", "--flavor", "cpu-basic", "--timeout", "20m"]
        done = subprocess.run(job, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        (submitted,) = hub.jobs
        assert (submitted.folder / "site" / "lce_trainer" / "cli.py").is_file()
        assert hub.repos["dataset", "user/lce-trainer-run"].private
        kept = [*hub.large.values(), *(blob for blob in hub.files("dataset", "user/lce-trainer-run").values())]
        assert not [content for content in kept if TOKEN.encode() in content]
        assert TOKEN not in done.stdout + done.stderr + "".join(submitted.lines)
    assert "Done in" in done.stdout and "files came back" in done.stdout
    for name in ARTIFACTS:
        assert read_manifest(folder / "run" / name, name)
    assert not (folder / "run" / "checkpoints").exists() or not any((folder / "run" / "checkpoints").iterdir())
    before = contents(folder / "run")
    environment |= {"HF_HUB_OFFLINE": "1"}
    again = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr[-3000:]
    for name in ARTIFACTS:
        assert f"{name}: already made" in again.stderr, again.stderr
    assert "made again" not in again.stderr and contents(folder / "run") == before
