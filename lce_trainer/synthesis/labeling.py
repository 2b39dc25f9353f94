"""A judge turns each query's candidates into positives and hard negatives, with soft labels beside them.

The soft labels are a teacher's: the judge's scores, the cosines of an encoder and BM25's scores, each standardized
over the query's pool, and added. On the quickstart's human dev queries the sum ranks better than either alone: nDCG@10
0.636, where the encoder has 0.584 and the likelihood under a model of 270M parameters 0.530.
"""

import itertools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import datasets
import numpy as np
import pyarrow as pa
from tqdm.auto import tqdm

from lce_trainer.artifacts import digest
from lce_trainer.errors import ConfigError, LabelError
from lce_trainer.groups.schema import GROUPS_FEATURES
from lce_trainer.settings import option
from lce_trainer.synthesis.battles import draw_battles, strengths
from lce_trainer.synthesis.held_out import hold_out
from lce_trainer.synthesis.journal import Journal, answer_all
from lce_trainer.synthesis.judges import ChoiceJudge, Judge, LikelihoodJudge, PairwiseJudge, RerankerJudge
from lce_trainer.synthesis.llm.protocol import LLM, Each, Need
from lce_trainer.synthesis.prompts import Prompt
from lce_trainer.synthesis.queries import plan_batches
from lce_trainer.synthesis.retrieval.bm25 import BM25Index
from lce_trainer.synthesis.retrieval.dense import DenseIndex, Encoder
from lce_trainer.synthesis.shortcut import auc, shortcut_probe, word_counts

logger = logging.getLogger(__name__)

# Candidates at hand are drawn from ranks that grow as a square: half of them from the top quarter.
_SPREAD = 2.0
# Negatives may lean to longer or shorter than their positives by this share of them: AUC 0.45 to 0.55.
_LEAN = 0.1
_LEAN_AT_FIRST = 8
# Groups built at once: an Arrow array of strings ends at 2 GiB.
_WINDOW = 10_000
# What becomes of a judged pair, and why; the names are those of the manifest's counts.
_REASONS = (
    "source",
    "promoted",
    "negative",
    "kept_as_good_as_source",
    "negative_not_taken",
    "dropped_as_good_as_source",
    "undecided",
    "abstained",
    "source_rejected",
    "source_abstained",
)
_WEIGHTS = tuple(tenths / 10 for tenths in range(16))  # of the judge beside the encoder, from which auto chooses
_HELD_OUT = 100  # documents that auto chooses on at least


