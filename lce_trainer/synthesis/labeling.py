"""An LLM judges each query's candidates into positives and hard negatives.

Two judges. ``likelihood`` asks how well a passage explains the query: the mean log-probability of
the query's tokens after the passage. It is what small models can do: on MedQuAD their yes or no
was chance (AUC 0.50 to 0.53), their likelihood was not (0.66). ``verdict`` asks a strong model
whether the passage answers the query: the probability of yes over yes and no.
"""

import itertools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import datasets
import numpy as np
import pyarrow as pa
from tqdm.auto import tqdm

from lce_trainer.artifacts import digest
from lce_trainer.errors import LabelError
from lce_trainer.groups.schema import GROUPS_FEATURES
from lce_trainer.settings import option
from lce_trainer.synthesis.journal import Journal, ask
from lce_trainer.synthesis.llm.protocol import LLM, Each
from lce_trainer.synthesis.prompts import Prompt
from lce_trainer.synthesis.queries import cut_words, plan_batches
from lce_trainer.synthesis.shortcut import auc, shortcut_probe, word_counts

logger = logging.getLogger(__name__)

_YES = (" yes", " Yes", " YES", "yes", "Yes", "YES")
_NO = (" no", " No", " NO", "no", "No", "NO")
# Candidates at hand are drawn from ranks that grow as a square: half of them from the top quarter.
_SPREAD = 2.0
# Negatives may lean to longer or shorter than their positives by this share of them: AUC 0.45 to 0.55.
_LEAN = 0.1
_LEAN_AT_FIRST = 8
# Groups built at once: an Arrow array of strings ends at 2 GiB.
_WINDOW = 10_000


@dataclass
class LabelConfig:
    """How candidates become positives and negatives."""

    judge: Literal["likelihood", "verdict"] = option(
        "likelihood",
        "likelihood: how well the passage explains the query, for small models; verdict: yes or no, for strong ones.",
    )
    prompt: str | None = option(None, "A prompt by name or .jinja path; the judge's own if null.")
    examples: list[dict[str, str]] = option([], "Few-shot examples for the prompt: passage, query.")
    candidates: int = option(12, "Candidates of each query that are judged, the source passage among them.")
    negatives: int = option(7, "Negatives a group holds at most.")
    max_passage_words: int = option(120, "Words of the passage shown to the judge.")
    drop_margin: float = option(
        0.0, "likelihood: a candidate whose score is above the source's less this margin is no negative (nats a token)."
    )
    promote_margin: float | None = option(
        None,
        "likelihood: a candidate above the source by this margin becomes a positive; null never does (nats a token).",
    )
    positive_above: float = option(0.6, "verdict: a probability of yes from here on makes a positive.")
    negative_below: float = option(0.3, "verdict: a probability of yes up to here makes a negative.")
    match_length: bool = option(True, "Prefer negatives whose length matches the positive's.")


@dataclass(frozen=True)
class _Pool:
    """What is judged, flat: one entry a pair, each query's source passage first, the rest by rank."""

    queries: list[str]  # (queries,)
    query_ids: list[str]  # (queries,)
    ids: list[str]  # (passages,)
    texts: list[str]  # (passages,)
    query: np.ndarray  # (pairs,) row of queries
    passage: np.ndarray  # (pairs,) row of texts
    is_source: np.ndarray  # (pairs,)


def label_candidates(
    candidates: datasets.Dataset,
    passages: datasets.Dataset,
    llm: LLM,
    prompt: Prompt,
    config: LabelConfig,
    seed: int,
    journal: Journal,
) -> tuple[datasets.Dataset, dict[str, int], dict[str, Any]]:
    """Groups of a query's source passage and what the judge says does not answer it.

    Args:
        candidates: The candidates artifact.
        passages: The passages artifact that it was made from.
        llm: The judge.
        prompt: Rendered with ``passage`` and ``examples``; the verdict's with ``query`` as well.
        config: Which judge, how many candidates, the thresholds.
        seed: Seeds the draw of candidates and the order of the work.
        journal: Where the judge's answers are kept.

    Returns:
        The groups artifact, its ``scores`` the judge's (nats a token, or the probability of yes);
        what was kept and dropped; and as facts the shortcut probe (``shortcut_auc``) and how
        often the judge puts the source passage above all it was compared with
        (``source_judged_best``).

    Raises:
        LabelError: A passage is not among ``passages``, a score is not finite, or no group is left.
    """
    if not len(candidates):
        raise LabelError("there are no candidates to judge: no query was written, or none was mined for")
    pool = _draw_pool(candidates, passages, config, seed)
    order = np.random.default_rng(seed).permutation(len(pool.queries))
    shuffled = np.argsort(np.argsort(order)[pool.query], kind="stable")
    pairs = [(pool.queries[q], pool.texts[p]) for q, p in zip(pool.query, pool.passage, strict=True)]
    scores = _judge(pairs, llm, prompt, config, journal, shuffled, seed)

    positive, negative, counts = _decide(scores, pool, config)
    chosen = _choose_negatives(negative, positive, pool, config)
    groups = _build_groups(positive, chosen, scores, pool)
    counts |= {
        "negatives_not_taken": int(negative.sum() - chosen.sum()),
        "groups_without_negative": counts.pop("groups_with_positive") - len(groups),
        "negatives": int(chosen.sum()),
        "groups": len(groups),
    }
    if not len(groups):
        said = ", ".join(f"{count} {what.replace('_', ' ')}" for what, count in counts.items())
        raise LabelError(f"no group is left ({said}): try another label.judge, other thresholds or another llm.model")
    facts = {
        "shortcut_auc": shortcut_probe(groups, seed=seed),
        "source_judged_best": _share_first(scores, pool.is_source, pool.query),
    }
    return groups, counts, facts


