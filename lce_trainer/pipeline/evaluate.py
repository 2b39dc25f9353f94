"""The evaluation stage: what the user already has, and the trained reranker, on the same candidates.

Human queries decide. A recipe without any holds documents out, whose synthetic queries never reach training, and is
measured on those; such figures are called synthetic wherever they stand. General test sets show what a model has
forgotten: there the trained weights are compared with those before training.
"""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import datasets
import numpy as np

from lce_trainer.artifacts import Manifest
from lce_trainer.errors import ConfigError, EvaluationError
from lce_trainer.evaluation.compare import choose_weight, compare, fuse, rerank, strongest
from lce_trainer.evaluation.judged import Query, judgments, read_queries
from lce_trainer.evaluation.metrics import CUT, ranking
from lce_trainer.evaluation.report import baseline_of, by_query, details, markdown, table, verdict
from lce_trainer.hardware import resolve_dtype
from lce_trainer.hub.privacy import names_only
from lce_trainer.model.loading import has_head
from lce_trainer.model.reranker import Reranker
from lce_trainer.pipeline.general import General, read_general
from lce_trainer.pipeline.run import Made, Run, open_journal
from lce_trainer.synthesis.cost import Meter
from lce_trainer.synthesis.held_out import hold_out
from lce_trainer.synthesis.judges import Judge, PairwiseJudge
from lce_trainer.synthesis.labeling import LabelConfig, ask_judge, load_judge
from lce_trainer.synthesis.llm.loading import load_llm
from lce_trainer.synthesis.llm.protocol import LLM

logger = logging.getLogger(__name__)

RERANKER = "reranker"  # the trained model's row
FUSED = "reranker + first stage"
UNTOUCHED = "base, untouched"
SYNTHETIC = "synthetic"  # the comparison on queries that no person wrote
GENERAL = "general"  # the comparison on general test sets
FIGURES = "evaluation.json"
_BY_QUERY = "_by_query"  # ends the names of the tables that hold a row a query
_FEW_DOCUMENTS = 10  # below which passages are held out in their place
_FEW_QUERIES = 50  # below which the intervals are wide

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
    """Compare systems on human judgments, or on the synthetic queries of held-out documents.

    Returns:
        The tables and verdicts, as text.

    Raises:
        ConfigError: The recipe names no human judgments, and holds no documents out either.
        ArtifactError: The model was trained on other groups than those that are there now.
        EvaluationError: There is no query to measure on.
    """
    config = run.recipe.evaluate
    if not is_judged(run):
        raise ConfigError("nothing to evaluate on: set evaluate.queries, or evaluate.benchmark")
    synthetic = measures_synthetic(run)
    general = read_general(run) if config.benchmark else None

    def work() -> Made:
        results: dict[str, datasets.Dataset] = {}
        queries: dict[str, datasets.Dataset] = {}
        counts: dict[str, int] = {}
        notes: dict[str, str] = {}
        if config.queries is not None:
            judged, counts = _in_domain(run, config.queries, config.max_queries)
            results["in_domain"], queries["in_domain"] = _compare(run, judged, judged.qrels, _rank(run, judged))
            notes["in_domain"] = f"{_same_candidates(run, judged)} p-values are against the best of the other systems."
        if synthetic:
            judged, counts, held = _held_out(run)
            systems, qrels = _rank(run, judged), judged.qrels
            notes[SYNTHETIC] = f"A language model wrote the {held}. {_same_candidates(run, judged)} "
            if config.synthetic.judge is not None:
                judge = _load_judge(run)
                qrels, more = _judge_pools(run, judged, systems, judge)
                counts |= more
                notes[SYNTHETIC] += f"{judge.note} "
            else:
                notes[SYNTHETIC] += "The passage that a query was written from is the only relevant one. "
            results[SYNTHETIC], queries[SYNTHETIC] = _compare(run, judged, qrels, systems)
            notes[SYNTHETIC] += "p-values are against the best of the other systems."
        if general is not None:
            results[GENERAL], queries[GENERAL], notes[GENERAL] = _compare_general(run, general)
            counts |= {f"general_{what}": count for what, count in run.manifest("general").counts.items() if count}
        folder = run.root / "evaluation"
        folder.mkdir(parents=True, exist_ok=True)
        model = run.manifest("model")
        verdicts: dict[str, str] = {}
        for name, result in results.items():
            notes[name] += f" {_near_duplicates(model, name)}"
            verdicts[name] = verdict_of(result, name)
            by_kind = details(queries[name], judged_system(name), baseline_of(result), run.recipe.seed)
            text = f"{markdown(result)}\n\n{verdicts[name]}\n\n{by_kind}".rstrip() + "\n"
            if name in (SYNTHETIC, GENERAL):
                text = f"{title_of(name)}\n\n{text}"
            (folder / f"{name}.md").write_text(text, encoding="utf-8")
        _write_figures(folder / FIGURES, results, verdicts, notes)
        tables = {**results, **{f"{name}{_BY_QUERY}": rows for name, rows in queries.items()}}
        counts |= {what: count for what, count in model.counts.items() if what.startswith("near_duplicates_")}
        return tables, counts, {"verdict": verdicts, "notes": notes, "synthetic": [SYNTHETIC] if synthetic else []}

    inputs: tuple[str, ...] = ("passages", "model") if config.queries is not None else ("model",)
    shape = {
        **asdict(config),
        **first_stage_shape(run),
        "contents": run.contents((config.queries,)),
    }
    del shape["synthetic"]  # without it the figures on human judgments stay as they are
    if synthetic:
        inputs = ("passages", "queries", "model")
        # Where a model runs does not shape its answers, and what a prompt holds is in its digest.
        settings = {key: value for key, value in asdict(config.synthetic).items() if key != "endpoint"}
        shape["synthetic"] = {**settings, "prompt": config.synthetic.prompt and Path(config.synthetic.prompt).name}
        if config.synthetic.judge is not None and (by := _judge_config(run)).by_llm:
            model = names_only(config.synthetic.model or run.recipe.llm.model, run.base)
            shape["synthetic_judge"] = {"prompt_digest": run.prompt(by.prompt_name).digest, "llm_model": model}
    run.make("evaluation", shape, (*inputs, *(("general",) if general is not None else ())), work)
    manifest = run.manifest("evaluation")
    texts = []
    for name in comparisons(manifest):
        results = run.table("evaluation", name)
        title = f"{title_of(name)}, {results[0]['queries']} queries; p against {_against(name, baseline_of(results))}"
        texts.append(f"{title}\n{table(results)}\n\n{manifest.facts['verdict'][name]}")
    return "\n\n".join(texts)


