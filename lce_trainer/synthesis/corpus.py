"""Read documents, clean them, cut them into passages; whatever is dropped or merged is counted."""

import hashlib
import logging
import math
import os
import re
import runpy
import tempfile
import traceback
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from tqdm.auto import tqdm

from lce_trainer.errors import ConfigError, CorpusError
from lce_trainer.files import ENDINGS as ROW_FILES
from lce_trainer.files import is_hub_id, kind_of, one_line, open_dataset, read_batches
from lce_trainer.settings import option
from lce_trainer.synthesis.documents import ENDINGS as DOCUMENTS
from lce_trainer.synthesis.documents import EXTRA, read_document
from lce_trainer.synthesis.language import (
    Language,
    count_words,
    detect_language,
    find_language,
    sentences,
    without_long_runs,
)

logger = logging.getLogger(__name__)

PASSAGES_SCHEMA = pa.schema([(name, pa.string()) for name in ("passage_id", "doc_id", "text", "title")])

_TEXT_NAMES = ("text", "passage", "content", "contents", "body", "document", "abstract", "article", "answer", "context")
_ID_NAMES = ("doc_id", "_id", "id", "docid", "document_id", "pid", "passage_id")
_NO_DOCUMENTS = re.compile(r"(readme|license|licence|changelog|contributing|citation|dataset_?card)\b.*", re.IGNORECASE)
_COUNTS = (
    *("documents_read", "documents", "documents_empty", "documents_duplicate", "documents_not_text"),
    *("documents_undecodable", "documents_unreadable", "documents_not_drawn", "words_too_long"),
    *("files_not_read", "passages", "passages_duplicate"),
)
_BATCH = 256  # rows of a dataset that are Python objects at once
_FLUSH = 5_000  # rows held as Python strings before they are written
_SAMPLE = 200  # documents by which the language is detected
_DOCUMENTS_SCHEMA = pa.schema([(name, pa.string()) for name in ("doc_id", "title", "text")])

# Longer "words" are encoded data, not language: no written word comes near.
_LONGEST_WORD = 200
# Control characters that are not white space, soft hyphen, byte order mark, half of a surrogate pair.
_JUNK = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\ufeff\ud800-\udfff]")
_PARAGRAPH = re.compile(r"\n\s*\n")
_SAYS_SOMETHING = re.compile(r"[^\W_]")


@dataclass
class CorpusConfig:
    """Where the documents are and how they are cut into passages."""

    source: str | None = option(
        None,
        "Hub dataset id; a .parquet, .jsonl, .json, .csv or .tsv file, packed by .gz or .zst or not; or a folder of "
        "such files, or of documents: .md, .mdx, .rst, .html, .ipynb, .txt, .pdf, .docx.",
    )
    script: str | None = option(
        None, "Instead of source: a Python file of yours whose documents() yields dicts with text, doc_id, title."
    )
    split: str = option("train", "Split of a Hub dataset.")
    text_column: str | None = option(None, "Column with the text; found by name (text, passage, content, …) if null.")
    id_column: str | None = option(None, "Column with the document's id; found by name, else made from the text.")
    title_column: str | None = option(
        None, "Column with the title, which every passage of the document carries; found by name."
    )
    language: str = option(
        "auto", "Code or English name of the language, as in de or German; auto: the one most of the text is in."
    )
    max_words: int = option(
        150, "Words a passage holds at most; in Chinese and Japanese two characters, in Thai four, count as a word."
    )
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
        language: The corpus is in.
    """

    table: datasets.Dataset
    counts: dict[str, int]
    merged: dict[str, str]
    language: Language


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
    rows: np.ndarray | range = range(len(documents))
    if config.max_documents is not None and config.max_documents < len(documents):
        rows = np.sort(np.random.default_rng(seed).choice(len(documents), config.max_documents, replace=False))
        counts["documents_not_drawn"] = len(documents) - config.max_documents
    counts["documents"] = len(rows)
    language = _language(config, documents)
    table = _cut(documents, rows, config, counts, merged)
    kept = set(table.unique("doc_id"))
    # A document may have been merged into one that was merged in its turn, or that was not drawn.
    merged = {doc_id: into if into in kept else merged.get(into, "") for doc_id, into in merged.items()}
    merged = {doc_id: into for doc_id, into in merged.items() if into in kept and doc_id not in kept}
    logger.debug("%s: %s", where, _in_words(counts))
    if counts["words_too_long"]:
        logger.warning(
            "%s: %d words of over %d characters left out: they are encoded data",
            *(where, counts["words_too_long"], _LONGEST_WORD),
        )
    return Passages(table, counts, merged, language)


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
        max_words: Words of a passage at most; where no space parts them, by the number of characters.
        overlap_words: A passage starts with the last whole sentences of the one before, of so many words at most.
    """
    parts = [part for line in text.split("\n") for part in sentences(f"{line} ", max_words)]
    sizes = [count_words(part) for part in parts]
    spans = _pack(sizes, max_words, overlap_words)
    low, high = max(max(sizes), math.ceil(sum(sizes) / len(spans))), max_words
    while low < high:
        middle = (low + high) // 2
        tried = _pack(sizes, middle, overlap_words)
        if len(tried) <= len(spans):
            spans, high = tried, middle
        else:
            low = middle + 1
    return ["".join(parts[start:end]).strip() for start, end in spans]


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