def check_judge(
    human: datasets.Dataset, llm: LLM, prompt: Prompt, config: LabelConfig, journal: Journal
) -> dict[str, float]:
    """How the judge does on pairs that people have labelled.

    Args:
        human: Rows of ``query``, ``passages`` and ``labels`` (above 0: it answers the query).
        llm: The judge.
        prompt: As in :func:`label_candidates`.
        config: As in :func:`label_candidates`.
        journal: Where the judge's answers are kept.

    Returns:
        ``pairs``, ``queries`` (those with an answer and a non-answer), and over these queries:
        ``auc`` of all pairs pooled, ``auc_within_query``, ``first_is_right`` (share of queries
        whose best-judged passage is an answer), ``first_is_right_by_chance``, and ``abstained``
        (share of pairs; they count as judged worst). Only the first two where there is no such query.
    """
    rows = [row for row in human.to_list() if 0 < sum(label > 0 for label in row["labels"]) < len(row["labels"])]
    pairs = [(row["query"], passage) for row in rows for passage in row["passages"]]
    if not rows:
        return {"pairs": 0, "queries": 0}
    answers = np.concatenate([np.asarray(row["labels"]) > 0 for row in rows])
    sizes = [len(row["labels"]) for row in rows]
    query = np.repeat(np.arange(len(rows)), sizes)
    scores = _judge(pairs, llm, prompt, config, journal, np.arange(len(pairs)), seed=0)
    worst = np.where(np.isnan(scores), -np.inf, scores)
    return {
        "pairs": len(pairs),
        "queries": len(rows),
        "auc": auc(worst, answers),
        "auc_within_query": auc(worst, answers, query),
        "first_is_right": _share_first(scores, answers, query),
        "first_is_right_by_chance": float(np.mean(np.bincount(query, weights=answers) / sizes)),
        "abstained": float(np.isnan(scores).mean()),
    }


def _judge(
    pairs: Sequence[tuple[str, str]],
    llm: LLM,
    prompt: Prompt,
    config: LabelConfig,
    journal: Journal,
    order: np.ndarray,
    seed: int,
) -> np.ndarray:
    """Score of each (query, passage), float64; NaN where the judge abstains.

    Args:
        pairs: What is judged.
        llm: The judge.
        prompt: What it is asked.
        config: Which judge.
        journal: Where its answers are kept.
        order: Indices of ``pairs``, queries shuffled, so that any prefix of the work is a fair sample.
        seed: Seeds the order of batches.
    """
    verdict = config.judge == "verdict"

    def render(index: int) -> tuple[str, str]:
        query, passage = pairs[index]
        shown = cut_words(passage, config.max_passage_words)
        if verdict:
            return prompt.render(passage=shown, query=query, examples=config.examples), ""
        text = prompt.render(passage=shown, examples=config.examples)
        return text, query if text[-1:].isspace() else f" {query}"

    def score_of(index: int, answer: Any) -> float | None:
        if verdict:
            return None if answer is None else float(answer[0])
        if not math.isfinite(answer):
            raise LabelError(f"{llm.name} scored the query {pairs[index][0][:60]!r} {answer}, not a finite number")
        return float(answer)

    def call(batch: Sequence[int], each: Each) -> Sequence[float | None]:
        texts, continuations = zip(*map(render, batch), strict=True)

        def came(place: int, answer: Any) -> None:
            each(place, score_of(batch[place], answer))

        answers: Sequence[Any]
        answers = llm.choose(texts, [_YES, _NO], each=came) if verdict else llm.score(texts, continuations, each=came)
        return [score_of(index, answer) for index, answer in zip(batch, answers, strict=True)]

    # Prompts are rendered again when they are asked: all of them at once would fill the memory.
    asked = _YES + _NO if verdict else ()
    keys = [
        digest({"judge": config.judge, "llm": llm.name, "pair": render(index), "options": asked})
        for index in tqdm(range(len(pairs)), desc="preparing", unit=" pairs", delay=5)
    ]
    # The queries asked about one passage are asked together: the LLM reads it once for all of them.
    passages = [pairs[index][1] for index in order]
    batches = [[int(order[place]) for place in batch] for batch in plan_batches(passages, seed)]
    answers = ask(journal, keys, batches, call, "judging")
    return np.array([math.nan if answer is None else answer for answer in answers], dtype=np.float64)


