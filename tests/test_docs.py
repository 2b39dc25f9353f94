"""The pages under docs/ do what they say."""

import ast
import os
import re
import subprocess
import sys

import pytest

from helpers.paths import ROOT

PAGES = sorted((ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_snippet_runs_in_order(page, tmp_path):
    snippets = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert len(snippets) >= 5
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(snippets)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Lima" in done.stdout
    assert (tmp_path / "merged" / "model.safetensors").is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_of_a_page_leads_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))
    assert links
    for link in links:
        assert link.startswith("https://") or (page.parent / link).exists(), link


def literals() -> list[str]:
    """Texts of the package as they read in its source, with ``…`` for what is filled in."""
    found = []
    for path in (ROOT / "lce_trainer").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%[.\d]*[sdrfe]", "…", node.value).replace("%%", "%"))
    return found


def test_messages_are_shown_as_the_code_has_them():
    page = (ROOT / "docs" / "trainer.md").read_text(encoding="utf-8")
    section = page.partition("## What it tells you")[2].partition("The curves")[0]
    messages = re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)
    assert len(messages) >= 12
    known = literals()
    for message in messages:
        pattern = ".+".join(re.escape(part) for part in message.split("…"))
        assert any(re.match(pattern, text, re.DOTALL) for text in known), message
