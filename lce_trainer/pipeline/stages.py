"""The stages of a recipe, each from one artifact to the next.

``generate`` → ``mine`` → ``label`` → ``train`` → ``evaluate`` → ``publish``. A stage whose artifact is
there, made from the same settings and inputs, does nothing; one that was interrupted goes on.
Stages are the only code that knows both halves: what makes the data, and what learns from it.
"""

import logging
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lce_trainer.artifacts import MANIFEST, read_manifest
from lce_trainer.errors import ConfigError, LLMError, PublishError
from lce_trainer.evaluation.judged import read_queries
from lce_trainer.hub.publish import Published
from lce_trainer.hub.publish import publish as upload
from lce_trainer.model.loading import load_tokenizer
from lce_trainer.pipeline.evaluate import (
    GENERAL,
    choose_bm25_share,
    choose_first_stage_weight,
    dev_groups,
    evaluate_systems,
    first_stage_shape,
    held_out_queries,
    held_out_shape,
    held_out_texts,
    human_queries,
    is_judged,
    measured_queries,
    measures_synthetic,
)
from lce_trainer.pipeline.facts import repos, worse_verdicts
from lce_trainer.pipeline.general import read_general
from lce_trainer.pipeline.merge import check_merge, merge_with_base
from lce_trainer.pipeline.run import Made, Run, is_stale, open_journal
from lce_trainer.pipeline.train import check_training, train_reranker
from lce_trainer.synthesis import cost
from lce_trainer.synthesis.corpus import build_passages
from lce_trainer.synthesis.cost import Meter, QuoteReadyError, check_prices
from lce_trainer.synthesis.examples import Example, check_not_evaluated, find_passages, read_examples
from lce_trainer.synthesis.gauge import Sourced, describe_gauge, gauge
from lce_trainer.synthesis.journal import Journal
from lce_trainer.synthesis.judges import ChoiceJudge, Judge, LikelihoodJudge
from lce_trainer.synthesis.labeling import LabelConfig, check_judge, label_candidates, load_judge
from lce_trainer.synthesis.llm.endpoint import EndpointLLM
from lce_trainer.synthesis.llm.protocol import Need
from lce_trainer.synthesis.queries import GenerateConfig, check_styles, generate_queries, prompt_name
from lce_trainer.synthesis.retrieval.bm25 import BM25Index
from lce_trainer.synthesis.retrieval.clusters import READ
from lce_trainer.synthesis.retrieval.dense import DenseIndex, Encoder
from lce_trainer.synthesis.retrieval.mining import mine_candidates

logger = logging.getLogger(__name__)


# How a language model is reached and how fast does not shape its answers.
_HOW_IT_RUNS = ("endpoint", "concurrency", "timeout", "retries", "batch_tokens", "patience", "price", "budget")
_SAMPLE = 16  # calls that a dry run answers for its quote
_JUDGED_DEV_QUERIES = 40
_MOST_BM25 = 0.8  # of the soft labels beside the encoder, where it ranks best alone
# Where the queries of each comparison come from.
_MEASURED = {"in_domain": "evaluate.queries", "dev": "evaluate.dev_queries", GENERAL: "evaluate.benchmark"}


def check(run: Run) -> None:
    """Say what is wrong with a recipe before hours go into the stages that come first.

    Raises:
        LCETrainerError: A file, prompt, model or setting that a later stage needs cannot be used.
    """
    recipe, judged = run.recipe, run.recipe.evaluate
    if recipe.train.groups is None:
        _check_generate(run)
        check_prices(recipe.llm.price, recipe.llm.budget)
        judged_by_llm = recipe.label.by_llm
        if judged_by_llm:
            run.prompt(recipe.label.prompt_name)
        run.lead(partial(_check_llm, run, judged_by_llm))
    for queries in filter(None, (judged.queries, judged.dev_queries)):
        read_queries(run.find(queries))
    check_merge(run)
    if judged.benchmark:
        read_general(run)
    if recipe.train.groups is None:
        _check_examples(run)
        _check_label(run)
        if recipe.label.encoder is not None:
            load_tokenizer(recipe.label.encoder)
    if recipe.mine.encoder is not None and "dense" in recipe.mine.retrievers:
        load_tokenizer(recipe.mine.encoder)
    if measures_synthetic(run) and (judge := recipe.evaluate.synthetic.judge) is not None:
        if judge == "reranker" and recipe.evaluate.synthetic.reranker is None:
            raise ConfigError("evaluate.synthetic.judge=reranker needs evaluate.synthetic.reranker")
        if judge != "reranker":
            run.prompt(recipe.evaluate.synthetic.prompt or judge)
    check_training(run)


