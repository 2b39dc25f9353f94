"""The pages under docs/ do what they say."""

import ast
import html
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from docs.design.draw import DRAWING, arrows, draw
from docs.hooks import LLMS, list_pages
from helpers.snippets import run_code
from lce_trainer.cli import main
from lce_trainer.model.saving import write_calibration
from lce_trainer.pipeline.reference import recipe_sections

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lce_trainer"
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def snippets(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text_of(page), re.DOTALL)


@pytest.fixture
def given(tmp_path: Path, tiny_reranker: Path) -> Path:
    """A folder with the files that the pages name."""
    shutil.copytree(tiny_reranker, tmp_path / "runs" / "quickstart" / "model")
    write_calibration(tmp_path / "runs" / "quickstart" / "model", {"slope": 2.0, "intercept": -1.0})
    (tmp_path / "pairs.tsv").write_text("what is red\ta red fish\nwhat is blue\ta blue bird\n")
    rows = [{"query": f"what is {i}", "pos": ["red fish"], "neg": [f"bird {i}", "river"]} for i in range(4)]
    (tmp_path / "flag.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page)], ids=lambda page: page.stem)
def test_every_snippet_of_a_page_runs_in_order(page, given):
    if page.stem == "export":  # whose first commands are not Python
        if not find_spec("onnxscript") or not find_spec("nncf"):
            pytest.skip("of the extras export and openvino")
        for runtime in ("onnx", "openvino"):
            assert main(["export", str(given / "runs" / "quickstart" / "model"), "--to", runtime, "--int8"]) == 0
    printed = run_code("\n".join(snippets(page)), given)
    if page.stem == "trainer":
        assert len(snippets(page)) >= 5 and "Lima" in printed
    if page.stem == "adapters":
        assert (given / "merged" / "model.safetensors").is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_link_of_a_page_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text_of(page)):
        assert link.startswith("https://") or (page.parent / link).exists(), link


def test_every_page_is_in_the_navigation_once():
    yaml = pytest.importorskip("yaml")
    entries: list[str] = []

    def walk(node):
        if isinstance(node, str):
            entries.append(node)
        for inner in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
            walk(inner)

    walk(yaml.safe_load(text_of(ROOT / "mkdocs.yml"))["nav"])
    assert sorted(entries) == [page.relative_to(DOCS).as_posix() for page in PAGES]


def test_the_site_builds_without_warnings_and_asks_no_other_server(tmp_path):
    """Strict: a link, an anchor or a name of the API that is not there is an error."""
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "true", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for page in (tmp_path / "site").rglob("*.html"):
        loaded = re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=\"(https?:[^\"]+)", text_of(page))
        assert not loaded, (page, loaded)
    recipe = text_of(tmp_path / "site" / "reference" / "recipe" / "index.html")
    for section in recipe_sections():
        for key in (key for key in section.keys if not key.inherited):
            name = key.name.rpartition(".")[2]
            assert f"<code>{name}</code>" in html.unescape(recipe), key.name
    arguments = text_of(tmp_path / "site" / "reference" / "arguments" / "index.html")
    assert "micro_batch_size" in arguments and "gradient_accumulation_steps" in arguments
    assert "lce-trainer init" in text_of(tmp_path / "site" / "reference" / "command" / "index.html")
    linked = re.findall(r"\]\(([^)]+)\)", text_of(tmp_path / "site" / "llms.txt"))
    assert len(linked) == len(PAGES)
    assert [link for link in linked if not (tmp_path / "site" / link / "index.html").exists()] == []
    assert "0.368" in text_of(tmp_path / "site" / "benchmarks" / "index.html")


def test_the_list_for_language_models_is_that_of_the_pages():
    assert LLMS.read_text(encoding="utf-8") == list_pages(), "run python -m docs.hooks"
    for page in PAGES:
        assert f"](docs/{page.relative_to(DOCS).as_posix()})" in list_pages()


def test_the_drawing_is_that_of_the_code_and_small():
    assert DRAWING.read_text(encoding="utf-8") == draw(), "run make design"
    assert len(arrows()) <= 50, sorted(arrows())


def walks() -> dict[str, list[tuple[str, str]]]:
    """File and text of each step, by the walk's name."""
    parts = re.split(r"^## ", text_of(DOCS / "design" / "walks.md"), flags=re.MULTILINE)[1:]
    return {
        part.partition("\n")[0]: re.findall(r"^\| `([^`]+\.py)` \| (.*) \|$", part, flags=re.MULTILINE)
        for part in parts
    }


@pytest.mark.parametrize("walk", walks())
def test_a_walk_names_files_that_exist_once_each_and_functions_that_are_in_them(walk):
    steps = walks()[walk]
    names = [name for name, _ in steps]
    assert len(steps) >= 5 and len(names) == len(set(names))
    for name, text in steps:
        code = text_of(PACKAGE / name)
        for called in re.findall(r"`([A-Za-z_.]+)`", text):
            last = called.rpartition(".")[2]
            known = re.search(rf"^\s*(?:def|class) {last}\b|^{last}\b", code, re.MULTILINE)
            assert known or called in ("Trainer",), (name, called)


def test_the_four_walks_are_there():
    assert len(walks()) == 4


def test_what_moved_names_modules_that_exist():
    rows = re.findall(r"^\| `(\w+)` \| (.+) \|$", text_of(DOCS / "design" / "moved.md"), re.MULTILINE)
    assert len(rows) == 58
    for old, new in rows:
        for module in re.findall(r"`([\w.]+)`", new):
            path = PACKAGE.joinpath(*module.split("."))
            assert path.with_suffix(".py").is_file() or (path / "__init__.py").is_file(), (old, module)


def test_what_to_change_names_paths_that_exist():
    text = text_of(DOCS / "design" / "extending.md")
    paths = re.findall(r"`([\w./]+(?:\.py|/))`", text)
    assert len(paths) >= 12
    for path in paths:
        assert (PACKAGE / path).exists() or (ROOT / path).exists() or (ROOT / "docs" / path).exists(), path


def test_the_tree_on_the_design_page_is_that_of_the_package():
    tree = re.search(r"```text\nlce_trainer/\n(.*?)```", text_of(DOCS / "design" / "index.md"), re.DOTALL)[1]
    listed = {name.rstrip("/") for name in re.findall(r"[├└]── (\S+)", tree)}
    there = {path.name for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert listed == there


def literals() -> list[str]:
    """Texts of the package as they read in its source, with ``…`` for what is filled in."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%[.\d]*[sdrfe]", "…", node.value).replace("%%", "%"))
    return found


def test_messages_are_shown_as_the_code_has_them():
    section = text_of(DOCS / "reference" / "messages.md").partition("## The curves")[0]
    messages = re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)
    assert len(messages) >= 12
    known = literals()
    for message in messages:
        pattern = ".+".join(re.escape(part) for part in message.split("…"))
        assert any(re.match(pattern, text, re.DOTALL) for text in known), message
