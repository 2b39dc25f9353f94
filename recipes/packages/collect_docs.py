"""The documentation inside well-known packages of PyPI: one document for each public function, class and method.

``documents()`` is what a recipe's ``corpus.script`` calls. Run as a program, this file prints them::

    pip install -r recipes/packages/requirements.txt
    python recipes/packages/collect_docs.py | head

All packages are under licenses that let you share what you make of their documentation: BSD, MIT, Apache 2.0.
"""

import contextlib
import importlib
import inspect
import io
import json
import re
import subprocess
import sys
import types
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

REQUIREMENTS = Path(__file__).with_name("requirements.txt")
MIN_WORDS = 8  # one-liners such as "Return the name." answer nothing

# What a user of these packages imports. An object that several modules offer has the name of the first.
MODULES = """
    numpy numpy.linalg numpy.random numpy.lib.stride_tricks
    pandas pandas.api.types pandas.api.indexers pandas.api.typing pandas.testing pandas.plotting
    scipy.optimize scipy.stats scipy.spatial scipy.spatial.distance scipy.interpolate scipy.integrate
    sklearn sklearn.base sklearn.calibration sklearn.cluster sklearn.compose sklearn.covariance
    sklearn.cross_decomposition sklearn.datasets sklearn.decomposition sklearn.discriminant_analysis sklearn.dummy
    sklearn.ensemble sklearn.feature_extraction sklearn.feature_extraction.image sklearn.feature_extraction.text
    sklearn.feature_selection sklearn.gaussian_process sklearn.impute sklearn.inspection sklearn.isotonic
    sklearn.kernel_approximation sklearn.kernel_ridge sklearn.linear_model sklearn.manifold sklearn.metrics
    sklearn.metrics.pairwise sklearn.mixture sklearn.model_selection sklearn.multiclass sklearn.multioutput
    sklearn.naive_bayes sklearn.neighbors sklearn.neural_network sklearn.pipeline sklearn.preprocessing
    sklearn.random_projection sklearn.semi_supervised sklearn.svm sklearn.tree sklearn.utils
    networkx
    pyarrow.csv pyarrow.parquet datasets
    requests requests.adapters requests.auth urllib3 urllib3.util aiohttp aiohttp.web
    werkzeug.datastructures werkzeug.routing werkzeug.security werkzeug.test werkzeug.utils werkzeug.wrappers
    werkzeug.middleware.proxy_fix werkzeug.middleware.shared_data
    click click.testing rich rich.console rich.live rich.logging rich.markdown rich.padding rich.panel rich.progress
    rich.prompt rich.style rich.syntax rich.table rich.text rich.traceback rich.tree
    jinja2 jinja2.filters jinja2.sandbox jinja2.tests attr
    pytest bs4 PIL.Image PIL.ImageChops PIL.ImageDraw PIL.ImageEnhance PIL.ImageFilter PIL.ImageFont PIL.ImageOps
    PIL.ImageSequence PIL.ImageStat
    joblib fsspec fsspec.callbacks fsspec.utils filelock markdown docx docx.document docx.table
    docx.text.paragraph docx.text.run pypdf dateutil.parser dateutil.relativedelta dateutil.rrule dateutil.tz
    sortedcontainers
""".split()  # noqa: SIM905
# Methods of estimators read all alike ("Fit the model."), and the class's own documentation says what they do.
WITHOUT_METHODS = ("sklearn", "scipy")
# NumPy's legacy generator has the same methods as the one that follows it; its scalars and matrices those of arrays.
SKIPPED = re.compile(r"numpy\.random\.(RandomState|(?!default_rng)[a-z])|numpy\.(matrix|recarray|memmap)\.")
ACCESSORS = {"str", "dt", "cat", "sparse", "plot"}  # of a pandas.Series; Index.str is the same
INTERNAL = re.compile(r"\A(internal |\(private\))|\A[^\n]*for internal use|:meta private:", re.IGNORECASE)

