"""One reader of row files: what is written there comes out, or one line says where and why not."""

import csv
import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, List, Value

from lce_trainer.errors import DataError, GroupsError
from lce_trainer.files import arrow_table, numbers_of, read_batches, read_fields, read_rows
from lce_trainer.groups.convert import to_groups

ODD = ["1", "01", "007", "12345678901234567890", "2024-01-15", "true", "NA", "null", "1.0", "1e5", "", " x ", "-0"]


def read(path: Path) -> list[dict]:
    return read_rows(path).table.to_pylist()


def compressed(path: Path, data: bytes) -> Path:
    if path.suffix == ".zst":
        with pa.OSFile(str(path), "wb") as file, pa.CompressedOutputStream(file, "zstd") as out:
            out.write(data)
    else:
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "json", "numbers.jsonl"])
def test_text_stays_as_it_is_written(ending, packed, tmp_path):
    path = tmp_path / f"rows.{ending}{packed}"
    rows = [(f"{i:03}", value) for i, value in enumerate(ODD)]
    if ending in ("csv", "tsv"):
        sign = "," if ending == "csv" else "\t"
        text = f"id{sign}query\n" + "".join(f"{key}{sign}{value}\n" for key, value in rows)
    elif ending == "numbers.jsonl":  # JSON has no 01 or 007
        rows = [row for row in rows if row[1] in ("1", "12345678901234567890", "true", "1.0", "1e5", "-0")]
        text = "".join(f'{{"id": "{key}", "query": {value}}}\n' for key, value in rows)
    else:
        dicts = [{"id": key, "query": value} for key, value in rows]
        text = json.dumps(dicts, indent=1) if ending == "json" else "\n".join(map(json.dumps, dicts))
    found = read(compressed(path, text.encode()))
    assert [(row["id"], row["query"]) for row in found] == rows


