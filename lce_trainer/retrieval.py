"""Find what competes with a passage: BM25, and the embeddings of a bi-encoder."""

import json
import logging
import re
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import bm25s
import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import Stemmer
import torch
from bm25s.tokenization import Tokenized, Tokenizer
from tqdm.auto import tqdm
from transformers import AutoModel, AutoTokenizer
from transformers.utils import cached_file

from lce_trainer.artifacts import MANIFEST, read_manifest, write_manifest
from lce_trainer.errors import ArtifactError, ConfigError, CorpusError
from lce_trainer.packaged import resolve_model
from lce_trainer.precision import multiplies_bfloat16

logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets itself to DEBUG

CANDIDATES_SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("query_id", "query", "source_passage_id")]
    + [(name, pa.list_(pa.string())) for name in ("passage_ids", "passages", "retrievers")]
    + [("ranks", pa.list_(pa.int32()))]
)

# What bm25s does by default; Lucene's form, https://arxiv.org/abs/2407.03618.
_BM25 = {"method": "lucene", "k1": 1.5, "b": 0.75}
_INDEX_FILES = [*(f"{name}.csc.index.npy" for name in ("data", "indices", "indptr"))]
_INDEX_FILES += ["params.index.json", "vocab.index.json"]
_WORD = re.compile(r"\w\w+")
_WINDOW = 50_000  # candidates whose texts are gathered at once: bounds memory, and Arrow's 2 GiB a string array
_TOKENIZED = 16_384  # texts tokenized at once: bounds the memory that token ids take


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
            queries: What was asked.
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
        for i, query in enumerate(tqdm(queries, desc="searching", unit=" queries", disable=not progress)):
            ids = self._words.ids(query)
            if ids:
                found = self._scores.get_scores_from_ids(ids)
                best = _best(found, k)
                rows[i, : len(best)] = best
                scores[i, : len(best)] = found[best]
        return rows, scores


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
        return [found for word in _WORD.findall(text.lower()) if (found := self[word]) >= 0]

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