# Sections of numpydoc and Google's style that are left out: names, code and literature, what else is installed, and
# what hardly says more than the first sentence.
DROPPED = {"see also", "examples", "example", "references", "methods", "attributes"}
DROPPED |= {"returns", "raises", "yields", "warns", "additional backends implement this function"}
Offer = tuple[tuple[int, int, bool, int, str], str, Any]  # rank of the name, the name, the object
_UNDERLINE = re.compile(r"(-{3,}|={3,})\s*")
_GOOGLE = re.compile(
    r"(Args|Arguments|Parameters|Returns|Raises|Yields|Examples?|See Also|References|Notes?|Attributes)::?"
)
_ROLE = re.compile(r":[a-z:]+:`~?\.?([^`<]*?)(\s*<[^`]*>)?`")
_DIRECTIVE = re.compile(r"\.\. ([a-z_:-]+)::")
_PROSE_DIRECTIVES = {"note", "warning", "versionadded", "versionchanged", "deprecated", "tip", "important"}


def documents() -> Iterator[dict[str, str]]:
    """Yield what :func:`collect` finds in an interpreter of its own, where no other library has been imported.

    Raises:
        ImportError: A package is missing, or has another version than the queries were judged with.
    """
    check_versions()
    printed = subprocess.run([sys.executable, "-I", __file__], capture_output=True, check=True, text=True).stdout
    yield from map(json.loads, printed.splitlines())


def check_versions() -> None:
    """Compare what is installed with ``requirements.txt``.

    Raises:
        ImportError: Names each package that is missing or has another version.
    """
    wrong = []
    for line in REQUIREMENTS.read_text(encoding="utf-8").splitlines():
        name, _, version = line.partition("#")[0].strip().partition("==")
        if not name:
            continue
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            found = "missing"
        if found != version:
            wrong.append(f"{name} {version} (here: {found})")
    if wrong:
        raise ImportError(
            f"the corpus is the documentation of {', '.join(wrong)}: pip install -r {REQUIREMENTS}, "
            "in an environment of its own if others need other versions"
        )


def collect() -> Iterator[dict[str, str]]:
    """Yield the documents, ordered by name.

    Each public class, function, method and property comes once, under the name a programmer would use:
    ``pandas.DataFrame.merge``; a method only under the class that defines it. Of objects with the same
    documentation the one with the simplest name stays.

    Yields:
        ``doc_id`` and ``title``, the dotted name; ``text``, the docstring's prose: what it does, parameters, notes.
    """
    offers: dict[int, Offer] = {}
    for place, module_name in enumerate(MODULES):
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            module = importlib.import_module(module_name)
            for name, value in _members(module):
                _offer(offers, module_name, name, value, place)
    texts: dict[str, str] = {}
    seen = set()
    for _, name, value in sorted(offers.values(), key=lambda offer: offer[0]):
        text = prose(getattr(value, "__doc__", None))
        generated = "\n" not in text and text.startswith(f"{name.rpartition('.')[2]}(")  # a dataclass's signature
        if len(text.split()) < MIN_WORDS or generated or INTERNAL.search(text):
            continue
        if text not in seen and name not in texts:
            seen.add(text)
            texts[name] = text
    for name in sorted(texts):
        yield {"doc_id": name, "title": name, "text": texts[name]}


def _members(module: types.ModuleType) -> Iterator[tuple[str, Any]]:
    """Yield what a module offers: its ``__all__``, or else what it or its package defines."""
    exported = getattr(module, "__all__", None)
    package = module.__name__.partition(".")[0]
    for name in sorted(vars(module) if exported is None else set(exported)):
        if name.startswith("_"):
            continue
        try:
            value = getattr(module, name, None)
        except ImportError:  # scikit-learn's experimental classes want to be imported in another way
            continue
        if isinstance(value, types.ModuleType) or not _has_own_documentation(value):
            continue
        home = getattr(value, "__module__", None) or ""
        # jinja2.sandbox has no __all__: what it imports is offered by jinja2
        inside = package if exported is not None or "." not in module.__name__ else module.__name__
        ufunc = home == "" and exported is not None
        if ufunc or f"{home.lstrip('_')}.".startswith(f"{inside}."):
            yield name, value


def _has_own_documentation(value: Any) -> bool:
    """An instance mostly shows its class's docstring; ufuncs and distributions have one each."""
    if inspect.isclass(value):  # whose members may be documented where it is not
        return all(base.__name__ != "generic" for base in value.__mro__)  # numpy.longlong differs between platforms
    doc = getattr(value, "__doc__", None)
    function = callable(value) and type(value).__name__.startswith("_")  # pytest.skip
    return isinstance(doc, str) and (doc != type(value).__doc__ or function)


