"""Documents in every kind of file that users keep: title and text, and nothing else."""

import gzip
import json
import logging
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lce_trainer.errors import CorpusError
from lce_trainer.synthesis.corpus import CorpusConfig, Passages, build_passages
from lce_trainer.synthesis.documents import read_document

HTML = """<html><head><title>Moon — Site</title><style>p {color: red}</style></head><body><nav>Home</nav>
<h1>The Moon</h1><p>It <b>shines</b>.</p><p>It is red &amp; cold.</p><script>alert(1)</script></body></html>"""
NOTEBOOK = {
    "nbformat": 4,
    "cells": [
        {"cell_type": "code", "source": ["# a comment\n", "x = 1"]},
        {"cell_type": "markdown", "source": ["# The Moon\n", "\n", "It shines."]},
    ],
}

TEXTS = {
    "plain.txt": ("# no title\nIt shines.", "", "# no title It shines."),
    "a.md": ("Before.\n\n## The Moon ##\n\nIt shines.", "The Moon", "Before. It shines."),
    "setext.md": ("The Moon\n========\n\nIt shines.", "The Moon", "It shines."),
    "rule.md": ("- a list\n---\nIt shines.", "", "- a list --- It shines."),
    "code.md": ("```sh\n# a comment\n```\nIt shines.", "", "```sh # a comment ``` It shines."),
    "after.md": ("~~~~\n# no\n~~~\n# no\n~~~~\n# The Moon\nIt shines.", "The Moon",
                 "~~~~ # no ~~~ # no ~~~~ It shines."),
    "front.md": ("---\n# a YAML comment\ntitle: The Moon\ntags: [a]\n---\n\nIt shines.", "The Moon", "It shines."),
    "front2.md": ("---\n# a YAML comment\ntags: [a]\n---\n# The Moon\nIt shines.", "The Moon", "It shines."),
    "same.md": ("---\ntitle: The Moon\n---\n# The Moon\nIt shines.", "The Moon", "It shines."),
    "toml.md": ('+++\ntitle = "The Moon"\ndraft = false\n+++\nIt shines.', "The Moon", "It shines."),
    "rules.md": ("---\nIt shines.\n---\nIt sets.", "", "--- It shines. --- It sets."),
    "comment.md": ("<!-- # no\n -->\n# The Moon\nIt shines.", "The Moon", "It shines."),
    "a.mdx": ("import X from 'x'\n\n# The Moon\n\n{/* no */}\nIt shines.\n```\nimport os\n```", "The Moon",
              "It shines. ``` import os ```"),
    "a.rst": (".. _moon:\n\n========\nThe Moon\n========\n\nIt shines.\n\nPart\n----\n\nIt sets.", "The Moon",
              "It shines. Part It sets."),
    "a.html": (HTML, "The Moon", "It shines. It is red & cold."),
    "a.ipynb": (json.dumps(NOTEBOOK), "The Moon", "# a comment x = 1 It shines."),
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / ".cache")


def build(source: Path, **settings: object) -> Passages:
    return build_passages(CorpusConfig(source=str(source), language="en", **settings), 0, Path())  # type: ignore[arg-type]


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("name", TEXTS)
def test_a_document_gives_its_title_and_its_text(name, packed, tmp_path):
    content, title, text = TEXTS[name]
    path = tmp_path / f"{name}{packed}"
    path.write_bytes(gzip.compress(content.encode()) if packed else content.encode())
    found_title, found = read_document(path)
    assert found_title == title
    assert " ".join(found.split()) == text
    (row,) = build(path).table
    assert (row["doc_id"], row["title"]) == (path.name, title)


def a_pdf(path: Path) -> None:
    stream = b"BT /F1 12 Tf 72 720 Td (The moon shines at night.) Tj ET"
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792]"
        b" /Contents 4 0 R\n/Resources << /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
        b"<< /Title (The Moon) >>",
    ]
    data, places = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        places.append(len(data))
        data += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    data += (
        b"xref\n0 7\n0000000000 65535 f \n%strailer\n<< /Size 7 /Root 1 0 R /Info 6 0 R >>\nstartxref\n%d\n%%%%EOF"
        % (
            table,
            len(data),
        )
    )
    path.write_bytes(data)


def a_docx(path: Path) -> None:
    from docx import Document

    document = Document()
    document.core_properties.title = ""
    document.add_heading("The Moon", 1)
    document.add_paragraph("It shines.")
    cells = document.add_table(1, 2).rows[0].cells
    cells[0].text, cells[1].text = "red", "cold"
    document.save(str(path))


def test_pdf_and_word_are_read_by_their_libraries(tmp_path):
    pytest.importorskip("pypdf")
    pytest.importorskip("docx")
    a_pdf(tmp_path / "a.pdf")
    a_docx(tmp_path / "b.docx")
    (tmp_path / "c.pdf").write_bytes(b"%PDF-1.4 nothing")
    passages = build(tmp_path)
    assert [(row["doc_id"], row["text"]) for row in passages.table] == [
        ("a.pdf", "The Moon\nThe moon shines at night."),
        ("b.docx", "The Moon\nIt shines. red cold"),
    ]
    assert passages.counts["documents_unreadable"] == 1 and passages.counts["documents_read"] == 3
    with pytest.raises(CorpusError, match=r"c\.pdf cannot be read"):
        build(tmp_path / "c.pdf")


