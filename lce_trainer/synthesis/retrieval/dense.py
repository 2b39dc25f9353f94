"""Dense retrieval: passages and queries as vectors of a sentence-transformers model."""

import json
import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import AutoModel

from lce_trainer.artifacts import MANIFEST, read_manifest, write_manifest
from lce_trainer.compat import find_file
from lce_trainer.errors import ArtifactError, ConfigError
from lce_trainer.hardware import best_device, multiplies_bfloat16
from lce_trainer.names import load_checkpoint, load_tokenizer_files, model_name, resolve_model
from lce_trainer.synthesis.retrieval.clusters import Clusters

logger = logging.getLogger(__name__)

_VECTORS = "vectors.npy"
_EMBEDDED = 1024  # texts embedded between two moves of the progress bar; bounds memory as well
_PASSAGES = 1 << 16  # passage vectors that are multiplied at once
_QUERIES = 256  # query vectors that are multiplied at once


class Encoder:
    """An embedding model, through sentence-transformers, so that its own prompts, pooling and layers apply.

    Example::

        encoder = Encoder("BAAI/bge-small-en-v1.5")
        similarity = encoder.queries(["what is a moon"]) @ encoder.passages(["A moon is ..."]).T
    """

    def __init__(self, model: str, max_length: int = 256, batch_size: int = 64) -> None:
        """Name a model; it is loaded at its first use.

        Args:
            model: Hub id, folder, or ``package:NAME/FOLDER``.
            max_length: Tokens of a text that are read at most.
            batch_size: Texts that are embedded in one forward pass.
        """
        self.model = model
        self.name = model_name(model)
        self._max_length = max_length
        self._batch_size = batch_size

    def queries(self, texts: Sequence[str], *, progress: bool = True) -> np.ndarray:
        """Return unit vectors of queries, float32, shape ``(texts, dim)``.

        Raises:
            ConfigError: There is no such model, or sentence-transformers is not installed.
        """
        return self._embed(texts, self._loaded.encode_query, progress)

    def passages(self, texts: Sequence[str], *, progress: bool = True) -> np.ndarray:
        """Return unit vectors of passages, as :meth:`queries` does of queries."""
        return self._embed(texts, self._loaded.encode_document, progress)

    def similarity(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """Return the cosine of each (query, passage), shape ``(pairs,)``; each distinct text is embedded once."""
        queries, passages = (list(dict.fromkeys(texts)) for texts in zip(*pairs, strict=True)) if pairs else ([], [])
        left = self.queries(queries)[_places([query for query, _ in pairs], queries)]
        right = self.passages(passages)[_places([passage for _, passage in pairs], passages)]
        cosines: np.ndarray = np.einsum("pd,pd->p", left, right)
        return cosines

    def _embed(self, texts: Sequence[str], encode: Any, progress: bool) -> np.ndarray:
        parts = []
        with tqdm(total=len(texts), desc="embedding", unit=" texts", disable=not progress) as bar:
            for start in range(0, len(texts), _EMBEDDED):
                window = list(texts[start : start + _EMBEDDED])
                vectors = encode(window, batch_size=self._batch_size, show_progress_bar=False)
                vectors = np.asarray(vectors, dtype=np.float32)
                # In float32: a length that bfloat16 rounds is off by some thousandths.
                parts.append(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12))
                bar.update(len(window))
        return np.concatenate(parts) if parts else np.zeros((0, self.dim), dtype=np.float32)

    @property
    def dim(self) -> int:
        """The length of a vector."""
        return int(self._loaded.get_embedding_dimension())

    @cached_property
    def _loaded(self) -> Any:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError:
            raise ConfigError(
                f"the encoder {self.model!r} needs sentence-transformers: pip install 'lce-trainer[dense]', "
                "or set mine.encoder to null for BM25 alone"
            ) from None
        # In bfloat16 where the hardware multiplies it, which moves a cosine by some thousandths.
        dtype = torch.bfloat16 if multiplies_bfloat16() else torch.float32
        path = resolve_model(self.model)
        try:
            _check_checkpoint(self.model, path)
            encoder = SentenceTransformer(
                path, device=str(best_device()), model_kwargs={"dtype": dtype, "use_safetensors": True}
            )
        except Exception as error:  # damaged files fail in whichever way their library fails
            raise ConfigError(f"no encoder {self.model!r}: {' '.join(str(error).split())}") from None
        encoder.max_seq_length = min(self._max_length, encoder.max_seq_length or self._max_length)
        return encoder


