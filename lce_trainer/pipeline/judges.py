"""The comparison of judges: which of them agrees best with people's labels, how fast, and for how much."""

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from lce_trainer.artifacts import digest
from lce_trainer.errors import ConfigError, LabelError, LCETrainerError, LLMError, TrainingError
from lce_trainer.evaluation.judged import LabelledPairs, read_pairs
from lce_trainer.evaluation.report import aligned
from lce_trainer.hub.privacy import names_only
from lce_trainer.pipeline.evaluate import dev_groups
from lce_trainer.pipeline.run import Run, open_journal
from lce_trainer.pipeline.stages import read_corpus
from lce_trainer.synthesis.agreement import mean_of_judges, measure_judge, rank_correlations
from lce_trainer.synthesis.cost import Meter, Usage, check_prices, money
from lce_trainer.synthesis.judges import PairwiseJudge
from lce_trainer.synthesis.labeling import LabelConfig, ask_judge, load_judge
from lce_trainer.synthesis.retrieval.dense import Encoder

logger = logging.getLogger(__name__)

JUDGES = ("verdict", "grade", "likelihood", "pairwise", "reranker", "encoder")
RESULT = "judges/judges.json"

_OTHERS = 3  # candidates beside each relevant passage, of pairs that are made from dev queries
_FEW = 50  # pairs, below which the intervals are wide


def compare_judges(run: Run, path: str | None, names: Sequence[str], limit: int) -> dict[str, Any]:
    """Compare judges on pairs that people have labelled, and write what was found into the run folder as JSON.

    Answers of the language model are kept in journals beside it, so that the same comparison asks for nothing again.

    Args:
        run: The recipe: its language model, prompts, encoder and reranker judge.
        path: A file of rows of query, passage and label; None makes pairs from the recipe's dev queries.
        names: Judges, of ``JUDGES``; none for all that the recipe has and its language model can serve.
        limit: Pairs at most, drawn by the seed query by query where there are more.

    Returns:
        ``pairs``, ``relevant``, ``queries`` and ``from``; ``judges``, a row each with the figures of
        :func:`lce_trainer.synthesis.agreement.measure_judge`, ``model``, ``seconds_per_1000``, ``tokens_per_1000`` and
        ``money_per_1000`` pairs, None where nothing is paid for; ``ensembles``, rows of the same figures; ``agreement``
        of every two judges; and ``skipped``, by judge the reason why it was left out.

    Raises:
        ConfigError: There are no labelled pairs, a judge is unknown, or one that is named has no model.
        LLMError: The language model cannot serve a judge that is named.
        EvaluationError: The pairs cannot be read, or have one kind of label.
    """
    if limit < 2:
        raise ConfigError(f"--limit must be 2 or more pairs, not {limit}")
    check_prices(run.recipe.llm.price, run.recipe.llm.budget)
    wanted, skipped = _which(run, names)
    labelled = _some(_dev_pairs(run, limit) if path is None else read_pairs(run.find(path)), limit, run.recipe.seed)
    if len(labelled.queries) < _FEW:
        logger.warning("%d pairs are few: the intervals will be wide; label 50 to 100", len(labelled.queries))
    pairs = list(zip(labelled.queries, labelled.passages, strict=True))
    numbers = {query: number for number, query in enumerate(dict.fromkeys(labelled.queries))}
    query = np.array([numbers[text] for text in labelled.queries])
    scores, rows, spent = {}, [], 0.0
    for name in wanted:
        if name == "pairwise" and len(numbers) == len(pairs):
            skipped[name] = "it compares passages of one query, and each query has one passage only"
            continue
        logger.info("%s: %d pairs", name, len(pairs))
        try:
            values, scores[name], row = _ask_one(run, name, pairs, query, spent)
        except (LLMError, LabelError, TrainingError) as reason:
            if names:
                raise
            skipped[name] = str(reason)
            continue
        spent += row.pop("spent")
        rows.append({"judge": name, **measure_judge(values, labelled.relevant, query, run.recipe.seed), **row})
    if not rows:
        raise ConfigError(f"no judge can be compared: {'; '.join(f'{name}: {why}' for name, why in skipped.items())}")
    found: dict[str, Any] = {
        "pairs": len(pairs),
        "relevant": int(labelled.relevant.sum()),
        "queries": len(numbers),
        "from": Path(path or run.recipe.evaluate.dev_queries or "").name,
        "judges": rows,
        "ensembles": [
            {"judges": names, **measure_judge(mean_of_judges(members), labelled.relevant, query, run.recipe.seed)}
            for names, members in _ensembles(scores)
        ],
        "agreement": rank_correlations(scores),
        "skipped": skipped,
    }
    target = run.root / RESULT
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return found


