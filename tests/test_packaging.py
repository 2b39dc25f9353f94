"""The wheel holds what the package needs, and works from an unrelated folder."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

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
        "hub/space_files/README.md",
        "hub/space_files/app.py",
        "hub/space_files/requirements.txt",
        "py.typed",
        "synthesis/prompts/query.jinja",
        "model/pair_template.jinja",
        "pipeline/report.html.jinja",
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


def project() -> dict:
    tomllib = pytest.importorskip("tomllib", reason="part of Python from 3.11 on")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins_of(name: str) -> dict[str, str]:
    """The one version of each package in a file of constraints."""
    lines = [line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]
    pins = {canonicalize_name(one.name): [pin.version for pin in one.specifier] for one in map(Requirement, lines)}
    assert all(len(versions) == 1 for versions in pins.values())
    return {package: version for package, (version,) in pins.items()}


def test_every_requirement_has_a_tested_version_that_satisfies_it():
    """Also those of the extras: what nobody pins nobody has tested."""
    pinned, extras = pins_of("constraints.txt"), project()["optional-dependencies"].values()
    unpinned = set()
    for requirement in map(Requirement, project()["dependencies"] + [one for extra in extras for one in extra]):
        name = canonicalize_name(requirement.name)
        if name in pinned:
            assert requirement.specifier.contains(pinned[name]), f"{requirement} is tested with {pinned[name]}"
        else:
            unpinned.add(name)
    assert unpinned <= {"lce-trainer", "build", "types-pyyaml", "types-tqdm"}


def test_the_lowest_versions_tested_are_the_lowest_claimed():
    pinned, extras = pins_of("constraints-lowest.txt"), project()["optional-dependencies"]
    wanted = project()["dependencies"] + extras["test"] + extras["peft"] + extras["quickstart"]
    for requirement in map(Requirement, wanted):
        claimed = [Version(one.version) for one in requirement.specifier if one.operator in (">=", "==")]
        if requirement.name != "lce-trainer":
            assert claimed == [Version(pinned[canonicalize_name(requirement.name)])], str(requirement)


def test_no_major_version_that_nobody_has_tested_is_claimed():
    pinned = pins_of("constraints.txt")
    for requirement in map(Requirement, project()["dependencies"]):
        following = Version(pinned[canonicalize_name(requirement.name)]).major + 1
        assert not requirement.specifier.contains(f"{following}.0"), str(requirement)
