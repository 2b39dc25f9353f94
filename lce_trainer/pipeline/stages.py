"""The stages of a recipe, each from one artifact to the next.

``generate`` → ``mine`` → ``label`` → ``train`` → ``evaluate`` → ``publish``. A stage whose artifact is
there, made from the same settings and inputs, does nothing; one that was interrupted goes on.
Stages are the only code that knows both halves: what makes the data, and what learns from it.
"""

import logging
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from lce_trainer.artifacts import MANIFEST
from lce_trainer.errors import ConfigError
from lce_trainer.evaluation.compare import compare, fuse, rerank
from lce_trainer.evaluation.judged import Query, judgments, read_judged, read_queries
from lce_trainer.evaluation.report import markdown, table
from lce_trainer.hardware import resolve_dtype
from lce_trainer.hub.publish import Published
from lce_trainer.hub.publish import publish as upload
from lce_trainer.model.loading import load_tokenizer
from lce_trainer.model.reranker import Reranker
from lce_trainer.pipeline.facts import RERANKER, repos
from lce_trainer.pipeline.run import Made, Run
from lce_trainer.pipeline.train import check_training, fit_reranker
from lce_trainer.synthesis.corpus import build_passages
from lce_trainer.synthesis.journal import Journal
from lce_trainer.synthesis.labeling import LabelConfig, check_judge, label_candidates
from lce_trainer.synthesis.queries import GenerateConfig, generate_queries
from lce_trainer.synthesis.retrieval.bm25 import BM25Index
from lce_trainer.synthesis.retrieval.dense import embed
from lce_trainer.synthesis.retrieval.mining import candidates
from lce_trainer.synthesis.warm_start import warm_start_groups

logger = logging.getLogger(__name__)

Runs = dict[str, dict[str, dict[str, float]]]

# How a language model is reached and how fast does not shape its answers.
_HOW_IT_RUNS = ("endpoint", "concurrency", "timeout", "retries", "batch_tokens")
_JUDGED_DEV_QUERIES = 40


def check(run: Run) -> None:
    """Say what is wrong with a recipe before hours go into the stages that come first.

    Raises:
        LCETrainerError: A file, prompt, model or setting that a later stage needs cannot be used.
    """
    recipe, judged = run.recipe, run.recipe.evaluate
    if recipe.train.groups is None:
        run.prompt(recipe.generate.prompt)
        run.prompt(_judge_prompt(recipe.label))
    for queries in filter(None, (judged.queries, judged.dev_queries)):
        read_queries(run.find(queries))
    for path in filter(None, (judged.candidates, judged.qrels)):
        if not run.find(path).is_file():
            raise ConfigError(f"no file {path!r}, here or beside the recipe")
    if judged.candidates is not None and judged.qrels is None:
        raise ConfigError("evaluate.candidates needs evaluate.qrels, its judgments")
    for encoder in filter(None, (recipe.train.warm_start.teacher, judged.bi_encoder)):
        load_tokenizer(encoder)
    check_training(run)


def read_corpus(run: Run) -> None:
    """Documents into passages, with a BM25 index beside them."""
    config = run.recipe.corpus

    def work() -> Made:
        passages = build_passages(config, run.recipe.seed, run.base)
        # From here on the index is that of other passages than those of an earlier manifest.
        (run.root / "passages" / MANIFEST).unlink(missing_ok=True)
        language = passages.language
        index = run.root / "passages" / "bm25"
        BM25Index.build(passages.table, index, stemmer=language.stemmer, stopwords=language.stopwords)
        return {"train": passages.table}, passages.counts, {"merged": passages.merged, "language": language.code}

    shape = {**asdict(config), "contents": run.contents((config.source, config.script))}
    run.make("passages", shape, (), work, parts=("bm25",))


def generate(run: Run) -> None:
    """The LLM writes queries for passages drawn at random; a filter keeps those that lead back."""
    read_corpus(run)
    config = run.recipe.generate
    prompt = run.prompt(config.prompt)

    def work() -> Made:
        with Journal(run.root / "queries" / "journal.jsonl") as journal:
            queries, counts = generate_queries(
                run.table("passages"), run.llm, prompt, config, run.recipe.seed, journal, run.index
            )
        return {"train": queries}, counts, {"prompt": prompt.source, "llm": run.llm.name}

    run.make("queries", {**_prompted(config), "prompt_digest": prompt.digest, **_llm_shape(run)}, ("passages",), work)


def mine(run: Run) -> None:
    """BM25 finds what competes with each query's source passage."""

    def work() -> Made:
        found, counts = candidates(run.table("queries"), run.table("passages"), run.index, run.recipe.mine.top_k)
        return {"train": found}, counts, {}

    run.make("candidates", asdict(run.recipe.mine), ("passages", "queries"), work)


