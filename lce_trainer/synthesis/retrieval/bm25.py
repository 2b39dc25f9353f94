"""Find what competes with a passage by its words: BM25."""

import logging
from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import bm25s
import datasets
import numpy as np
import Stemmer
import torch
from bm25s.tokenization import Tokenized, Tokenizer
from tqdm.auto import tqdm

from lce_trainer.artifacts import MANIFEST, read_manifest, write_manifest
from lce_trainer.errors import ArtifactError, ConfigError, CorpusError
from lce_trainer.synthesis.language import index_words

logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets itself to DEBUG


# What bm25s does by default; Lucene's form, https://arxiv.org/abs/2407.03618.
_BM25 = {"method": "lucene", "k1": 1.5, "b": 0.75}
_INDEX_FILES = [*(f"{name}.csc.index.npy" for name in ("data", "indices", "indptr"))]
_INDEX_FILES += ["params.index.json", "vocab.index.json"]
_WORTH_THREADS = 300_000  # passages: below, Python's part of a search is the larger one


class BM25Index:
    """BM25 over passages, on disk and memory-mapped.

    Example::

        index = BM25Index.build(passages, Path("run/bm25"))
        rows, scores = index.search(["what is a moon"], k=10)
    """

    def __init__(self, scores: bm25s.BM25, words: "_Words") -> None:
        """Wrap a loaded index; see :meth:`build` and :meth:`load`."""
        self._scores = scores
        self._words = words

    @classmethod
    def build(
        cls,
        passages: datasets.Dataset,
        path: Path,
        *,
        stemmer: str | None = "english",
        stopwords: str | None = "english",
    ) -> "BM25Index":
        """Index the column ``text`` and write the index.

        Holds four bytes a token and sixteen a distinct token of a passage while it works.

        Args:
            passages: The passages artifact, or any table with ``text``.
            path: The index's folder.
            stemmer: Snowball's name of the language that words are stemmed in; None leaves them as they are.
            stopwords: Language whose stopwords are left out; None keeps them.

        Raises:
            CorpusError: No passage holds a word to index.
            ConfigError: There is no such stemmer or list of stopwords.
        """
        words = _Words({}, stemmer, stopwords, grow=True)
        tokens, ends = array("i"), array("q", [0])
        with tqdm(total=len(passages), desc="indexing", unit=" passages") as bar:
            for batch in passages.select_columns("text").with_format("arrow").iter(1000):
                for text in batch["text"].to_pylist():
                    tokens.extend(words.ids(text))
                    ends.append(len(tokens))
                bar.update(len(batch))
        if not tokens:
            raise CorpusError(
                f"none of the {len(passages)} passages holds a word to index: "
                f"words have two letters or more and are not stopwords ({stopwords})"
            )
        scores = bm25s.BM25(**_BM25, backend="numpy", csc_backend="numpy")
        tokenized = Tokenized(ids=_Slices(tokens, ends), vocab=words.stems)
        scores.index(tokenized, create_empty_token=False, show_progress=False)
        path.mkdir(parents=True, exist_ok=True)
        (path / MANIFEST).unlink(missing_ok=True)
        scores.save(path, show_progress=False)
        write_manifest(
            path,
            _INDEX_FILES,
            kind="bm25",
            config={**_BM25, "stemmer": stemmer, "stopwords": stopwords},
            inputs={},
            counts={"passages": len(passages), "tokens": len(tokens), "stems": len(words.stems)},
        )
        return cls.load(path)

    @classmethod
    def load(cls, path: Path) -> "BM25Index":
        """Open an index without reading it into memory.

        Raises:
            ArtifactError: It is missing, unfinished or damaged.
        """
        manifest = read_manifest(path, "bm25")
        try:
            scores = bm25s.BM25.load(path, mmap=True, show_progress=False)
            words = _Words(scores.vocab_dict, manifest.config["stemmer"], manifest.config["stopwords"], grow=False)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(
                f"{path} is not a BM25 index: {_one_line(error)}; delete it and build it again"
            ) from None
        index = cls(scores, words)
        if len(index) != manifest.counts["passages"]:
            raise ArtifactError(
                f"{path} holds {len(index)} passages where its manifest says {manifest.counts['passages']}: "
                f"delete it and build it again"
            )
        return index

    def __len__(self) -> int:
        """Passages in the index."""
        return int(self._scores.scores["num_docs"])

    def search(self, queries: Sequence[str], k: int, *, progress: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """The best passages of each query; of equal ones the first.

        Args:
            queries: Texts.
            k: Passages of a query at most.
            progress: Show a bar.

        Returns:
            Rows of the passages table, int64, and their scores, float32, both of shape ``(queries, k)`` and best
            first; -1 and 0.0 where no more passages share a word with the query.
        """
        if k < 1:
            raise ConfigError(f"a search for {k} passages finds none: top_k must be 1 or more")
        rows = np.full((len(queries), k), -1, dtype=np.int64)
        scores = np.zeros((len(queries), k), dtype=np.float32)
        words = [self._words.ids(query) for query in queries]

        def find(place: int) -> None:
            if words[place]:
                found = self._scores.get_scores_from_ids(words[place])
                best = _best(found, k)
                rows[place, : len(best)] = best
                scores[place, : len(best)] = found[best]

        threads = torch.get_num_threads() if len(self) >= _WORTH_THREADS else 1
        with ThreadPoolExecutor(threads) as pool:
            work = map(find, range(len(queries))) if threads == 1 else pool.map(find, range(len(queries)))
            for _ in tqdm(work, total=len(queries), desc="searching", unit=" queries", disable=not progress):
                pass
        return rows, scores

    def similarity(self, queries: Sequence[str], query: np.ndarray, passage: np.ndarray) -> np.ndarray:
        """Return the score of given pairs, 0 where they share no word, float32, shape ``(pairs,)``.

        Args:
            queries: Texts.
            query: Row of ``queries`` of each pair, shape ``(pairs,)``.
            passage: Row of its passage, likewise.
        """
        scores = np.zeros(len(query), dtype=np.float32)
        order = np.argsort(query, kind="stable")
        for pairs in np.split(order, np.flatnonzero(np.diff(query[order])) + 1):
            if len(pairs) and (ids := self._words.ids(queries[query[pairs[0]]])):
                scores[pairs] = self._scores.get_scores_from_ids(ids)[passage[pairs]]
        return scores


def _best(scores: np.ndarray, k: int) -> np.ndarray:
    """Rows of the k highest scores above 0; argpartition alone would let the CPU break the ties."""
    rows = np.flatnonzero(scores > 0)
    if len(rows) > k:
        found = scores[rows]
        rows = rows[found >= np.partition(found, len(found) - k)[len(found) - k]]
    best: np.ndarray = rows[np.argsort(-scores[rows], kind="stable")[:k]]
    return best


class _Words(dict[str, int]):
    """Ids of stems by word, so that each distinct word is stemmed once; -1 is not indexed."""

    def __init__(self, stems: dict[str, int], stemmer: str | None, stopwords: str | None, *, grow: bool) -> None:
        super().__init__()
        self.stems = stems
        self._grow = grow
        try:
            self._stem = Stemmer.Stemmer(stemmer).stemWord if stemmer else str
            self._stopwords = frozenset(Tokenizer(stopwords=stopwords).stopwords)
        except (KeyError, ValueError) as error:
            raise ConfigError(f"no stemmer {stemmer!r} or stopwords {stopwords!r}: {_one_line(error)}") from None

    def ids(self, text: str) -> list[int]:
        """Ids of the text's indexed words, in order."""
        return [found for word in index_words(text) if (found := self[word]) >= 0]

    def __missing__(self, word: str) -> int:
        if word in self._stopwords:
            found = -1
        elif self._grow:
            found = self.stems.setdefault(self._stem(word), len(self.stems))
        else:
            found = self.stems.get(self._stem(word), -1)
        self[word] = found
        return found


class _Slices:
    """Token ids of each passage, made into a list only when bm25s asks for them."""

    def __init__(self, tokens: "array[int]", ends: "array[int]") -> None:
        self._tokens = np.frombuffer(tokens, dtype=np.int32)
        self._ends = ends

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __iter__(self) -> Iterator[list[int]]:
        for start, end in zip(self._ends, self._ends[1:], strict=False):
            yield self._tokens[start:end].tolist()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
