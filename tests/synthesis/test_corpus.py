"""Whatever people have, passages come out, and what was dropped is counted."""

import json
import random
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from helpers.paths import SHARED_DATA
from lce_trainer.errors import ConfigError, CorpusError
from lce_trainer.synthesis.corpus import (
    CorpusConfig,
    Passages,
    build_passages,
    clean_text,
    passage_text,
    split_passages,
)

ROWS = [
    {"doc_id": "a", "title": "Moon", "text": "The moon shines. It is red."},
    {"doc_id": "b", "title": "", "text": "Rain falls on the hill."},
    {"doc_id": "c", "title": "Fire", "text": "Fire burns.\n\nSand does not."},
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / ".cache")


def build(source: str | Path | None = None, base: Path = Path(), seed: int = 0, **settings: Any) -> Passages:
    return build_passages(CorpusConfig(source=source and str(source), **settings), seed, base)


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def build_rows(tmp_path: Path, rows: list[Any], **settings: Any) -> Passages:
    return build(write_jsonl(tmp_path / "rows.jsonl", rows), **settings)


def as_dataset_folder(path: Path) -> Path:
    path.mkdir()
    pq.write_table(pa.Table.from_pylist(ROWS), path / "train-00000.parquet")
    return path


def as_script(path: Path) -> Path:
    path.write_text(f"ROWS = {ROWS!r}\n\ndef documents():\n    yield from ROWS\n")
    return path