def candidates(
    queries: datasets.Dataset, passages: datasets.Dataset, index: BM25Index, top_k: int
) -> tuple[datasets.Dataset, dict[str, int]]:
    """The passages that compete for each query.

    Args:
        queries: Rows with ``query_id``, ``query`` and ``source_passage_id``.
        passages: The passages artifact.
        index: BM25 over it.
        top_k: Passages of a query at most.

    Returns:
        A row a query, in order: its columns, and the lists ``passage_ids``, ``passages``, ``retrievers`` and
        ``ranks`` (from 1), best first; the source passage is in them only if it was found. Counts: queries, those
        with no candidate, those whose source was found, candidates.

    Raises:
        ArtifactError: The index is not over these passages.
    """
    if len(index) != len(passages):
        raise ArtifactError(f"the index holds {len(index)} passages, the table {len(passages)}: build the index again")
    asked = queries.select_columns(["query_id", "query", "source_passage_id"]).with_format("arrow")
    table = (passages.flatten_indices() if passages._indices is not None else passages).data.table
    counts = {"queries": len(queries), "queries_without_candidates": 0, "queries_with_source": 0, "candidates": 0}
    parts = [CANDIDATES_SCHEMA.empty_table()]
    with tqdm(total=len(queries), desc="mining", unit=" queries") as bar:
        for batch in asked.iter(max(1, _WINDOW // top_k)):
            rows, _ = index.search(batch["query"].to_pylist(), top_k, progress=False)
            found = rows >= 0
            flat, lengths = rows[found], found.sum(axis=1)
            query_of, rank = np.nonzero(found)
            lists = {
                "passage_ids": _take(table["passage_id"], flat),
                "passages": _take(table["text"], flat),
                "retrievers": pa.repeat("bm25", len(flat)),
                "ranks": pa.array(rank + 1, pa.int32()),
            }
            sources = batch["source_passage_id"].combine_chunks().take(pa.array(query_of))
            counts["queries_with_source"] += pc.sum(pc.equal(sources, lists["passage_ids"])).as_py() or 0
            counts["queries_without_candidates"] += int((lengths == 0).sum())
            counts["candidates"] += len(flat)
            offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
            columns = {name: pa.ListArray.from_arrays(offsets, values) for name, values in lists.items()}
            parts.append(pa.table({name: batch[name] for name in batch.column_names} | columns, CANDIDATES_SCHEMA))
            bar.update(len(batch))
    # Else the fingerprint is a hash of all the texts, pickled.
    fingerprint = datasets.fingerprint.generate_random_fingerprint()
    return datasets.Dataset(pa.concat_tables(parts), fingerprint=fingerprint), counts


def _take(column: pa.ChunkedArray, rows: np.ndarray) -> pa.Array:
    """Values at the rows; ``column.take`` would first copy the whole column, and fails above 2 GiB."""
    order = np.argsort(rows, kind="stable")
    sorted_rows = rows[order]
    starts = np.cumsum([0, *map(len, column.chunks)])
    cuts = np.searchsorted(sorted_rows, starts)
    parts = [
        chunk.take(pa.array(sorted_rows[low:high] - start))
        for chunk, start, low, high in zip(column.chunks, starts, cuts, cuts[1:], strict=False)
        if high > low
    ]
    back = np.empty_like(order)
    back[order] = np.arange(len(order))
    return pa.concat_arrays(parts).take(pa.array(back)) if parts else pa.array([], column.type)


def embed(
    texts: Sequence[str],
    model: str,
    *,
    max_length: int = 256,
    batch_tokens: int = 8192,
    pooling: str | None = None,
    normalize: bool = True,
    progress: bool = True,
) -> np.ndarray:
    """Embed texts with a bi-encoder.

    Args:
        texts: What to embed.
        model: Hub id, folder, or ``package:NAME/FOLDER``.
        max_length: Tokens of a text at most.
        batch_tokens: Tokens, padding included, in one forward pass at most.
        pooling: ``mean`` or ``cls``; if None, what the model's ``1_Pooling`` says, else mean.
        normalize: Scale every embedding to length 1.
        progress: Show a bar.

    Returns:
        float32, shape ``(texts, dim)``. Where the hardware multiplies bfloat16 the model runs in it, which moves
        a cosine by some thousandths.

    Raises:
        ConfigError: There is no such model, or it pools in another way.
    """
    name = resolve_model(model)
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        encoder = AutoModel.from_pretrained(name, dtype=torch.float32).to(device).eval()
        pooling = pooling or _pooling(name)
    except (OSError, ValueError) as error:
        raise ConfigError(f"no encoder {model!r}: {_one_line(error)}") from None
    if pooling not in ("mean", "cls"):
        raise ConfigError(f"{model} pools its tokens by {pooling!r}; expected mean or cls")
    positions = getattr(encoder.config, "max_position_embeddings", None) or max_length
    max_length = min(max_length, tokenizer.model_max_length, positions)
    embeddings = np.zeros((len(texts), encoder.config.hidden_size), dtype=np.float32)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=multiplies_bfloat16())
    with torch.inference_mode(), autocast, tqdm(total=len(texts), desc="embedding", disable=not progress) as bar:
        for start in range(0, len(texts), _TOKENIZED):
            window = list(texts[start : start + _TOKENIZED])
            ids = tokenizer(window, truncation=True, max_length=max_length)["input_ids"]
            for rows in _batches([len(one) for one in ids], batch_tokens):
                lengths = torch.tensor([len(ids[row]) for row in rows])
                padded = torch.full((len(rows), int(lengths.max())), tokenizer.pad_token_id or 0)
                mask = torch.arange(padded.shape[1]) < lengths[:, None]  # (batch, width)
                padded[mask] = torch.tensor([token for row in rows for token in ids[row]])
                mask = mask.to(device)
                states = encoder(input_ids=padded.to(device), attention_mask=mask.long()).last_hidden_state.float()
                pooled = states[:, 0] if pooling == "cls" else (states * mask[..., None]).sum(1) / mask.sum(1)[:, None]
                if normalize:
                    pooled = torch.nn.functional.normalize(pooled, dim=-1)
                embeddings[start + rows] = pooled.cpu().numpy()
                bar.update(len(rows))
    return embeddings


def _batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[np.ndarray]:
    """Rows of each batch, longest first, so that what does not fit into memory fails at once."""
    order = np.argsort(-np.asarray(lengths), kind="stable")
    start = 0
    while start < len(order):
        size = max(1, batch_tokens // max(1, lengths[order[start]]))
        yield order[start : start + size]
        start += size


def _pooling(name: str) -> str:
    """How sentence-transformers pools this model; mean where it does not say."""
    file = cached_file(
        name,
        "1_Pooling/config.json",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if file is None:
        return "mean"
    config: dict[str, Any] = json.loads(Path(file).read_text(encoding="utf-8"))
    modes = [key.removeprefix("pooling_mode_") for key, value in config.items() if value is True]
    mode = str(config.get("pooling_mode") or "+".join(mode for mode in modes if mode != "include_prompt"))
    return {"mean_tokens": "mean", "cls_token": "cls"}.get(mode, mode)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
