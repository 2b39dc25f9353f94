"""What competes with each query's source passage."""

from dataclasses import dataclass

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm.auto import tqdm

from lce_trainer.compat import row_selection
from lce_trainer.errors import ArtifactError
from lce_trainer.settings import option
from lce_trainer.synthesis.retrieval.bm25 import BM25Index

CANDIDATES_SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("query_id", "query", "source_passage_id")]
    + [(name, pa.list_(pa.string())) for name in ("passage_ids", "passages", "retrievers")]
    + [("ranks", pa.list_(pa.int32()))]
)


_WINDOW = 50_000  # candidates whose texts are gathered at once: bounds memory, and Arrow's 2 GiB a string array


@dataclass
class MineConfig:
    """Where a query's competitors come from."""

    top_k: int = option(50, "Passages BM25 brings for each query.")


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
    table = (passages.flatten_indices() if row_selection(passages) is not None else passages).data.table
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