WRITERS: dict[str, Callable[[Path], Any]] = {
    "rows.parquet": lambda path: pq.write_table(pa.Table.from_pylist(ROWS), path),
    "rows.jsonl": lambda path: write_jsonl(path, ROWS),
    "rows.json": lambda path: write_jsonl(path, ROWS),
    "rows.csv": lambda path: pyarrow.csv.write_csv(pa.Table.from_pylist(ROWS), path),
    "rows.tsv": lambda path: pyarrow.csv.write_csv(
        pa.Table.from_pylist(ROWS), path, pyarrow.csv.WriteOptions(delimiter="\t")
    ),
    "dataset": as_dataset_folder,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_source_gives_the_same_passages(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    passages = build(tmp_path / name)
    assert passages.table.to_list() == [
        {"passage_id": "a#0", "doc_id": "a", "text": "Moon\nThe moon shines. It is red.", "title": "Moon"},
        {"passage_id": "b#0", "doc_id": "b", "text": "Rain falls on the hill.", "title": ""},
        {"passage_id": "c#0", "doc_id": "c", "text": "Fire\nFire burns. Sand does not.", "title": "Fire"},
    ]
    assert {name: count for name, count in passages.counts.items() if count} == {
        "documents_read": 3,
        "documents": 3,
        "passages": 3,
    }
    assert passages.merged == {}


def test_a_script_gives_what_a_file_gives(tmp_path: Path) -> None:
    as_script(tmp_path / "collect.py")
    from_file = build(write_jsonl(tmp_path / "rows.jsonl", ROWS))
    from_script = build(script="collect.py", base=tmp_path)
    assert from_script.table.to_list() == from_file.table.to_list()


def test_a_folder_gives_a_document_a_file_in_name_order(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "b.txt").write_text("# no title\nRain.")
    (tmp_path / "a.md").write_text("Before.\n\n## The Moon\n\nIt shines.")
    (tmp_path / "sub" / "c.md").write_text("```sh\n# a comment\n```\nSand.")
    (tmp_path / "sub" / "bad.txt").write_bytes(b"caf\xe9")
    (tmp_path / ".git" / "x.md").write_text("Hidden.")
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    passages = build(tmp_path)
    assert [(row["doc_id"], row["title"], row["text"]) for row in passages.table] == [
        ("a.md", "The Moon", "The Moon\nBefore. It shines."),
        ("b.txt", "", "# no title Rain."),
        ("sub/c.md", "", "```sh # a comment ``` Sand."),
    ]
    assert passages.counts["documents_undecodable"] == 1
    assert "bad.txt is not UTF-8" in caplog.text


def test_a_relative_source_is_found_here_and_then_beside_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, recipe = tmp_path / "here", tmp_path / "recipe"
    here.mkdir(), recipe.mkdir()
    write_jsonl(recipe / "rows.jsonl", [{"text": "beside the recipe"}])
    monkeypatch.chdir(here)
    assert build("rows.jsonl", recipe).table["text"][:] == ["beside the recipe"]
    write_jsonl(here / "rows.jsonl", [{"text": "here"}])
    assert build("rows.jsonl", recipe).table["text"][:] == ["here"]


@pytest.mark.parametrize(
    ("row", "settings", "doc_id", "text"),
    [
        ({"_id": 7, "Content": "rain", "text_length": 4}, {}, "7", "rain"),
        ({"id": "x", "body": "rain", "note": "snow"}, {"text_column": "note"}, "x", "snow"),
        ({"key": "k", "answer": "rain"}, {"id_column": "key"}, "k", "rain"),
        ({"text": "rain", "name": "N"}, {"title_column": "name", "id_column": "name"}, "N", "N\nrain"),
    ],
)
def test_columns_are_found_by_name_or_named(
    row: dict[str, Any], settings: dict[str, Any], doc_id: str, text: str, tmp_path: Path
) -> None:
    (found,) = build_rows(tmp_path, [row], **settings).table
    assert (found["doc_id"], found["text"]) == (doc_id, text)


def test_a_document_without_an_id_gets_one_from_its_text(tmp_path: Path) -> None:
    first = build_rows(tmp_path, [{"text": "rain"}, {"text": "snow"}]).table["doc_id"][:]
    second = build_rows(tmp_path, [{"text": " snow\n"}, {"text": "sand"}]).table["doc_id"][:]
    assert len(set(first)) == 2
    assert first[1] == second[0]


def test_text_is_cleaned() -> None:
    assert clean_text("a\x00b\tc \r\n d\u00a0e\ufeff \ud83d cafe\u0301") == ("ab c d e caf\u00e9", 0)
    assert clean_text("one\ntwo\r\n \r\nthree\n\n\n") == ("one two\nthree", 0)


def test_empty_documents_and_those_without_text_are_counted(tmp_path: Path) -> None:
    rows = [{"text": " \n "}, {"text": "--- * ---"}, {"text": None}, {"text": 5}, {"other": "x"}, {"text": "rain"}]
    counts = build_rows(tmp_path, rows).counts
    assert (counts["documents_read"], counts["documents"]) == (6, 2), "a number is the text that is written"
    assert (counts["documents_empty"], counts["documents_not_text"]) == (2, 2)


def test_equal_documents_are_merged_into_the_first(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "text": "Rain falls."},
        {"id": "b", "text": "Rain\n falls. "},
        {"id": "c", "title": "Weather", "text": "Rain falls."},
        {"id": "d", "text": "Rain falls."},
    ]
    passages = build_rows(tmp_path, rows)
    assert passages.table["doc_id"][:] == ["a", "c"], "another title makes another document"
    assert passages.merged == {"b": "a", "d": "a"}
    assert passages.counts["documents_duplicate"] == 2


def test_a_document_made_of_others_passages_is_merged_into_the_first_of_them(tmp_path: Path) -> None:
    one, two, three = ("Rain falls here now.", "Snow falls there then.", "Fire burns it all.")
    rows = [
        {"id": "a", "text": f"{one} {two}"},
        {"id": "b", "text": two},
        {"id": "c", "text": f"{two} {three}"},
        {"id": "d", "text": two},
    ]
    passages = build_rows(tmp_path, rows, max_words=4, overlap_words=0)
    assert passages.table["passage_id"][:] == ["a#0", "a#1", "c#0"]
    assert passages.table["text"][:] == [one, two, three]
    assert passages.merged == {"b": "a", "d": "a"}
    assert passages.counts["passages_duplicate"] == 2
    assert passages.counts["documents"] == 2
    assert passages.counts["documents_duplicate"] == 2


def test_documents_that_share_an_id_number_their_passages_on(tmp_path: Path) -> None:
    rows = [{"id": "a", "text": "Rain falls."}, {"id": "b", "text": "Sand."}, {"id": "a", "text": "Snow falls."}]
    assert build_rows(tmp_path, rows).table["passage_id"][:] == ["a#0", "b#0", "a#1"]


def test_documents_are_drawn_by_the_seed_and_keep_their_order(tmp_path: Path) -> None:
    rows = [{"id": f"{i:03}", "text": f"Document {i // 2}."} for i in range(200)]
    draws = [build_rows(tmp_path, rows, seed=seed, max_documents=30) for seed in range(40)]
    for draw in draws:
        ids = draw.table["doc_id"][:]
        assert len(ids) == 30
        assert ids == sorted(ids)
        assert set(draw.merged.values()) == set(ids), "only what stands for a drawn document"
        assert draw.counts["documents_not_drawn"] == 70
    assert draws[3].table["doc_id"][:] == build_rows(tmp_path, rows, seed=3, max_documents=30).table["doc_id"][:]
    drawn = [row for draw in draws for row in draw.table["doc_id"][:]]
    assert len(set(drawn)) == 100, "every document has its chance"
    assert len(build_rows(tmp_path, rows, max_documents=1000).table) == 100


def test_lines_that_are_not_utf8_are_dropped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "rain"}\n\n{"text": "caf\xe9"}\n{"text": "\xff"}\n')
    passages = build(tmp_path / "rows.jsonl")
    assert passages.table["text"][:] == ["rain"]
    assert passages.counts["documents_undecodable"] == 2
    assert passages.counts["documents_read"] == 3
    assert caplog.text.count("line 3 is not UTF-8") == 1