def comparisons(evaluation: Manifest) -> list[str]:
    """Return the splits of the evaluation artifact that compare systems, one a set of judgments; the general last."""
    names = [file.removesuffix(".parquet") for file in evaluation.files]
    return sorted((name for name in names if not name.endswith(_BY_QUERY)), key=lambda name: name == GENERAL)


def public_names(systems: Iterable[str], base: Path) -> dict[str, str]:
    """Return each system's name without a path of the machine, still distinct.

    Args:
        systems: Names as the tables of the evaluation have them; they may repeat.
        base: The recipe's folder, which names may be relative to.
    """
    public: dict[str, str] = {}
    for system in dict.fromkeys(systems):
        name = shown = names_only(system, base)
        count = 1
        while name in public.values():
            count += 1
            name = f"{shown} ({count})"
        public[system] = name
    return public


def title_of(comparison: str) -> str:
    """Return what a comparison is called where people read it."""
    titles = {SYNTHETIC: "SYNTHETIC queries of held-out documents", GENERAL: "GENERAL test sets, the mean over them"}
    return titles.get(comparison, comparison.replace("_", " "))


def judged_system(comparison: str) -> str:
    """Return whose figures the verdict of a comparison is on.

    That is the reranker as it is used, beside the first stage; on general test sets the trained weights alone, for
    which the first stage of the recipe was not made.
    """
    return RERANKER if comparison == GENERAL else FUSED


def verdict_of(results: datasets.Dataset, comparison: str) -> str:
    """Return the verdict of a comparison, one line."""
    return verdict(results, judged_system(comparison), synthetic=comparison == SYNTHETIC, general=comparison == GENERAL)


def _against(comparison: str, baseline: str) -> str:
    """Return what p-values are against, in words."""
    return baseline if comparison == GENERAL and baseline == UNTOUCHED else "the best of the others"


def query_table(run: Run, comparison: str) -> datasets.Dataset | None:
    """Return how each system ranks each query of a comparison, as :func:`lce_trainer.evaluation.report.by_query`.

    None for an evaluation that was made before there was such a table.
    """
    name = f"{comparison}{_BY_QUERY}"
    return run.table("evaluation", name) if f"{name}.parquet" in run.manifest("evaluation").files else None


