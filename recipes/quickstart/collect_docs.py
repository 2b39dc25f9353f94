"""The documentation inside your own Python: one document for each docstring of the standard library.

``documents()`` is what a recipe's ``corpus.script`` calls. Run as a program, this file prints them::

    python recipes/quickstart/collect_docs.py | head
"""

import contextlib
import importlib
import inspect
import io
import json
import pkgutil
import subprocess
import sys
import types
import warnings
from collections.abc import Iterator
from typing import Any

MIN_WORDS = 3  # math.gcd says "Greatest Common Divisor."

SKIPPED = {
    # importing them opens a browser, prints, hooks into the terminal, or needs a window system
    *("antigravity", "this", "readline", "rlcompleter", "tkinter", "turtle", "turtledemo", "idlelib"),
    # tests and inner workings
    *("test", "tests", "pydoc_data", "ensurepip", "macholib", "site", "genericpath", "nt", "ntpath", "posix"),
    *("nturl2path", "pyexpat", "sre_compile", "sre_constants", "sre_parse"),
    # gone in Python 3.12 and 3.13: without them the corpus is much the same in every version
    *("aifc", "asynchat", "asyncore", "audioop", "cgi", "cgitb", "chunk", "crypt", "distutils", "imghdr", "imp"),
    *("lib2to3", "mailcap", "msilib", "nis", "nntplib", "ossaudiodev", "pipes", "smtpd", "sndhdr", "spwd", "sunau"),
    *("telnetlib", "uu", "xdrlib"),
}
# os.path is posixpath or ntpath; only posixpath documents join, and it imports everywhere.
RENAMED = {"posixpath": "os.path"}
SHALLOW = {"encodings"}  # its hundred submodules are tables
Rank = tuple[int, int, bool, bool, int, str]
Names = dict[int, tuple[Rank, str, Any]]  # by id(): its best name's rank, the name, the object itself


def documents() -> Iterator[dict[str, str]]:
    """Yield what :func:`collect` finds in an interpreter of its own.

    The one at work has libraries loaded that change the standard library (torch replaces inspect.getfile),
    and need not have all of it imported.
    """
    printed = subprocess.run([sys.executable, "-I", __file__], capture_output=True, check=True, text=True).stdout
    yield from map(json.loads, printed.splitlines())


def collect() -> Iterator[dict[str, str]]:
    """Yield the documents, ordered by name.

    Each public module, class, function, method and property comes once, under the name a programmer
    would use: ``str.strip``, ``os.path.join``; a method only under the class that defines it. Of
    objects with the same docstring the one with the simplest name stays.

    Yields:
        ``doc_id`` and ``title``, the dotted name; ``text``, the docstring without indentation.
    """
    modules = _import_modules()
    names: Names = {}
    for module_name, module in modules.items():
        for name, value in _public_members(module_name, module):
            _offer(names, name, value)
    classes = sorted((name, value) for _, name, value in names.values() if inspect.isclass(value))
    known = {id(cls) for name, cls in classes if name.rpartition(".")[2] == cls.__name__}
    for class_name, cls in classes:
        _offer_class(names, class_name, cls, known)
    kept: dict[str, str] = {}
    seen = set()
    for _, name, value in sorted(names.values(), key=lambda item: item[0]):
        text = _docstring(value)
        if text is not None and text not in seen and name not in kept:  # unittest.main: a class and a module
            seen.add(text)
            kept[name] = text
    for name in sorted(kept):
        yield {"doc_id": name, "title": name, "text": kept[name]}


def _import_modules() -> dict[str, types.ModuleType]:
    """The standard library's public modules by name; those this platform lacks are left out."""
    modules = {}
    waiting = sorted(sys.stdlib_module_names, reverse=True)
    while waiting:
        name = waiting.pop()
        last = name.rpartition(".")[2]
        if last.startswith("_") or last in SKIPPED:
            continue
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            try:
                module = importlib.import_module(name)
            except Exception:  # noqa: S112  another platform's module fails in its own way
                continue
        modules[RENAMED.get(name, name)] = module
        if hasattr(module, "__path__") and name not in SHALLOW:
            inner = sorted((item.name for item in pkgutil.iter_modules(module.__path__, f"{name}.")), reverse=True)
            waiting.extend(inner)
    return modules


