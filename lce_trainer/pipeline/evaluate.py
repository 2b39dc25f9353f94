"""The evaluation stage: what the user already has, and the trained reranker, on the same candidates."""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import datasets
import numpy as np

from lce_trainer.artifacts import Manifest
from lce_trainer.errors import ConfigError
from lce_trainer.evaluation.compare import choose_weight, compare, fuse, rerank, strongest
from lce_trainer.evaluation.judged import Judged, Query, judgments, read_judged, read_queries
from lce_trainer.evaluation.report import by_query, markdown, table, verdict
from lce_trainer.hardware import resolve_dtype
from lce_trainer.model.loading import has_head
from lce_trainer.model.reranker import Reranker
from lce_trainer.pipeline.run import Made, Run

logger = logging.getLogger(__name__)

RERANKER = "reranker"  # the trained model's row
FUSED = "reranker + first stage"
UNTOUCHED = "base, untouched"
_BY_QUERY = "_by_query"  # ends the names of the tables that hold a row a query

Runs = dict[str, dict[str, dict[str, float]]]


@dataclass(frozen=True)
class _Judged:
    """Queries with the candidates of the first stage, and what the user already ranks them with."""

    queries: list[tuple[str, str]]  # (query_id, query)
    pools: list[list[tuple[str, str]]]  # (doc_id, passage) of each, best first
    rows: Runs  # the rankings of the first stage, as a user has them
    scores: Runs  # what each retriever gives every document of the pools
    qrels: Mapping[str, Mapping[str, int]]
    types: Mapping[str, str | None] = field(default_factory=dict)

    def first_stage(self, bm25_weight: float) -> dict[str, dict[str, float]]:
        """Return the scores that are fused with the reranker's: the encoder's, with BM25's beside them."""
        if len(self.scores) == 1:
            return next(iter(self.scores.values()))
        return fuse(self.scores["bm25"], self.scores["dense"], bm25_weight)


def evaluate_systems(run: Run) -> str:
    """Compare systems on human judgments.

    Returns:
        The tables and verdicts, as text.

    Raises:
        ConfigError: The recipe names no human judgments.
    """
    config = run.recipe.evaluate
    if not is_judged(run):
        raise ConfigError("nothing to evaluate on: set evaluate.queries, or evaluate.candidates and evaluate.qrels")

    def work() -> Made:
        results: dict[str, datasets.Dataset] = {}
        queries: dict[str, datasets.Dataset] = {}
        counts: dict[str, int] = {}
        verdicts: dict[str, str] = {}
        notes: dict[str, str] = {}
        if config.queries is not None:
            judged, counts = _in_domain(run, config.queries, config.max_queries)
            results["in_domain"], queries["in_domain"] = _compare(run, judged, relevant_from=1)
            names = ["BM25" if name == "bm25" else "the encoder" for name in judged.scores]
            of = f"each of {' and '.join(names)}" if len(names) > 1 else names[0]
            notes["in_domain"] = (
                f"Each system reranks the same candidates: the first {config.top_k} passages a query of "
                f"{of}. p-values are against the best of the other systems."
            )
        if config.candidates is not None:
            given = _out_of_domain(run)
            results["out_of_domain"], queries["out_of_domain"] = _compare(run, given, config.relevant_from)
            sizes = sorted(map(len, given.pools))
            notes["out_of_domain"] = (
                f"Each system reranks the same candidates, those given in {Path(config.candidates).name}, all of them: "
                f"{sizes[0]} to {sizes[-1]} a query. MAP and MRR count grades from {config.relevant_from} on as "
                "relevant. p-values are against the best of the other systems."
            )
        folder = run.root / "evaluation"
        folder.mkdir(parents=True, exist_ok=True)
        model = run.manifest("model")
        for name, result in results.items():
            notes[name] += f" {_near_duplicates(model, name)}"
            verdicts[name] = verdict(result, FUSED)
            text = f"{markdown(result)}\n\n{verdicts[name]}\n"
            (folder / f"{name}.md").write_text(text, encoding="utf-8")
        tables = {**results, **{f"{name}{_BY_QUERY}": rows for name, rows in queries.items()}}
        counts |= {what: count for what, count in model.counts.items() if what.startswith("near_duplicates_")}
        return tables, counts, {"verdict": verdicts, "notes": notes}

    inputs = ("passages", "model") if config.queries is not None else ("model",)
    shape = {
        **asdict(config),
        **first_stage_shape(run),
        "contents": run.contents((config.queries, config.candidates, config.qrels)),
    }
    run.make("evaluation", shape, inputs, work)
    manifest = run.manifest("evaluation")
    texts = []
    for name in comparisons(manifest):
        results = run.table("evaluation", name)
        title = f"{name.replace('_', ' ')}, {results[0]['queries']} queries; p against the best of the others"
        texts.append(f"{title}\n{table(results)}\n\n{manifest.facts['verdict'][name]}")
    return "\n\n".join(texts)


