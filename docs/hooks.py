"""What is written into the pages when the site is built: the keys of a recipe, from the code that declares them.

A page asks for it by a comment: ``<!-- recipe -->``, ``<!-- training arguments -->`` or ``<!-- command -->``; and for a
document of the repository by ``<!-- include CHANGELOG.md -->``, or the README's table by ``<!-- results -->``.

``llms.txt`` is the list of pages for a language model, see https://llmstxt.org: ``python -m docs.hooks`` writes it
anew, and the site has it at its root.
"""

import html
import logging
import os
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LLMS = ROOT / "docs" / "llms.txt"

os.environ.setdefault("COLUMNS", "100")  # of argparse's help
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it speaks when transformers imports it


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Replace each marker of a page by what the code says."""
    makers = {"results": _results, "recipe": _recipe, "training arguments": _training_arguments, "command": _command}
    markdown = re.sub(r"<!-- include (\S+) -->", lambda found: _document(found[1]), markdown)
    return re.sub(r"<!-- (results|recipe|training arguments|command) -->", lambda found: makers[found[1]](), markdown)


def on_page_content(content: str, **kwargs: Any) -> str:
    """Write what docstrings say in the way of Sphinx, roles and double colons, as Markdown would have it."""
    content = re.sub(r":(?:mod|class|func|meth|data|exc):(<code>)~?", r"\1", content)
    return re.sub(r"::</p>", ":</p>", content)


def on_post_build(config: Any, **kwargs: Any) -> None:
    """Put the list of pages for language models at the root of the site."""
    text = re.sub(r"\]\(docs/(.*?)(?:index)?\.md\)", lambda found: f"]({found[1].rstrip('/') or '.'}/)", list_pages())
    (Path(config["site_dir"]) / "llms.txt").write_text(text, encoding="utf-8")


def list_pages() -> str:
    """Return ``llms.txt``: every page with its title and first sentence, by section of the navigation."""
    import yaml

    lines: dict[str, list[str]] = {}
    for entry in yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]:
        ((section, pages),) = entry.items()
        for page in [pages] if isinstance(pages, str) else pages:
            path = page if isinstance(page, str) else next(iter(page.values()))
            text = _document(f"docs/{path}")
            text = re.sub(r"<!-- include (\S+) -->", lambda found: _document(found[1]), text)
            title = re.search(r"^# (.+)", text, re.MULTILINE)[1]
            first = re.search(r"^# .+\n+(?!#|```|- |\||<)((?:.+\n?)+)", text, re.MULTILINE)
            sentence = re.split(r"(?<=[.:])\s", " ".join(first[1].split()))[0] if first else ""
            plain = re.sub(r"\[([^]]*)\]\([^)]*\)|\*\*|<[^>]+>", r"\1", sentence)
            lines.setdefault(section if isinstance(pages, list) else "Start", []).append(
                f"- [{title}](docs/{path})" + (f": {plain}" if plain else "")
            )
    head = re.search(r"\n\n(?!\*)(An LLM writes .+?\.)\s", _document("README.md"), re.DOTALL)
    parts = ["# lce_trainer", "> " + " ".join(head[1].split())]
    return "\n\n".join([*parts, *(f"## {name}\n\n" + "\n".join(found) for name, found in lines.items())]) + "\n"


def _document(name: str) -> str:
    text = (ROOT / name).read_text(encoding="utf-8")
    return text.replace("](docs/", "](")


def _results() -> str:
    """Return the README's table of results, the only place where its figures are written."""
    return re.search(r"^\| system .*?(?=\n\n)", _document("README.md"), re.MULTILINE | re.DOTALL)[0]


def _recipe() -> str:
    from lce_trainer.pipeline.reference import recipe_sections

    parts = []
    for section in recipe_sections():
        parts += [f"## {section.name or 'Outside of any section'}", section.help if section.name else ""]
        parts += [_table([key for key in section.keys if not key.inherited])]
        if any(key.inherited for key in section.keys):
            parts += ["Besides these, the section takes transformers' [training arguments](arguments.md)."]
    return "\n\n".join(filter(None, parts))


def _training_arguments() -> str:
    from lce_trainer.pipeline.reference import training_keys

    keys = training_keys("")
    own = [key for key in keys if not key.inherited]
    inherited = [key for key in keys if key.inherited]
    return (
        f"## The trainer's own, and those with a default of its own\n\n{_table(own)}\n\n"
        f"## Those of transformers\n\n{_table(inherited)}"
    )


def _command() -> str:
    from lce_trainer.cli import parser

    top = parser()
    commands = next(action for action in top._actions if action.dest == "command").choices
    parts = [f"```text\n{top.format_help().strip()}\n```"]
    for name, command in commands.items():
        parts += [f"## lce-trainer {name}", f"```text\n{command.format_help().strip()}\n```"]
    return "\n\n".join(parts)


def _table(keys: "list[Any]") -> str:
    rows = ["| key | type | default | what it does |", "|---|---|---|---|"]
    for key in keys:
        name, kind, default = (_code(text) for text in (key.name.rpartition(".")[2], key.type, key.default))
        text = html.escape(" ".join(key.help.split()), quote=False).replace("|", "&#124;")
        rows.append(f"| {name} | {kind} | {default} | {text} |")
    return "\n".join(rows)


def _code(text: str) -> str:
    """Return code for a cell of a table, where Markdown's own quotes would keep the backslash before a bar."""
    return f"<code>{html.escape(text).replace('|', '&#124;').replace('_', '&#95;').replace('*', '&#42;')}</code>"


if __name__ == "__main__":
    LLMS.write_text(list_pages(), encoding="utf-8")