def _public_members(module_name: str, module: types.ModuleType) -> Iterator[tuple[str, Any]]:
    """The module itself and what it offers: its ``__all__``, or else what it defines."""
    yield module_name, module
    exported = getattr(module, "__all__", None)
    for name in sorted(vars(module) if exported is None else set(exported)):
        value = getattr(module, name, None)
        if name.startswith("_") or isinstance(value, types.ModuleType):
            continue
        home = _root(getattr(value, "__module__", None) or "")
        if module_name == "builtins" and home in _STDLIB:  # open comes from _io
            yield name, value
        elif home == _root(module.__name__) or (exported is not None and home in _STDLIB | {""}):
            yield f"{module_name}.{name}", value


def _offer_class(names: Names, class_name: str, cls: type, known: set[int]) -> None:
    """Add a class's own members, and those of the hidden bases that nothing else will show."""
    alias = class_name.rpartition(".")[2] != cls.__name__  # socket.SocketType is what socket.socket hides
    shown: set[str] = set()
    for distance, base in enumerate(cls.__mro__):
        hidden = any(part.startswith("_") for part in f"{base.__module__}.{base.__name__}".split("."))
        if base is not cls and (id(base) in known or not hidden):
            shown.update(vars(base))
            continue
        for name, value in sorted(vars(base).items()):
            if name.startswith("_") or name in shown:
                continue
            shown.add(name)
            nested = inspect.isclass(value) and id(value) not in names and _root(value.__module__) in _STDLIB
            if nested or (_is_member(value) and not inspect.isclass(value)):
                _offer(names, f"{class_name}.{name}", value, distance + 100 * alias)


def _offer(names: Names, name: str, value: Any, distance: int = 0) -> None:
    """Keep this name of an object if it is simpler than the one it has.

    Fewer dots first; then the class nearest to the one that defines it; then the object's home over a
    module that re-exports it; then its own name; then the shorter: set.union, not frozenset.union.
    """
    # random.choice is a method of a hidden instance; staticmethod is a class that has __func__ too
    target = value if inspect.isclass(value) else getattr(value, "__func__", value)
    away = _root(name) != _root(getattr(target, "__module__", None) or "")
    renamed = name.rpartition(".")[2] != getattr(target, "__name__", None)
    rank = (name.count("."), distance, away, renamed, len(name), name)
    if id(target) not in names or rank < names[id(target)][0]:
        names[id(target)] = (rank, name, target)


def _docstring(value: Any) -> str | None:
    """An object's own docstring, cleaned; None when it says too little."""
    doc = getattr(value, "__doc__", None)
    if inspect.isclass(value):
        init = vars(value).get("__init__")
        if doc is None and inspect.isfunction(init):
            doc = init.__doc__
    elif not _is_member(value) and not inspect.ismodule(value) and doc == type(value).__doc__:
        return None  # most instances only show their class's docstring; typing.Optional has its own
    if not isinstance(doc, str):
        return None
    text = inspect.cleandoc(doc).strip()
    generated = text.startswith((f"{getattr(value, '__name__', '')}(", "Alias for field number")) and "\n" not in text
    if len(text.split()) < MIN_WORDS or (generated and text.endswith((")", *"0123456789"))):
        return None
    return text


def _is_member(value: Any) -> bool:
    return (
        inspect.isroutine(value)
        or inspect.isdatadescriptor(value)
        or isinstance(value, (classmethod, staticmethod, property))
    )


def _root(module_name: str) -> str:
    """``_heapq`` and ``heapq`` are one module to who uses them."""
    return module_name.partition(".")[0].lstrip("_")


_STDLIB = {_root(name) for name in sys.stdlib_module_names}


if __name__ == "__main__":
    for document in collect():
        print(json.dumps(document))