@dataclass
class LabelConfig:
    """How candidates become positives and negatives, and what their soft labels are."""

    judge: Literal["likelihood", "verdict", "grade", "pairwise", "reranker", "encoder"] = option(
        "likelihood",
        "likelihood: how well the passage explains the query, for small models; verdict: yes or no, grade: 0 to 3, and "
        "pairwise: which of two passages is better, for strong ones; reranker: a cross-encoder, named by "
        "label.reranker; encoder: the encoder alone, which costs no call of an LLM: for soft labels of many queries, "
        "before training goes on with judged ones.",
    )
    reranker: str | None = option(None, "The reranker that judges: Hub id or folder.")
    encoder: str | None = option(
        None,
        "The encoder whose cosines are in the soft labels, if not that of mine.encoder: Hub id or folder of a "
        "sentence-transformers model. A stronger and slower one teaches what a first stage cannot afford.",
    )
    opponents: int = option(
        4,
        "pairwise: other candidates of its query that each candidate is compared with, an even number; of fewer, all. "
        "Each comparison is asked in both orders, so a candidate takes this many calls.",
    )
    prompt: str | None = option(None, "A prompt by name or .jinja path; the judge's own if null.")
    examples: list[dict[str, str]] = option(
        [],
        "Few-shot examples for the prompt: passage, query; verdict, grade: answer too; pairwise: query, first, second, "
        "answer.",
    )
    candidates: int = option(16, "Passages of each query that are judged, the source passage among them.")
    random: int = option(3, "How many of them are drawn from the whole corpus, as easy negatives.")
    negatives: int = option(15, "Negatives a group holds at most.")
    max_passage_words: int = option(120, "Words of the passage shown to the judge.")
    judge_weight: float | Literal["auto"] = option(
        0.6,
        "Weight of the judge in the soft labels beside the encoder, which has weight 1; both are "
        "standardized over the query's pool. Without an encoder the judge is alone. auto: of 0 to 1.5 the weight that "
        "ranks the source passages of a tenth of the documents highest in their pools (MRR). The LLM wrote each query "
        "from its source passage, which a judge by the same LLM therefore finds too easily: auto leans to a high "
        "weight, so it ends at 1.5; with human dev queries, compare weights on those.",
    )
    bm25_weight: float | Literal["auto"] = option(
        0.0,
        "Weight of BM25 in the soft labels beside the encoder, which has weight 1. auto: the least weight by which "
        "the two rank the human dev queries within a standard error of the best, 0 where there are none: on some "
        "corpora BM25 adds much, on others it takes away.",
    )
    false_negatives: Literal["drop", "promote", "keep"] | None = option(
        None,
        "What becomes of a candidate that is judged as relevant as the source passage (label.drop_margin), or under "
        "verdict and grade as relevant (label.positive_above). drop: it is left out; promote: it becomes a positive; "
        "keep: it stays a negative. null: promote for verdict and grade, and where label.promote_margin is set; drop "
        "for the others.",
    )
    drop_margin: float = option(
        0.0,
        "likelihood, pairwise, reranker, encoder: a candidate whose soft label is above the source passage's less "
        "this margin is as relevant as that, see label.false_negatives (standard deviations of the pool).",
    )
    promote_margin: float | None = option(
        None,
        "likelihood, pairwise, reranker, encoder: of these, promote makes a positive of one whose soft label is above "
        "the source passage's by this margin, and drops the others; null: by 0 (standard deviations of the pool).",
    )
    positive_above: float | None = option(
        None, "verdict, grade: a score from here on makes a positive; null: a probability of 0.6, a grade of 1.5."
    )
    negative_below: float | None = option(
        None, "verdict, grade: a score up to here makes a negative; null: a probability of 0.3, a grade of 0.75."
    )
    match_length: bool = option(True, "Prefer negatives whose length matches the positive's.")

    def __post_init__(self) -> None:
        """Check what no single value shows to be wrong.

        Raises:
            ConfigError: Names the key.
        """
        if not isinstance(self.bm25_weight, str) and not 0 <= self.bm25_weight < math.inf:
            raise ConfigError(f"label.bm25_weight must be 0 or more, not {self.bm25_weight:g}")
        if self.opponents < 2 or self.opponents % 2:
            raise ConfigError(f"label.opponents must be an even number, 2 or more, not {self.opponents}")
        if self.promote_margin is not None and self.false_negatives in ("drop", "keep"):
            raise ConfigError(
                f"label.promote_margin is for label.false_negatives=promote, and that is {self.false_negatives}: leave "
                "one of them out"
            )

    @property
    def by_llm(self) -> bool:
        """Whether the judge is a language model, which has a prompt."""
        return self.judge not in ("reranker", "encoder")

    @property
    def prompt_name(self) -> str:
        """The judge's prompt, by name or path."""
        return self.prompt or self.judge

    @property
    def needs(self) -> Need:
        """What the judge needs of the language model."""
        return "score" if self.judge == "likelihood" else "choose"


@dataclass(frozen=True)
class _Pool:
    """What is judged, flat: one entry a pair, each query's source passage first, the rest by rank."""

    queries: list[str]  # (queries,)
    query_ids: list[str]  # (queries,)
    rows: np.ndarray  # (passages,) row of the passages table
    ids: list[str]  # (passages,)
    texts: list[str]  # (passages,)
    query: np.ndarray  # (pairs,) row of queries
    passage: np.ndarray  # (pairs,) row of texts
    is_source: np.ndarray  # (pairs,)