def label(run: Run) -> None:
    """The LLM judges candidates into positives and hard negatives."""
    config = run.recipe.label
    prompt = run.prompt(_judge_prompt(config))

    def work() -> Made:
        with Journal(run.root / "groups" / "journal.jsonl") as journal:
            groups, counts, facts = label_candidates(
                run.table("candidates"), run.table("passages"), run.llm, prompt, config, run.recipe.seed, journal
            )
            if run.recipe.evaluate.dev_queries is not None:
                human = _dev_groups(run, config.candidates, _JUDGED_DEV_QUERIES)
                facts = {**facts, "judge_on_human_labels": check_judge(human, run.llm, prompt, config, journal)}
        return {"train": groups}, counts, {**facts, "prompt": prompt.source, "llm": run.llm.name}

    shape = {**_prompted(config), "prompt_digest": prompt.digest, **_llm_shape(run)}
    run.make("groups", shape, ("passages", "candidates"), work)


def train(run: Run) -> None:
    """A warm start where the recipe wants one, then the cross-encoder learns from the judged groups."""
    config = run.recipe.train.warm_start
    if run.recipe.train.groups is None:
        run.manifest("groups")  # missing ones must not be noticed after the warm start
    elif config.pairs or run.recipe.evaluate.dev_queries is not None:
        read_corpus(run)  # which generate does otherwise
    if config.pairs:
        teacher = config.teacher or run.recipe.train.model

        def work() -> Made:
            vectors = partial(embed, model=teacher, max_length=128)
            groups, counts = warm_start_groups(
                run.table("passages"), vectors, config, run.recipe.seed, run.root / "warm_start" / "bm25"
            )
            return {"train": groups}, counts, {}

        # The learning rate and temperature belong to the training that follows, not to the groups.
        shaping = {key: value for key, value in asdict(config).items() if key not in ("learning_rate", "temperature")}
        run.make("warm_start", {**shaping, "teacher": teacher}, ("passages",), work)
    dev = None
    if run.recipe.evaluate.dev_queries is not None:
        dev = _dev_groups(run, run.recipe.evaluate.top_k, run.recipe.evaluate.max_dev_queries)
    fit_reranker(run, dev)


def stages_of(run: Run) -> tuple[str, ...]:
    """Return the stages that a whole run of the recipe goes through, in order."""
    making = () if run.recipe.train.groups is not None else ("generate", "mine", "label")
    return (*making, "train", *(("evaluate",) if is_judged(run) else ()))


def is_judged(run: Run) -> bool:
    """Whether the recipe names human judgments to evaluate on."""
    return run.recipe.evaluate.queries is not None or run.recipe.evaluate.candidates is not None


def evaluate(run: Run) -> str:
    """Systems compared on human judgments.

    Returns:
        The tables, as text.

    Raises:
        ConfigError: The recipe names no human judgments.
    """
    config = run.recipe.evaluate
    if not is_judged(run):
        raise ConfigError("nothing to evaluate on: set evaluate.queries, or evaluate.candidates and evaluate.qrels")
    if config.queries is not None and run.recipe.train.groups is not None:
        read_corpus(run)  # which generate does otherwise

    def work() -> Made:
        results: dict[str, datasets.Dataset] = {}
        counts: dict[str, int] = {}
        notes: dict[str, str] = {}
        if config.queries is not None:
            results["in_domain"], counts, notes["in_domain"] = _evaluate_in_domain(run)
        if config.candidates is not None:
            results["out_of_domain"], notes["out_of_domain"] = _evaluate_out_of_domain(run)
        folder = run.root / "evaluation"
        folder.mkdir(parents=True, exist_ok=True)
        for name, result in results.items():
            (folder / f"{name}.md").write_text(markdown(result) + "\n", encoding="utf-8")
        return results, counts, {"notes": notes}

    inputs = ("passages", "model") if config.queries is not None else ("model",)
    shape = {**asdict(config), "contents": run.contents((config.queries, config.candidates, config.qrels))}
    run.make("evaluation", shape, inputs, work)
    texts = []
    for file in run.manifest("evaluation").files:
        name = file.removesuffix(".parquet")
        results = run.table("evaluation", name)
        texts.append(f"{name.replace('_', ' ')}, {results[0]['queries']} queries\n{table(results)}")
    return "\n\n".join(texts)


def publish(run: Run, *, dry_run: bool = False, include_passages: bool = False) -> Published:
    """Publish the model and what it was trained on, each with its card; nothing is written into the run's folder."""
    contents = repos(run, include_passages)
    return upload(*contents, private=run.recipe.publish.private, dry_run=dry_run, folders=[run.root])


def _evaluate_in_domain(run: Run) -> tuple[datasets.Dataset, dict[str, int], str]:
    config = run.recipe.evaluate
    queries = _human_queries(run, config.queries or "", config.max_queries)
    qrels, counts = judgments(queries, set(run.table("passages").unique("doc_id")))
    pools, bm25 = _bm25_pools(run, queries, config.top_k)
    systems = _rerank_all(run, [(query.query_id, query.query) for query in queries], pools, bm25)
    note = f"Each system reranks the same BM25 candidates, {config.top_k} passages a query at most."
    return compare(systems, qrels, baseline="BM25", seed=run.recipe.seed), counts, note


