"""Read documents, clean them, cut them into passages; whatever is dropped or merged is counted."""

import csv
import hashlib
import json
import logging
import math
import re
import runpy
import traceback
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from lce_trainer.errors import ConfigError, CorpusError
from lce_trainer.settings import option

logger = logging.getLogger(__name__)

PASSAGES_SCHEMA = pa.schema([(name, pa.string()) for name in ("passage_id", "doc_id", "text", "title")])

_TEXT_NAMES = ("text", "passage", "content", "contents", "body", "document", "abstract", "article", "answer", "context")
_ID_NAMES = ("doc_id", "_id", "id", "docid", "document_id", "pid", "passage_id")
_FILES = (".parquet", ".jsonl", ".json", ".csv", ".tsv")
_TEXTS = {".txt", ".md", ".markdown"}
_COUNTS = (
    *("documents_read", "documents", "documents_empty", "documents_duplicate", "documents_not_text"),
    *("documents_undecodable", "documents_not_drawn", "words_too_long", "passages", "passages_duplicate"),
)
_BATCH = 256  # rows read at once from columnar files
_FLUSH = 50_000  # passages held as Python strings before they become Arrow

# Longer "words" are encoded data, not language: no written word comes near.
_LONGEST_WORD = 200
# Control characters that are not white space, soft hyphen, byte order mark, half of a surrogate pair.
_JUNK = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\ufeff\ud800-\udfff]")
_PARAGRAPH = re.compile(r"\n\s*\n")
_SAYS_SOMETHING = re.compile(r"[^\W_]")
_HEADING = re.compile(r"^ {0,3}#{1,6}[ \t]+(\S.*)$", re.MULTILINE)
# Common abbreviations, initials and the numbers of a list end no sentence; at rarer ones a passage may start.
_SENTENCE_END = re.compile(
    r" (?:(?<=[.!?…] )|(?<=[.!?…][\"'”’)\]] ))(?![a-z])"
    r"(?<!\b(?:Dr|Mr|Ms|St|vs|cf|al)\. )(?<!\b(?:Mrs|Fig|e\.g|i\.e)\. )(?<!\bProf\. )(?<!\b[A-Z0-9]\. )"
)


@dataclass
class CorpusConfig:
    """Where the documents are and how they are cut into passages."""

    source: str | None = option(None, "Hub dataset id, .parquet/.jsonl/.csv file, or a folder of .txt/.md files.")
    script: str | None = option(
        None, "Instead of source: a Python file of yours whose documents() yields dicts with text, doc_id, title."
    )
    split: str = option("train", "Split of a Hub dataset.")
    text_column: str | None = option(None, "Column with the text; found by name (text, passage, content, …) if null.")
    id_column: str | None = option(None, "Column with the document's id; found by name, else made from the text.")
    title_column: str | None = option(
        None, "Column with the title, which every passage of the document carries; found by name."
    )
    max_words: int = option(150, "Words a passage holds at most.")
    overlap_words: int = option(20, "Words of whole sentences that a passage repeats from the one before.")
    max_documents: int | None = option(None, "Use only so many documents, drawn at random with the recipe's seed.")


@dataclass(frozen=True)
class Passages:
    """A corpus, cut.

    Attributes:
        table: ``passage_id`` (``doc_id#0``, ``doc_id#1``, …), ``doc_id``, ``text`` (which starts with the title,
            if there is one, on a line of its own) and ``title``.
        counts: What was read, kept, and dropped and why.
        merged: The document that stands for each document merged into it, by ``doc_id``: judgments may name either.
    """

    table: datasets.Dataset
    counts: dict[str, int]
    merged: dict[str, str]


def build_passages(config: CorpusConfig, seed: int, base: Path) -> Passages:
    """Read a corpus and cut it into passages.

    Text is cleaned: Unicode NFC, control characters and words over 200 characters removed, white space folded.
    Documents with the same title and text are merged into the first of them, and so are passages. Documents that
    share an id count as parts of one: their passages are numbered on.

    Args:
        config: Where the documents are and how they are cut.
        seed: Seeds the draw of ``max_documents``.
        base: The recipe's folder, where ``script`` is; ``source`` may be relative to it or to the current folder.

    Raises:
        CorpusError: There is nothing to read, it cannot be read, or nothing is left of it.
        ConfigError: The settings contradict each other.
    """
    _check(config)
    where = config.script or config.source or ""
    counts = dict.fromkeys(_COUNTS, 0)
    documents, merged = _clean_and_merge(_read(config, base, counts), config, where, counts)
    if config.max_documents is not None and config.max_documents < len(documents):
        drawn = np.random.default_rng(seed).choice(len(documents), config.max_documents, replace=False)
        counts["documents_not_drawn"] = len(documents) - config.max_documents
        documents = [documents[row] for row in np.sort(drawn)]
    counts["documents"] = len(documents)
    table = _cut(documents, config, counts, merged)
    kept = set(table.unique("doc_id"))
    # A document may have been merged into one that was merged in its turn, or that was not drawn.
    merged = {doc_id: into if into in kept else merged.get(into, "") for doc_id, into in merged.items()}
    merged = {doc_id: into for doc_id, into in merged.items() if into in kept and doc_id not in kept}
    logger.debug("%s: %s", where, _said(counts))
    if counts["words_too_long"]:
        logger.warning(
            "%s: %d words of over %d characters left out: encoded data, or a script that puts no spaces between words",
            *(where, counts["words_too_long"], _LONGEST_WORD),
        )
    return Passages(table, counts, merged)


