"""One document out of a file: Markdown, reStructuredText, HTML, a notebook, plain text, PDF or Word."""

import html
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from lce_trainer.errors import CorpusError
from lce_trainer.files import kind_of, one_line, read_bytes

_MARKDOWN = (".md", ".markdown", ".mdx")
_PLAIN = (".txt", ".text")
_HTML = (".html", ".htm", ".xhtml")
ENDINGS = (*_PLAIN, *_MARKDOWN, ".rst", *_HTML, ".ipynb", ".pdf", ".docx")
EXTRA = "pip install 'lce-trainer[documents]'"

_FRONT_MATTER = re.compile(r"\A(---|\+\+\+)[ \t]*\n(.*?)\n(?:\1|\.\.\.)[ \t]*(?:\n|\Z)", re.DOTALL)
_TOML_TITLE = re.compile(r"^title\s*=\s*(?:\"([^\"\n]*)\"|'([^'\n]*)')", re.MULTILINE)
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
_ATX = re.compile(r" {0,3}#{1,6}[ \t]+(\S.*)")
_SETEXT = re.compile(r" {0,3}(?:=+|-{2,})[ \t]*")
_ADORNMENT = re.compile(r"([!-/:-@\[-`{-~])\1{2,}[ \t]*")
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_MDX = re.compile(r"^(?:import|export)\s.*$|\{/\*.*?\*/\}", re.MULTILINE)
_LEFT_OUT = ("script", "style", "noscript", "template", "nav", "footer", "svg", "iframe", "head")
_BLOCKS = """address article aside blockquote br dd div dl dt figcaption figure form h1 h2 h3 h4 h5 h6 header hr li main
ol p pre section table td th tr ul caption""".split()  # noqa: SIM905
_NO_TITLE = re.compile(r"untitled|microsoft word - .*|.*\.(?:docx?|pdf|tex|dvi|indd)", re.IGNORECASE)


def read_document(path: Path) -> tuple[str, str]:
    """Read the title and the text of a document; the title is "" where there is none.

    Raises:
        UnicodeDecodeError: It is not UTF-8.
        ModuleNotFoundError: The library that reads it is not installed; says how to install it.
        CorpusError: It is damaged, or encrypted.
    """
    kind = kind_of(path)
    if kind in _PLAIN:
        return "", read_bytes(path).decode("utf-8")
    read: dict[str, Callable[[Path], tuple[str, str]]] = {
        ".rst": _rst, ".ipynb": _notebook, ".pdf": _pdf, ".docx": _docx,
        **dict.fromkeys(_MARKDOWN, _markdown), **dict.fromkeys(_HTML, _html),
    }  # fmt: skip
    try:
        return read[kind](path)
    except ImportError as error:
        raise ModuleNotFoundError(f"{path.name} needs the package {error.name}: {EXTRA}") from None
    except (UnicodeDecodeError, CorpusError, OSError):
        raise
    except Exception as error:  # damaged files make the libraries that read them raise all kinds
        raise CorpusError(f"{path} cannot be read: {one_line(error)}") from None


def _markdown(path: Path) -> tuple[str, str]:
    text = read_bytes(path).decode("utf-8").replace("\r\n", "\n")
    title, text = _without_front_matter(text)
    if kind_of(path) == ".mdx":
        text = _outside_code(text, lambda part: _MDX.sub("", part))
    text = _outside_code(text, lambda part: _COMMENT.sub("", part))
    return _with_heading(title, text)


def _without_front_matter(text: str) -> tuple[str, str]:
    """Title that the front matter gives, and the text without it."""
    found = _FRONT_MATTER.match(text)
    if found is None:
        return "", text
    mark, body = found[1], found[2]
    rest = text[found.end() :]
    if mark == "+++":
        title = _TOML_TITLE.search(body)
        return (title[1] or title[2] or "") if title else "", rest
    try:
        fields = yaml.safe_load(body)
    except yaml.YAMLError:
        # Templates and half-written front matter; a text between two rules has no keys.
        return ("", rest) if re.match(r"\s*(?:#.*\n\s*)*[\w-]+:(?:\s|$)", body) else ("", text)
    if fields is None and body.strip().startswith("#"):
        return "", rest
    if not isinstance(fields, dict):
        return "", text
    title = fields.get("title")
    return (str(title) if isinstance(title, (str, int, float)) else ""), rest


