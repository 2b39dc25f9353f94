"""What the documents tell people to type works."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.paths import ROOT
from lce_trainer.cli import parser
from lce_trainer.pipeline.run import open_run

DOCUMENTS = ("README.md", "docs/trainer.md", "recipes/README.md", "CONTRIBUTING.md", "recipes/medquad/recipe.yaml")
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
def test_every_command_parses_and_its_recipe_reads(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = parser().parse_args(words_of(command)[1:])
    open_run(arguments.recipe, arguments.overrides)


@pytest.mark.parametrize("command", commands("accelerate launch"))
def test_every_launch_names_files_that_exist(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    script = next(i for i, word in enumerate(words_of(command)) if word.endswith(".py"))
    assert all((ROOT / word).is_file() for word in words_of(command) if word.endswith((".py", ".yaml")))
    recipe, *overrides = words_of(command)[script + 1 :]
    open_run(Path(recipe), overrides)


@pytest.mark.parametrize("block", blocks("yaml"))
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


def run_with_reranker(called: str, reranker: Path, folder: Path, also: str = "") -> str:
    """What the one example that calls this prints."""
    (code,) = [block for block in blocks("python") if called in block]
    code = re.sub(r'from_pretrained\("[^"]+"', f"from_pretrained({str(reranker)!r}", code)
    done = subprocess.run([sys.executable, "-c", code + also], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_reranker_example_ranks(tiny_reranker, tmp_path):
    assert "RankedPassage(index=" in run_with_reranker("reranker.rank(", tiny_reranker, tmp_path)


def test_the_example_that_shares_pairs_scores_them(tiny_reranker, tmp_path):
    (tmp_path / "pairs.tsv").write_text("what is red\ta red fish\nwhat is blue\ta blue bird\n")
    assert "(2,)" in run_with_reranker("accelerator=accelerator", tiny_reranker, tmp_path, "print(scores.shape)")


def test_every_link_leads_somewhere():
    for name in ("README.md", "recipes/README.md", "CONTRIBUTING.md"):
        for link in re.findall(r"\]\(([^)#]+)\)", (ROOT / name).read_text(encoding="utf-8")):
            assert link.startswith("https://") or (ROOT / name).parent.joinpath(link).exists(), (name, link)