def read_corpus(run: Run) -> None:
    """Cut documents into passages, and index them for the first stage."""
    run.lead(partial(_read_corpus, run))


def _read_corpus(run: Run) -> None:
    config, folder = run.recipe.corpus, run.root / "passages"

    def work() -> Made:
        passages = build_passages(config, run.recipe.seed, run.base)
        # From here on the index is that of other passages than those of an earlier manifest.
        (folder / MANIFEST).unlink(missing_ok=True)
        language = passages.language
        BM25Index.build(passages.table, folder / "bm25", stemmer=language.stemmer, stopwords=language.stopwords)
        return {"train": passages.table}, passages.counts, {"merged": passages.merged, "language": language.code}

    shape = {**asdict(config), "contents": run.contents((config.source, config.script))}
    run.make("passages", shape, (), work, parts=("bm25",))
    if (encoder := run.encoder) is not None:
        made_from = {"passages": run.manifest("passages").digest}
        if is_stale(folder / "dense", "dense", {"encoder": encoder.name}, made_from):
            DenseIndex.build(run.table("passages"), folder / "dense", encoder, made_from)
        if run.searches_clusters:
            vectors = {"dense": read_manifest(folder / "dense", "dense").digest}
            if is_stale(folder / "clusters", "clusters", {"read": READ}, vectors):
                DenseIndex.load(folder / "dense", encoder).build_clusters(folder / "clusters", vectors)
        elif run.manifest("passages").counts["passages"] > run.recipe.mine.exact_up_to:
            logger.warning(
                "mine.exact_up_to is %s: without faiss a query is compared with all passages all the same, which takes "
                "longer; pip install 'lce-trainer[ann]'",
                f"{run.recipe.mine.exact_up_to:,}",
            )


def generate(run: Run, dry_run: bool = False) -> None:
    """Have the LLM write queries for passages drawn at random, and keep those that lead back.

    Raises:
        QuoteReadyError: In a dry run, once a sample is answered, unless the queries are made already.
    """
    run.lead(partial(_generate, run, dry_run))


def _generate(run: Run, dry_run: bool) -> None:
    read_corpus(run)
    config = run.recipe.generate
    examples = _example_queries(run)
    prompt = run.prompt(prompt_name(config, examples))

    def work() -> Made:
        _check_generate(run)
        _check_examples(run)
        _probe(run)
        passages = run.table("passages")
        own = _own_queries(run)
        with open_journal(run.root / "queries" / "journal.jsonl", run.llm) as journal:
            journal.meter = _meter(run, journal, "queries", dry_run)
            try:
                queries, counts, facts = generate_queries(
                    passages,
                    run.llm,
                    prompt,
                    config,
                    run.recipe.seed,
                    journal,
                    run.first_stage,
                    examples=find_passages(examples, passages),
                    own=own,
                    **_filter_judges(run),
                )
            except QuoteReadyError as quote:
                raise QuoteReadyError(f"{quote}{_not_quoted(config)}") from None
            facts["cost"] = _cost(run, journal, counts["kept"], "query")
        texts = dict(zip(passages["passage_id"][:], passages["text"][:], strict=True))
        pairs = zip(queries["query"][:], queries["source_passage_id"][:], strict=True)
        facts["gauge"] = gauge(own, [Sourced(query, [texts[source]]) for query, source in pairs], run.recipe.seed)
        logger.info("queries: %s", describe_gauge(facts["gauge"]))
        return {"train": queries}, counts, {"prompt": prompt.source, "llm": run.llm.name, **facts}

    fitted_to = run.recipe.evaluate.dev_queries if config.styles == "auto" else None
    shape = {
        **asdict(config),
        "prompt": Path(prompt_name(config, examples)).name,
        "example_queries": config.example_queries and Path(config.example_queries).name,
        "contents": list(run.contents((config.example_queries, fitted_to)).values()),
        "prompt_digest": prompt.digest,
        **{f"{name}_prompt_digest": run.prompt(name).digest for name in _filter_judges(run)},
        **_llm_shape(run, "queries"),
        **first_stage_shape(run),
    }
    run.make("queries", shape, ("passages",), work)