def passage_text(title: str, text: str) -> str:
    """A passage as the retriever, the language model and the reranker see it."""
    return f"{title}\n{text}" if title else text


def split_passages(text: str, max_words: int, overlap_words: int) -> list[str]:
    """Cut a text at sentences into passages of much the same length.

    As few passages as ``max_words`` allows, and among those cuts the one whose longest passage is shortest, so
    that no scrap is left at the end. A sentence of more than ``max_words`` is cut between words. Every passage
    says something that the one before does not. Sentences are found by their punctuation, abbreviations mostly
    told apart.

    Args:
        text: Cleaned text, one paragraph a line; a paragraph's end is a sentence's end.
        max_words: Words of a passage at most.
        overlap_words: A passage starts with the last whole sentences of the one before, of so many words at most.
    """
    sentences = [part for line in text.split("\n") for part in _sentences(line, max_words)]
    sizes = [sentence.count(" ") + 1 for sentence in sentences]
    spans = _pack(sizes, max_words, overlap_words)
    low, high = max(max(sizes), math.ceil(sum(sizes) / len(spans))), max_words
    while low < high:
        middle = (low + high) // 2
        tried = _pack(sizes, middle, overlap_words)
        if len(tried) <= len(spans):
            spans, high = tried, middle
        else:
            low = middle + 1
    return [" ".join(sentences[start:end]) for start, end in spans]