def test_without_its_library_a_document_is_counted_and_the_extra_is_named(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(__import__("sys").modules, "pypdf", None)
    a_pdf(tmp_path / "a.pdf")
    (tmp_path / "b.txt").write_text("It shines.")
    passages = build(tmp_path)
    assert passages.counts["files_not_read .pdf"] == passages.counts["files_not_read"] == 1
    assert "pip install 'lce-trainer[documents]'" in caplog.text
    with pytest.raises(CorpusError, match=r"a\.pdf needs the package pypdf: pip install 'lce-trainer\[documents\]'"):
        build(tmp_path / "a.pdf")


def test_what_is_not_read_is_counted_by_its_ending_and_logged(tmp_path, caplog):
    for name in ("a.txt", "b.png", "c.png", "d.csv", "e", ".hidden", "f.PNG"):
        (tmp_path / name).write_text("It shines.")
    with caplog.at_level(logging.WARNING):
        counts = build(tmp_path).counts
    unread = {name: count for name, count in counts.items() if name.startswith("files_not_read")}
    assert unread == {
        "files_not_read": 5,
        "files_not_read .png": 3,
        "files_not_read .csv": 1,
        "files_not_read no ending": 1,
    }
    assert "5 files are not read: 3 .png, 1 .csv, 1 no ending" in caplog.text


def test_symlinked_folders_are_read_once_and_a_circle_ends(tmp_path):
    corpus, other = tmp_path / "corpus", tmp_path / "other"
    (corpus / "sub").mkdir(parents=True), other.mkdir()
    (corpus / "a.txt").write_text("Rain falls.")
    (corpus / "sub" / "b.txt").write_text("Snow falls.")
    (other / "c.txt").write_text("Fire burns.")
    (corpus / "linked").symlink_to(other)
    (other / "back").symlink_to(corpus)
    (corpus / "again").symlink_to(corpus / "sub")
    (corpus / "broken.txt").symlink_to(tmp_path / "nothing")
    passages = build(corpus)
    assert passages.table["doc_id"][:] == ["a.txt", "linked/c.txt", "sub/b.txt"]
    assert passages.counts["documents_read"] == 3


@pytest.mark.parametrize("ending", ["parquet", "csv", "jsonl", "json", "jsonl.gz"])
def test_a_cloned_dataset_is_read_by_its_data_files_and_not_as_its_readme(ending, tmp_path):
    rows = [{"_id": f"{i:03}", "title": "", "text": f"Document {i}."} for i in range(500)]
    (tmp_path / "data").mkdir()
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# A dataset\n\nIts card.")
    file = tmp_path / "data" / f"train-00000-of-00001.{ending}"
    text = "\n".join(map(json.dumps, rows))
    if ending == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    elif ending == "csv":
        file.write_text("_id,title,text\n" + "".join(f"{row['_id']},,{row['text']}\n" for row in rows))
    elif ending == "json":
        file.write_text(json.dumps(rows))
    else:
        file.write_bytes(gzip.compress(text.encode()) if ending.endswith("gz") else text.encode())
    passages = build(tmp_path)
    assert passages.counts["documents_read"] == 500
    assert passages.table["doc_id"][:3] == ["000", "001", "002"]
    assert passages.counts["files_not_read .md"] == 1


@pytest.mark.parametrize("name", ["a.json", "a.jsonl.gz", "a.csv.gz", "collection.tsv", "semicolon.csv", "wide.csv"])
def test_a_corpus_in_any_file_of_rows(name, tmp_path):
    rows = [("1", 'Rain "falls'), ("01", "Snow falls."), ("2024-01-15", "NA")]
    if name == "collection.tsv":
        data = "".join(f"{key}\t{text}\n" for key, text in rows).encode()
    elif name == "a.json":
        data = json.dumps([{"id": key, "text": text} for key, text in rows]).encode()
    elif name == "a.jsonl.gz":
        data = gzip.compress("\n".join(json.dumps({"id": key, "text": text}) for key, text in rows).encode())
    else:
        sign = ";" if name == "semicolon.csv" else ","
        text = f"ID{sign}Text\n" + "".join(
            '{}{}"{}"\n'.format(key, sign, text.replace('"', '""')) for key, text in rows
        )
        data = text.encode("utf-16" if name == "wide.csv" else "utf-8")
        data = gzip.compress(data) if name.endswith(".gz") else data
    (tmp_path / name).write_bytes(data)
    assert [(row["doc_id"], row["text"]) for row in build(tmp_path / name).table] == rows


@pytest.mark.slow
def test_a_million_documents_are_cut_in_bounded_memory(tmp_path):
    import subprocess
    import sys

    with (tmp_path / "a.jsonl").open("w") as file:
        for i in range(1_000_000):
            file.write(json.dumps({"id": str(i), "text": f"Document {i} says {'rain and snow ' * 40}."}) + "\n")
    code = (
        "import resource, sys\nfrom pathlib import Path\n"
        "from lce_trainer.synthesis.corpus import CorpusConfig, build_passages\n"
        "found = build_passages(CorpusConfig(source=sys.argv[1], language='en'), 0, Path())\n"
        "assert len(found.table) == 1_000_000\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.jsonl")], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout.split()[-1]) < 3_000_000  # kilobytes, some of it the mapped file
