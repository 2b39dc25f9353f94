"""Whatever is written is read, or refused by an error of ours: nothing is counted twice, and nothing goes unseen."""

import csv
import gzip
import io
import json
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from lce_trainer.errors import LCETrainerError
from lce_trainer.evaluation.judged import read_judged, read_queries
from lce_trainer.files import read_batches, read_rows
from lce_trainer.groups.convert import to_groups
from lce_trainer.qrels import read_qrels, read_run
from lce_trainer.synthesis.corpus import CorpusConfig, build_passages, clean_text, split_passages
from lce_trainer.synthesis.language import index_words, sentences


def cases(**strategies: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Declare a test twice: with 50 examples, and with many among the slow tests."""

    def declare(test: Callable[..., None]) -> Callable[..., None]:
        few, many = (
            settings(max_examples=n, deadline=None, suppress_health_check=list(HealthCheck))(given(**strategies)(test))
            for n in (50, 5000)
        )
        many = pytest.mark.timeout(3600)(pytest.mark.slow(many))
        setattr(sys.modules[test.__module__], f"{test.__name__}_many", many)
        return few

    return declare


def in_a_file(name: str, data: bytes, read: Callable[[Path], Any]) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(data)
        return read(path)


characters = st.characters(exclude_categories=("Cs",))
texts = st.text(characters, max_size=12) | st.sampled_from(
    ["1", "01", "NA", "true", "2024-01-15", 'a "b" c', "\\", "1e9"]
)
fields = texts.map(lambda text: "".join(c for c in text if c not in "\t\r\n").lstrip('"'))  # of a TSV file
ids = st.text("abc019-_.é月", min_size=1, max_size=4)
tables = st.lists(st.tuples(texts, texts), min_size=1, max_size=8)
plain_tables = st.lists(st.tuples(fields, fields), min_size=1, max_size=8)


# ---- rows


@cases(rows=tables, sign=st.sampled_from(",;\t|"), quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
def test_csv_comes_back(rows, sign, quoting):
    assume(not any('\\"' in value for row in rows for value in row))  # of which there are two readings
    text = io.StringIO()
    csv.writer(text, delimiter=sign, quoting=quoting).writerows([("query", "text"), *rows])
    found = in_a_file("a.csv", text.getvalue().encode(), read_rows).table
    assert [tuple(row.values()) for row in found.to_pylist()] == rows


@cases(rows=plain_tables, end=st.sampled_from(["\n", "\r\n"]), last=st.booleans())
def test_tsv_comes_back(rows, end, last):
    lines = ["\t".join(row) for row in [("query", "text"), *rows]]
    found = in_a_file("a.tsv", (end.join(lines) + end * last).encode(), read_rows).table
    assert [tuple(row.values()) for row in found.to_pylist()] == rows


@cases(
    rows=tables, form=st.sampled_from(["jsonl", "json", "lines", "pretty"]), packed=st.booleans(), ascii=st.booleans()
)
def test_json_comes_back(rows, form, packed, ascii):
    dicts = [{"query": query, "text": text} for query, text in rows]
    if form == "json":
        text = json.dumps(dicts, ensure_ascii=ascii, indent=1)
    else:
        text = "\n".join(json.dumps(row, ensure_ascii=ascii, indent=2 if form == "pretty" else None) for row in dicts)
    name = f"a.{'jsonl' if form == 'jsonl' else 'json'}{'.gz' if packed else ''}"
    data = gzip.compress(text.encode()) if packed else text.encode()
    assert in_a_file(name, data, read_rows).table.to_pylist() == dicts


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ids, inner, max_size=3),
    max_leaves=6,
)


@cases(rows=st.lists(st.dictionaries(ids | st.sampled_from(["query", "text"]), values, max_size=4), max_size=5))
def test_any_json_is_read_row_by_row_or_refused(rows):
    text = "\n".join(map(json.dumps, rows))
    try:
        found = in_a_file("a.jsonl", text.encode(), read_rows).table
    except LCETrainerError as error:
        assert "\n" not in str(error)
    else:
        assert found.num_rows == len(rows)


# ---- files that are damaged

ROWS = [
    {"query_id": f"q{i // 3}", "query": f"what is {i // 3}", "doc_id": f"d{i}", "text": f'say "{i}", é',
     "score": 9.5 - i, "label": i % 2}
    for i in range(9)
]  # fmt: skip


def a_file(kind: str) -> bytes:
    names = list(ROWS[0])
    if kind in ("csv", "tsv"):
        text = io.StringIO()
        csv.DictWriter(text, names, delimiter="," if kind == "csv" else "\t").writeheader()
        csv.DictWriter(text, names, delimiter="," if kind == "csv" else "\t").writerows(ROWS)
        return text.getvalue().encode()
    if kind == "json":
        return json.dumps(ROWS).encode()
    if kind == "parquet":
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(ROWS), sink)
        return sink.getvalue()
    if kind == "trec":
        return "".join(f"{row['query_id']} Q0 {row['doc_id']} 1 {row['score']} x\n" for row in ROWS).encode()
    lines = "\n".join(map(json.dumps, ROWS)).encode()
    return gzip.compress(lines) if kind.endswith("gz") else lines


KINDS = ["csv", "tsv", "json", "jsonl", "jsonl.gz", "parquet", "trec"]
FILES = {kind: a_file(kind) for kind in KINDS}


def damaged(data: bytes, seed: int) -> bytes:
    rng = random.Random(seed)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(max(len(data), 1))
        how = rng.randrange(6)
        if how == 0:
            data = data[:at]
        elif how == 1:
            data = data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
        elif how == 2:
            data = data[:at] + data[at + rng.randint(1, 20) :]
        elif how == 3:
            data = (
                data[:at]
                + rng.choice([b'"', b"\t", b"\n", b",", b"\\", b"\x00", b"\xe9", b"{", b"]", b"\r"])
                + data[at:]
            )
        elif how == 4:
            data = data[:at] + data[at // 2 : at] + data[at:]
        else:
            data = rng.choice([b"\xef\xbb\xbf", b"\xff\xfe", b"\n\n", b" "]) + data
    return data


@cases(kind=st.sampled_from(KINDS), seed=st.integers(0, 10**9))
def test_a_damaged_file_is_read_or_refused_in_one_line(kind, seed):
    data = damaged(FILES[kind], seed)

    def judged(path: Path) -> Any:
        return read_judged(path, path)

    def corpus(path: Path) -> Any:
        return build_passages(CorpusConfig(source=str(path), language="en"), 0, path.parent)

    def convert(path: Path) -> Any:
        return to_groups(path, columns=["query", "text", "label"])

    for read in (
        read_rows,
        lambda path: list(read_batches(path)),
        read_qrels,
        read_run,
        read_queries,
        judged,
        corpus,
        convert,
    ):
        try:
            in_a_file(f"a.{kind}", data, read)
        except LCETrainerError as error:
            assert "\n" not in str(error) or "Understood are" in str(error)


# ---- groups

pairs = st.lists(
    st.tuples(st.sampled_from(["a", "b", "c", " "]), st.sampled_from(["w", "x", "y", "z", ""]), st.integers(0, 3)),
    min_size=1,
    max_size=12,
)


@cases(rows=pairs, order=st.permutations(["query", "passage", "label"]), upper=st.booleans())
def test_rows_in_any_order_of_columns_give_the_same_groups_and_the_counts_add_up(rows, order, upper):
    columns = {name: [row[i] for row in rows] for i, name in enumerate(("query", "passage", "label"))}
    groups, counts = to_groups(Dataset.from_dict(columns))
    shuffled = {name.upper() if upper else name: columns[name] for name in order}
    assert to_groups(Dataset.from_dict(shuffled))[0].to_list() == groups.to_list()
    assert counts["rows_read"] == counts["pairs_read"] == len(rows)
    dropped = counts["groups_without_positive"] + counts["groups_without_negative"]
    assert counts["groups"] + dropped == counts["groups_read"] and counts["groups"] == len(groups)
    best: dict[tuple[str, str], int] = {}
    for query, passage, label in rows:
        if query.strip() and passage.strip():
            best[query, passage] = max(label, best.get((query, passage), 0))
    assert counts["pairs_empty"] == sum(not (row[0].strip() and row[1].strip()) for row in rows)
    assert len(best) == len(rows) - counts["pairs_empty"] - counts["pairs_repeated"]
    for row in groups:
        assert len(set(row["passages"])) == len(row["passages"])
        assert all(
            best[row["query"], text] == label for text, label in zip(row["passages"], row["labels"], strict=True)
        )
        assert len(row["passages"]) == sum(query == row["query"] for query, _ in best)


# ---- judgments and runs

scores = st.dictionaries(
    ids,
    st.dictionaries(ids, st.integers(-40, 40).map(lambda n: n + 0.5), min_size=1, max_size=4),
    min_size=1,
    max_size=4,
)
grades = st.dictionaries(
    ids, st.dictionaries(ids, st.integers(0, 3).map(float), min_size=1, max_size=4), min_size=1, max_size=4
)
FORMS = ["trec", "three", "header", "jsonl", "nested", "csv"]


def written(found: dict[str, dict[str, float]], form: str, run: bool, seed: int) -> tuple[str, bytes]:
    rows = [(query, doc, value) for query, some in found.items() for doc, value in some.items()]
    random.Random(seed).shuffle(rows)
    last = "score" if run else "label"
    if form == "trec":
        lines = [f"{q} Q0 {d} 0 {v} x" if run else f"{q} 0 {d} {v:.0f}" for q, d, v in rows]
    elif form == "three":
        lines = [f"{q}\t{d}\t{v}" for q, d, v in rows]
    elif form == "header":
        lines = [f"{last}\tcorpus-id\tQuery-ID", *(f"{v}\t{d}\t{q}" for q, d, v in rows)]
    elif form == "csv":
        lines = [f"{last},doc_id,qid", *(f"{v},{d},{q}" for q, d, v in rows)]
    elif form == "nested":
        return "a.json", json.dumps(found).encode()
    else:
        lines = [json.dumps({last: v, "doc_id": d, "query_id": q}, sort_keys=True) for q, d, v in rows]
    return f"a.{form if form in ('jsonl', 'csv') else 'tsv'}", ("\n".join(lines) + "\n").encode()


@cases(found=scores, form=st.sampled_from(FORMS), seed=st.integers(0, 99))
def test_a_run_says_the_same_in_every_form(found, form, seed):
    read = in_a_file(*written(found, form, True, seed), read_run)
    rows = zip(read.queries.to_pylist(), read.passages.to_pylist(), read.values.tolist(), strict=True)
    assert sorted(rows) == sorted((q, d, v) for q, some in found.items() for d, v in some.items())


@cases(found=grades, form=st.sampled_from(FORMS), seed=st.integers(0, 99))
def test_qrels_say_the_same_in_every_form(found, form, seed):
    read = in_a_file(*written(found, form, False, seed), read_qrels)
    rows = zip(read.queries.to_pylist(), read.passages.to_pylist(), read.values.tolist(), strict=True)
    assert sorted(rows) == sorted((q, d, v) for q, some in found.items() for d, v in some.items())


@cases(
    qrels=grades,
    run=scores,
    depth=st.none() | st.integers(1, 4),
    skip=st.integers(0, 2),
)
def test_every_candidate_of_a_run_is_counted_once(qrels, run, depth, skip):
    queries = {query: f"query {query}" for query in (*qrels, *run)}
    corpus = {doc: f"text {doc}" for some in (*qrels.values(), *run.values()) for doc in some}
    groups, counts = to_groups(queries=queries, corpus=corpus, qrels=qrels, run=run, depth=depth, skip=skip)
    assert counts["candidates_read"] == sum(map(len, run.values()))
    left = ("candidates_of_other_queries", "candidates_outside_window", "candidates_positive", "candidates_repeated")
    positives = sum(grade > 0 for some in qrels.values() for grade in some.values())
    assert counts["pairs_read"] == positives + counts["candidates_read"] - sum(counts[name] for name in left)
    for row in groups:
        assert len(set(row["passage_ids"])) == len(row["passage_ids"])
        assert all(
            (qrels[row["query_id"]].get(doc, 0) > 0) == (label > 0)
            for doc, label in zip(row["passage_ids"], row["labels"], strict=True)
        )


# ---- the corpus

bodies = st.text(st.sampled_from("ab .!?。，月球はนึ้ हि\n\t-\u0301") | characters, max_size=60)


@cases(rows=st.lists(st.tuples(ids, bodies), min_size=1, max_size=8), drawn=st.none() | st.integers(1, 8))
def test_every_document_that_is_read_is_kept_or_counted(rows, drawn):
    data = "\n".join(json.dumps({"id": key, "text": text}) for key, text in rows).encode()

    def build(path: Path) -> Any:
        config = CorpusConfig(source=str(path), language="en", max_documents=drawn, max_words=5, overlap_words=0)
        return build_passages(config, 0, path.parent)

    try:
        passages = in_a_file("a.jsonl", data, build)
    except LCETrainerError as error:
        assert "nothing to make passages of" in str(error)
        return
    counts = passages.counts
    dropped = ("documents_empty", "documents_duplicate", "documents_not_text", "documents_not_drawn")
    assert counts["documents_read"] == len(rows) == counts["documents"] + sum(counts[name] for name in dropped)
    assert len(set(passages.table["passage_id"])) == len(passages.table) == counts["passages"]
    assert len(set(passages.table["text"])) == len(passages.table)


@cases(text=bodies, max_words=st.integers(1, 20))
def test_cutting_loses_no_character(text, max_words):
    cleaned, _ = clean_text(text)
    for line in cleaned.split("\n"):
        assert "".join(sentences(line, max_words)) == line
    if cleaned:
        passages = split_passages(cleaned, max_words, 0)
        assert "".join("".join(passages).split()) == "".join(cleaned.split())
    assert all(word == word.lower() or not word.islower() for word in index_words(text))