def load_judge(config: LabelConfig, llm: LLM, prompt: Prompt | None) -> Judge | PairwiseJudge | None:
    """Return the judge that a recipe names; None where the encoder alone is the teacher.

    Raises:
        ConfigError: ``label.judge`` is ``reranker`` and no reranker is named.
    """
    if config.judge == "encoder":
        return None
    if config.judge == "reranker":
        if config.reranker is None:
            raise ConfigError("label.judge=reranker needs label.reranker, the Hub id or folder of a reranker")
        return RerankerJudge(config.reranker)
    assert prompt is not None  # every judge that is a language model has one
    if config.judge == "likelihood":
        return LikelihoodJudge(llm, prompt, config.examples, config.max_passage_words)
    if config.judge == "pairwise":
        return PairwiseJudge(llm, prompt, config.examples, config.max_passage_words, config.opponents)
    positive, negative = {"verdict": (0.6, 0.3), "grade": (1.5, 0.75)}[config.judge]
    return ChoiceJudge(
        config.judge,
        llm,
        prompt,
        config.examples,
        config.max_passage_words,
        positive if config.positive_above is None else config.positive_above,
        negative if config.negative_below is None else config.negative_below,
    )


def label_candidates(
    candidates: datasets.Dataset,
    passages: datasets.Dataset,
    judge: Judge | PairwiseJudge | None,
    encoder: DenseIndex | Encoder | None,
    config: LabelConfig,
    seed: int,
    journal: Journal,
    bm25: tuple[BM25Index, float] | None = None,
) -> tuple[dict[str, datasets.Dataset], dict[str, int], dict[str, Any]]:
    """Make groups of a query's source passage and of what the judge says does not answer the query.

    Args:
        candidates: The candidates artifact.
        passages: The passages artifact that it was made from.
        judge: Scores pairs; None where the encoder's cosines are the judgment, and the teacher.
        encoder: Gives the cosines that are half of the teacher: the first stage's index of ``passages``, or another
            encoder, which embeds what is judged. None leaves the judge alone.
        config: How many candidates, the teacher's weight, the thresholds.
        seed: Seeds the draw of candidates and the order of the work.
        journal: Where the judge's answers are kept.
        bm25: BM25 over ``passages``, and its weight in the teacher beside the encoder's.

    Returns:
        Two tables: ``train``, the groups, whose ``scores`` are the teacher's, in standard deviations of the query's
        pool; and ``judged``, a row a pair that was judged, kept or not. Then what was kept and dropped; and as facts
        the shortcut probe (``shortcut_auc``) and how often judge, encoder, BM25 and teacher put the source passage
        above all it was compared with (``source_first``).

    Raises:
        LabelError: A passage is not among ``passages``, a score is not finite, there is neither judge nor encoder, or
            no group is left.
    """
    if judge is None and encoder is None:
        raise LabelError(
            "label.judge=encoder needs an encoder: set label.encoder to a sentence-transformers model, or mine.encoder "
            "to one and mine.retrievers to dense or hybrid"
        )
    if not len(candidates):
        raise LabelError("there are no candidates to judge: no query was written, or none was mined for")
    pool = _draw_pool(candidates, passages, config, seed)
    order = np.random.default_rng(seed).permutation(len(pool.queries))
    pairs = [(pool.queries[q], pool.texts[p]) for q, p in zip(pool.query, pool.passage, strict=True)]
    cosines: np.ndarray | None = None
    if isinstance(encoder, Encoder):
        cosines = encoder.similarity(pairs)
    elif encoder is not None:
        cosines = encoder.similarity(pool.queries, pool.query, pool.rows[pool.passage])
    if judge is None:
        assert cosines is not None
        scores = scaled = cosines.astype(np.float64)
    else:
        scores = ask_judge(pairs, pool.query, judge, journal, np.argsort(order), seed)
        scaled = judge.scale(scores)
    # Without an encoder the judge is alone, and its weight says nothing.
    weight = 1.0 if isinstance(config.judge_weight, str) else config.judge_weight
    choice: dict[str, Any] | None = None
    if isinstance(config.judge_weight, str) and cosines is not None and judge is not None:
        weight, choice = _choose_weight(scaled, cosines, pool, _source_documents(candidates, passages), seed)
    if judge is None:
        weight = 0.0  # the encoder is the judge, and counts once
    parts = [(scaled, 1.0)] if cosines is None else [(cosines.astype(np.float64), 1.0), (scaled, weight)]
    lexical: np.ndarray | None = None
    if bm25 is not None:
        lexical = bm25[0].similarity(pool.queries, pool.query, pool.rows[pool.passage]).astype(np.float64)
        parts.append((lexical, bm25[1]))
    teacher = _teacher(parts, pool.query)

    positive, negative, reason = _decide(scores, teacher, pool, judge, config)
    counts = _count(reason, positive, pool)
    chosen = _choose_negatives(negative, positive, pool, config)
    reason[negative & ~chosen] = "negative_not_taken"
    groups = _build_groups(positive, chosen, teacher, pool)
    counts |= {
        "negatives_not_taken": int(negative.sum() - chosen.sum()),
        "groups_without_negative": counts.pop("groups_with_positive") - len(groups),
        "negatives": int(chosen.sum()),
        "groups": len(groups),
    }
    if not len(groups):
        dropped = ", ".join(f"{count} {what.replace('_', ' ')}" for what, count in counts.items())
        raise LabelError(
            f"no group is left ({dropped}): try another label.judge, other thresholds or another llm.model"
        )
    facts: dict[str, Any] = {
        "shortcut_auc": shortcut_probe(groups, seed=seed),
        "source_first": {
            name: _share_first(values, pool.is_source, pool.query)
            for name, values in (("judge", scores), ("encoder", cosines), ("bm25", lexical), ("teacher", teacher))
            if values is not None
        },
    }
    if choice is not None:
        facts["judge_weight"] = choice
    judged = _judged_table(pool, scores, cosines, lexical, teacher, positive, chosen, reason)
    return {"train": groups, "judged": judged}, counts, facts