def test_a_surrogate_in_json_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"id": "a\\ud800", "title": "\\udfff", "text": "rain \\ud800"}')
    assert build(tmp_path / "rows.jsonl").table.to_list() == [
        {"passage_id": "a#0", "doc_id": "a", "text": "rain", "title": ""}
    ]


BAD_FILES = {
    "garbage.parquet": (b"PAR1 not really", "garbage.parquet cannot be read"),
    "latin.csv": (b"text\ncaf\xe9\n", "latin.csv, line 2 is not UTF-8"),
    "header.csv": (b"id,text\n", "it holds no documents"),
    "empty.jsonl": (b"", "it holds no documents"),
    "broken.jsonl": (b'{"text": "rain"}\n{"text": \n', "broken.jsonl, line 2 is not JSON"),
    "deep.jsonl": (b"[" * 100_000, "deep.jsonl, line 1 is not JSON"),
    "array.json": (b'["rain"]', "array.json, line 1: expected an object"),
    "numbers.jsonl": (
        b'{"text": {"en": 1}}\n{"text": {"en": 2}}',
        "nothing to make passages of: documents_read 2, documents_not_text 2",
    ),
    "blank.jsonl": (b'{"text": ""}', "documents_empty 1"),
    "columns.jsonl": (b'{"rain": "x", "snow": "y"}', "there are: rain, snow"),
    "book.pdf": (b"%PDF", "book.pdf cannot be read"),
    "film.mp4": (b"moov", "expected a folder, or a file named .parquet"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_input_is_one_line_that_names_it(name: str, tmp_path: Path) -> None:
    content, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError) as caught:
        build(tmp_path / name)
    assert message in str(caught.value)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_source_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    for source in (tmp_path / "missing.parquet", "./missing", tmp_path / "nothing", "nobody/no-such-dataset"):
        with pytest.raises(CorpusError, match=Path(source).name) as caught:
            build(source)
        assert "\n" not in str(caught.value)


def test_a_named_column_that_is_not_there_lists_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"no column 'txet' \(corpus.text_column\); there are: doc_id, title, text"):
        build_rows(tmp_path, ROWS, text_column="txet")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("x = 1", "must define a function documents"),
        ("def documents():\n    yield 'rain'", "must yield dicts, but number 0 is 'rain'"),
        (
            "def documents():\n    yield {'text': 'rain'}\n    raise OSError('disk\\nfull')",
            "line 3: OSError: disk full",
        ),
        ("import sys\nsys.exit('no data')", "line 2: SystemExit: no data"),
        ("def documents(:", "SyntaxError"),
        ("def documents():\n    yield {'test': 'rain'}", "there are: test"),
    ],
)
def test_a_failing_script_is_one_line_that_names_it(code: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "collect.py").write_text(code)
    with pytest.raises(CorpusError) as caught:
        build(script="collect.py", base=tmp_path)
    assert message in str(caught.value)
    assert "collect.py" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"source": "a.csv", "script": "b.py"},
        {"source": "a.csv", "max_words": 0},
        {"source": "a.csv", "overlap_words": 150},
        {"source": "a.csv", "max_documents": 0},
    ],
)
def test_settings_that_contradict_each_other_are_errors(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="corpus: "):
        build_passages(CorpusConfig(**settings), 0, Path())