def comparisons(evaluation: Manifest) -> list[str]:
    """Return the splits of the evaluation artifact that compare systems, one a set of judgments."""
    names = [file.removesuffix(".parquet") for file in evaluation.files]
    return [name for name in names if not name.endswith(_BY_QUERY)]


def query_table(run: Run, comparison: str) -> datasets.Dataset | None:
    """Return how each system ranks each query of a comparison, as :func:`lce_trainer.evaluation.report.by_query`.

    None for an evaluation that was made before there was such a table.
    """
    name = f"{comparison}{_BY_QUERY}"
    return run.table("evaluation", name) if f"{name}.parquet" in run.manifest("evaluation").files else None


def is_judged(run: Run) -> bool:
    """Return whether the recipe names human judgments to evaluate on."""
    return run.recipe.evaluate.queries is not None or run.recipe.evaluate.candidates is not None


def measured_queries(run: Run) -> dict[str, list[str]]:
    """Return the texts of all queries that the recipe measures or chooses a model on, by the name of the comparison."""
    config = run.recipe.evaluate
    found = {}
    for name, path in (("in_domain", config.queries), ("dev", config.dev_queries)):
        if path is not None:
            found[name] = [query.query for query in read_queries(run.find(path))]
    if config.candidates is not None:
        found["out_of_domain"] = [query for _, query in _read_candidates(run).queries]
    return found


def first_stage_shape(run: Run) -> dict[str, str | None]:
    """Return what decides which candidates the first stage brings, for the manifests of what depends on it."""
    encoder = run.encoder
    return {"retrievers": "+".join(run.recipe.mine.retrievers), "encoder": None if encoder is None else encoder.name}


def dev_groups(run: Run, top_k: int, limit: int | None) -> datasets.Dataset:
    """Return human dev queries as groups: what the first stage brings for each, the answers labelled 1."""
    judged, _ = _in_domain(run, run.recipe.evaluate.dev_queries or "", limit, top_k)
    return datasets.Dataset.from_dict(
        {
            "query_id": [query_id for query_id, _ in judged.queries],
            "query": [query for _, query in judged.queries],
            "passages": [[text for _, text in pool] for pool in judged.pools],
            "labels": [
                [float(doc_id in judged.qrels[query_id]) for doc_id, _ in pool]
                for (query_id, _), pool in zip(judged.queries, judged.pools, strict=True)
            ],
        }
    )


def choose_first_stage_weight(run: Run, model: Path) -> dict[str, float]:
    """Find on the human dev queries how much the first stage's scores count beside the reranker's.

    Args:
        run: The recipe being run.
        model: The folder of the trained reranker.

    Returns:
        ``bm25_weight``, BM25's share of the first stage's score beside the encoder's; ``weight``, the first stage's
        share beside the reranker; both from 0 to 1; and on the dev queries the nDCG@10 of the reranker alone, of the
        first stage alone, and of both. Without dev queries only the weights: 0 and one half.
    """
    path = run.recipe.evaluate.dev_queries
    if path is None:
        return {"bm25_weight": 0.0, "weight": 0.5}
    judged, _ = _in_domain(run, path, None)
    bm25_weight = 0.0
    if len(judged.scores) > 1:
        bm25_weight, _ = choose_weight(judged.scores["bm25"], judged.scores["dense"], judged.qrels)
    weight, ndcg = choose_weight(judged.first_stage(bm25_weight), _rerank(run, model, judged), judged.qrels)
    return {
        "bm25_weight": bm25_weight,
        "weight": weight,
        "dev_ndcg@10_reranker": ndcg[0.0],
        "dev_ndcg@10_first_stage": ndcg[1.0],
        "dev_ndcg@10_fused": ndcg[weight],
    }


