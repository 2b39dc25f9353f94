"""Few-shot examples from the user's own queries, and the check that none of them is evaluated on."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np

from lce_trainer.errors import ConfigError, DataError
from lce_trainer.files import PASSAGE_IDS, QUERIES, find_column, read_rows, texts_of
from lce_trainer.synthesis.gauge import overlap
from lce_trainer.synthesis.language import index_words

_PASSAGES = ("passage", "passage_text", "document", "doc", "content", "contents", "body")
_ID_LISTS = ("doc_ids", "document_ids", "docids")
_DOC_IDS = tuple(name for name in PASSAGE_IDS if name not in ("_id", "id"))


@dataclass(frozen=True)
class Example:
    """A query of the user's, and what is known of the passage that answers it.

    Attributes:
        query: The query.
        at: File and row, for messages.
        passage: The text that answers it.
        doc_ids: Documents of the corpus that do.
        style: The style that it is an example of; None: of any.
        passage_id: The passage of the corpus, once it is found.
    """

    query: str
    at: str
    passage: str | None = None
    doc_ids: tuple[str, ...] = ()
    style: str | None = None
    passage_id: str | None = None

    @property
    def is_alone(self) -> bool:
        """Whether nothing is known of a passage that answers it."""
        return self.passage is None and not self.doc_ids


def read_examples(path: Path) -> list[Example]:
    """Read the user's own queries from a file of rows.

    Args:
        path: Rows with ``query``, and optionally ``passage``, a text; ``doc_id`` or ``doc_ids`` of the corpus; and
            ``style``.

    Raises:
        DataError: The file cannot be read, or a row of it has no query.
    """
    rows = read_rows(path)

    def texts(names: Sequence[str]) -> list[str | None]:
        name = find_column(rows.table, names)
        found = None if name is None else texts_of(rows.table[name], f"{path}, {name}").to_pylist()
        return [(text or "").strip() or None for text in found] if found else [None] * rows.table.num_rows

    lists = find_column(rows.table, _ID_LISTS)
    documents: list[tuple[str, ...]]
    if lists is not None:
        documents = [
            tuple(map(str, ids if isinstance(ids, list) else [ids])) if ids else ()
            for ids in rows.table[lists].to_pylist()
        ]
    else:
        documents = [(one,) if one else () for one in texts(_DOC_IDS)]
    found = []
    columns = (texts((*QUERIES, "text")), texts(_PASSAGES), documents, texts(("style",)))
    for row, (query, passage, doc_ids, style) in enumerate(zip(*columns, strict=True)):
        if query is None:
            raise DataError(f"{rows.at(row)}: 'query' is missing or empty; it must be a query of yours")
        found.append(Example(query, rows.at(row), passage, doc_ids, style))
    if not found:
        raise DataError(f"{path} holds no rows; generate.example_queries needs one query or more")
    return found


def find_passages(examples: Sequence[Example], passages: datasets.Dataset) -> list[Example]:
    """Return the examples, each document that one names replaced by its passage with most words of the query.

    Args:
        examples: From :func:`read_examples`.
        passages: The passages artifact.

    Raises:
        DataError: An example names a document that is not in the corpus.
    """
    wanted = {doc_id for example in examples if example.passage is None for doc_id in example.doc_ids}
    if not wanted:
        return list(examples)
    of_document: dict[str, list[int]] = {}
    for row, doc_id in enumerate(passages["doc_id"][:]):
        if doc_id in wanted:
            of_document.setdefault(doc_id, []).append(row)
    found = []
    for example in examples:
        if example.passage is not None or not example.doc_ids:
            found.append(example)
            continue
        missing = [doc_id for doc_id in example.doc_ids if doc_id not in of_document]
        if missing:
            raise DataError(
                f"{example.at}: the corpus has no document {missing[0]!r}; name one of its documents, give the text as "
                "'passage', or leave both out"
            )
        rows = [row for doc_id in example.doc_ids for row in of_document[doc_id]]
        shares = [overlap(example.query, [passages[row]["text"]]) for row in rows]
        best = passages[rows[int(np.argmax([-1.0 if math.isnan(share) else share for share in shares]))]]
        found.append(
            Example(example.query, example.at, best["text"], example.doc_ids, example.style, best["passage_id"])
        )
    return found


def draw_examples(examples: Sequence[Example], count: int, seed: int) -> list[Example]:
    """Return so many of the examples, drawn without replacement, in the order in which they stand in the file."""
    rows = np.sort(np.random.default_rng(seed).permutation(len(examples))[:count])
    return [examples[row] for row in rows]


def check_not_evaluated(examples: Iterable[tuple[str, str]], evaluated: Mapping[str, Iterable[str]]) -> None:
    """Refuse examples that a reranker is measured or chosen on: the LLM would write variants of them to train on.

    Args:
        examples: Each query, and where it stands.
        evaluated: By setting, such as ``evaluate.queries``, the text of each query.

    Raises:
        ConfigError: A query is in both, but for case and punctuation.
    """
    known = {
        words: setting
        for setting, queries in evaluated.items()
        for query in queries
        if (words := tuple(index_words(query)))
    }
    for query, at in examples:
        if (setting := known.get(tuple(index_words(query)))) is not None:
            raise ConfigError(
                f"{at}: the example query {query[:60]!r} is also in {setting}: what is measured on would leak into the "
                "training; take it out of one of them"
            )
