"""The wheel holds what the package needs, and works from an unrelated folder."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from helpers.paths import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(out), str(ROOT)], check=True
    )
    return next(out.glob("*.whl"))


def test_the_wheel_holds_templates_prompts_and_typing(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for name in (
        "hub/model_card_template.md",
        "hub/dataset_card_template.md",
        "py.typed",
        "synthesis/prompts/query.jinja",
        "model/pair_template.jinja",
    ):
        assert f"lce_trainer/{name}" in names
    assert "lce_trainer/synthesis/prompts/verdict.jinja" in names
    assert not [name for name in names if name.startswith(("tests/", "recipes/", "benchmarks/"))]


def test_an_installed_wheel_finds_its_files(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import lce_trainer, pathlib\n"
        f"assert pathlib.Path(lce_trainer.__file__).is_relative_to({str(tmp_path)!r})\n"
        "from lce_trainer.synthesis.prompts import load_prompt\n"
        "from lce_trainer.hub.cards import RunFacts, model_card\n"
        "print(len(load_prompt('likelihood').render(passage='a', examples=[])))\n"
        "from lce_trainer.cli import main\n"
        "main(['--help'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "generate" in done.stdout


def test_every_requirement_has_a_tested_version_that_satisfies_it():
    """Also those of the extras: what nobody pins nobody has tested."""
    tomllib = pytest.importorskip("tomllib", reason="part of Python from 3.11 on")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pinned = {canonicalize_name(Requirement(line).name): Requirement(line) for line in lines}
    wanted = project["dependencies"] + [one for extra in project["optional-dependencies"].values() for one in extra]
    unpinned = set()
    for requirement in map(Requirement, wanted):
        name = canonicalize_name(requirement.name)
        if name in pinned:
            (version,) = (one.version for one in pinned[name].specifier)
            assert requirement.specifier.contains(version), f"{requirement} is tested with {version}"
        else:
            unpinned.add(name)
    assert unpinned <= {"lce-trainer", "build", "types-pyyaml", "types-tqdm"}
