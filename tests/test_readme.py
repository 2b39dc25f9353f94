"""What the documents tell people to type works."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import lce_trainer
from helpers.paths import ROOT
from lce_trainer.cli import parser
from lce_trainer.pipeline.reference import find_keys
from lce_trainer.pipeline.run import open_run

PAGES = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").rglob("*.md"))]
RESULTS = "recipes/quickstart/RESULTS.md"
DOCUMENTS = ("README.md", "recipes/README.md", RESULTS, "CONTRIBUTING.md", "recipes/medquad/recipe.yaml", *PAGES)
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands(program: str) -> list[str]:
    """Every command of a program in a shell block of a document, or inline, that names a recipe file."""
    found = []
    for name in DOCUMENTS:
        text = (ROOT / name).read_text(encoding="utf-8").replace("\\\n#", " ").replace("\\\n", " ")
        text = "\n".join(blocks("bash", text)) if name.endswith(".md") else text
        found += [line.lstrip("# ").strip() for line in text.splitlines() if line.lstrip("# ").startswith(program)]
    return found


def words_of(command: str) -> list[str]:
    return shlex.split(command, comments=True)


def test_the_documents_hold_commands():
    assert len(commands("make ")) >= 2
    assert len(commands("lce-trainer ")) >= 3
    assert len(commands("accelerate launch")) >= 3


@pytest.mark.parametrize("command", commands("make "))
def test_every_make_target_exists(command):
    for target in words_of(command)[1:]:
        done = subprocess.run(["make", "--dry-run", "--always-make", target], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", commands("lce-trainer "))
def test_every_command_parses_and_its_recipe_reads(command, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    arguments, overrides = parser().parse_known_args(words_of(command)[1:])
    if arguments.command == "config":
        assert find_keys(arguments.section)
        return
    recipe = ROOT / str(getattr(arguments, "recipe", "none"))
    if not recipe.is_file():  # one that the reader writes, or has written by init
        recipe = tmp_path / "recipe.yaml"
        recipe.touch()
    open_run(recipe, [*getattr(arguments, "overrides", []), *overrides])


@pytest.mark.parametrize("command", commands("accelerate launch"))
def test_every_launch_names_files_that_exist(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    script = next(i for i, word in enumerate(words_of(command)) if word.endswith(".py"))
    assert all((ROOT / word).is_file() for word in words_of(command) if word.endswith((".py", ".yaml")))
    recipe, *overrides = words_of(command)[script + 1 :]
    open_run(Path(recipe), overrides)


def recipes() -> list[str]:
    return [
        block for name in ("README.md", *PAGES) for block in blocks("yaml", (ROOT / name).read_text(encoding="utf-8"))
    ]


@pytest.mark.parametrize("block", recipes())
def test_every_recipe_shown_reads(block, tmp_path):
    (tmp_path / "recipe.yaml").write_text(block, encoding="utf-8")
    open_run(tmp_path / "recipe.yaml")


@pytest.mark.parametrize("code", [block for block in blocks("python") if "LCETrainer(" in block])
def test_every_trainer_example_trains(code, tiny_reranker, tmp_path):
    triplets = [{"anchor": f"what is {i}", "positive": "red fish", "negative": f"bird {i}"} for i in range(4)]
    (tmp_path / "triplets.jsonl").write_text("".join(json.dumps(row) + "\n" for row in triplets))
    code = re.sub(r'model="[^"]+"', f"model={str(tiny_reranker)!r}", code)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_the_reranker_example_ranks(tiny_reranker, tmp_path):
    (code,) = [block for block in blocks("python") if "reranker.rank(" in block]
    code = re.sub(r'from_pretrained\("[^"]+"', f"from_pretrained({str(tiny_reranker)!r}", code)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "RankedPassage(index=" in done.stdout


def test_the_readme_is_for_someone_with_two_minutes():
    lines = README.splitlines()
    assert len(lines) <= 150 and len(README.split()) <= 900
    first = next(number for number, line in enumerate(lines) if "pip install" in line)
    assert first <= 40 and lines.index("make test         # the tests") <= 40
    assert all(len(line) <= 140 for line in lines)
    assert README.count("|---|") == 1  # one table


def test_the_changelog_begins_with_the_version_of_the_package():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## (\S+)", text, re.MULTILINE)[1] == lce_trainer.__version__
    assert f"version: {lce_trainer.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def made_without(index: str, gpu: bool, tmp_path: Path) -> str:
    """What ``make`` would run for a new environment, on a Linux machine with an NVIDIA GPU or without."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("make", "uname", "sh", "bash"):
        (tools / name).symlink_to(shutil.which(name))
    if gpu:
        (tools / "nvidia-smi").touch(mode=0o755)
    command = ["make", "--dry-run", f"VENV={tmp_path / 'new'}", f"CPU_TORCH={index}", "quickstart"]
    done = subprocess.run(command, cwd=ROOT, env={"PATH": str(tools)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="PyPI's torch brings CUDA on Linux only")
@pytest.mark.parametrize("gpu", [True, False])
def test_a_machine_without_a_gpu_takes_the_cpu_build_of_torch(gpu, tmp_path):
    printed = made_without("https://torch.example/cpu", gpu, tmp_path)
    assert ("--index-url https://torch.example/cpu torch" in printed) is not gpu
    assert "install --quiet -c constraints.txt -e '.[quickstart]'" in printed


def test_every_link_leads_somewhere():
    for name in ("README.md", "recipes/README.md", "CONTRIBUTING.md"):
        for link in re.findall(r"\]\(([^)#]+)\)", (ROOT / name).read_text(encoding="utf-8")):
            assert link.startswith("https://") or (ROOT / name).parent.joinpath(link).exists(), (name, link)