def _draw_pool(candidates: datasets.Dataset, passages: datasets.Dataset, config: LabelConfig, seed: int) -> _Pool:
    """For each query its source passage and some of its candidates, from the top ranks and from deeper."""
    row_of = {passage_id: row for row, passage_id in enumerate(passages["passage_id"][:])}
    lengths = word_counts(passages.with_format("arrow")["text"][:])
    query, drawn, is_source = [], [], []
    columns = candidates.select_columns(["query_id", "source_passage_id", "passage_ids"])
    for number, row in enumerate(columns):
        source = row_of.get(row["source_passage_id"])
        others = [row_of.get(key) for key in row["passage_ids"] if key != row["source_passage_id"]]
        if source is None or None in others:
            raise LabelError(
                f"candidates row {number} names a passage that is not among the {len(passages)} passages: "
                "the candidates were mined from another corpus; mine again"
            )
        rng = np.random.default_rng(int(digest([seed, row["query_id"]]), 16))
        found = np.array(others, dtype=np.int64)
        longer = np.log((lengths[found] + 1) / (lengths[source] + 1)) if config.match_length else None
        some = found[_spread(len(found), max(config.candidates - 1, 0), longer, rng)]
        query += [number] * (1 + len(some))
        drawn += [source, *some.tolist()]
        is_source += [True] + [False] * len(some)
    rows, passage = np.unique(np.array(drawn, dtype=np.int64), return_inverse=True)
    used = passages.select(rows)
    return _Pool(
        queries=candidates["query"][:],
        query_ids=candidates["query_id"][:],
        ids=used["passage_id"][:],
        texts=used["text"][:],
        query=np.array(query, dtype=np.int64),
        passage=passage.reshape(-1),
        is_source=np.array(is_source, dtype=bool),
    )


def _spread(n: int, k: int, longer: np.ndarray | None, rng: np.random.Generator) -> np.ndarray:
    """Places of k of n ranked candidates: one from each of k runs of ranks that grow longer.

    Args:
        n: Candidates.
        k: How many to take.
        longer: Log of each one's length over the source's; the nearest of a run is taken, from
            the side that has fewer so far. None takes any.
        rng: Draws, or breaks the tie of sides.
    """
    if n <= k:
        return np.arange(n)
    bounds = np.maximum(np.round(n * (np.arange(k + 1) / k) ** _SPREAD).astype(int), np.arange(k + 1)) if k else []
    taken, lean = [], rng.choice([-0.5, 0.5])
    for start, end in itertools.pairwise(bounds):
        run = np.arange(start, end)
        if longer is None:
            taken.append(rng.choice(run))
            continue
        fitting = run[longer[run] * lean <= 0]
        run = fitting if len(fitting) else run
        taken.append(run[np.argmin(np.abs(longer[run]))])
        lean += np.sign(longer[taken[-1]])
    return np.array(taken, dtype=np.int64)


def _decide(scores: np.ndarray, pool: _Pool, config: LabelConfig) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
    """Which pairs are positive, which could be negative, and how many are neither and why."""
    source_scores = scores[pool.is_source][pool.query]
    counts = {"queries": len(pool.queries), "pairs_judged": len(scores)}
    if config.judge == "likelihood":
        positive = pool.is_source.copy()
        if config.promote_margin is not None:
            positive |= scores > source_scores + config.promote_margin
        negative = ~positive & (scores < source_scores - config.drop_margin)
        counts["promoted"] = int((positive & ~pool.is_source).sum())
        counts["dropped_as_good_as_source"] = int((~positive & ~negative).sum())
        counts["groups_with_positive"] = len(pool.queries)
        return positive, negative, counts
    source_stands = source_scores >= config.positive_above  # False where the judge abstained
    positive = source_stands & (scores >= config.positive_above)
    negative = source_stands & (scores <= config.negative_below)
    counts["source_rejected"] = int((~source_stands & pool.is_source).sum())
    counts["promoted"] = int((positive & ~pool.is_source).sum())
    counts["dropped_abstained"] = int((np.isnan(scores) & source_stands).sum())
    counts["dropped_undecided"] = int((source_stands & ~np.isnan(scores) & ~positive & ~negative).sum())
    counts["groups_with_positive"] = len(pool.queries) - counts["source_rejected"]
    return positive, negative, counts