def _sentences(line: str, max_words: int) -> Iterator[str]:
    for sentence in _SENTENCE_END.split(line):
        words = sentence.split(" ")
        pieces = math.ceil(len(words) / max_words)
        for i in range(pieces):
            yield " ".join(words[i * len(words) // pieces : (i + 1) * len(words) // pieces])


def _pack(sizes: list[int], capacity: int, overlap: int) -> list[tuple[int, int]]:
    """First and past-the-last sentence of each passage; as many sentences in each as go in."""
    spans = []
    start = words = 0
    for i, size in enumerate(sizes):
        if words + size > capacity:
            spans.append((start, i))
            start, words = i, 0
            # Never back to the first sentence of the span just closed: that span and this sentence do not fit.
            while words + sizes[start - 1] <= min(overlap, capacity - size):
                start -= 1
                words += sizes[start]
        words += size
    return [*spans, (start, len(sizes))]


def _check(config: CorpusConfig) -> None:
    if (config.source is None) == (config.script is None):
        raise ConfigError("corpus: set either source (a dataset, file or folder) or script (a Python file)")
    if config.max_words < 1 or not 0 <= config.overlap_words < config.max_words:
        raise ConfigError("corpus: max_words must be above 0, and overlap_words from 0 to below max_words")
    if config.max_documents is not None and config.max_documents < 1:
        raise ConfigError(f"corpus: max_documents must be 1 or more, or null for all, not {config.max_documents}")


def _clean_and_merge(
    rows: Iterable[Mapping[str, Any]], config: CorpusConfig, where: str, counts: dict[str, int]
) -> tuple[list[tuple[str, str, str]], dict[str, str]]:
    """The distinct documents, as ``(doc_id, title, text)`` with one paragraph a line; and what was merged into what."""
    documents: list[tuple[str, str, str]] = []
    merged: dict[str, str] = {}
    first: dict[bytes, str] = {}  # doc_id by digest of the document
    columns = None
    for row in tqdm(rows, desc="reading documents", unit=" documents"):
        columns = columns or _columns(row, config, where)
        raw, raw_id, raw_title = (row.get(name) for name in columns)
        counts["documents_read"] += 1
        if not isinstance(raw, str):
            counts["documents_not_text"] += 1
            continue
        text, too_long = clean_text(raw)
        counts["words_too_long"] += too_long
        if not _SAYS_SOMETHING.search(text):
            counts["documents_empty"] += 1
            continue
        title = clean_text(raw_title)[0].replace("\n", " ") if isinstance(raw_title, str) else ""
        key = hashlib.sha256(passage_text(title, text.replace("\n", " ")).encode()).digest()
        doc_id = key.hex()[:16] if raw_id in (None, "") else _JUNK.sub("", str(raw_id))
        if key in first:
            counts["documents_duplicate"] += 1
            merged.setdefault(doc_id, first[key])
        else:
            first[key] = doc_id
            documents.append((doc_id, title, text))
    if not documents:
        raise CorpusError(f"{where}: nothing to make passages of: {_said(counts)}")
    return documents, merged


def clean_text(text: str) -> tuple[str, int]:
    """Clean a text, in time linear in its length.

    Returns:
        The text, one paragraph a line, words parted by single spaces; and how many words over 200 characters were
        left out.
    """
    paragraphs = []
    too_long = 0
    for paragraph in _PARAGRAPH.split(_JUNK.sub("", text)):
        words = paragraph.split()
        kept = [word for word in words if len(word) <= _LONGEST_WORD]
        too_long += len(words) - len(kept)
        if kept:
            paragraphs.append(" ".join(kept))
    # Normalizing comes last: a run of combining marks takes quadratic time, and is now a short word.
    return unicodedata.normalize("NFC", "\n".join(paragraphs)), too_long


def _cut(
    documents: list[tuple[str, str, str]], config: CorpusConfig, counts: dict[str, int], merged: dict[str, str]
) -> datasets.Dataset:
    """The passages table; a document that repeats other documents' passages only is merged into the first of them."""
    batches: list[pa.RecordBatch] = []
    rows: list[dict[str, str]] = []
    first: dict[bytes, str] = {}  # doc_id by digest of the passage
    numbers: dict[str, int] = {}  # of the next passage, by doc_id
    for doc_id, title, text in tqdm(documents, desc="cutting passages", unit=" documents"):
        owners = []
        for body in split_passages(text, config.max_words, config.overlap_words):
            passage = passage_text(title, body)
            key = hashlib.sha256(passage.encode()).digest()
            if key in first:
                counts["passages_duplicate"] += 1
                owners.append(first[key])
                continue
            first[key] = doc_id
            number = numbers.get(doc_id, 0)
            numbers[doc_id] = number + 1
            rows.append({"passage_id": f"{doc_id}#{number}", "doc_id": doc_id, "text": passage, "title": title})
        if doc_id not in numbers:
            counts["documents"] -= 1
            counts["documents_duplicate"] += 1
            merged[doc_id] = owners[0]
        if len(rows) >= _FLUSH:
            batches.append(pa.RecordBatch.from_pylist(rows, PASSAGES_SCHEMA))
            rows = []
    batches.append(pa.RecordBatch.from_pylist(rows, PASSAGES_SCHEMA))
    counts["passages"] = sum(batch.num_rows for batch in batches)
    fingerprint = datasets.fingerprint.generate_random_fingerprint()  # else a hash of all the texts, pickled
    return datasets.Dataset(pa.Table.from_batches(batches), fingerprint=fingerprint)


def _said(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items() if count) or "it holds no documents"


def _columns(names: Iterable[str], config: CorpusConfig, where: object) -> tuple[str, str, str]:
    """The columns of text, id and title; the last two may be missing from some rows, or from all."""
    have = [name for name in names if isinstance(name, str)]  # what a csv row has too much comes under None

    def find(setting: str, named: str | None, known: tuple[str, ...]) -> str | None:
        if named is not None and named not in have:
            raise CorpusError(f"{where}: no column {named!r} (corpus.{setting}); there are: {', '.join(have)}")
        lower = {name.lower(): name for name in reversed(have)}
        return named or next((lower[name] for name in known if name in lower), None)

    text = find("text_column", config.text_column, _TEXT_NAMES)
    if text is None:
        raise CorpusError(
            f"{where}: no column named {', '.join(_TEXT_NAMES[:4])} or the like; there are: {', '.join(have)}; "
            f"name the one with the text in corpus.text_column"
        )
    doc_id = find("id_column", config.id_column, _ID_NAMES) or _ID_NAMES[0]
    return text, doc_id, find("title_column", config.title_column, ("title",)) or "title"


def _read(config: CorpusConfig, base: Path, counts: dict[str, int]) -> Iterator[Mapping[str, Any]]:
    """Rows as they come, from wherever they are."""
    if config.script is not None:
        yield from _run_script(base / config.script)
        return
    source = str(config.source)
    path = next((path for path in (Path(source).expanduser(), base / source) if path.exists()), None)
    if path is None:
        if Path(source).suffix in _FILES or source.startswith((".", "/", "~")) or source.count("/") > 1:
            raise CorpusError(f"no file or folder {source!r}, here or beside the recipe")
        yield from _read_dataset(source, config)
        return
    try:
        if path.is_dir():
            yield from _read_folder(path, config, counts)
        elif path.suffix == ".parquet":
            yield from _read_parquet(path, config)
        elif path.suffix in (".csv", ".tsv"):
            yield from _read_csv(path)
        elif path.suffix in _FILES:
            yield from _read_json(path, counts)
        else:
            raise CorpusError(f"{path}: expected a folder, or a file named {', '.join(_FILES)}")
    except (OSError, UnicodeDecodeError, csv.Error, pa.ArrowException) as error:
        raise CorpusError(f"{path} cannot be read: {_one_line(error)}") from None


def _run_script(path: Path) -> Iterator[Mapping[str, Any]]:
    if not path.is_file():
        raise CorpusError(f"no script at {path} (corpus.script is relative to the recipe)")
    try:
        documents = runpy.run_path(str(path)).get("documents")
        if not callable(documents):
            raise TypeError("it must define a function documents() that yields dicts with text, doc_id, title")
        for number, row in enumerate(documents()):
            if not isinstance(row, Mapping):
                raise TypeError(f"documents() must yield dicts, but number {number} is {str(row)[:60]!r}")
            yield row
    except (Exception, SystemExit) as error:  # whatever the user's code does
        lines = [f", line {at.lineno}" for at in traceback.extract_tb(error.__traceback__) if at.filename == str(path)]
        raise CorpusError(f"{path}{(lines or [''])[-1]}: {type(error).__name__}: {_one_line(error)}") from error


def _read_dataset(name: str, config: CorpusConfig) -> Iterator[Mapping[str, Any]]:
    try:
        table = datasets.load_dataset(name, split=config.split)
    except Exception as error:  # the Hub, the network and the dataset's own files raise all kinds
        wanted = f"a folder of .txt or .md files, or a dataset with the split {config.split!r}"
        raise CorpusError(f"{name!r} is not {wanted}: {_one_line(error)}") from None
    columns = [column for column in table.column_names if column in _columns(table.column_names, config, name)]
    for batch in table.select_columns(columns).with_format("arrow").iter(_BATCH):
        yield from batch.to_pylist()


def _read_parquet(path: Path, config: CorpusConfig) -> Iterator[Mapping[str, Any]]:
    file = pq.ParquetFile(path)
    names = file.schema_arrow.names
    wanted = [column for column in names if column in _columns(names, config, path)]
    for batch in file.iter_batches(_BATCH, columns=wanted):
        yield from batch.to_pylist()


def _read_csv(path: Path) -> Iterator[Mapping[str, Any]]:
    limit = csv.field_size_limit(2**31 - 1)  # else no field over 128 KiB
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            yield from csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
    finally:
        csv.field_size_limit(limit)


def _read_json(path: Path, counts: dict[str, int]) -> Iterator[Mapping[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError:
                if not counts["documents_undecodable"]:
                    logger.warning("%s, line %d is not UTF-8; such lines are dropped and counted", path, number)
                counts["documents_undecodable"] += 1
                counts["documents_read"] += 1
                continue
            except (ValueError, RecursionError) as error:
                raise CorpusError(f"{path}, line {number} is not JSON, one object a line: {_one_line(error)}") from None
            if not isinstance(row, dict):
                raise CorpusError(f"{path}, line {number}: expected an object with a text, not {str(row)[:60]!r}")
            yield row


def _read_folder(path: Path, config: CorpusConfig, counts: dict[str, int]) -> Iterator[Mapping[str, Any]]:
    """A document a file, hidden ones left out; or the parquet, jsonl or csv files of a dataset."""
    files = [file for file in path.rglob("*") if file.suffix.lower() in _TEXTS and file.is_file()]
    by_name = {file.relative_to(path).as_posix(): file for file in files}
    names = sorted(name for name in by_name if not f"/{name}".count("/."))
    if not names:
        yield from _read_dataset(str(path), config)
    for name in names:
        try:
            text = by_name[name].read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            logger.warning("%s is not UTF-8: left out and counted", by_name[name])
            counts["documents_undecodable"] += 1
            counts["documents_read"] += 1
            continue
        title = ""
        # In a code block # may be a comment.
        if not name.lower().endswith(".txt") and (heading := _HEADING.search(text.partition("```")[0])):
            title, text = heading[1], text[: heading.start()] + text[heading.end() :]
        yield {"doc_id": name, "title": title, "text": text}


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