def mine(run: Run) -> None:
    """Find what competes with each query's source passage."""
    config = run.recipe.mine

    def work() -> Made:
        queries, left_out = run.table("queries"), {}
        if measures_synthetic(run):
            held = held_out_queries(run)
            queries, left_out = queries.select(np.flatnonzero(~held)), {"held_out_queries": int(held.sum())}
        found, counts = mine_candidates(queries, run.table("passages"), run.first_stage, config)
        return {"train": found}, {**counts, **left_out}, {}

    settings = {key: value for key, value in asdict(config).items() if key != "exact_up_to"}  # see first_stage_shape
    shape = {**settings, "encoder": None, **first_stage_shape(run), **held_out_shape(run)}
    run.make("candidates", shape, ("passages", "queries"), work)


def label(run: Run, dry_run: bool = False) -> None:
    """Have a judge make candidates into positives and hard negatives, with soft labels.

    Raises:
        QuoteReadyError: In a dry run, once a sample is judged, unless the groups are made already.
    """
    run.lead(partial(_label, run, dry_run))


def _label(run: Run, dry_run: bool) -> None:
    config = run.recipe.label
    prompt = run.prompt(config.prompt_name) if config.by_llm else None
    by_llm = {} if prompt is None else {"prompt_digest": prompt.digest, **_llm_shape(run, "groups")}
    teacher = Encoder(config.encoder) if config.encoder is not None else None

    def work() -> Made:
        _check_label(run)
        if prompt is not None:
            run.llm.check(config.needs)
        elif dry_run:
            raise QuoteReadyError(f"the judge is the {config.judge}, which runs here: it costs no tokens")
        judge = load_judge(config, run.llm, prompt)
        dense = run.first_stage.retrievers.get("dense")
        encoder = teacher or (dense if isinstance(dense, DenseIndex) else None)
        bm25_weight, chosen = _bm25_weight(run)
        bm25 = run.first_stage.retrievers.get("bm25")
        with open_journal(run.root / "groups" / "journal.jsonl", run.llm if prompt is not None else None) as journal:
            journal.meter = None if prompt is None else _meter(run, journal, "groups", dry_run)
            tables, counts, facts = label_candidates(
                run.table("candidates"),
                run.table("passages"),
                judge,
                encoder,
                config,
                run.recipe.seed,
                journal,
                (bm25, bm25_weight) if isinstance(bm25, BM25Index) and bm25_weight else None,
            )
            if chosen:
                facts = {**facts, "bm25_weight_chosen_on_dev": bm25_weight}
            if run.recipe.evaluate.dev_queries is not None and judge is not None:
                human = dev_groups(run, config.candidates // 2, _JUDGED_DEV_QUERIES)
                facts = {**facts, "judge_on_human_labels": check_judge(human, judge, journal)}
            if prompt is not None:
                facts = {**facts, "cost": _cost(run, journal, counts["groups"], "group")}
            # Beside the groups for whoever looks, and no part of what is published.
            tables.pop("judged").to_parquet(run.root / "groups" / "judged.parquet")
        by_encoder = teacher or run.encoder
        name = judge.name if judge is not None else by_encoder and by_encoder.name
        by = {"judge_model": name} if prompt is None else {"prompt": prompt.source, "llm": name}
        return tables, counts, {**facts, **by}

    shape = {**_prompted(config), **by_llm, **first_stage_shape(run)}
    if teacher is not None:
        shape["encoder"] = teacher.name
    if config.bm25_weight == "auto" and run.recipe.evaluate.dev_queries is not None:
        # Not their path: the groups are published with their manifest.
        shape["contents"] = list(run.contents((run.recipe.evaluate.dev_queries,)).values())
    run.make("groups", shape, ("passages", "candidates"), work)


def _check_label(run: Run) -> None:
    """Check that the first stage has what the soft labels are made of.

    Raises:
        ConfigError: It lacks BM25 or an encoder.
    """
    config, mine = run.recipe.label, run.recipe.mine
    dense = mine.encoder is not None and "dense" in mine.retrievers
    if config.judge == "encoder" and not dense and config.encoder is None:
        raise ConfigError("label.judge=encoder needs label.encoder, or mine.encoder and dense among mine.retrievers")
    if not isinstance(config.bm25_weight, str) and config.bm25_weight and "bm25" not in mine.retrievers:
        raise ConfigError(
            f"label.bm25_weight={config.bm25_weight:g} needs BM25 in the first stage: set mine.first_stage to bm25 or "
            "hybrid, or the weight to 0"
        )


def _bm25_weight(run: Run) -> tuple[float, bool]:
    """Return the weight of BM25 in the soft labels beside the encoder's 1, and whether dev queries chose it."""
    weight = run.recipe.label.bm25_weight
    if not isinstance(weight, str):
        return weight, False
    share = choose_bm25_share(run)
    if share is None:
        logger.info("label.bm25_weight=auto: 0, as there are no dev queries to choose it on, or no two retrievers")
        return 0.0, False
    share = min(share, _MOST_BM25)
    chosen = round(share / (1 - share), 2)
    logger.info(
        "label.bm25_weight=auto: %g beside the encoder's 1, the least that ranks the dev queries within a standard "
        "error of the best",
        chosen,
    )
    return chosen, True


def train(run: Run) -> None:
    """Fine-tune the cross-encoder on the groups, and find the weight of the first stage beside it."""
    run.release_llm()
    check_merge(run)
    if run.recipe.train.groups is None:
        run.manifest("groups")  # names the stage to run first
    elif run.recipe.evaluate.dev_queries is not None:
        read_corpus(run)  # which generate does otherwise
    dev = None
    if run.recipe.evaluate.dev_queries is not None:
        dev = dev_groups(run, max(run.recipe.evaluate.top_k // 3, 1), run.recipe.evaluate.max_dev_queries)
    train_reranker(
        run,
        dev,
        {**measured_queries(run), **held_out_texts(run)},
        partial(merge_with_base, run),
        partial(choose_first_stage_weight, run),
    )


def evaluate(run: Run) -> str:
    """Compare systems, and return the tables and verdicts as text.

    Raises:
        ConfigError: The recipe names no human judgments, and holds no documents out either.
    """
    if run.recipe.evaluate.queries is not None and run.recipe.train.groups is not None:
        read_corpus(run)  # which generate does otherwise
    return evaluate_systems(run)


def stages_of(run: Run) -> tuple[str, ...]:
    """Return the stages that a whole run of the recipe goes through, in order."""
    making = () if run.recipe.train.groups is not None else ("generate", "mine", "label")
    return (*making, "train", *(("evaluate",) if is_judged(run) else ()))


def publish(
    run: Run,
    *,
    dry_run: bool = False,
    include_passages: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    anyway: bool = False,
) -> Published:
    """Publish the model and what it was trained on, each with its card; nothing is written into the run's folder.

    Raises:
        PublishError: An evaluation says that the model ranks worse than what else ranks, and ``anyway`` is not set.
    """
    contents = repos(run, include_passages)
    worse = [] if anyway else worse_verdicts(run)
    if worse and not dry_run:
        raise PublishError(f"{worse[0]}: train it better, or publish it with --anyway; its card says so either way")
    for line in worse:
        logger.warning("%s: publish needs --anyway for such a model", line)
    return upload(
        *contents,
        private=run.recipe.publish.private,
        dry_run=dry_run,
        folders=[run.root],
        revision=revision,
        create_pr=create_pr,
    )


def _check_llm(run: Run, judges: bool) -> None:
    """Find out whether the language model can do what the stages that are not done yet need of it."""
    if all((run.root / name / MANIFEST).is_file() for name in ("queries", "groups")):
        return
    _probe(run)
    if judges:
        run.llm.check(run.recipe.label.needs)


def _check_generate(run: Run) -> None:
    """Check how queries are to be written."""
    config, examples = run.recipe.generate, _example_queries(run)
    check_styles(config, run.prompt(prompt_name(config, examples)), examples)
    if config.styles == "auto" and run.recipe.evaluate.dev_queries is None:
        raise ConfigError(
            "generate.styles=auto fits the mix of styles to evaluate.dev_queries, and the recipe names none: give "
            "weights, such as {keyword: 1, question: 1}"
        )


def _check_examples(run: Run) -> None:
    """Check that no few-shot example is a query that is measured on."""
    given = [(item["query"], "generate.examples") for item in run.recipe.generate.examples if "query" in item]
    given += [(example.query, example.at) for example in _example_queries(run)]
    if given:
        measured = measured_queries(run)
        check_not_evaluated(given, {_MEASURED[name]: queries for name, queries in measured.items()})


def _probe(run: Run) -> None:
    """Find out whether the language model can do all that writing and filtering queries needs of it."""
    config = run.recipe.generate
    run.llm.check("complete")
    needs: dict[str, Need] = {"min_gain": "score", "min_answerable": "choose"}
    for setting, need in needs.items():
        if getattr(config, setting) is not None:
            try:
                run.llm.check(need)
            except LLMError as error:
                raise LLMError(f"generate.{setting}: {error}") from None


def _filter_judges(run: Run) -> dict[str, Judge]:
    """Return the judges that filter queries, by name."""
    config = run.recipe.generate
    judges: dict[str, Judge] = {}
    if config.min_gain is not None:
        judges["likelihood"] = LikelihoodJudge(run.llm, run.prompt("likelihood"), [], config.max_passage_words)
    if config.min_answerable is not None:
        # Its probability of yes is compared with generate.min_answerable: it decides nothing itself.
        judges["verdict"] = ChoiceJudge("verdict", run.llm, run.prompt("verdict"), [], config.max_passage_words, 1, 0)
    return judges


def _not_quoted(config: GenerateConfig) -> str:
    """Return what a dry run's quote leaves out: how many queries reach the last filters is not known before."""
    calls = {"min_gain": "two more calls", "min_answerable": "one more call"}
    parts = [f"generate.{name} {text}" for name, text in calls.items() if getattr(config, name) is not None]
    return f"; not counted: {' and '.join(parts)} for each query that reaches it" if parts else ""


def _example_queries(run: Run) -> list[Example]:
    path = run.recipe.generate.example_queries
    if path is None:
        return []
    if not run.find(path).exists():
        raise ConfigError(f"generate.example_queries: no file {path!r}, here or beside the recipe")
    return read_examples(run.find(path))


def _own_queries(run: Run) -> list[Sourced]:
    """Return the dev queries with the passages that answer them; never those of the test."""
    path = run.recipe.evaluate.dev_queries
    if path is None:
        return []
    passages = run.table("passages")
    queries = human_queries(run, path, None)
    of_document: dict[str, list[str]] = {doc_id: [] for query in queries for doc_id in query.doc_ids}
    for doc_id, text in zip(passages["doc_id"][:], passages["text"][:], strict=True):
        if doc_id in of_document:
            of_document[doc_id].append(text)
    return [
        Sourced(query.query, [text for doc_id in query.doc_ids for text in of_document[doc_id]]) for query in queries
    ]


def _prompted(config: LabelConfig) -> dict[str, Any]:
    """The settings of a stage; of its prompt the name, and no path: what it holds is in the digest."""
    return {**asdict(config), "prompt": config.prompt and Path(config.prompt).name}


def _llm_shape(run: Run, name: str) -> dict[str, Any]:
    """What of the language model shapes an artifact: its settings, and behind a server how it is spoken to there."""
    config = run.recipe.llm
    shaping = {f"llm_{key}": value for key, value in asdict(config).items() if key not in _HOW_IT_RUNS}
    if config.endpoint is None:
        # Its name and not its path on this machine: the groups are published with their manifest.
        return {**shaping, "llm_model": run.llm.name}
    if (run.root / name / MANIFEST).is_file() and isinstance(run.llm, EndpointLLM) and not run.llm.is_up():
        made = run.manifest(name).config
        if "llm_identity" in made:
            logger.info("%s: the server does not answer; it is taken for the one that made them", name)
            return {**shaping, "llm_model": made.get("llm_model"), "llm_identity": made["llm_identity"]}
    return {**shaping, "llm_model": run.llm.name, "llm_identity": run.llm.identity}


def _meter(run: Run, journal: Journal, name: str, dry_run: bool) -> Meter:
    """Counts a stage's calls, those of the other one before it in the budget."""
    config = run.recipe.llm
    spent = 0.0
    if name == "groups" and config.budget is not None:
        spent = float(run.manifest("queries").facts.get("cost", {}).get("money", 0.0))
    # What runs here answers a batch together or not at all, so that a later run gives the same bits.
    sample = (10**9 if config.endpoint is None else _SAMPLE) if dry_run else None
    return Meter(lambda: run.llm.usage, journal.usage, config.price, budget=config.budget, spent=spent, sample=sample)


def _cost(run: Run, journal: Journal, kept: int, what: str) -> dict[str, float]:
    logger.info("cost: %s", cost.summary(journal.usage, run.recipe.llm.price))
    return cost.facts(journal.usage, run.recipe.llm.price, kept, what)
