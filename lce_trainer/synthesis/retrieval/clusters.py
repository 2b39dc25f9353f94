"""Passage vectors in clusters, for a corpus too large to compare each query's vector with all of them.

faiss groups the vectors around some means and keeps them rounded to 8 bits. A search looks through the clusters whose
means are nearest to the query, so a passage of another cluster is missed now and then.
"""

import math
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from lce_trainer.artifacts import MANIFEST, read_manifest, write_manifest
from lce_trainer.errors import ArtifactError

_FILE = "clusters.faiss"
READ = 64  # clusters that a search looks through
_LEARNED_FROM = 64  # vectors for each cluster that the means are learned from
_BLOCK = 1 << 16  # vectors that are added at once
_QUERIES = 1024  # vectors that are searched for at once


class Clusters:
    """An index of faiss over passage vectors, memory-mapped."""

    def __init__(self, index: Any) -> None:
        """Wrap a loaded index; see :meth:`build` and :meth:`load`."""
        self._index = index
        index.nprobe = min(READ, index.nlist)

    @staticmethod
    def are_available() -> bool:
        """Whether faiss is installed."""
        return find_spec("faiss") is not None

    @classmethod
    def build(cls, vectors: np.ndarray, path: Path, inputs: Mapping[str, str] | None = None) -> "Clusters":
        """Group vectors and write the index.

        Args:
            vectors: Unit vectors, float32, shape ``(passages, dim)``; may be memory-mapped.
            path: The index's folder.
            inputs: Digest of what the vectors come from, by kind.
        """
        import faiss

        # As many as its authors advise for a million vectors: four times the root.
        number = max(round(4 * math.sqrt(len(vectors))), 1)
        index = faiss.index_factory(vectors.shape[1], f"IVF{number},SQ8", faiss.METRIC_INNER_PRODUCT)
        learned = min(number * _LEARNED_FROM, len(vectors))
        index.train(vectors[np.linspace(0, len(vectors) - 1, learned).astype(np.int64)])
        with tqdm(total=len(vectors), desc="clustering", unit=" passages") as bar:
            for start in range(0, len(vectors), _BLOCK):
                block = np.array(vectors[start : start + _BLOCK])
                index.add(block)
                bar.update(len(block))
        path.mkdir(parents=True, exist_ok=True)
        (path / MANIFEST).unlink(missing_ok=True)
        part = path / f".{_FILE}.part"
        faiss.write_index(index, str(part))
        part.replace(path / _FILE)
        write_manifest(
            path,
            [_FILE],
            kind="clusters",
            config={"read": READ},
            inputs=inputs or {},
            counts={"passages": len(vectors), "clusters": number},
        )
        return cls.load(path)

    @classmethod
    def load(cls, path: Path) -> "Clusters":
        """Open an index without reading it into memory.

        Raises:
            ArtifactError: It is missing, unfinished or damaged.
        """
        import faiss

        read_manifest(path, "clusters")
        try:
            index = faiss.read_index(str(path / _FILE), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise ArtifactError(f"{path / _FILE} cannot be read ({reason}): delete {path} and build it") from None
        return cls(index)

    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        """Return rows whose vectors are among the nearest to each query's, int64, shape ``(queries, k)``.

        Args:
            queries: Unit vectors, float32, shape ``(queries, dim)``.
            k: Rows of a query; -1 stands where the clusters hold no more.
        """
        found = [
            self._index.search(queries[start : start + _QUERIES], k)[1] for start in range(0, len(queries), _QUERIES)
        ]
        rows: np.ndarray = np.concatenate(found) if found else np.zeros((0, k), dtype=np.int64)
        return rows