def _offer(offers: dict[int, Offer], module_name: str, name: str, value: Any, place: int) -> None:
    """Offer a function or a class, and with a class the members that it and its private bases define."""
    _keep(offers, f"{module_name}.{name}", value, 0, place)
    if not inspect.isclass(value) or module_name.startswith(WITHOUT_METHODS):
        return
    package = module_name.partition(".")[0]
    for distance, base in enumerate(value.__mro__):
        if base.__module__.partition(".")[0].lstrip("_") != package:
            continue  # what a package takes from the standard library is not its documentation
        for inner, member in sorted(vars(base).items()):
            if inner.startswith("_"):
                continue
            accessor = getattr(value, inner, None)
            if name == "Series" and inner in ACCESSORS and inspect.isclass(accessor):
                for last in sorted(set(dir(accessor))):
                    if not last.startswith("_") and _is_member(method := getattr(accessor, last)):
                        _keep(offers, f"{module_name}.{name}.{inner}.{last}", method, distance, place)
            elif _is_member(member):
                _keep(offers, f"{module_name}.{name}.{inner}", member, distance, place)


def _keep(offers: dict[int, Offer], name: str, value: Any, distance: int, place: int) -> None:
    """Keep this name of an object if it is simpler than the one it has.

    The class nearest to the one that defines it comes first; then the module named first; then the shorter name.
    """
    if SKIPPED.match(name):
        return
    target = value if inspect.isclass(value) else getattr(value, "__func__", value)
    renamed = name.rpartition(".")[2] != getattr(target, "__name__", None)
    rank = (distance, place, renamed, len(name), name)
    if id(target) not in offers or rank < offers[id(target)][0]:
        offers[id(target)] = (rank, name, target)


def _is_member(value: Any) -> bool:
    return (
        inspect.isroutine(value)
        or inspect.isdatadescriptor(value)
        or isinstance(value, (classmethod, staticmethod, property))
        or hasattr(value, "func")  # cached_property of the standard library and those made after it
    ) and isinstance(getattr(value, "__doc__", None), str)


def prose(doc: object) -> str:
    """Return what a docstring says in words: without code, references, addresses in memory and markup.

    Args:
        doc: The docstring; what is no text says nothing.
    """
    if not isinstance(doc, str):
        return ""
    kept: list[str] = []
    dropping: int | None = None  # indentation of the section or block that is being left out
    code = doctest = False
    lines = inspect.cleandoc(doc).splitlines()
    for number, line in enumerate(lines):
        stripped, indent = line.strip(), len(line) - len(line.lstrip())
        following = lines[number + 1].strip() if number + 1 < len(lines) else ""
        if stripped.startswith("```"):
            code = not code
            continue
        doctest = bool(stripped) and (doctest or stripped.startswith(">>>"))  # with its output, up to an empty line
        titled = bool(stripped and _UNDERLINE.fullmatch(following)) or bool(_GOOGLE.fullmatch(stripped))
        if titled:
            dropping = indent if stripped.rstrip(":").lower() in DROPPED else None
        elif dropping is not None and stripped and not titled and indent < dropping:
            dropping = None
        directive = _DIRECTIVE.match(stripped)
        if dropping is None and directive and directive[1] not in _PROSE_DIRECTIVES:
            dropping = indent + 1
        if code or doctest or dropping is not None or _UNDERLINE.fullmatch(stripped):
            continue
        if titled:
            line = f"{stripped.rstrip(':')}:"
        kept.append(line)
    return _plain("\n".join(kept))


def _plain(text: str) -> str:
    """Take the markup out of reStructuredText."""
    text = _ROLE.sub(r"\1", text).replace("``", "")
    text = re.sub(r" at 0x[0-9a-fA-F]+", "", text)
    text = re.sub(r"\.\. (versionadded|versionchanged):: *v?[\d.]+$", "", text, flags=re.M)
    text = re.sub(r"\.\. (note|warning|tip|important)::", "", text)
    text = re.sub(r"^:Alias on this platform.*$", "", text, flags=re.M)  # differs between Linux, macOS and Windows
    return re.sub(r"\n\s*\n\s*", "\n\n", text).strip()


if __name__ == "__main__":
    check_versions()
    for document in collect():
        print(json.dumps(document))