def _check_checkpoint(name: str, path: str) -> None:
    """Check that the weights and the tokenizer of an encoder all come from its checkpoint.

    sentence-transformers fills up what is missing with random weights, and its vectors would mean nothing.

    Raises:
        TrainingError: Something is missing, or cannot be read.
    """
    modules = find_file(path, "modules.json")
    first = json.loads(Path(modules).read_text(encoding="utf-8"))[0] if modules else {"type": ".Transformer"}
    if str(first.get("type")).endswith(".Transformer") and not first.get("path"):
        load_checkpoint(AutoModel, name, path, lambda _, key: key.startswith("pooler."))  # embeddings need no pooler
        load_tokenizer_files(name, path)


class DenseIndex:
    """Passage vectors on disk, memory-mapped, searched exactly by matrix product.

    Attributes:
        encoder: Embeds queries.
        clusters: Where there are some, a search looks for candidates in them; cosines are exact all the same.
    """

    def __init__(self, vectors: np.ndarray, encoder: Encoder) -> None:
        """Wrap loaded vectors; see :meth:`build` and :meth:`load`."""
        self._vectors = vectors
        self.encoder = encoder
        self.clusters: Clusters | None = None

    @classmethod
    def build(
        cls, passages: datasets.Dataset, path: Path, encoder: Encoder, inputs: Mapping[str, str] | None = None
    ) -> "DenseIndex":
        """Embed the column ``text`` and write the vectors.

        Args:
            passages: The passages artifact, or any table with ``text``.
            path: The index's folder.
            encoder: Embeds the passages, and later the queries.
            inputs: Digest of each artifact that the passages come from, by kind.

        Raises:
            ConfigError: The encoder cannot be loaded.
        """
        path.mkdir(parents=True, exist_ok=True)
        (path / MANIFEST).unlink(missing_ok=True)
        part = path / f".{_VECTORS}.part"
        written = np.lib.format.open_memmap(part, mode="w+", dtype=np.float32, shape=(len(passages), encoder.dim))
        at = 0
        with tqdm(total=len(passages), desc="embedding", unit=" passages") as bar:
            for batch in passages.select_columns("text").with_format("arrow").iter(_EMBEDDED):
                texts = batch["text"].to_pylist()
                written[at : at + len(texts)] = encoder.passages(texts, progress=False)
                at += len(texts)
                bar.update(len(texts))
        written.flush()
        del written
        part.replace(path / _VECTORS)
        write_manifest(
            path,
            [_VECTORS],
            kind="dense",
            config={"encoder": encoder.name},
            inputs=inputs or {},
            counts={"passages": len(passages)},
        )
        return cls.load(path, encoder)

    @classmethod
    def load(cls, path: Path, encoder: Encoder) -> "DenseIndex":
        """Open an index without reading it into memory.

        Raises:
            ArtifactError: It is missing, unfinished, damaged, or of another encoder.
        """
        manifest = read_manifest(path, "dense")
        if manifest.config["encoder"] != encoder.name:
            raise ArtifactError(
                f"{path} holds vectors of {manifest.config['encoder']}, not of {encoder.name}: "
                "run lce-trainer generate with this recipe first"
            )
        try:
            vectors = np.load(path / _VECTORS, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{path / _VECTORS} cannot be read ({error}): delete {path} and build it") from None
        if vectors.shape[0] != manifest.counts["passages"]:
            raise ArtifactError(
                f"{path} holds {vectors.shape[0]} vectors where its manifest says {manifest.counts['passages']}: "
                "delete it and build it again"
            )
        return cls(vectors, encoder)

    def __len__(self) -> int:
        """Return the number of passages."""
        return len(self._vectors)

    def build_clusters(self, path: Path, inputs: Mapping[str, str] | None = None) -> None:
        """Group the passages for searches that are not exact, see :class:`Clusters`."""
        self.clusters = Clusters.build(self._vectors, path, inputs)

    def search(self, queries: Sequence[str], k: int, *, progress: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Find the passages whose vectors are nearest to each query's; of equal ones the first.

        Args:
            queries: Texts.
            k: Passages of a query at most.
            progress: Show a bar.

        Returns:
            Rows of the passages table, int64, and cosines, float32, both of shape ``(queries, k)`` and best first;
            -1 and 0.0 past the end of a corpus of fewer than k passages.
        """
        if k < 1:
            raise ConfigError(f"a search for {k} passages finds none: top_k must be 1 or more")
        rows = np.full((len(queries), k), -1, dtype=np.int64)
        scores = np.zeros((len(queries), k), dtype=np.float32)
        vectors = self.encoder.queries(queries, progress=progress)
        if self.clusters is None:
            found, cosines = self._search_all(vectors, min(k, len(self)))
        else:
            found, cosines = self._search_clusters(vectors, k)
        order = np.lexsort((found, -cosines))[:, :k]
        rows[:, : order.shape[1]] = np.take_along_axis(found, order, 1)
        scores[:, : order.shape[1]] = np.take_along_axis(cosines, order, 1)
        scores[rows < 0] = 0.0
        return rows, scores

    def _search_all(self, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return rows and cosines of the k nearest of all passages, in no order, each of shape ``(queries, k)``."""
        device = best_device()
        queries = torch.from_numpy(vectors)
        rows = torch.zeros((len(queries), 0), dtype=torch.int64)
        cosines = torch.zeros((len(queries), 0))
        for first in range(0, len(self), _PASSAGES):  # each vector is read from the disk once
            block = torch.from_numpy(np.array(self._vectors[first : first + _PASSAGES])).to(device)
            tops = [(part.to(device) @ block.T).topk(min(k, len(block))) for part in torch.split(queries, _QUERIES)]
            cosines = torch.cat([cosines, torch.cat([top.values.cpu() for top in tops])], 1)
            rows = torch.cat([rows, torch.cat([top.indices.cpu() for top in tops]) + first], 1)
            # Sorted stably, so of equal ones the first stay.
            best = cosines.sort(dim=1, descending=True, stable=True).indices[:, :k]
            cosines, rows = cosines.gather(1, best), rows.gather(1, best)
        return rows.numpy(), cosines.numpy()

    def _search_clusters(self, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return rows and exact cosines of what clusters bring, shape ``(queries, at least k)``; row -1 for nothing."""
        assert self.clusters is not None
        rows = self.clusters.search(vectors, k + max(k // 2, 20))  # some more, as these are ranked by rounded vectors
        cosines = np.empty(rows.shape, dtype=np.float32)
        for start in range(0, len(rows), _QUERIES):
            part = slice(start, start + _QUERIES)
            cosines[part] = np.einsum("qd,qkd->qk", vectors[part], self._vectors[rows[part]])
        return rows, np.where(rows < 0, -np.inf, cosines)

    def similarity(self, queries: Sequence[str], query: np.ndarray, passage: np.ndarray) -> np.ndarray:
        """Return the cosine of given pairs, float32, shape ``(pairs,)``.

        Args:
            queries: Texts.
            query: Row of ``queries`` of each pair, shape ``(pairs,)``.
            passage: Row of its passage, likewise.
        """
        vectors = self.encoder.queries(queries)
        cosines = np.empty(len(query), dtype=np.float32)
        for start in range(0, len(query), _PASSAGES):
            part = slice(start, start + _PASSAGES)
            cosines[part] = np.einsum("pd,pd->p", vectors[query[part]], self._vectors[passage[part]])
        return cosines


def _places(texts: Sequence[str], distinct: Sequence[str]) -> np.ndarray:
    row = {text: place for place, text in enumerate(distinct)}
    return np.array([row[text] for text in texts], dtype=np.int64)
