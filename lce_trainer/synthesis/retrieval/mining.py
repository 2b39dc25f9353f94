"""What competes with each query's source passage."""

import datasets
import numpy as np
import pyarrow as pa
from tqdm.auto import tqdm

from lce_trainer.synthesis.retrieval.hybrid import FirstStage, MineConfig, Pools

CANDIDATES_SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("query_id", "query", "source_passage_id")]
    + [(name, pa.list_(pa.string())) for name in ("passage_ids", "found_by")]
    + [("ranks", pa.list_(pa.int32()))]
)
_WINDOW = 1024  # queries that are searched at once: bounds memory


def mine_candidates(
    queries: datasets.Dataset, passages: datasets.Dataset, first_stage: FirstStage, config: MineConfig
) -> tuple[datasets.Dataset, dict[str, int]]:
    """Find the passages that compete for each query.

    Args:
        queries: Rows with ``query_id``, ``query`` and ``source_passage_id``.
        passages: The passages artifact.
        first_stage: Retrievers over it.
        config: How deep, and what is left out.

    Returns:
        A row a query, in order: its columns, and the lists ``passage_ids``, ``found_by`` (the retrievers, joined by
        ``+``) and ``ranks`` (the best of them, from 1), in the order of reciprocal rank fusion; the source passage is
        in them only if it was found. Counts: queries, those without a candidate, those whose source was found,
        candidates, and what was left out and why.
    """
    ids = passages.with_format("arrow")["passage_id"][:].combine_chunks()
    documents = np.asarray(passages.with_format("arrow")["doc_id"][:].combine_chunks().dictionary_encode().indices)
    row_of = {passage_id: row for row, passage_id in enumerate(ids.to_pylist())}
    counts = dict.fromkeys(
        ("queries", "queries_without_candidates", "queries_with_source", "candidates", "dropped_same_document"), 0
    )
    counts["dropped_too_similar"] = 0
    parts = [CANDIDATES_SCHEMA.empty_table()]
    columns = queries.select_columns(["query_id", "query", "source_passage_id"]).with_format("arrow")
    with tqdm(total=len(queries), desc="mining", unit=" queries") as bar:
        for batch in columns.iter(_WINDOW):
            texts = batch["query"].to_pylist()
            source = np.array([row_of.get(passage_id, -1) for passage_id in batch["source_passage_id"].to_pylist()])
            pools = first_stage.search(texts, config.top_k, progress=False)
            kept = _competing(pools, source, documents, texts, first_stage, config, counts)
            query, passage = pools.query[kept], pools.passage[kept]
            ranks = {name: rank[kept] for name, rank in pools.ranks.items()}
            sizes = np.bincount(query, minlength=len(texts))
            best = np.min([np.where(rank > 0, rank, np.iinfo(np.int32).max) for rank in ranks.values()], axis=0)
            lists = {
                "passage_ids": ids.take(pa.array(passage)),
                "found_by": pa.array(_names_of(ranks), pa.string()),
                "ranks": pa.array(best, pa.int32()),
            }
            offsets = pa.array(np.concatenate([[0], np.cumsum(sizes)]), pa.int32())
            table = {name: batch[name] for name in batch.column_names}
            table |= {name: pa.ListArray.from_arrays(offsets, values) for name, values in lists.items()}
            parts.append(pa.table(table, CANDIDATES_SCHEMA))
            counts["queries"] += len(texts)
            counts["queries_without_candidates"] += int((sizes == 0).sum())
            counts["queries_with_source"] += int((passage == source[query]).sum())
            counts["candidates"] += len(passage)
            bar.update(len(texts))
    # Without a name of its own the fingerprint would be a hash of all the texts, pickled.
    fingerprint = datasets.fingerprint.generate_random_fingerprint()
    return datasets.Dataset(pa.concat_tables(parts), fingerprint=fingerprint), counts


def _competing(
    pools: Pools,
    source: np.ndarray,
    documents: np.ndarray,
    texts: list[str],
    first_stage: FirstStage,
    config: MineConfig,
    counts: dict[str, int],
) -> np.ndarray:
    """Return which pairs stay, shape ``(pairs,)``; those that do not are counted by reason."""
    kept = np.ones(len(pools.query), dtype=bool)
    # A query of a log has no source passage, and so nothing that is left out for being like it.
    other = (source >= 0)[pools.query] & (pools.passage != source[pools.query])
    if not config.same_document:
        siblings = other & (documents[pools.passage] == documents[source][pools.query])
        counts["dropped_same_document"] += int(siblings.sum())
        kept &= ~siblings
    dense = first_stage.retrievers.get("dense")
    if config.max_similarity is not None and dense is not None:
        cosine = dense.similarity(texts, pools.query, pools.passage)
        of_source = dense.similarity(texts, np.arange(len(texts)), source)
        similar = kept & other & (cosine > config.max_similarity * of_source[pools.query])
        counts["dropped_too_similar"] += int(similar.sum())
        kept &= ~similar
    return kept


def _names_of(ranks: dict[str, np.ndarray]) -> list[str]:
    names = np.array(["+".join(n for i, n in enumerate(ranks) if code >> i & 1) for code in range(1 << len(ranks))])
    code = np.sum([(rank > 0).astype(np.int64) << i for i, rank in enumerate(ranks.values())], axis=0)
    found: list[str] = names[code].tolist()
    return found