def _choose_negatives(negative: np.ndarray, positive: np.ndarray, pool: _Pool, config: LabelConfig) -> np.ndarray:
    """Which of the possible negatives to take, so that length does not tell them from positives.

    Group after group, the nearest in length on the side, longer or shorter than the positive,
    that has fewer so far in the whole set. Where only the other side has any left and the set
    leans to it already, a group gets fewer negatives, but never none.
    """
    chosen = np.zeros_like(negative)
    starts = np.flatnonzero(pool.is_source)
    if not config.match_length:
        for pairs in np.split(np.flatnonzero(negative), np.searchsorted(np.flatnonzero(negative), starts[1:])):
            chosen[pairs[: config.negatives]] = True
        return chosen
    log_length = np.log(word_counts(pa.array(pool.texts, pa.large_string())) + 1)[pool.passage]
    balance = taken = 0
    for start, end in zip(starts, [*starts[1:], len(negative)], strict=True):
        left = start + np.flatnonzero(negative[start:end])
        if not len(left) or not config.negatives:
            continue
        reference = log_length[start:end][positive[start:end]].mean()
        side = np.sign(log_length[left] - reference).astype(int)
        nearest = np.argsort(np.abs(log_length[left] - reference), kind="stable")
        sides = {s: [int(i) for i in nearest if side[i] == s] for s in (-1, 0, 1)}
        for n in range(config.negatives):
            wanted = next((s for s in _preferred(balance) if sides[s]), None)
            leans = wanted is not None and wanted * balance > 0 and abs(balance) > _LEAN * taken + _LEAN_AT_FIRST
            if wanted is None or (n and leans):
                break
            chosen[left[sides[wanted].pop(0)]] = True
            balance, taken = balance + wanted, taken + 1
    return chosen


def _preferred(balance: int) -> tuple[int, int, int]:
    """Sides in the order they are wanted: -1 shorter, 0 equal, 1 longer than the positive."""
    return (-1, 0, 1) if balance > 0 else (1, 0, -1) if balance < 0 else (0, 1, -1)


def _build_groups(positive: np.ndarray, negative: np.ndarray, scores: np.ndarray, pool: _Pool) -> datasets.Dataset:
    """Positives first, the source before others; queries that lack one or the other are left out."""
    n_queries = len(pool.queries)
    both = np.bincount(pool.query, weights=positive, minlength=n_queries) > 0
    both &= np.bincount(pool.query, weights=negative, minlength=n_queries) > 0
    pairs = np.flatnonzero((positive | negative) & both[pool.query])
    pairs = pairs[np.lexsort((pairs, ~positive[pairs], pool.query[pairs]))]
    ids, texts = pa.array(pool.ids, pa.large_string()), pa.array(pool.texts, pa.large_string())
    kept = np.flatnonzero(both)
    tables = [GROUPS_FEATURES.arrow_schema.empty_table()]
    for start in range(0, len(kept), _WINDOW):
        rows = kept[start : start + _WINDOW]
        inside = pairs[slice(*np.searchsorted(pool.query[pairs], [rows[0], rows[-1] + 1]))]
        sizes = np.bincount(pool.query[inside] - rows[0])
        offsets = pa.array(np.r_[0, np.cumsum(sizes[rows - rows[0]])], pa.int32())
        flat = {
            "passage_ids": ids.take(pa.array(pool.passage[inside])).cast(pa.string()),
            "passages": texts.take(pa.array(pool.passage[inside])).cast(pa.string()),
            "labels": pa.array(positive[inside], pa.float32()),
            "scores": pa.array(scores[inside], pa.float32()),
        }
        columns = {
            "query_id": pa.array([pool.query_ids[row] for row in rows], pa.string()),
            "query": pa.array([pool.queries[row] for row in rows], pa.string()),
            **{name: pa.ListArray.from_arrays(offsets, values) for name, values in flat.items()},
        }
        tables.append(pa.table(columns).cast(GROUPS_FEATURES.arrow_schema))
    return datasets.Dataset(pa.concat_tables(tables)).cast(GROUPS_FEATURES)


def _share_first(scores: np.ndarray, right: np.ndarray, query: np.ndarray) -> float:
    """Share of queries whose highest score is at a right passage; a tie with a wrong one is not."""
    worst = np.where(np.isnan(scores), -np.inf, scores)
    order = np.lexsort((right, -worst, query))
    first = order[np.r_[True, np.diff(query[order]) > 0]]
    return float((right[first] & ~np.isnan(scores[first])).mean())