def check_judge(human: datasets.Dataset, judge: Judge | PairwiseJudge, journal: Journal) -> dict[str, float]:
    """Measure the judge on pairs that people have labelled.

    Args:
        human: Rows of ``query``, ``passages`` and ``labels`` (above 0: it answers the query).
        judge: Scores pairs.
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
    scores = ask_judge(pairs, query, judge, journal, np.arange(len(rows)), seed=0)
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


def ask_judge(
    pairs: Sequence[tuple[str, str]],
    query: np.ndarray,
    judge: Judge | PairwiseJudge,
    journal: Journal,
    turn: np.ndarray,
    seed: int,
) -> np.ndarray:
    """Return the score of each (query, passage), float64; NaN where the judge abstains.

    Args:
        pairs: What is judged.
        query: Number of the query of each, shape ``(pairs,)``.
        judge: Scores them.
        journal: Where its answers are kept.
        turn: When each query is worked on, shape ``(queries,)``: in random order, any prefix of the work is a fair
            sample.
        seed: Seeds the order of batches, and who meets whom.
    """
    if not isinstance(judge, PairwiseJudge):
        # The queries asked about one passage are asked together: the LLM reads it once for all of them.
        return _ask(pairs, [text for _, text in pairs], judge.key, judge.score, journal, turn[query], seed)
    left, right = draw_battles(query, ["\0".join(pair) for pair in pairs], judge.opponents, seed)
    battles = [(*pairs[one], pairs[other][1]) for one, other in zip(left, right, strict=True)]
    battles += [(text, second, first) for text, first, second in battles]
    belongs = [text for text, _, _ in battles]
    first, swapped = np.split(
        _ask(battles, belongs, judge.key, judge.compare, journal, turn[query[np.r_[left, left]]], seed), 2
    )
    return strengths(left, right, judge.wins(first, swapped), query)


def _ask(
    items: Sequence[Any],
    belongs: Sequence[str],
    key: Callable[..., str],
    score: Callable[[Any, Each], Sequence[float | None]],
    journal: Journal,
    turn: np.ndarray,
    seed: int,
) -> np.ndarray:
    """Return a judge's answer to each item, float64; NaN where it abstains.

    Args:
        items: The texts that the judge reads, a tuple each.
        belongs: What items share that are best asked together, one each.
        key: Digest of an item's texts.
        score: Asks the judge for several.
        journal: Where its answers are kept.
        turn: When each is asked, shape ``(items,)``.
        seed: Seeds the order of batches.
    """
    # Only digests are kept: all prompts at once would fill the memory.
    keys = [key(*item) for item in tqdm(items, desc="preparing", unit=" pairs", delay=5)]
    order = np.argsort(turn, kind="stable")
    # All of the work is one window: no group is made before the last answer, so no prefix need be whole queries.
    plan = plan_batches([belongs[i] for i in order], seed, window=len(order))
    batches = [[int(order[place]) for place in batch] for batch in plan]

    def call(batch: Sequence[int], each: Each) -> Sequence[float | None]:
        return score([items[index] for index in batch], each)

    answers = answer_all(journal, keys, batches, call, "judging")
    return np.array([math.nan if answer is None else answer for answer in answers], dtype=np.float64)


def _teacher(parts: Sequence[tuple[np.ndarray, float]], query: np.ndarray) -> np.ndarray:
    """Return the soft label of each pair in standard deviations of its query's pool; NaN where a part is NaN.

    Args:
        parts: Scores of each pair, and their weight once they are standardized over the pool.
        query: Of each pair, shape ``(pairs,)``.
    """
    added = np.sum([weight * standardize(values, query) for values, weight in parts], axis=0)
    return standardize(added, query)


def _draw_pool(candidates: datasets.Dataset, passages: datasets.Dataset, config: LabelConfig, seed: int) -> _Pool:
    """Draw for each query its source passage, candidates from the top ranks and from deeper, and random passages."""
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
        easy = rng.integers(len(passages), size=config.random)
        some = found[_spread(len(found), max(config.candidates - 1 - len(easy), 0), longer, rng)]
        some = np.concatenate([some, np.setdiff1d(easy, [source, *others])])
        query += [number] * (1 + len(some))
        drawn += [source, *some.tolist()]
        is_source += [True] + [False] * len(some)
    rows, passage = np.unique(np.array(drawn, dtype=np.int64), return_inverse=True)
    used = passages.select(rows)
    return _Pool(
        queries=candidates["query"][:],
        query_ids=candidates["query_id"][:],
        rows=rows,
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


def standardize(values: np.ndarray, query: np.ndarray) -> np.ndarray:
    """Return values in standard deviations of their query's pool, shape ``(pairs,)``; NaN stays, and is left out.

    A pool whose values are all equal has 0 everywhere.
    """
    known = ~np.isnan(values)
    n = max(int(query.max()) + 1, 1) if len(query) else 1
    size = np.maximum(np.bincount(query, weights=known, minlength=n), 1)
    centred = values - (np.bincount(query, weights=np.where(known, values, 0), minlength=n) / size)[query]
    spread = np.sqrt(np.bincount(query, weights=np.where(known, centred, 0) ** 2, minlength=n) / size)
    standardized: np.ndarray = centred / np.where(spread > 1e-9, spread, 1)[query]
    return standardized


def _decide(
    scores: np.ndarray, teacher: np.ndarray, pool: _Pool, judge: Judge | PairwiseJudge | None, config: LabelConfig
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return which pairs are positive, which could be negative, and why each is what it is, by a name of ``_REASONS``.

    Each has the shape ``(pairs,)``.
    """
    decided = None if judge is None else judge.decide(scores)
    mode = config.false_negatives
    known = ~np.isnan(scores)
    source_known = known[pool.is_source][pool.query]
    if decided is None:
        mode = mode or ("drop" if config.promote_margin is None else "promote")
        of_source = teacher[pool.is_source][pool.query]
        stands, below = source_known, np.ones_like(known)
        better = teacher > of_source + (config.promote_margin or 0.0)
        relevant = ~(teacher < of_source - config.drop_margin)
        relevant |= better & (mode == "promote")
    else:
        mode = mode or "promote"
        relevant, below = decided
        stands, better = relevant[pool.is_source][pool.query], relevant
    relevant = relevant & known & stands & ~pool.is_source
    reason = np.full(len(scores), "negative", dtype=f"<U{max(map(len, _REASONS))}")
    reason[~below] = "undecided"
    reason[~known] = "abstained"
    reason[relevant] = "dropped_as_good_as_source"
    if mode == "promote":
        reason[relevant & better] = "promoted"
    if mode == "keep":
        reason[relevant] = "kept_as_good_as_source"
    reason[pool.is_source] = "source"
    reason[~stands] = "source_rejected"
    reason[~source_known] = "source_abstained"
    positive = np.isin(reason, ["source", "promoted"])
    negative = np.isin(reason, ["negative", "kept_as_good_as_source"])
    return positive, negative, reason


