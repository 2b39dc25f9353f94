"""What must not leave the machine.

Paths become names, and a file that still holds one, or a token, stops the upload.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any
from urllib.parse import unquote, urlsplit

from lce_trainer.errors import PublishError

_TOKEN = re.compile(rb"hf_[A-Za-z0-9]{30,}")
_HOME = re.compile(r"~[\w.-]*([/\\]|$)|file:")
_LONGEST_PATH = 1024  # characters; a longer text is none
_BLOCK = 1 << 20
_EVERYWHERE = (Path("/root"), Path("/tmp"))  # noqa: S108  (a name, not a file)
_NOT_TEXT = (".safetensors", ".parquet")
# What a tokenizer knows are pieces of words, of which some are pieces of paths.
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", ".model")


def names_only(value: Any, base: Path | None = None) -> Any:
    """A JSON-able value in which every path of this machine is the name of its file or folder, keys included.

    A string is a path if it is absolute (POSIX or Windows), starts with ``~`` or ``file:``, goes up by ``..``, or
    names something that exists, here or in ``base``. The name of a Hub repo that is no folder here stays.

    Args:
        value: Strings, numbers, mappings and sequences of them.
        base: Folder that a relative path may start in: the recipe's.
    """
    if isinstance(value, Mapping):
        return {names_only(key, base): names_only(item, base) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [names_only(item, base) for item in value]
    if not isinstance(value, (str, Path)):
        return value
    text = str(value)
    if not is_local(text, base):
        return text
    path = unquote(urlsplit(text).path) if text.startswith("file:") else text
    return PureWindowsPath(path.rstrip("/\\")).name or "/"


def is_local(text: str, base: Path | None = None) -> bool:
    """Whether a text is a path of this machine, by the rule of :func:`names_only`."""
    if not text or len(text) > _LONGEST_PATH or "\n" in text or "\0" in text:
        return False
    if PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute() or _HOME.match(text):
        return True
    if ".." in re.split(r"[/\\]", text):
        return True
    if not re.search(r"[/\\]", text):  # already a name
        return False
    try:
        return Path(text).exists() or (base is not None and (base / text).exists())
    except OSError:  # longer than a name may be
        return False


def private_paths(*folders: Path) -> tuple[bytes, ...]:
    """The home folder and the given ones as they would stand in a file, but for those that are alike everywhere."""
    found = set()
    for folder in (Path.home(), *folders):
        for path in (folder.absolute(), folder.resolve()):
            if len(path.parts) > 1 and path not in _EVERYWHERE:
                found.add(os.fsencode(path))
    return tuple(sorted(found))


def refuse_private(contents: Mapping[str, Path | bytes], token: str, paths: Sequence[bytes]) -> None:
    """Check that no file that is about to leave the machine holds a Hub token or a path.

    Args:
        contents: Files by name.
        token: The token of this upload; empty if there is none.
        paths: From :func:`private_paths`.

    Raises:
        PublishError: A file holds one; the message names the file, and never the token.
    """
    for name, content in contents.items():
        if name.endswith(_NOT_TEXT):
            continue
        where = content if isinstance(content, Path) else name
        tail = b""
        for block in _blocks(content):
            window = tail + block
            if (token and token.encode() in window) or _TOKEN.search(window):
                raise PublishError(f"{where} holds a Hub token: remove it, revoke the token, and publish again")
            for path in () if name.endswith(_VOCABULARIES) else paths:
                if re.search(re.escape(path) + rb"(?![\w.-])", window):
                    raise PublishError(
                        f"{where} holds the path {os.fsdecode(path)} of this machine: write a name in its place, and "
                        "publish again"
                    )
            tail = window[-_LONGEST_PATH:]


def _blocks(content: Path | bytes) -> Iterable[bytes]:
    if isinstance(content, bytes):
        yield content
        return
    with content.open("rb") as file:
        while block := file.read(_BLOCK):
            yield block
