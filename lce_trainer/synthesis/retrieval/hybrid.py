"""The first stage: BM25, an encoder, or the union of both."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lce_trainer.errors import ArtifactError, ConfigError
from lce_trainer.settings import option
from lce_trainer.synthesis.retrieval.bm25 import BM25Index
from lce_trainer.synthesis.retrieval.dense import DenseIndex

# Cormack, Clarke & Büttcher 2009, https://doi.org/10.1145/1571941.1572114: 1 / (60 + rank), summed over rankings.
_RRF = 60


@dataclass
class MineConfig:
    """Which passages compete with a query's source passage."""

    first_stage: Literal["auto", "bm25", "dense", "hybrid"] = option(
        "auto",
        "What brings candidates, here, in the round trip of queries and in evaluation: bm25, dense (mine.encoder), or "
        "hybrid, the union of both. auto: hybrid where mine.encoder is set, else bm25.",
    )
    encoder: str | None = option(
        None, "A sentence-transformers model for dense retrieval: Hub id, folder, or package:NAME/FOLDER."
    )
    top_k: int = option(50, "Passages that each retriever brings for a query.")
    max_similarity: float | None = option(
        None,
        "A candidate whose cosine with the query is above this share of the source passage's is left out, as it may "
        "answer the query too (0.95 in NV-Retriever, arXiv 2407.15831); null leaves that to the judge.",
    )
    exact_up_to: int = option(
        1_000_000,
        "Passages up to which a query is compared with all of them in dense retrieval. Of a larger corpus faiss (extra "
        "ann) looks through the clusters of passages that are nearest to the query, which misses one now and then; "
        "without faiss all are compared.",
    )
    same_document: bool = option(False, "Keep other passages of the source passage's own document as candidates.")

    @property
    def retrievers(self) -> tuple[str, ...]:
        """The names of the retrievers that take part."""
        if self.first_stage in ("dense", "hybrid") and self.encoder is None:
            raise ConfigError(f"mine.first_stage={self.first_stage} needs mine.encoder, a model that embeds texts")
        if self.first_stage == "hybrid" or (self.first_stage == "auto" and self.encoder is not None):
            return ("bm25", "dense")
        return ("dense",) if self.first_stage == "dense" else ("bm25",)


@dataclass(frozen=True)
class Pools:
    """The passages that a first stage brings, flat: one entry a pair, query by query, best first.

    Attributes:
        query: Row of each pair's query, shape ``(pairs,)``, int64, ascending.
        passage: Row of its passage, likewise.
        ranks: By retriever, the rank from 1 that it gave the pair, 0 where it did not bring it, shape ``(pairs,)``.
    """

    query: np.ndarray
    passage: np.ndarray
    ranks: dict[str, np.ndarray]

    @property
    def reciprocal_ranks(self) -> np.ndarray:
        """The reciprocal rank fusion of the retrievers, which the pairs are ordered by, shape ``(pairs,)``."""
        fused: np.ndarray = np.sum([np.where(rank > 0, 1 / (_RRF + rank), 0.0) for rank in self.ranks.values()], axis=0)
        return fused


class FirstStage:
    """Retrievers over one passages table, searched together."""

    def __init__(self, passages: int, bm25: BM25Index | None, dense: DenseIndex | None) -> None:
        """Put retrievers together.

        Args:
            passages: Rows of the passages table.
            bm25: BM25 over it, if it takes part.
            dense: An encoder's vectors of it, if they take part.

        Raises:
            ArtifactError: A retriever is over another number of passages.
        """
        self.retrievers: dict[str, BM25Index | DenseIndex] = {}
        for name, retriever in (("bm25", bm25), ("dense", dense)):
            if retriever is not None:
                if len(retriever) != passages:
                    raise ArtifactError(
                        f"the {name} index holds {len(retriever)} passages, the table {passages}: build the index again"
                    )
                self.retrievers[name] = retriever

    @property
    def name(self) -> str:
        """The name of the first stage: ``BM25``, ``dense`` or ``hybrid``."""
        names = {"bm25": "BM25", "dense": "dense"}
        return "hybrid" if len(self.retrievers) > 1 else names[next(iter(self.retrievers))]

    def search(self, queries: Sequence[str], top_k: int, *, progress: bool = True) -> Pools:
        """Return the union of what each retriever brings for each query, in the order of reciprocal rank fusion.

        Args:
            queries: Texts.
            top_k: Passages that each retriever brings for a query at most.
            progress: Show a bar.
        """
        keys, ranks = [], []
        for retriever in self.retrievers.values():
            rows, _ = retriever.search(queries, top_k, progress=progress)
            query, place = np.nonzero(rows >= 0)
            keys.append(np.stack([query, rows[query, place]]))
            ranks.append(place + 1)
        pairs, inverse = np.unique(np.concatenate(keys, axis=1), axis=1, return_inverse=True)
        parts = np.split(inverse.reshape(-1), np.cumsum([len(rank) for rank in ranks])[:-1])
        by_retriever = {}
        for name, part, rank in zip(self.retrievers, parts, ranks, strict=True):
            by_retriever[name] = np.zeros(pairs.shape[1], dtype=np.int32)
            by_retriever[name][part] = rank
        found = Pools(pairs[0], pairs[1], by_retriever)
        order = np.lexsort((found.passage, -found.reciprocal_ranks, found.query))
        return Pools(
            found.query[order], found.passage[order], {name: rank[order] for name, rank in found.ranks.items()}
        )

    def scores(self, queries: Sequence[str], query: np.ndarray, passage: np.ndarray) -> dict[str, np.ndarray]:
        """Return each retriever's score of given pairs, whoever brought them, float32, each of shape ``(pairs,)``."""
        return {name: each.similarity(queries, query, passage) for name, each in self.retrievers.items()}