def _count(reason: np.ndarray, positive: np.ndarray, pool: _Pool) -> dict[str, int]:
    """Return how many queries and pairs there are, and what became of them."""
    counts = {"queries": len(pool.queries), "pairs_judged": len(reason)}
    for name in ("source_rejected", "source_abstained"):  # a query each
        counts[name] = int((pool.is_source & (reason == name)).sum())
    for name in ("promoted", "dropped_as_good_as_source", "kept_as_good_as_source"):
        counts[name] = int((reason == name).sum())
    for name in ("abstained", "undecided"):
        counts[f"dropped_{name}"] = int((reason == name).sum())
    counts["groups_with_positive"] = int((positive & pool.is_source).sum())
    return counts


def _source_documents(candidates: datasets.Dataset, passages: datasets.Dataset) -> np.ndarray:
    """Return the document of each query's source passage, shape ``(queries,)``."""
    document = dict(zip(passages["passage_id"][:], passages["doc_id"][:], strict=True))
    return np.array([document[key] for key in candidates["source_passage_id"][:]])


def _choose_weight(
    scores: np.ndarray, cosines: np.ndarray, pool: _Pool, documents: np.ndarray, seed: int
) -> tuple[float, dict[str, Any]]:
    """Return the judge's weight beside the encoder that ranks the source passages of held-out documents highest.

    The LLM wrote a query from its source passage, so a judge by the same LLM finds that too easily, and the choice
    leans to a high weight: the grid ends at 1.5, and of equally good weights the lowest is taken.

    Args:
        scores: The judge's, scaled, shape ``(pairs,)``.
        cosines: The encoder's, shape ``(pairs,)``.
        pool: What was judged.
        documents: That of each query's source passage, shape ``(queries,)``.
        seed: Draws a tenth of the documents, and not fewer than ``_HELD_OUT`` of them where there are so many.

    Returns:
        The weight; and for the manifest the weight, documents and queries that it was chosen on, and the mean
        reciprocal rank of their source passages at each weight.
    """
    held = hold_out(documents.tolist(), 0.1, seed, least=_HELD_OUT)
    n = len(np.unique(documents[held]))
    inside = held[pool.query]
    query = np.unique(pool.query[inside], return_inverse=True)[1].reshape(-1)
    is_source, scores, cosines = pool.is_source[inside], scores[inside], cosines[inside].astype(np.float64)
    curve = {}
    for weight in _WEIGHTS:
        teacher = _teacher([(cosines, 1.0), (scores, weight)], query)
        values = np.where(np.isnan(teacher), -np.inf, teacher)
        of_source = values[is_source][query]
        # A passage as good as the source stands before it, so that no score for all is no perfect ranking.
        rank = 1 + np.bincount(query, weights=~is_source & (values >= of_source))
        curve[weight] = float((1 / rank).mean())
    chosen = max(curve, key=lambda weight: (curve[weight], -weight))
    logger.info(
        "label.judge_weight=auto: %g, by the mean reciprocal rank of the source passage for %d queries of %d "
        "documents: %s",
        chosen,
        held.sum(),
        n,
        ", ".join(f"{weight:g}: {mrr:.3f}" for weight, mrr in curve.items()),
    )
    if chosen == _WEIGHTS[-1]:
        logger.warning(
            "label.judge_weight=auto chose %g, the highest: a judge by the LLM that wrote the queries finds their "
            "source passages too easily; compare weights on human dev queries where there are any",
            chosen,
        )
    found = {"chosen": chosen, "documents": n, "queries": int(held.sum())}
    return chosen, {**found, "source_mrr": {f"{weight:g}": round(mrr, 4) for weight, mrr in curve.items()}}


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
            "scores": pa.array(scores[inside], pa.float32(), from_pandas=True),
        }
        columns = {
            "query_id": pa.array([pool.query_ids[row] for row in rows], pa.string()),
            "query": pa.array([pool.queries[row] for row in rows], pa.string()),
            **{name: pa.ListArray.from_arrays(offsets, values) for name, values in flat.items()},
        }
        tables.append(pa.table(columns).cast(GROUPS_FEATURES.arrow_schema))
    return datasets.Dataset(pa.concat_tables(tables)).cast(GROUPS_FEATURES)


