"""The documents of the packages recipe are reproducible, and its queries can be answered from them."""

import json
import os
import re
import runpy
import subprocess
import sys
from importlib import metadata

import pytest
import yaml
from packaging.requirements import Requirement

from helpers.paths import ROOT
from lce_trainer.errors import CorpusError
from lce_trainer.synthesis.corpus import CorpusConfig, build_passages

RECIPE = ROOT / "recipes" / "packages"
COLLECT = RECIPE / "collect_docs.py"
TYPES = {"keyword", "question", "sentence", "task", "error", "misspelled"}


def read_queries(name: str) -> list[dict]:
    lines = (RECIPE / f"queries-{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def answers(queries: list[dict]) -> set[str]:
    return {doc_id for query in queries for doc_id in query["doc_ids"]}


def words(query: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", query.lower()))


def pins(path) -> dict[str, str]:
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    found = {}
    for requirement in map(Requirement, lines):
        (version,) = requirement.specifier
        assert version.operator == "=="
        found[requirement.name.lower()] = version.version
    return found


@pytest.fixture(scope="module")
def printed() -> bytes:
    """What the script prints; skips where the packages are not those that the queries were judged with."""
    try:
        runpy.run_path(str(COLLECT))["check_versions"]()
    except ImportError as error:
        pytest.skip(str(error))
    return run_script(PYTHONHASHSEED="1")


def run_script(*options: str, **environment: str) -> bytes:
    done = subprocess.run(
        [sys.executable, *options, str(COLLECT)],
        env={**os.environ, "PYTHONIOENCODING": "utf-8", **environment},
        capture_output=True,
        check=True,
        timeout=280,
    )
    assert done.stderr == b""
    return done.stdout


@pytest.fixture(scope="module")
def documents(printed) -> list[dict]:
    return [json.loads(line) for line in printed.splitlines()]


@pytest.fixture(scope="module")
def dev() -> list[dict]:
    return read_queries("dev")


@pytest.fixture(scope="module")
def test() -> list[dict]:
    return read_queries("test")


def test_the_versions_are_those_the_project_is_tested_with():
    tested, wanted = pins(ROOT / "constraints.txt"), pins(RECIPE / "requirements.txt")
    assert len(wanted) == 26
    assert wanted == {name: tested[name] for name in wanted}


def test_another_version_is_refused_with_the_command_that_helps(tmp_path):
    (tmp_path / "collect_docs.py").write_bytes(COLLECT.read_bytes())
    here = metadata.version("numpy")
    (tmp_path / "requirements.txt").write_text(f"# pinned\nnumpy=={here}\nabsent-package==1.0\npackaging==1.2.3\n")
    with pytest.raises(CorpusError) as caught:
        build_passages(CorpusConfig(script="collect_docs.py"), 13, tmp_path)
    message = str(caught.value)
    assert "absent-package 1.0 (here: missing)" in message
    assert f"packaging 1.2.3 (here: {metadata.version('packaging')})" in message
    assert "numpy" not in message
    assert f"pip install -r {tmp_path / 'requirements.txt'}" in message


def test_the_prose_of_a_docstring_has_no_code_and_no_markup():
    prose = runpy.run_path(str(COLLECT))["prose"]
    doc = """Return the thing at :attr:`Shelf.index`.

    .. versionadded:: 2.0
    .. image:: thing.png
       :width: 10

    Use ``key`` with <function f at 0x7f3a51c0>.

    Parameters
    ----------
    key : str
        Its name.

    See Also
    --------
    other : Another thing.

    Examples
    --------
    >>> thing(1)
    2

    Notes
    -----
    It is fast.

    >>> thing(2)
    Shelf(3)
    """
    assert prose(doc) == (
        "Return the thing at Shelf.index.\n\nUse key with <function f>.\n\n"
        "Parameters:\nkey : str\n    Its name.\n\nNotes:\nIt is fast."
    )
    assert prose("Say hello.\n\nArgs:\n    name: Whose.\n\nExample:\n\n```py\nhello()\n```\n") == (
        "Say hello.\n\nArgs:\n    name: Whose."
    )
    assert prose(None) == ""


def test_thousands_of_documents_with_distinct_ids_and_texts(documents):
    ids = [document["doc_id"] for document in documents]
    assert len(documents) > 6000
    assert ids == sorted(set(ids))
    assert len({document["text"] for document in documents}) == len(documents)
    assert all(document["title"] == document["doc_id"] for document in documents)
    assert not [name for name in ids if any(part.startswith("_") for part in name.split("."))]


def test_every_package_has_documents(documents):
    renamed = {"scikit-learn": "sklearn", "attrs": "attr", "beautifulsoup4": "bs4", "pillow": "PIL"}
    renamed |= {"Jinja2": "jinja2", "Werkzeug": "werkzeug", "Markdown": "markdown"}
    renamed |= {"python-docx": "docx", "python-dateutil": "dateutil"}
    lines = (RECIPE / "requirements.txt").read_text(encoding="utf-8").splitlines()
    names = {line.partition("==")[0] for line in lines if not line.startswith("#")}
    packages = {renamed.get(name, name) for name in names}
    assert {document["doc_id"].partition(".")[0] for document in documents} == packages


@pytest.mark.parametrize(
    "natural, other",
    [
        ("pandas.DataFrame.merge", "pandas.core.frame.DataFrame.merge"),
        ("pandas.Series.str.zfill", "pandas.Index.str.zfill"),
        ("numpy.random.Generator.shuffle", "numpy.random.shuffle"),
        ("jinja2.filters.do_batch", "jinja2.sandbox.do_batch"),
        ("werkzeug.utils.redirect", "werkzeug.routing.redirect"),
        ("sklearn.svm.SVC", "sklearn.svm.SVC.fit"),
        ("click.prompt", "click.termui.prompt"),
        ("pytest.MonkeyPatch.setenv", "_pytest.monkeypatch.MonkeyPatch.setenv"),
    ],
)
def test_an_object_has_the_name_a_programmer_would_use(documents, natural, other):
    names = {document["doc_id"] for document in documents}
    assert natural in names
    assert other not in names


def test_no_document_holds_what_differs_between_machines(documents):
    pattern = re.compile(r"at 0x[0-9a-f]{4}|Alias on this platform|" + re.escape(sys.prefix))
    assert not [document["doc_id"] for document in documents if pattern.search(document["text"])]


def test_collection_does_not_depend_on_the_hash_seed(printed):
    assert run_script(PYTHONHASHSEED="2") == printed


def test_every_answer_is_a_document(documents, dev, test):
    known = {document["doc_id"] for document in documents}
    assert answers(dev) - known == set()
    assert answers(test) - known == set()


def test_queries_are_many_distinct_and_answered(dev, test):
    assert len(dev) >= 60
    assert len(test) >= 160
    for key in ("query_id", "query"):
        values = [query[key].lower() for query in dev + test]
        assert len(set(values)) == len(values)
    for query in dev + test:
        assert set(query) == {"query_id", "query", "type", "doc_ids"}
        assert query["query"] == query["query"].strip() != ""
        assert query["doc_ids"]
        assert len(set(query["doc_ids"])) == len(query["doc_ids"])
    for queries in (dev, test):
        assert {query["type"] for query in queries} == TYPES


def test_no_document_answers_both_a_dev_and_a_test_query(dev, test):
    assert answers(dev) & answers(test) == set()


def test_no_query_of_dev_is_a_near_duplicate_of_one_of_test(dev, test):
    for one in map(words, (query["query"] for query in dev)):
        for other in map(words, (query["query"] for query in test)):
            assert len(one & other) < 0.6 * len(one | other), (one, other)


def test_the_prompt_shows_no_answer_of_a_query(documents, dev, test):
    recipe = yaml.safe_load((RECIPE / "recipe.yaml").read_text(encoding="utf-8"))
    examples = recipe["generate"]["examples"]
    # A passage is shown shortened, its white space folded, without the name of what it documents.
    texts = {document["doc_id"]: " ".join(document["text"].split()) for document in documents}
    for example in examples:
        shown = {doc_id for doc_id, text in texts.items() if " ".join(example["passage"].split()) in text}
        assert shown
        assert not shown & (answers(dev) | answers(test))
    assert not {example["query"] for example in examples} & {query["query"] for query in dev + test}