def _compare(run: Run, judged: _Judged, relevant_from: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Return the comparison, and how each system ranks each query."""
    chosen = run.manifest("model").facts["first_stage"]
    first_stage = judged.first_stage(chosen["bm25_weight"])
    systems: Runs = dict(judged.rows)
    if len(judged.scores) > 1 and chosen["bm25_weight"]:
        systems[f"encoder + {chosen['bm25_weight']:.2f} BM25"] = first_stage
    if has_head(run.recipe.train.model):
        systems[UNTOUCHED] = _rerank(run, run.recipe.train.model, judged)
    for name in run.recipe.evaluate.rerankers:
        systems[name] = _rerank(run, name, judged)
    best = strongest(systems, judged.qrels, list(systems))
    systems[RERANKER] = _rerank(run, run.root / "model", judged)
    systems[FUSED] = fuse(first_stage, systems[RERANKER], chosen["weight"])
    results = compare(
        systems,
        judged.qrels,
        baseline=best,
        tested=[RERANKER, FUSED],
        relevant_from=relevant_from,
        seed=run.recipe.seed,
    )
    queries = by_query(
        systems,
        judged.qrels,
        judged.queries,
        judged.pools,
        first_stage=first_stage,
        shown=[best, FUSED],
        types=judged.types,
        relevant_from=relevant_from,
    )
    return results, queries


def _rerank(run: Run, model: str | Path, judged: _Judged) -> dict[str, dict[str, float]]:
    config = run.recipe.evaluate
    reranker = Reranker.from_pretrained(model, dtype=resolve_dtype(config.precision))
    logger.info("%s scores %s pairs", Path(model).name, f"{sum(map(len, judged.pools)):,}")
    return rerank(
        judged.queries,
        judged.pools,
        lambda pairs: reranker.score(pairs, batch_tokens=config.batch_tokens, progress=True),
    )


def _in_domain(run: Run, path: str, limit: int | None, top_k: int | None = None) -> tuple[_Judged, dict[str, int]]:
    """Human queries over the recipe's own passages."""
    queries = human_queries(run, path, limit)
    passages = run.table("passages")
    qrels, counts = judgments(queries, set(passages.unique("doc_id")))
    texts = [query.query for query in queries]
    top_k = top_k or run.recipe.evaluate.top_k
    pool = run.first_stage.search(texts, top_k)
    rows, place = np.unique(pool.passage, return_inverse=True)
    used = passages.select(rows)
    documents, contents = used["doc_id"][:], used["text"][:]
    doc_ids = [documents[i] for i in place]
    scores = run.first_stage.scores(texts, pool.query, pool.passage)
    every = {
        name: _best_of(queries, pool.query, doc_ids, score, np.ones(len(score), dtype=bool))
        for name, score in scores.items()
    }
    rows_of: Runs = {}
    if "bm25" in scores:
        rows_of["BM25"] = _best_of(queries, pool.query, doc_ids, scores["bm25"], pool.ranks["bm25"] > 0)
    if len(scores) > 1:
        everything = np.ones(len(pool.query), dtype=bool)
        rows_of["BM25 + encoder, RRF"] = _best_of(queries, pool.query, doc_ids, pool.reciprocal_ranks, everything)
    if "dense" in scores:
        rows_of["encoder"] = every["dense"]
    ends = np.searchsorted(pool.query, np.arange(len(queries) + 1))
    pools = [[(doc_ids[i], contents[place[i]]) for i in range(start, end)] for start, end in pairwise(ends)]
    named = [(query.query_id, query.query) for query in queries]
    types = {query.query_id: query.query_type for query in queries}
    return _Judged(named, pools, rows_of, every, qrels, types), counts


def _best_of(
    queries: list[Query], query: np.ndarray, doc_ids: list[str], scores: np.ndarray, kept: np.ndarray
) -> dict[str, dict[str, float]]:
    """A document scores as its best passage (MaxP)."""
    found: dict[str, dict[str, float]] = {query.query_id: {} for query in queries}
    for i in np.flatnonzero(kept):
        best = found[queries[query[i]].query_id]
        best[doc_ids[i]] = max(float(scores[i]), best.get(doc_ids[i], -np.inf))
    return found


def _out_of_domain(run: Run) -> _Judged:
    """Judged candidates that came with their texts and their first stage's ranks."""
    given = _read_candidates(run)
    scores: Runs = {"bm25": given.run}
    rows: Runs = {"BM25": given.run}
    if run.encoder is not None:
        encoder = run.encoder
        scores["dense"] = rerank(given.queries, given.pools, lambda pairs: encoder.similarity(list(pairs)))
        rows["encoder"] = scores["dense"]
    return _Judged(given.queries, given.pools, rows, scores, given.qrels)


def _read_candidates(run: Run) -> Judged:
    config = run.recipe.evaluate
    if config.qrels is None:
        raise ConfigError("evaluate.candidates needs evaluate.qrels, its judgments")
    return read_judged(run.find(config.candidates or ""), run.find(config.qrels))


def _near_duplicates(model: Manifest, comparison: str) -> str:
    """Return a sentence on the training queries that repeat those of a comparison."""
    count = model.counts.get(f"near_duplicates_{comparison}")
    if count is None:
        return "Whether training queries repeat these was not checked."
    what = "no training query is" if not count else f"{count:,} training groups were left out whose query is"
    return f"{what[0].upper()}{what[1:]} a near-duplicate of one of these."


def human_queries(run: Run, path: str, limit: int | None) -> list[Query]:
    """Judged queries, their answers renamed to the documents that duplicates were merged into."""
    kept_as: Mapping[str, str] = run.manifest("passages").facts["merged"]
    return [
        replace(query, doc_ids=tuple(dict.fromkeys(kept_as.get(doc, doc) for doc in query.doc_ids)))
        for query in read_queries(run.find(path))[:limit]
    ]