@pytest.mark.parametrize(
    ("text", "too_long"),
    [
        ("x" * 10_000_000, 1),
        ("e\u0301\u0316" * 3_000_000, 1),
        ("word " * 2_000_000, 0),
        (" " * 10_000_000 + "\n", 0),
        ("# " + " #" * 5_000_000, 0),
        ("A. " * 1_000_000, 0),
    ],
    ids=["no space", "combining marks", "no full stop", "white space", "hashes", "full stops"],
)
def test_ten_megabytes_of_anything_neither_hang_nor_crash(text: str, too_long: int, tmp_path: Path) -> None:
    (tmp_path / "big.md").write_text(text)
    (tmp_path / "small.md").write_text("Rain falls.")
    passages = build(tmp_path)
    assert passages.counts["words_too_long"] == too_long
    assert max(len(passage.split()) for passage in passages.table["text"]) <= 150
    assert passages.table["text"][-1] == "Rain falls."


def random_sentences(rng: random.Random) -> list[str]:
    sentences = []
    for n in range(rng.randint(1, 40)):
        words = [f"w{n}x{i}" for i in range(rng.choice([1, 3, 8, 15, 25]))]
        sentences.append(" ".join(["W" + words[0], *words[1:]]) + rng.choice([".", "?", "!", '."']))
    return sentences


@pytest.mark.parametrize("overlap", [0, 7, 29])
def test_passages_hold_every_sentence_whole_and_repeat_only_the_overlap(overlap: int) -> None:
    rng = random.Random(overlap)
    for _ in range(200):
        sentences = random_sentences(rng)
        passages = split_passages(" ".join(sentences), 30, overlap)
        at = 0
        for passage in passages:
            assert len(passage.split()) <= 30
            start = next(i for i in range(len(sentences)) if passage.startswith(sentences[i]))
            end = start
            while end < len(sentences) and " ".join(sentences[start : end + 1]) in passage:
                end += 1
            assert passage == " ".join(sentences[start:end])
            assert start <= at < end, "no gap, and something new"
            assert len(" ".join(sentences[start:at]).split()) <= overlap
            at = end
        assert at == len(sentences)


def test_a_document_is_cut_evenly_rather_than_leaving_a_scrap() -> None:
    text = " ".join(f"Sentence number {i} has exactly seven words." for i in range(23))  # 161 words
    lengths = [len(passage.split()) for passage in split_passages(text, 150, 0)]
    assert lengths == [84, 77]
    assert len(split_passages(text, 161, 20)) == 1


def test_a_sentence_too_long_for_a_passage_is_cut_between_words() -> None:
    words = [f"w{i}" for i in range(100)]
    passages = split_passages(" ".join(words), 30, 10)
    assert " ".join(passages).split() == words
    assert [len(passage.split()) for passage in passages] == [25] * 4


def test_abbreviations_do_not_end_a_sentence() -> None:
    text = 'See Dr. Ray, e.g. J. Smith et al. 2019. It works 3. times (Fig. 2). "Does it?" Yes.'
    passages = split_passages(text, 12, 0)
    assert passages == ["See Dr. Ray, e.g. J. Smith et al. 2019.", 'It works 3. times (Fig. 2). "Does it?" Yes.']


def test_a_paragraph_ends_a_sentence() -> None:
    assert split_passages("A heading\nthe first words of it", 5, 0) == ["A heading", "the first words of it"]


def test_a_title_is_the_first_line_of_every_passage(tmp_path: Path) -> None:
    text = "Rain falls on the hill. Snow falls on the river."
    table = build_rows(tmp_path, [{"title": " The\n sky ", "text": text}], max_words=5, overlap_words=0).table
    assert table["text"][:] == ["The sky\nRain falls on the hill.", "The sky\nSnow falls on the river."]
    assert table["text"][0] == passage_text("The sky", "Rain falls on the hill.")


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="no shared/data folder beside the project")
def test_medquad_keeps_its_words() -> None:
    source = SHARED_DATA / "medquad" / "corpus.parquet"
    passages = build(source, max_documents=500, overlap_words=0)
    assert passages.counts["documents_read"] == 15_803
    assert passages.counts["documents"] <= 500
    assert len(passages.table) == len(set(passages.table["passage_id"]))
    texts = dict(zip(*pq.read_table(source, columns=["doc_id", "text"]).to_pydict().values(), strict=True))
    words: dict[str, list[str]] = {}
    for row in passages.table:
        assert len(row["text"].split()) <= 150
        words.setdefault(row["doc_id"], []).extend(row["text"].split())
    whole = [unicodedata.normalize("NFC", texts[doc_id]).split() == found for doc_id, found in words.items()]
    shared = passages.counts["passages_duplicate"]
    assert sum(whole) >= len(whole) - shared, "all but those that share a passage with another document"
    assert shared < 100