def describe_judges(found: dict[str, Any]) -> str:
    """Return a comparison of judges as plain text, what :func:`compare_judges` returns."""
    priced = any(row["money_per_1000"] is not None for row in found["judges"])
    head = ["judge", "AUC [95 % CI]", "in a query", "kappa", "held out", "threshold", "s/1,000", "tokens/1,000"]
    table = [head + ["money/1,000"] * priced]
    for row in [*found["judges"], *found["ensembles"]]:
        name = row["judge"] if "judge" in row else " + ".join(row["judges"])
        if "judges" in row and len(row["judges"]) == len(found["judges"]) > 2:
            name = "all"
        cells = [name, f"{row['auc']:.2f} [{row['auc_low']:.2f}, {row['auc_high']:.2f}]"]
        cells += [_cell(row[key], "{:.2f}") for key in ("auc_within_query", "kappa", "kappa_held_out")]
        cells += [_cell(row["threshold"], "{:.3g}"), _cell(row.get("seconds_per_1000"), "{:,.1f}")]
        cells += [_cell(row.get("tokens_per_1000"), "{:,.0f}")]
        table.append(cells + [_cell(row.get("money_per_1000"), "{:.4g}")] * priced)
    lines = [
        f"{found['pairs']} pairs of {found['queries']} queries, {found['relevant']} relevant, from {found['from']}",
        *aligned(table),
        "kappa: at the threshold, which is the best on these pairs; held out: where other queries chose the threshold",
    ]
    if found["ensembles"]:
        lines.append("+ and all: the mean of their scores, each standardized over the pairs")
    abstained = [f"{row['judge']} {row['abstained']:.0%}" for row in found["judges"] if row["abstained"]]
    if abstained:
        lines.append(f"abstained, which counts as the lowest score: {', '.join(abstained)}")
    if found["agreement"]:
        names = [row["judge"] for row in found["judges"]]
        of = {tuple(row["judges"]): row["spearman"] for row in found["agreement"]}
        corner = [["Spearman", *names[1:]]]
        for place, name in enumerate(names[:-1]):
            corner.append([name] + [""] * place + [_cell(of[name, other], "{:.2f}") for other in names[place + 1 :]])
        lines += ["", *aligned(corner)]
    if found["skipped"]:
        lines += ["", *(f"left out: {name}: {why}" for name, why in found["skipped"].items())]
    return "\n".join(lines)