def test_a_parquet_file_keeps_its_types(tmp_path):
    pq.write_table(pa.table({"id": ["01"], "n": [5]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [{"id": "01", "n": 5}]
    (batch,) = read_batches(tmp_path / "a.parquet", columns={"n"})
    assert batch.table.to_pylist() == [{"n": 5}]


@pytest.mark.parametrize(
    "text",
    [
        '[{"a": "x"}, {"a": "y"}]',
        '\ufeff[\n {"a": "x"},\n\n {"a": "y"}\n]\n',
        '{"a": "x"}\n{"a": "y"}',
        '{\n "a": "x"\n}\n{\n "a": "y"\n}\n',
        '{"a": "x"} {"a": "y"}',
    ],
)
def test_json_in_an_array_one_a_line_or_one_after_the_other(text, tmp_path):
    (tmp_path / "a.json").write_text(text)
    assert read(tmp_path / "a.json") == [{"a": "x"}, {"a": "y"}]


def test_a_long_array_is_read_in_pieces(tmp_path):
    rows = [{"a": f"{i} {'x' * 900}"} for i in range(9000)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    sizes = [batch.table.num_rows for batch in read_batches(tmp_path / "a.json")]
    assert sum(sizes) == 9000 and max(sizes) <= 4096
    assert read(tmp_path / "a.json") == rows


def test_nested_values_are_texts_too(tmp_path):
    rows = [{"a": {"id": 7, "ok": True, "t": None}, "b": [1, "2"]}, {"a": {"id": "x"}, "b": []}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read(tmp_path / "a.jsonl") == [
        {"a": {"id": "7", "ok": "true", "t": None}, "b": ["1", "2"]},
        {"a": {"id": "x", "ok": None, "t": None}, "b": []},
    ]


def test_a_tsv_file_has_no_quoting(tmp_path):
    lines = ["query\tpositive\tnegative", '"a\tb"\t"c', 'x"y\t"z" and more\tw', "d\te\tf"]
    (tmp_path / "a.tsv").write_text("\n".join(lines))
    assert read(tmp_path / "a.tsv") == [
        {"query": '"a', "positive": 'b"', "negative": '"c'},
        {"query": 'x"y', "positive": '"z" and more', "negative": "w"},
        {"query": "d", "positive": "e", "negative": "f"},
    ]


def test_a_row_of_empty_texts_is_a_row_and_an_empty_line_is_none(tmp_path):
    (tmp_path / "a.tsv").write_text("query\ttext\n\t\n\na\tb\n")
    rows = read_rows(tmp_path / "a.tsv")
    assert rows.table.to_pylist() == [{"query": "", "text": ""}, {"query": "a", "text": "b"}]
    assert rows.at(1).endswith("a.tsv, row 4")


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_a_tsv_file_that_a_csv_writer_wrote_is_read_as_such(quoting, tmp_path):
    rows = [{"query": 'he said "hi"', "text": "two\nlines"}, {"query": "tab\there", "text": "plain"}]
    with (tmp_path / "a.tsv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["query", "text"], delimiter="\t", quoting=quoting)
        writer.writeheader()
        writer.writerows(rows)
    assert read(tmp_path / "a.tsv") == rows


def test_a_tsv_file_without_a_header_has_numbered_columns(tmp_path):
    (tmp_path / "a.tsv").write_text("what is a moon\tA moon is round.\tSand is dry.\nq\tp\tn\n")
    assert read(tmp_path / "a.tsv")[1] == {"f0": "q", "f1": "p", "f2": "n"}
    (tmp_path / "b.tsv").write_text("d1\tRain\nd2\tSnow\n")
    assert read_fields(tmp_path / "b.tsv", "\t").table.to_pylist()[0] == {"f0": "d1", "f1": "Rain"}


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ('Query;Text\n"a; b";c, d\n', [{"Query": "a; b", "Text": "c, d"}]),
        ('query,text\n"say \\"hi\\", now",x\n', [{"query": 'say "hi", now', "text": "x"}]),
        ('query,text\n"C:\\",x\n', [{"query": "C:\\", "text": "x"}]),
        ('query,text\n"two\nlines","a ""b"""\n', [{"query": "two\nlines", "text": 'a "b"'}]),
        ("text\nhello\n", [{"text": "hello"}]),
        ("1,a b c d\n2,x\n", [{"f0": "1", "f1": "a b c d"}, {"f0": "2", "f1": "x"}]),
    ],
)
def test_csv_is_read_in_the_dialects_that_are_unambiguous(text, rows, tmp_path):
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        (tmp_path / "a.csv").write_text(text, encoding=encoding)
        assert read(tmp_path / "a.csv") == rows


BAD = {
    "latin.csv": (b"text\nrain\ncaf\xe9\n", "latin.csv, line 3 is not UTF-8 .byte 0xe9.: save the file as UTF-8"),
    "latin.tsv": (b"query\ttext\nrain\tcaf\xe9\n", "latin.tsv, line 2 is not UTF-8"),
    "latin.jsonl": (b'{"a": "x"}\n\n{"a": "\xe9"}', "latin.jsonl, line 3 is not UTF-8"),
    "latin.json": (b'[{"a": "x"},\n{"a": "\xe9"}]', "latin.json, line 2 is not UTF-8"),
    "width.csv": (b"query,text\na,b\n\nc\n", "width.csv, line 4: 1 fields where the first line has 2"),
    "width.tsv": (b"query\ttext\na\tb\nc\td\te\n", "width.tsv, line 3: 3 fields where the first line has 2"),
    "open.csv": (b'query,text\na,"b\nc,d\n', "open.csv, line 2: unexpected end of data"),
    "twice.csv": (b"text,text\na,b\n", "twice.csv, line 1: the header has 'text' twice"),
    "both.csv": (b"query;text,label\n1;2,3\n", r"both.csv, line 1 may be split at ',' or ';'"),
    "array.json": (b'[{"a": 1} {"a": 2}]', "array.json, line 1 is not JSON: a comma is missing before"),
    "open.json": (b'[{"a": 1},\n', "open.json, line 2 is not JSON: the array does not end"),
    "more.json": (b'[{"a": 1}]\nx', "more.json, line 1 is not JSON: 'x' after the end of the array"),
    "number.json": (b"[1]", "number.json, line 1: expected an object with named values"),
    "deep.jsonl": (b"[" * 100_000, "deep.jsonl, line 1 is not JSON"),
    "twice.jsonl": (b'{"a": 1, "a": 2}', "twice.jsonl, line 1 is not JSON: 'a' is given twice in one object"),
    "mixed.jsonl": (b'{"a": "x"}\n{"a": ["y"]}', "mixed.jsonl, row 2: 'a' does not hold the same kind of value"),
    "cut.csv.gz": (gzip.compress(b"text\n" + b"rain\n" * 9000)[:-20], "cut.csv.gz cannot be read: Truncated"),
    "not.csv.gz": (b"text\nrain", "not.csv.gz cannot be read"),
    "bad.parquet": (b"PAR1 not really", "bad.parquet cannot be read"),
    "lfs.parquet": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "lfs.parquet.*git lfs pull"),
    "wide.jsonl": ('{"a": "x"}\n'.encode("utf-16-le"), "wide.jsonl: it looks like UTF-16 without a byte order mark"),
    "a.xlsx": (b"", "a.xlsx must end in .jsonl"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_one_line_with_file_and_line(name, tmp_path):
    content, message = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        read_rows(tmp_path / name)
    assert "\n" not in str(error.value)
    with pytest.raises(GroupsError):
        read_rows(tmp_path / name, error=GroupsError)


def test_bytes_in_a_parquet_file_that_are_no_text_are_refused(tmp_path):
    broken = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\x02\0\0\0"), pa.py_buffer(b"a\x87")])
    pq.write_table(pa.table({"query": broken, "positive": ["p"], "negative": ["n"]}), tmp_path / "a.parquet")
    for read in (read_rows, lambda path: list(read_batches(path)), to_groups):
        with pytest.raises((DataError, GroupsError), match=r"a\.parquet.*[Ii]nvalid UTF8"):
            read(tmp_path / "a.parquet")


def test_a_name_of_a_column_that_no_dataset_can_have_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"query": "q", "\\u0000text": "p", "label": 1, "\\u0000": 2}')
    with pytest.raises(GroupsError, match=r"a\.jsonl"):
        to_groups(tmp_path / "a.jsonl")


def test_a_cloned_dataset_is_read_by_its_data_files(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# A dataset")
    (tmp_path / "data" / "train-0.csv").write_text("id,text\n007,x\n")
    (tmp_path / "data" / "train-1.csv").write_text("id,text\n2024-01-15,y\n")
    assert read(tmp_path) == [{"id": "007", "text": "x"}, {"id": "2024-01-15", "text": "y"}]
    with pytest.raises(DataError, match=r"no dataset .*split 'test'"):
        read_rows(tmp_path, split="test")


def test_classes_come_by_their_names():
    features = Features(
        {"label": ClassLabel(names=["relevant", "unrelated"]), "all": List(ClassLabel(names=["no", "yes"]))}
    )
    rows = Dataset.from_dict({"label": [1, 0, -1], "all": [[0, 1], [], None]}, features=features)
    assert arrow_table(rows).to_pydict() == {
        "label": ["unrelated", "relevant", None],
        "all": [["no", "yes"], [], None],
    }
    assert arrow_table(rows.select([1]))["label"].to_pylist() == ["relevant"]
    assert Value("string") not in rows.features.values()


def test_a_number_that_is_none_names_its_row():
    with pytest.raises(DataError, match="grade: row 1 is 'high', which is not a finite number"):
        numbers_of(pa.chunked_array([["1", "high"]]), "grade")
    assert numbers_of(pa.chunked_array([[" 1", "2.5"]]), "grade").tolist() == [1.0, 2.5]