def is_judged(run: Run) -> bool:
    """Return whether there is something to evaluate on: human judgments, or documents that are held out."""
    config = run.recipe.evaluate
    return config.queries is not None or bool(config.benchmark) or measures_synthetic(run)


def measures_synthetic(run: Run) -> bool:
    """Return whether documents are held out, on whose synthetic queries the reranker is measured."""
    config = run.recipe.evaluate
    return config.queries is None and run.recipe.train.groups is None and config.synthetic.documents > 0


def held_out_queries(run: Run) -> np.ndarray:
    """Return which synthetic queries are kept from training, bool, a row each of the queries artifact."""
    sources = run.table("queries")["source_passage_id"][:]
    units = _units(run, sources)
    if len(set(units)) < 2:  # one of one would leave nothing to train on
        return np.zeros(len(sources), dtype=bool)
    return hold_out(units, run.recipe.evaluate.synthetic.documents, run.recipe.seed)


def held_out_shape(run: Run) -> dict[str, float]:
    """Return what decides which queries are kept from training, for the manifest of what depends on it."""
    return {"held_out_documents": run.recipe.evaluate.synthetic.documents} if measures_synthetic(run) else {}


def measured_queries(run: Run) -> dict[str, list[str]]:
    """Return the texts of the human queries that the recipe measures or chooses a model on, by their comparison."""
    config = run.recipe.evaluate
    found = {}
    for name, path in (("in_domain", config.queries), ("dev", config.dev_queries)):
        if path is not None:
            found[name] = [query.query for query in read_queries(run.find(path))]
    if config.benchmark:
        found[GENERAL] = [query for _, query in read_general(run).judged.queries]
    return found


def held_out_texts(run: Run) -> dict[str, list[str]]:
    """Return the texts of the queries that are kept from training, as :func:`measured_queries` does human ones."""
    if not measures_synthetic(run):
        return {}
    return {SYNTHETIC: run.table("queries").select(np.flatnonzero(held_out_queries(run)))["query"][:]}


def first_stage_shape(run: Run) -> dict[str, str | None]:
    """Return what decides which candidates the first stage brings, for the manifests of what depends on it."""
    encoder = run.encoder
    shape = {"retrievers": "+".join(run.recipe.mine.retrievers), "encoder": None if encoder is None else encoder.name}
    return {**shape, "search": "clusters"} if run.searches_clusters else shape


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


def dev_queries_of(run: Run) -> str:
    """Return the recipe's file of human dev queries.

    Raises:
        ConfigError: It names none.
    """
    if run.recipe.evaluate.dev_queries is None:
        raise ConfigError("there are no dev queries to compare rankings on: set evaluate.dev_queries in the recipe")
    return run.recipe.evaluate.dev_queries


def compare_on_dev(run: Run, rerankers: Mapping[str, Reranker]) -> datasets.Dataset:
    """Compare forms of one reranker on the human dev queries, over the candidates of the first stage.

    Args:
        run: The recipe; its passages were read.
        rerankers: By name; the others are tested against the first.

    Raises:
        ConfigError: The recipe names no dev queries.
    """
    judged, _ = _in_domain(run, dev_queries_of(run), run.recipe.evaluate.max_dev_queries)
    systems = {name: rerank(judged.queries, judged.pools, one.score) for name, one in rerankers.items()}
    return compare(systems, judged.qrels, baseline=next(iter(systems)), seed=run.recipe.seed)


def choose_bm25_share(run: Run) -> float | None:
    """Return BM25's share beside the encoder, from 0 to 1, as the human dev queries have it.

    None where there are no dev queries, or the first stage has only one retriever.
    """
    path = run.recipe.evaluate.dev_queries
    if path is None or len(run.first_stage.retrievers) < 2:
        return None
    return _bm25_share(_in_domain(run, path, None)[0])


def _bm25_share(judged: _Judged) -> float:
    """Return the least share of BM25 that ranks queries within a standard error of the best.

    Some tens of dev queries may like BM25 more than others do, and too much of it costs more than too little.
    """
    return choose_weight(judged.scores["bm25"], judged.scores["dense"], judged.qrels, cautious=True)[0]


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
    bm25_weight = _bm25_share(judged) if len(judged.scores) > 1 else 0.0
    weight, ndcg = choose_weight(judged.first_stage(bm25_weight), _rerank(run, model, judged), judged.qrels)
    return {
        "bm25_weight": bm25_weight,
        "weight": weight,
        "dev_ndcg@10_reranker": ndcg[0.0],
        "dev_ndcg@10_first_stage": ndcg[1.0],
        "dev_ndcg@10_fused": ndcg[weight],
    }