def _language(config: CorpusConfig, documents: datasets.Dataset) -> Language:
    if config.language != "auto":
        return find_language(config.language)
    step = max(len(documents) // _SAMPLE, 1)
    return detect_language(documents[row]["text"] for row in range(0, len(documents), step))


def _clean_and_merge(
    rows: Iterable[Mapping[str, Any]], config: CorpusConfig, where: str, counts: dict[str, int]
) -> tuple[datasets.Dataset, dict[str, str]]:
    """The distinct documents, on disk, with one paragraph a line; and what was merged into what."""
    merged: dict[str, str] = {}
    first: dict[bytes, str] = {}  # doc_id by digest of the document
    columns = None

    def distinct() -> Iterator[tuple[str, str, str]]:
        nonlocal columns
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
            key = hashlib.sha256(passage_text(title, text.replace("\n", " ")).encode()).digest()[:16]
            doc_id = key.hex() if raw_id in (None, "") else _JUNK.sub("", str(raw_id))
            if key in first:
                counts["documents_duplicate"] += 1
                merged.setdefault(doc_id, first[key])
            else:
                first[key] = doc_id
                yield doc_id, title, text

    documents = _on_disk(distinct(), _DOCUMENTS_SCHEMA)
    if not len(documents):
        raise CorpusError(f"{where}: nothing to make passages of: {_in_words(counts)}")
    return documents, merged


def _on_disk(rows: Iterable[tuple[str, ...]], schema: pa.Schema) -> datasets.Dataset:
    """Write rows to a file without a name, which goes when the table does, and map it into memory."""
    with tempfile.TemporaryDirectory(prefix="lce-trainer-") as folder:
        path = Path(folder) / "rows.arrow"
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
            held: list[tuple[str, ...]] = []
            for row in rows:
                held.append(row)
                if len(held) >= _FLUSH:
                    writer.write_batch(_batch(held, schema))
                    held = []
            if held:
                writer.write_batch(_batch(held, schema))
        table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
    fingerprint = datasets.fingerprint.generate_random_fingerprint()  # else a hash of all the texts, pickled
    return datasets.Dataset(table, fingerprint=fingerprint)


def _batch(rows: list[tuple[str, ...]], schema: pa.Schema) -> pa.RecordBatch:
    return pa.record_batch([pa.array(column, pa.string()) for column in zip(*rows, strict=True)], schema=schema)


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
        if len(kept) < len(words):
            kept = []
            for word in words:
                # Where no space parts words, one may be a whole paragraph; of it only a run of letters is data.
                runs, dropped = ([word], 0) if len(word) <= _LONGEST_WORD else without_long_runs(word, _LONGEST_WORD)
                too_long += dropped
                kept += runs
        if kept:
            paragraphs.append(" ".join(kept))
    # Normalizing comes last: a run of combining marks takes quadratic time, and is now a short word.
    return unicodedata.normalize("NFC", "\n".join(paragraphs)), too_long


def _cut(
    documents: datasets.Dataset,
    drawn: Iterable[int],
    config: CorpusConfig,
    counts: dict[str, int],
    merged: dict[str, str],
) -> datasets.Dataset:
    """The passages table; a document that repeats other documents' passages only is merged into the first of them."""
    first: dict[bytes, str] = {}  # doc_id by digest of the passage
    numbers: dict[str, int] = {}  # of the next passage, by doc_id

    def passages() -> Iterator[tuple[str, str, str, str]]:
        for doc_id, title, text in tqdm(_rows_of(documents, drawn), desc="cutting passages", unit=" documents"):
            owners = []
            for body in split_passages(text, config.max_words, config.overlap_words):
                passage = passage_text(title, body)
                key = hashlib.sha256(passage.encode()).digest()[:16]
                if key in first:
                    counts["passages_duplicate"] += 1
                    owners.append(first[key])
                    continue
                first[key] = doc_id
                number = numbers.get(doc_id, 0)
                numbers[doc_id] = number + 1
                yield f"{doc_id}#{number}", doc_id, passage, title
            if doc_id not in numbers:
                counts["documents"] -= 1
                counts["documents_duplicate"] += 1
                merged[doc_id] = owners[0]

    table = _on_disk(passages(), PASSAGES_SCHEMA)
    counts["passages"] = len(table)
    return table


def _rows_of(documents: datasets.Dataset, drawn: Iterable[int]) -> Iterator[tuple[str, str, str]]:
    """Some of the documents, in their order."""
    wanted = np.fromiter(drawn, dtype=np.int64)
    start = 0
    for batch in documents.data.table.to_batches(max_chunksize=_BATCH):
        inside = wanted[(wanted >= start) & (wanted < start + len(batch))] - start
        start += len(batch)
        for row in batch.take(pa.array(inside)).to_pylist() if len(inside) < len(batch) else batch.to_pylist():
            yield row["doc_id"], row["title"], row["text"]


def _in_words(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items() if count) or "it holds no documents"


def _columns(names: Iterable[str], config: CorpusConfig, where: object) -> tuple[str, str, str]:
    """The columns of text, id and title; the last two may be missing from some rows, or from all."""
    have = list(names)
    if have == [f"f{i}" for i in range(len(have))] and len(have) in (2, 4) and config.text_column is None:
        # MS MARCO: id and text; or id, URL, title and text.
        return have[-1], have[0], "f2" if len(have) == 4 else "title"

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
        if not is_hub_id(source):
            raise CorpusError(f"no file or folder {source!r}, here or beside the recipe")
        yield from _read_dataset(source, config, counts)
    elif path.is_dir():
        yield from _read_folder(path, config, counts)
    elif kind_of(path) in ROW_FILES:
        yield from _read_rows(path, config, counts)
    elif kind_of(path) in DOCUMENTS:
        try:
            title, text = read_document(path)
        except (OSError, UnicodeDecodeError, ModuleNotFoundError) as error:
            raise CorpusError(f"{path} cannot be read: {one_line(error)}") from None
        yield {"doc_id": path.name, "title": title, "text": text}
    else:
        raise CorpusError(f"{path}: expected a folder, or a file named {', '.join((*ROW_FILES, *DOCUMENTS))}")


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
        raise CorpusError(f"{path}{(lines or [''])[-1]}: {type(error).__name__}: {one_line(error)}") from error


def _read_dataset(name: str, config: CorpusConfig, counts: dict[str, int]) -> Iterator[Mapping[str, Any]]:
    """Rows of a Hub dataset, or of the folder of one."""
    missing = f"no folder of documents ({', '.join(DOCUMENTS)}) and no dataset"
    found = open_dataset(name, config.split, missing, CorpusError)
    if isinstance(found, list):
        for file in found:
            yield from _read_rows(file, config, counts)
        return
    columns = [column for column in found.column_names if column in _columns(found.column_names, config, name)]
    for batch in found.select_columns(columns).with_format("arrow").iter(_BATCH):
        yield from batch.to_pylist()


def _read_rows(path: Path, config: CorpusConfig, counts: dict[str, int]) -> Iterator[Mapping[str, Any]]:
    """Rows of a file; lines of .jsonl that are not UTF-8 are left out and counted."""
    named = [name for name in (config.text_column, config.id_column, config.title_column) if name is not None]
    undecodable: list[int] = []
    wanted = None
    if kind_of(path) == ".parquet":
        with path.open("rb") as file:  # a pointer of git-lfs is no parquet file
            is_parquet = file.read(4) == b"PAR1"
        wanted = _columns(_parquet_columns(path), config, path) if is_parquet else None
    for batch in read_batches(path, header=named, columns=wanted, undecodable=undecodable, error=CorpusError):
        yield from batch.table.to_pylist()
    if undecodable:
        logger.warning("%s, line %d is not UTF-8; such lines are dropped and counted", path, undecodable[0])
        counts["documents_undecodable"] += len(undecodable)
        counts["documents_read"] += len(undecodable)


def _parquet_columns(path: Path) -> list[str]:
    try:
        names: list[str] = pa.parquet.read_schema(path).names
    except (OSError, pa.ArrowException) as error:
        raise CorpusError(f"{path} cannot be read: {one_line(error)}") from None
    return names


def _read_folder(path: Path, config: CorpusConfig, counts: dict[str, int]) -> Iterator[Mapping[str, Any]]:
    """A document a file, hidden ones left out; or the rows of a dataset. What is not read is counted by its ending."""
    files = dict(sorted(_files_under(path)))
    documents = [name for name, file in files.items() if kind_of(file) in DOCUMENTS]
    rows = [name for name, file in files.items() if kind_of(file) in ROW_FILES]
    texts = [name for name in documents if not _NO_DOCUMENTS.fullmatch(Path(name).name)]
    if rows and not texts:
        _count_unread([file for name, file in files.items() if name not in rows], path, counts)
        yield from _read_dataset(str(path), config, counts)
        return
    if not documents:
        yield from _read_dataset(str(path), config, counts)
        return
    unread = [file for name, file in files.items() if name not in documents]
    needs: Counter[str] = Counter()
    for name in documents:
        try:
            title, text = read_document(files[name])
        except ModuleNotFoundError:
            needs[kind_of(files[name])] += 1
            unread.append(files[name])
            continue
        except UnicodeDecodeError:
            logger.warning("%s is not UTF-8: left out and counted", files[name])
            counts["documents_undecodable"] += 1
            counts["documents_read"] += 1
            continue
        except (CorpusError, OSError) as error:
            logger.warning("%s: left out and counted", one_line(error))
            counts["documents_unreadable"] += 1
            counts["documents_read"] += 1
            continue
        yield {"doc_id": name, "title": title, "text": text}
    _count_unread(unread, path, counts)
    if needs:
        logger.warning("%s need further libraries: %s", " and ".join(needs), EXTRA)


def _files_under(path: Path) -> Iterator[tuple[str, Path]]:
    """Files of a folder by their names in it, those in symlinked folders too, each folder once."""
    visited: set[str] = set()
    waiting = [path]
    while waiting:
        links: list[Path] = []
        for start in waiting:
            for folder, names, files in os.walk(start):
                if (real := os.path.realpath(folder)) in visited:
                    names.clear()
                    continue
                visited.add(real)
                names[:] = sorted(name for name in names if not name.startswith("."))
                links += [Path(folder) / name for name in names if (Path(folder) / name).is_symlink()]
                for name in files:
                    file = Path(folder) / name
                    if not name.startswith(".") and file.is_file():
                        yield file.relative_to(path).as_posix(), file
        waiting = sorted(links)


def _count_unread(files: Iterable[Path], path: Path, counts: dict[str, int]) -> None:
    endings = Counter(kind_of(file) or "no ending" for file in files)
    if not endings:
        return
    for ending, count in sorted(endings.items()):
        counts[f"files_not_read {ending}"] = count
    counts["files_not_read"] = endings.total()
    listed = ", ".join(f"{count} {ending}" for ending, count in endings.most_common())
    logger.warning("%s: %d files are not read: %s", path, endings.total(), listed)