def _which(run: Run, names: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return the judges to compare, and why others are left out, before any is paid for."""
    for name in names:
        if name not in JUDGES:
            raise ConfigError(f"there is no judge {name!r}, only {', '.join(JUDGES)}")
    wanted: list[str] = []
    skipped: dict[str, str] = {}
    for name in dict.fromkeys(names or JUDGES):
        try:
            if name == "encoder" and _encoder(run) is None:
                raise ConfigError("the encoder is label.encoder or mine.encoder, which the recipe does not set")
            if name == "reranker" and run.recipe.label.reranker is None:
                raise ConfigError("the reranker is label.reranker, which the recipe does not set")
            if (config := _config(run, name)).by_llm:
                run.llm.check(config.needs)
        except LCETrainerError as reason:
            if names:
                raise
            skipped[name] = str(reason)
        else:
            wanted.append(name)
    return wanted, skipped


def _config(run: Run, name: str) -> LabelConfig:
    """Return the recipe's settings for a judge; prompt and examples are those of the one that the recipe labels by."""
    config = run.recipe.label
    return config if config.judge == name else replace(config, judge=cast(Any, name), prompt=None, examples=[])


def _encoder(run: Run) -> Encoder | None:
    """Return the encoder of the soft labels."""
    return Encoder(run.recipe.label.encoder) if run.recipe.label.encoder is not None else run.encoder


def _dev_pairs(run: Run, limit: int) -> LabelledPairs:
    """Make pairs from dev queries: of each the relevant passage that the first stage has first, and others it has."""
    if run.recipe.evaluate.dev_queries is None:
        raise ConfigError(
            "there are no human labels to compare judges on: name a file of rows of query, passage and label by "
            "--pairs, or set evaluate.dev_queries"
        )
    read_corpus(run)
    groups = dev_groups(run, run.recipe.evaluate.top_k, None)
    rng = np.random.default_rng(run.recipe.seed)
    queries: list[str] = []
    passages: list[str] = []
    relevant: list[bool] = []
    missed = 0
    for place in rng.permutation(len(groups)).tolist():
        row = groups[place]
        labels = np.array(row["labels"]) > 0
        if labels.all() or not labels.any():
            missed += 1
            continue
        others = np.flatnonzero(~labels)
        drawn = rng.choice(others, min(_OTHERS, len(others)), replace=False)
        chosen = [int(labels.argmax()), *np.sort(drawn).tolist()]
        queries += [row["query"]] * len(chosen)
        passages += [row["passages"][one] for one in chosen]
        relevant += [True, *[False] * len(drawn)]
        if len(queries) >= limit:
            break
    if missed:
        logger.info("%d dev queries have no relevant passage among the candidates, or nothing else", missed)
    if not queries:
        raise ConfigError(
            "the first stage brings no relevant passage for any dev query: name labelled pairs by --pairs"
        )
    return LabelledPairs(queries, passages, np.array(relevant))


def _some(labelled: LabelledPairs, limit: int, seed: int) -> LabelledPairs:
    """Return so many pairs at most, query by query."""
    if len(labelled.queries) <= limit:
        return labelled
    names = list(dict.fromkeys(labelled.queries))
    turn = dict(zip(names, np.random.default_rng(seed).permutation(len(names)).tolist(), strict=True))
    order = np.argsort([turn[query] for query in labelled.queries], kind="stable")[:limit]
    logger.info("%d of %d labelled pairs are drawn (--limit)", limit, len(labelled.queries))
    relevant = labelled.relevant[order]
    if relevant.all() or not relevant.any():
        raise ConfigError(f"the {limit} pairs that are drawn have labels of one kind only: raise --limit")
    return LabelledPairs([labelled.queries[i] for i in order], [labelled.passages[i] for i in order], relevant)


def _ask_one(
    run: Run, name: str, pairs: Sequence[tuple[str, str]], query: np.ndarray, spent: float
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Return a judge's scores, the same on a scale on which they can be added, and what a thousand pairs take."""
    config = _config(run, name)
    if name == "encoder":
        encoder = _encoder(run)
        assert encoder is not None
        encoder.similarity(pairs[:1])  # loads the model, which is no cost of a pair
        begun = time.monotonic()
        scores = encoder.similarity(pairs).astype(np.float64)
        return scores, scores, _took(run, encoder.name, time.monotonic() - begun, len(pairs))
    if name == "reranker":
        reranker = load_judge(config, run.llm, None)
        assert reranker is not None and not isinstance(reranker, PairwiseJudge)
        reranker.score(pairs[:1])
        begun = time.monotonic()
        scores = np.array(reranker.score(pairs), dtype=np.float64)
        return scores, reranker.scale(scores), _took(run, reranker.name, time.monotonic() - begun, len(pairs))
    prompt = run.prompt(config.prompt_name)
    judge = load_judge(config, run.llm, prompt)
    assert judge is not None
    # What answers took stands in their journal: one for all that decides them has the sums of these alone.
    settings = [name, config.examples, config.max_passage_words, config.opponents, run.recipe.seed]
    made_by = digest([settings, prompt.digest, run.llm.identity, pairs])
    with open_journal(run.root / "judges" / f"{name}-{made_by}.jsonl", run.llm) as journal:
        if run.recipe.llm.endpoint is None and not len(journal):
            judge.compare([(*pairs[0], "")]) if isinstance(judge, PairwiseJudge) else judge.score(pairs[:1])
        price, budget = run.recipe.llm.price, run.recipe.llm.budget
        journal.meter = Meter(lambda: run.llm.usage, journal.usage, price, budget=budget, spent=spent)
        scores = ask_judge(pairs, query, judge, journal, np.arange(int(query.max()) + 1), run.recipe.seed)
        used = journal.usage
    return scores, judge.scale(scores), _took(run, judge.name, used.seconds, len(pairs), used)


def _took(run: Run, model: str, seconds: float, pairs: int, used: Usage | None = None) -> dict[str, Any]:
    price, thousand = run.recipe.llm.price, 1000 / pairs
    paid = money(used, price) if used is not None and price else None
    return {
        "model": names_only(model, run.base),
        "seconds_per_1000": round(seconds * thousand, 3),
        "tokens_per_1000": None if used is None else round((used.tokens_in + used.tokens_out) * thousand),
        "money_per_1000": None if paid is None else round(paid * thousand, 6),
        "spent": paid or 0.0,
    }


def _ensembles(scores: dict[str, np.ndarray]) -> list[tuple[list[str], dict[str, np.ndarray]]]:
    """Return the judges of each ensemble: every other one beside the encoder, as soft labels are made, and all."""
    sets = [[name, "encoder"] for name in scores if name != "encoder"] if "encoder" in scores else []
    if len(scores) > 1 and list(scores) not in sets:
        sets.append(list(scores))
    return [(names, {name: scores[name] for name in names}) for names in sets]


def _cell(value: float | None, form: str) -> str:
    text = "" if value is None else form.format(value)
    return "0.00" if text == "-0.00" else text