def _outside_code(text: str, change: Callable[[str], str]) -> str:
    """Change a text where it is not fenced code."""
    parts: list[tuple[bool, list[str]]] = [(False, [])]
    fence = ""
    for line in text.split("\n"):
        found = _FENCE.match(line)
        if not fence and found:
            fence = found[1]
            parts.append((True, [line]))
        elif fence:
            parts[-1][1].append(line)
            if found and found[1].startswith(fence) and not line.strip().strip(fence[0]):
                fence = ""
                parts.append((False, []))
        else:
            parts[-1][1].append(line)
    return "\n".join("\n".join(lines) if code else change("\n".join(lines)) for code, lines in parts)


def _with_heading(title: str, text: str) -> tuple[str, str]:
    """Take the first heading, which stands in no code, for the title, and out of the text."""
    lines = text.split("\n")
    fence = ""
    for i, line in enumerate(lines):
        found = _FENCE.match(line)
        if fence:
            if found and found[1].startswith(fence):
                fence = ""
            continue
        if found:
            fence = found[1]
            continue
        heading = _ATX.fullmatch(line.rstrip("\r"))
        name, end = (heading[1].rstrip("# \t"), i + 1) if heading else ("", i)
        if not heading and i + 1 < len(lines) and line.strip() and _SETEXT.fullmatch(lines[i + 1]):
            above = i == 0 or not lines[i - 1].strip()
            if above and not re.match(r"\s*(?:[-*+>|]|\d+[.)])\s?", line) and not line.startswith("    "):
                name, end = line.strip(), i + 2
        if name and (not title or title.strip() == name.strip()):
            return name, "\n".join(lines[:i] + lines[end:])
        if name:
            break
    return title, text


def _rst(path: Path) -> tuple[str, str]:
    lines = read_bytes(path).decode("utf-8").replace("\r\n", "\n").split("\n")
    title = ""
    kept = []
    for i, line in enumerate(lines):
        if _ADORNMENT.fullmatch(line):
            continue
        following = lines[i + 1] if i + 1 < len(lines) else ""
        underlined = _ADORNMENT.fullmatch(following) and len(following.rstrip()) >= min(len(line.strip()), 3)
        if not title and underlined and line.strip():
            title = line.strip()
        elif not re.fullmatch(r"\.\. _[^:]+:\s*", line):
            kept.append(line)
    return title, "\n".join(kept)


def _notebook(path: Path) -> tuple[str, str]:
    book = json.loads(read_bytes(path).decode("utf-8"))
    cells = [cell for sheet in book.get("worksheets", [book]) for cell in sheet["cells"]]
    title, parts = "", []
    for cell in cells:
        source: Any = cell.get("source", cell.get("input", ""))
        text = source if isinstance(source, str) else "".join(source)
        if cell.get("cell_type") == "markdown" and not title:
            title, text = _with_heading("", text)
        parts.append(text)
    return title, "\n\n".join(parts)


def _html(path: Path) -> tuple[str, str]:
    from bs4 import BeautifulSoup

    data = read_bytes(path)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        named = re.search(rb"charset=[\"']?([\w-]+)", data[:2048])
        if named is None or named[1].lower().replace(b"-", b"") == b"utf8":
            raise
        text = data.decode(named[1].decode())
    soup = BeautifulSoup(text, "html.parser")
    headings = soup.find_all("h1")
    heading = headings[0].get_text(" ", strip=True) if len(headings) == 1 else ""
    title = heading or (soup.title.get_text(" ", strip=True) if soup.title else "")
    if heading:
        headings[0].decompose()
    for tag in soup.find_all(_LEFT_OUT):
        tag.decompose()
    for tag in soup.find_all(_BLOCKS):
        tag.insert_before("\n\n")
        tag.insert_after("\n\n")
    return html.unescape(title), soup.get_text()


def _pdf(path: Path) -> tuple[str, str]:
    from pypdf import PdfReader

    reader = PdfReader(path)
    if reader.is_encrypted and not reader.decrypt(""):
        raise CorpusError(f"{path} cannot be read: it is encrypted")
    text = "\n\n".join(page.extract_text() for page in reader.pages)
    title = str((reader.metadata.title if reader.metadata else None) or "").strip()
    return "" if _NO_TITLE.fullmatch(title) else title, text


def _docx(path: Path) -> tuple[str, str]:
    from docx import Document
    from docx.table import Table

    document = Document(str(path))
    title, parts = (document.core_properties.title or "").strip(), []
    for item in document.iter_inner_content():
        if isinstance(item, Table):
            parts += [" ".join(dict.fromkeys(cell.text for cell in row.cells)) for row in item.rows]
        elif item.style is not None and item.style.name in ("Title", "Heading 1") and not title:
            title = item.text.strip()
        elif item.text.strip() != title or not title:
            parts.append(item.text)
    return title, "\n\n".join(parts)
