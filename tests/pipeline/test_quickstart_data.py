"""The quickstart's documents are reproducible, and its questions can be answered from them."""

import json
import os
import runpy
import subprocess
import sys

import pytest
import yaml

from helpers.paths import ROOT

RECIPE = ROOT / "recipes" / "quickstart"
COLLECT = RECIPE / "collect_docs.py"


def read_questions(name: str) -> list[dict]:
    lines = (RECIPE / f"queries-{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def answers(questions: list[dict]) -> set[str]:
    return {doc_id for question in questions for doc_id in question["doc_ids"]}


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONIOENCODING": "utf-8", **environment},
        capture_output=True,
        check=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def documents() -> list[dict]:
    return list(runpy.run_path(str(COLLECT))["documents"]())


@pytest.fixture(scope="module")
def dev() -> list[dict]:
    return read_questions("dev")


@pytest.fixture(scope="module")
def test() -> list[dict]:
    return read_questions("test")


def test_thousands_of_documents_with_distinct_ids_and_texts(documents):
    assert len(documents) > 3000
    assert len({document["doc_id"] for document in documents}) == len(documents)
    assert len({document["text"] for document in documents}) == len(documents)
    assert all(document["title"] == document["doc_id"] for document in documents)
    assert [document["doc_id"] for document in documents] == sorted(document["doc_id"] for document in documents)


@pytest.mark.parametrize(
    "natural, other",
    [
        ("str.strip", "builtins.str.strip"),
        ("open", "io.open"),
        ("set.union", "frozenset.union"),
        ("os.path.join", "posixpath.join"),
        ("os.path.getsize", "genericpath.getsize"),
        ("random.choice", "random.Random.choice"),
        ("json.JSONDecoder", "json.decoder.JSONDecoder"),
        ("collections.Counter.most_common", "typing.Counter.most_common"),
        ("dict.keys", "collections.Counter.keys"),
        ("socket.socket.bind", "socket.SocketType.bind"),
        ("pathlib.PurePath.suffix", "pathlib.Path.suffix"),
        ("concurrent.futures.ThreadPoolExecutor", "concurrent.futures.thread.ThreadPoolExecutor"),
    ],
)
def test_an_object_has_the_name_a_programmer_would_use(documents, natural, other):
    names = {document["doc_id"] for document in documents}
    assert natural in names
    assert other not in names


def test_no_private_name_and_no_generated_docstring_is_a_document(documents):
    assert not [document for document in documents if any(p.startswith("_") for p in document["doc_id"].split("."))]
    assert not [document for document in documents if document["text"].startswith("Alias for field number")]


def test_collection_does_not_depend_on_hash_seed_or_loaded_libraries(documents):
    first = run_python(str(COLLECT), PYTHONHASHSEED="1").stdout
    second = run_python(str(COLLECT), PYTHONHASHSEED="2").stdout
    assert first == second
    # this process has torch loaded, which patches the standard library; the other two had not
    assert [json.loads(line) for line in first.decode().splitlines()] == documents


def test_collection_prints_only_documents_and_imports_nothing_here():
    program = run_python("-W", "always", str(COLLECT))
    assert program.stderr == b""
    assert all(set(json.loads(line)) == {"doc_id", "title", "text"} for line in program.stdout.splitlines())
    code = f"""
import runpy, sys
documents = runpy.run_path({str(COLLECT)!r})["documents"]
assert len(list(documents())) > 3000
assert {{"mailbox", "xmlrpc.server", "unittest"}}.isdisjoint(sys.modules)
"""
    called = run_python("-W", "always", "-c", code)
    assert (called.stdout, called.stderr) == (b"", b"")


def test_every_answer_is_a_document(documents, dev, test):
    known = {document["doc_id"] for document in documents}
    assert answers(dev) - known == set()
    assert answers(test) - known == set()


def test_questions_are_many_distinct_and_answered(dev, test):
    assert len(dev) >= 60
    assert len(test) >= 140
    for key in ("query_id", "query"):
        values = [question[key] for question in dev + test]
        assert len(set(values)) == len(values)
    for question in dev + test:
        assert set(question) == {"query_id", "query", "doc_ids"}
        assert question["query"] == question["query"].strip() != ""
        assert question["doc_ids"]
        assert len(set(question["doc_ids"])) == len(question["doc_ids"])


def test_no_document_answers_both_a_dev_and_a_test_question(dev, test):
    assert answers(dev) & answers(test) == set()


def test_the_prompt_shows_no_answer_of_a_question(documents, dev, test):
    recipe = yaml.safe_load((RECIPE / "recipe.yaml").read_text(encoding="utf-8"))
    examples = [example for section in ("generate", "label") for example in recipe[section].get("examples", [])]
    # A passage is shown shortened, its white space folded, without the name of what it documents.
    texts = {document["doc_id"]: " ".join(document["text"].split()) for document in documents}
    shown = {
        doc_id for example in examples for doc_id, text in texts.items() if " ".join(example["passage"].split()) in text
    }
    assert len(shown) >= len({example["passage"] for example in examples})
    assert not shown & (answers(dev) | answers(test))
    assert not {example["query"] for example in examples} & {question["query"] for question in dev + test}