def _judged_table(
    pool: _Pool,
    scores: np.ndarray,
    cosines: np.ndarray | None,
    lexical: np.ndarray | None,
    teacher: np.ndarray,
    positive: np.ndarray,
    negative: np.ndarray,
    reason: np.ndarray,
) -> datasets.Dataset:
    """Return a row a pair: what judge, encoder, BM25 and teacher gave it, whether it became a label, and why."""
    query, passage = pa.array(pool.query), pa.array(pool.passage)
    nothing = np.full(len(scores), np.nan)
    label = np.where(positive, "positive", np.where(negative, "negative", "left out"))
    columns = {
        "query_id": pa.array(pool.query_ids, pa.string()).take(query),
        "passage_id": pa.array(pool.ids, pa.large_string()).take(passage).cast(pa.string()),
        "is_source": pa.array(pool.is_source),
        "judge_score": pa.array(scores, pa.float32(), from_pandas=True),
        "cosine": pa.array(nothing if cosines is None else cosines, pa.float32(), from_pandas=True),
        "bm25": pa.array(nothing if lexical is None else lexical, pa.float32(), from_pandas=True),
        "teacher_score": pa.array(teacher, pa.float32(), from_pandas=True),
        "label": pa.array(label.tolist(), pa.string()),
        "reason": pa.array(reason.tolist(), pa.string()),
    }
    return datasets.Dataset(pa.table(columns))


def _share_first(scores: np.ndarray, right: np.ndarray, query: np.ndarray) -> float:
    """Share of queries whose highest score is at a right passage; a tie with a wrong one is not."""
    worst = np.where(np.isnan(scores), -np.inf, scores)
    order = np.lexsort((right, -worst, query))
    first = order[np.r_[True, np.diff(query[order]) > 0]]
    return float((right[first] & ~np.isnan(scores[first])).mean())