def _rank(run: Run, judged: _Judged) -> Runs:
    """Return how every system ranks the pools, the trained reranker and its fusion with the first stage last."""
    model = run.manifest("model")
    chosen, base = model.facts["first_stage"], model.config["base"]
    first_stage = judged.first_stage(chosen["bm25_weight"])
    systems: Runs = dict(judged.rows)
    if len(judged.scores) > 1 and chosen["bm25_weight"]:
        systems[f"encoder + {chosen['bm25_weight']:.2f} BM25"] = first_stage
    if has_head(base):
        systems[UNTOUCHED] = _rerank(run, base, judged)
    for name in run.recipe.evaluate.rerankers:
        known = name == base and UNTOUCHED in systems
        systems[name] = systems[UNTOUCHED] if known else _rerank(run, name, judged)
    systems[RERANKER] = _rerank(run, run.root / "model", judged)
    systems[FUSED] = fuse(first_stage, systems[RERANKER], chosen["weight"])
    return systems


def _compare(
    run: Run,
    judged: _Judged,
    qrels: Mapping[str, Mapping[str, int]],
    systems: Runs,
    general: General | None = None,
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Return the comparison, and how each system ranks each query.

    The baseline is the best of the others; on general test sets it is the base before training where that ranks.
    """
    relevant_from = 1 if general is None else general.relevant_from
    sets = None if general is None else general.sets
    if general is not None and UNTOUCHED in systems:
        best = UNTOUCHED
    else:
        best = strongest(systems, qrels, [name for name in systems if name not in (RERANKER, FUSED)], sets)
    results = compare(
        systems,
        qrels,
        baseline=best,
        tested=[RERANKER, FUSED],
        relevant_from=relevant_from,
        sets=sets,
        seed=run.recipe.seed,
    )
    queries = by_query(
        systems,
        qrels,
        judged.queries,
        judged.pools,
        first_stage=judged.first_stage(run.manifest("model").facts["first_stage"]["bm25_weight"]),
        shown=[best, RERANKER if general is not None else FUSED],
        types=judged.types,
        sets=sets,
        relevant_from=relevant_from,
    )
    return results, queries


def _compare_general(run: Run, general: General) -> tuple[datasets.Dataset, datasets.Dataset, str]:
    """Compare on general test sets; also returns a sentence on each thing that a reader must know."""
    given = general.judged
    judged = _Judged(given.queries, given.pools, {"first stage": given.run}, {"bm25": given.run}, given.qrels)
    if (encoder := run.encoder) is not None:
        judged.scores["dense"] = rerank(given.queries, given.pools, lambda pairs: encoder.similarity(list(pairs)))
        judged.rows["encoder"] = judged.scores["dense"]
    results, queries = _compare(run, judged, given.qrels, _rank(run, judged), general)
    by_kind: dict[str, list[str]] = {}
    for name, what in general.candidates.items():
        by_kind.setdefault(what, []).append(name)
    kinds = "; ".join(f"{what} ({', '.join(names)})" for what, names in by_kind.items())
    baseline = baseline_of(results)
    note = (
        f"General test sets, which are not of the recipe's domain: each of the {len(general.candidates)} counts alike. "
        f"Each system reranks the same candidates: {kinds}. p-values are against {_against(GENERAL, baseline)}."
    )
    if baseline != UNTOUCHED:
        note += " The base has no head of its own, so before training it cannot rank, and has no row."
    if run.manifest("model").facts.get("merge", {}).get("grid"):
        note += (
            " How much of the trained weights was kept was chosen on these sets too, so this figure is a little too "
            "good."
        )
    return results, queries, note


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
    qrels, counts = judgments(queries, set(run.table("passages").unique("doc_id")))
    return _retrieve(run, queries, qrels, "doc_id", top_k or run.recipe.evaluate.top_k), counts


def _held_out(run: Run) -> tuple[_Judged, dict[str, int], str]:
    """Synthetic queries of held-out documents over the recipe's passages, counts, and what was held out, in words."""
    for name, parent in (("model", "groups"), ("groups", "candidates"), ("candidates", "queries")):
        run.check_parent(name, parent)
    share = run.recipe.evaluate.synthetic.documents
    if run.manifest("candidates").config.get("held_out_documents") != share:
        raise ConfigError(
            f"the model was not trained with evaluate.synthetic.documents={share:g}, so it may have learned from the "
            "queries that it would be measured on: run lce-trainer run with this recipe again"
        )
    table = run.table("queries")
    table = table.select(np.flatnonzero(held_out_queries(run)))
    found: dict[str, Query] = {}  # one query of each source passage, the first that was written
    for row in table:
        source = row["source_passage_id"]
        found.setdefault(source, Query(row["query_id"], row["query"], (source,), row.get("style") or None))
    queries = list(found.values())[: run.recipe.evaluate.max_queries]
    if not queries:
        raise EvaluationError(
            "no synthetic query is held out to measure on: raise generate.queries or evaluate.synthetic.documents, or "
            "set evaluate.queries"
        )
    if len(queries) < _FEW_QUERIES:
        logger.warning(
            "%d held-out queries are few, and the intervals will be wide: raise generate.queries or "
            "evaluate.synthetic.documents",
            len(queries),
        )
    units = _units(run, [query.doc_ids[0] for query in queries])
    what = "passages" if units == [query.doc_ids[0] for query in queries] else "documents"
    qrels = {query.query_id: dict.fromkeys(query.doc_ids, 1) for query in queries}
    counts = {"held_out_queries": len(queries), f"held_out_{what}": len(set(units))}
    held = f"{len(queries):,} queries from {len(set(units)):,} held-out {what}, whose queries were kept from training"
    return _retrieve(run, queries, qrels, "passage_id", run.recipe.evaluate.top_k), counts, held


def _units(run: Run, sources: Sequence[str]) -> list[str]:
    """Return the document of each source passage; the passage itself where queries stem from few documents."""
    passages = run.table("passages")
    document = dict(zip(passages["passage_id"][:], passages["doc_id"][:], strict=True))
    every = {document[source] for source in run.table("queries").unique("source_passage_id")}
    return [document[source] for source in sources] if len(every) >= _FEW_DOCUMENTS else list(sources)


def _same_candidates(run: Run, judged: _Judged) -> str:
    names = ["BM25" if name == "bm25" else "the encoder" for name in judged.scores]
    of = f"each of {' and '.join(names)}" if len(names) > 1 else names[0]
    return f"Each system reranks the same candidates: the first {run.recipe.evaluate.top_k} passages a query of {of}."


def _write_figures(
    path: Path, results: Mapping[str, datasets.Dataset], verdicts: Mapping[str, str], notes: Mapping[str, str]
) -> None:
    """Write the comparisons as JSON, for whoever reads neither parquet nor pages."""
    figures = {
        name: {
            "synthetic": name == SYNTHETIC,
            "general": name == GENERAL,
            "title": title_of(name),
            "verdict": verdicts[name],
            "note": notes[name],
            "rows": result.to_list(),
        }
        for name, result in results.items()
    }
    path.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class _PoolJudge:
    """What judges the pools of synthetic queries, the language model that it asks, and a sentence on it."""

    judge: Judge
    llm: LLM | None
    note: str


def _judge_config(run: Run) -> LabelConfig:
    """Return the settings of the judge of ``evaluate.synthetic``."""
    config, label = run.recipe.evaluate.synthetic, run.recipe.label
    return LabelConfig(
        judge=config.judge or "verdict",
        prompt=config.prompt,
        reranker=config.reranker,
        examples=label.examples if config.judge == label.judge else [],
        max_passage_words=label.max_passage_words,
    )


def _load_judge(run: Run) -> _PoolJudge:
    """Load the judge of ``evaluate.synthetic``, and find out whether its model can serve it."""
    config, settings, label = run.recipe.evaluate.synthetic, _judge_config(run), run.recipe.label
    prompt = run.prompt(settings.prompt_name) if settings.by_llm else None
    llm: LLM = run.llm
    if config.model is not None or config.endpoint is not None:
        llm = load_llm(replace(run.recipe.llm, model=config.model or run.recipe.llm.model, endpoint=config.endpoint))
    judge = load_judge(settings, llm, prompt)
    assert judge is not None and not isinstance(judge, PairwiseJudge)  # no such judge can be named
    if prompt is None:
        same = (label.judge, label.reranker) == ("reranker", config.reranker)
        return _PoolJudge(judge, None, _judged_by(names_only(judge.name, run.base), settings.judge, same=same))
    llm.check(settings.needs)
    trained = run.manifest("groups").config
    same = (trained.get("prompt_digest"), trained.get("llm_model")) == (prompt.digest, llm.name)
    return _PoolJudge(judge, llm, _judged_by(judge.name, settings.judge, same=same))


def _judged_by(model: str, judge: str, *, same: bool) -> str:
    """Return a sentence on what judged the pools."""
    if same:
        logger.warning(
            "evaluate.synthetic.judge is the judge that labeled the training's groups, whose mistakes the reranker has "
            "learned: name another prompt or another model"
        )
    own = "which labeled the training's groups too" if same else "which did not label the training's groups"
    return (
        f"Relevant is, of the first {CUT} passages of every system, the source passage and what the {judge} of {model} "
        f"finds relevant, {own}."
    )


def _judge_pools(
    run: Run, judged: _Judged, systems: Runs, by: _PoolJudge
) -> tuple[dict[str, dict[str, int]], dict[str, int]]:
    """Judge the first passages of every system, as TREC pools them.

    Returns:
        Which passages are relevant to each query, without the queries whose source passage is rejected; and counts.

    Raises:
        EvaluationError: The judge rejects the source passages of all queries.
    """
    pairs, query, doc_ids = [], [], []
    for number, ((query_id, text), pool) in enumerate(zip(judged.queries, judged.pools, strict=True)):
        texts = dict(pool)
        (source,) = judged.qrels[query_id]
        if source not in texts:
            texts[source] = _text_of(run, source)
        first = {doc: None for scores in systems.values() for doc in ranking(query_id, scores.get(query_id, {}))[:CUT]}
        for doc_id in dict.fromkeys((source, *first)):
            pairs.append((text, texts[doc_id]))
            query.append(number)
            doc_ids.append(doc_id)
    of = np.array(query)
    with open_journal(run.root / "evaluation" / "journal.jsonl", by.llm) as journal:
        if (llm := by.llm) is run.llm and llm is not None:
            spent = sum(run.manifest(name).facts.get("cost", {}).get("money", 0.0) for name in ("queries", "groups"))
            price, budget = run.recipe.llm.price, run.recipe.llm.budget
            journal.meter = Meter(lambda: llm.usage, journal.usage, price, budget=budget, spent=spent)
        scores = ask_judge(pairs, of, by.judge, journal, np.arange(len(judged.queries)), run.recipe.seed)
    is_source = np.r_[True, np.diff(of) > 0]
    decided = by.judge.decide(scores)
    relevant = scores >= scores[is_source][of] if decided is None else decided[0]
    stands = relevant[is_source]  # no comparison with NaN is true: a source that is abstained on does not stand
    qrels: dict[str, dict[str, int]] = {}
    for place in np.flatnonzero(relevant & stands[of]):
        qrels.setdefault(judged.queries[of[place]][0], {})[doc_ids[place]] = 1
    counts = {
        "judged_pairs": len(pairs),
        "judged_relevant": int((relevant & stands[of]).sum()),
        "abstained": int(np.isnan(scores).sum()),
        "queries_left_out_source_rejected": int((~stands).sum()),
    }
    if not qrels:
        raise EvaluationError(
            f"{by.judge.name} rejects the source passages of all {len(judged.queries)} held-out queries: set another "
            "evaluate.synthetic.judge, prompt or model, or null"
        )
    return qrels, counts


def _text_of(run: Run, passage_id: str) -> str:
    passages = run.table("passages")
    return str(passages[passages["passage_id"][:].index(passage_id)]["text"])


def _retrieve(run: Run, queries: list[Query], qrels: Mapping[str, Mapping[str, int]], unit: str, top_k: int) -> _Judged:
    """Return what the first stage brings for queries, ranked by documents or by passages.

    Args:
        run: The recipe being run.
        queries: They are searched for.
        qrels: Their judgments.
        unit: The column of the passages that judgments are of: ``doc_id`` or ``passage_id``.
        top_k: Passages that each retriever brings for a query.
    """
    passages = run.table("passages")
    texts = [query.query for query in queries]
    pool = run.first_stage.search(texts, top_k)
    rows, place = np.unique(pool.passage, return_inverse=True)
    used = passages.select(rows)
    documents, contents = used[unit][:], used["text"][:]
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
    return _Judged(named, pools, rows_of, every, qrels, types)


def _best_of(
    queries: list[Query], query: np.ndarray, doc_ids: list[str], scores: np.ndarray, kept: np.ndarray
) -> dict[str, dict[str, float]]:
    """A document scores as its best passage (MaxP)."""
    found: dict[str, dict[str, float]] = {query.query_id: {} for query in queries}
    for i in np.flatnonzero(kept):
        best = found[queries[query[i]].query_id]
        best[doc_ids[i]] = max(float(scores[i]), best.get(doc_ids[i], -np.inf))
    return found


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
