"""General test sets: standard ones, outside the recipe's domain, on which a model shows what it has forgotten.

``evaluate.benchmark`` names them, see :mod:`lce_trainer.evaluation.general_sets`. Where a set has no first stage, BM25
is one.
"""

import logging
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa

from lce_trainer.errors import ConfigError
from lce_trainer.evaluation.general_sets import DEPTH, STANDARD, TestSet, Texts, read_test_sets
from lce_trainer.evaluation.judged import Judged
from lce_trainer.pipeline.run import Made, Run
from lce_trainer.synthesis.language import detect_language
from lce_trainer.synthesis.retrieval.bm25 import BM25Index

logger = logging.getLogger(__name__)

_DETECTED = 200  # passages that a language is detected by

_FEATURES = datasets.Features(
    {
        "test_set": datasets.Value("string"),
        "query_id": datasets.Value("string"),
        "query": datasets.Value("string"),
        "doc_ids": datasets.List(datasets.Value("string")),
        "passages": datasets.List(datasets.Value("string")),
        "scores": datasets.List(datasets.Value("float64")),  # of the first stage; null where it did not bring a passage
        "judged": datasets.List(datasets.Value("string")),
        "grades": datasets.List(datasets.Value("int64")),
        "relevant_from": datasets.Value("int64"),
    }
)


@dataclass(frozen=True)
class General:
    """The general test sets as one: each query counts by its set.

    Attributes:
        judged: Queries, candidates, the first stage's scores and grades of all sets; ids of queries are distinct.
        sets: Name of each query's test set.
        relevant_from: Lowest grade of a relevant passage, of each query.
        candidates: What is reranked, in words, by the name of the set.
    """

    judged: Judged
    sets: dict[str, str]
    relevant_from: dict[str, int]
    candidates: dict[str, str]


def read_general(run: Run) -> General:
    """Return the test sets that the recipe names, as :func:`load_general`, once the artifact of them is made.

    Of several processes all must call.

    Raises:
        ConfigError: A name is neither a folder nor a Hub id.
        EvaluationError: A dataset or folder has none of the three forms, or what it holds cannot be used.
    """
    config = run.recipe.evaluate
    shape = {
        "benchmark": config.benchmark,
        "relevant_from": config.relevant_from,
        "contents": run.contents(name for name in config.benchmark if name not in STANDARD),
    }
    run.make("general", shape, (), lambda: _make(run))
    return load_general(run)


def load_general(run: Run) -> General:
    """Return the test sets of the artifact ``general``, the first ``evaluate.max_queries`` queries of each.

    Raises:
        ArtifactError: It is not made.
    """
    config = run.recipe.evaluate
    rows = run.table("general")
    names = np.array(rows["test_set"][:])
    kept = np.arange(len(rows))
    if config.max_queries is not None:
        first = [np.flatnonzero(names == name)[: config.max_queries] for name in dict.fromkeys(names.tolist())]
        kept = np.concatenate(first)
    found = rows.select(kept).to_list()
    ids = [row["query_id"] for row in found]
    return General(
        judged=Judged(
            queries=[(row["query_id"], row["query"]) for row in found],
            pools=[list(zip(row["doc_ids"], row["passages"], strict=True)) for row in found],
            run={
                row["query_id"]: {
                    doc_id: score
                    for doc_id, score in zip(row["doc_ids"], row["scores"], strict=True)
                    if score is not None
                }
                for row in found
            },
            qrels={row["query_id"]: dict(zip(row["judged"], row["grades"], strict=True)) for row in found},
        ),
        sets=dict(zip(ids, (row["test_set"] for row in found), strict=True)),
        relevant_from=dict(zip(ids, (row["relevant_from"] for row in found), strict=True)),
        candidates=run.manifest("general").facts["candidates"],
    )


def _make(run: Run) -> Made:
    sets: dict[str, TestSet] = {}
    for name in run.recipe.evaluate.benchmark:
        source = STANDARD.get(name, name)
        found = read_test_sets(name, run.find(source), _by_bm25, run.recipe.evaluate.relevant_from)
        for title, one in found.items():
            if title in sets:  # NanoMSMARCO in two languages
                title = f"{Path(name).name} {title}"
            if title in sets:
                raise ConfigError(f"evaluate.benchmark: {name!r} is given twice")
            sets[title] = one
    rows, counts = [], {"test_sets": len(sets), "judged_queries": 0}
    for title, one in sets.items():
        judged = one.judged
        for (query_id, query), pool in zip(judged.queries, judged.pools, strict=True):
            grades = judged.qrels[query_id]
            rows.append(
                {
                    "test_set": title,
                    "query_id": f"{title} {query_id}",
                    "query": query,
                    "doc_ids": [doc_id for doc_id, _ in pool],
                    "passages": [text for _, text in pool],
                    "scores": [judged.run[query_id].get(doc_id) for doc_id, _ in pool],
                    "judged": list(grades),
                    "grades": list(grades.values()),
                    "relevant_from": one.relevant_from,
                }
            )
        counts["judged_queries"] += len(judged.queries)
        for what, count in one.counts.items():
            counts[what] = counts.get(what, 0) + count
        logger.info("%s: %d queries; %s", title, len(judged.queries), one.candidates)
    facts = {"candidates": {title: one.candidates for title, one in sets.items()}}
    return {"train": datasets.Dataset.from_list(rows, features=_FEATURES)}, counts, facts


def _by_bm25(queries: Mapping[str, str], corpus: Texts) -> dict[str, dict[str, float]]:
    """Return what BM25 brings for each query."""
    ids, texts = corpus
    passages = datasets.Dataset(pa.table({"text": texts}))
    language = detect_language(texts[:_DETECTED].to_pylist())
    with tempfile.TemporaryDirectory() as folder:
        stemmer, stopwords = language.stemmer, language.stopwords
        index = BM25Index.build(passages, Path(folder), stemmer=stemmer, stopwords=stopwords)
        rows, scores = index.search(list(queries.values()), DEPTH)
        rows, scores = np.array(rows), np.array(scores, dtype=np.float64)  # before the index is deleted
    return {
        query_id: {ids[int(row)].as_py(): float(score) for row, score in zip(some, values, strict=True) if row >= 0}
        for query_id, some, values in zip(queries, rows, scores, strict=True)
    }