def _evaluate_out_of_domain(run: Run) -> tuple[datasets.Dataset, str]:
    config = run.recipe.evaluate
    if config.qrels is None:
        raise ConfigError("evaluate.candidates needs evaluate.qrels, its judgments")
    judged = read_judged(run.find(config.candidates or ""), run.find(config.qrels))
    systems = _rerank_all(run, judged.queries, judged.pools, judged.run)
    sizes = sorted(map(len, judged.pools))
    note = (
        f"Each system reranks the same candidates, those given in {Path(config.candidates or '').name}, all of them: "
        f"{sizes[0]} to {sizes[-1]} a query. MAP and MRR count grades from {config.relevant_from} on as relevant."
    )
    results = compare(systems, judged.qrels, baseline="BM25", relevant_from=config.relevant_from, seed=run.recipe.seed)
    return results, note


def _rerank_all(
    run: Run,
    queries: list[tuple[str, str]],
    pools: list[list[tuple[str, str]]],
    bm25: dict[str, dict[str, float]],
) -> Runs:
    """The same candidates in the order of each system."""
    config = run.recipe.evaluate
    systems: Runs = {"BM25": bm25}
    if config.bi_encoder is not None:
        systems["bi-encoder"] = rerank(queries, pools, partial(_cosines, model=config.bi_encoder))
    reranker = Reranker.from_pretrained(run.root / "model", dtype=resolve_dtype(config.precision))
    logger.info("scoring %s pairs", f"{sum(map(len, pools)):,}")
    score = partial(reranker.score, batch_tokens=config.batch_tokens, progress=True)
    systems[RERANKER] = rerank(queries, pools, score)
    if config.bi_encoder is not None:
        systems["reranker + bi-encoder"] = fuse(systems[RERANKER], systems["bi-encoder"])
    return systems


def _cosines(pairs: list[tuple[str, str]], model: str) -> np.ndarray:
    """Similarity of each pair under a bi-encoder; every distinct text is embedded once."""
    texts = list(dict.fromkeys(text for pair in pairs for text in pair))
    rows = {text: row for row, text in enumerate(texts)}
    vectors = embed(texts, model)
    left = vectors[[rows[query] for query, _ in pairs]]
    right = vectors[[rows[passage] for _, passage in pairs]]
    cosines: np.ndarray = np.einsum("pd,pd->p", left, right)
    return cosines


def _human_queries(run: Run, path: str, limit: int | None) -> list[Query]:
    """Judged queries, their answers renamed to the documents that duplicates were merged into."""
    kept_as: Mapping[str, str] = run.manifest("passages").facts["merged"]
    return [
        Query(query.query_id, query.query, tuple(dict.fromkeys(kept_as.get(doc, doc) for doc in query.doc_ids)))
        for query in read_queries(run.find(path))[:limit]
    ]


def _bm25_pools(
    run: Run, queries: list[Query], top_k: int
) -> tuple[list[list[tuple[str, str]]], dict[str, dict[str, float]]]:
    """The passages BM25 brings for each query, best first; a document scores as its best passage."""
    passages = run.table("passages")
    rows, scores = run.index.search([query.query for query in queries], top_k)
    # Padding (-1) is taken as row 0 here and left out below.
    taken = passages.select(np.maximum(rows, 0).ravel())
    documents, texts = taken["doc_id"][:], taken["text"][:]
    pools: list[list[tuple[str, str]]] = []
    found: dict[str, dict[str, float]] = {}
    for i, query in enumerate(queries):
        pools.append([])
        best = found[query.query_id] = {}
        for j in range(rows.shape[1]):
            if rows[i, j] < 0:
                continue
            doc_id = documents[i * rows.shape[1] + j]
            pools[-1].append((doc_id, texts[i * rows.shape[1] + j]))
            best.setdefault(doc_id, float(scores[i, j]))
    return pools, found


def _dev_groups(run: Run, top_k: int, limit: int | None) -> datasets.Dataset:
    """Human dev queries as groups: what BM25 brings for each, the answers labelled 1."""
    queries = _human_queries(run, run.recipe.evaluate.dev_queries or "", limit)
    pools, _ = _bm25_pools(run, queries, top_k)
    return datasets.Dataset.from_dict(
        {
            "query_id": [query.query_id for query in queries],
            "query": [query.query for query in queries],
            "passages": [[text for _, text in pool] for pool in pools],
            "labels": [
                [float(doc_id in query.doc_ids) for doc_id, _ in pool]
                for query, pool in zip(queries, pools, strict=True)
            ],
        }
    )


def _judge_prompt(config: LabelConfig) -> str:
    return config.prompt or config.judge


def _prompted(config: GenerateConfig | LabelConfig) -> dict[str, Any]:
    """The settings of a stage; of its prompt the name, and no path: what it holds is in the digest."""
    return {**asdict(config), "prompt": config.prompt and Path(config.prompt).name}


def _llm_shape(run: Run) -> dict[str, Any]:
    shaping = {key: value for key, value in asdict(run.recipe.llm).items() if key not in _HOW_IT_RUNS}
    # Its name and not its path on this machine: the groups are published with their manifest.
    return {f"llm_{key}": value for key, value in {**shaping, "model": run.llm.name}.items()}
