"""Have an LLM write the queries that passages of the corpus answer, and keep the usable ones."""

import hashlib
import logging
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import datasets
import numpy as np

from lce_trainer.artifacts import digest
from lce_trainer.errors import ConfigError, LLMError
from lce_trainer.settings import option
from lce_trainer.synthesis.examples import Example, draw_examples
from lce_trainer.synthesis.filters import near_duplicates, vague_queries
from lce_trainer.synthesis.gauge import Sourced, mix_styles
from lce_trainer.synthesis.journal import Journal, answer_all
from lce_trainer.synthesis.llm.protocol import LLM, Each
from lce_trainer.synthesis.llm.replies import kind_of_reply
from lce_trainer.synthesis.prompts import Prompt
from lce_trainer.synthesis.retrieval.hybrid import FirstStage
from lce_trainer.synthesis.styles import MISSPELLED, WRITTEN, assign_styles, copies_of, misspell, read_styles

logger = logging.getLogger(__name__)

QUERIES_FEATURES = datasets.Features(
    {
        name: datasets.Value("string")
        for name in ("query_id", "query", "source_passage_id", "style", "prompt_digest", "model")
    }
)
# A query is one line; what a base model writes after it is the next example.
_STOP = ("\n",)
# Prompts handed to the LLM at once; the LLM sorts and cuts them to its memory. A killed run loses so many answers of a
# model that runs here, and of a server those in flight.
_BATCH = 128
_WINDOW = 16

_REASONS = ("empty", "reply", "too_short", "too_long", "copied", "echo", "roundtrip", "duplicate")
# Of the filters that have to be switched on.
_MORE_REASONS = ("near_duplicate", "vague", "unlikely", "unanswerable")
# Replies that are no query, by style. A claim is worded as an answer is, and a sentence ("I can't find …") may also be
# worded as a refusal is.
_NO_QUERY: dict[str | None, tuple[str, ...]] = {"claim": ("lead_in", "refusal"), "sentence": ("lead_in",)}
_EXAMPLES_OF_DROPPED = 3
_SAMPLE = 48  # passages whose queries in every style the mix of styles is computed from
_WORD = re.compile(r"\w+")
_SHOWN_WORD = re.compile(r"\S+")
# "1. ", "(2) ", "- ", "Query: ", "Search query 3: ", "Q: "
_LABEL = re.compile(
    r"(?:[-*•–]\s+|\(?\d{1,2}[.)]\s+|(?:(?:user|search|example)\s+)?(?:query|question)\s*\d*\s*:\s*|q\s*\d*\s*:\s*)",
    re.IGNORECASE,
)
_QUOTES = ('""', "''", "``", "“”", "„“", "‘’", "«»", "**", "[]", "<>")


@dataclass
class GenerateConfig:
    """How queries are written, and which are kept."""

    queries: int = option(400, "Passages, drawn uniformly, that the LLM writes a query for.")
    per_passage: int = option(1, "Queries written for each passage.")
    prompt: str = option(
        "query",
        "A prompt of lce_trainer/synthesis/prompts by name, or the path of a .jinja file. Where styles, personas or "
        "example queries without a passage are set, styled stands in for query.",
    )
    examples: list[dict[str, str]] = option(
        [], "Few-shot examples of your domain: passage, query, and optionally style, the only one that it is for."
    )
    example_queries: str | None = option(
        None,
        "Queries of your own as further examples, a file of rows: query, and optionally passage, or doc_id, and style.",
    )
    n_examples: int = option(
        4, "So many of generate.example_queries stand in a prompt; of more, others are drawn for each passage."
    )
    styles: dict[str, float] | str = option(
        {},
        "Weights of keyword, question, sentence, claim and misspelled queries; auto: those with which queries come "
        "nearest to evaluate.dev_queries. Empty: the prompt names no style.",
    )
    personas: list[str] = option([], "Who searches, such as a nurse on night duty; queries are theirs in turn.")
    show_title: bool = option(
        True, "Show the passage's title as well; without it the LLM has to describe, not to name."
    )
    max_passage_words: int = option(120, "Words of the passage shown to the LLM.")
    max_new_tokens: int = option(24, "Tokens of a query at most.")
    temperature: float = option(0.7, "Sampling temperature; 0 is greedy.")
    top_p: float = option(0.95, "Sampling keeps the likeliest tokens of this mass.")
    min_words: int = option(2, "Shorter queries are dropped.")
    max_words: int = option(25, "Longer queries are dropped.")
    max_copied_words: int = option(8, "Queries that copy a longer run of the passage's words are dropped.")
    roundtrip_k: int = option(
        20, "A query is kept if a retriever of the first stage brings its passage back in its top k; 0 keeps all."
    )
    max_jaccard: float | None = option(
        None, "Queries whose words have this Jaccard similarity with an earlier query's are dropped, such as 0.8."
    )
    max_ties: int | None = option(
        None,
        "A query is vague, and dropped, if by each retriever of the first stage more passages than these score within "
        "5 % of the best.",
    )
    min_gain: float | None = option(
        None,
        "A query is dropped unless its passage raises its likelihood under the LLM by this much, in nats a token, such "
        "as 0.5; needs an LLM that can score, see label.judge=likelihood.",
    )
    min_answerable: float | None = option(
        None,
        "A query is dropped unless the LLM answers with this probability that the passage answers it, such "
        "as 0.5; for strong LLMs, see label.judge=verdict.",
    )


class Scorer(Protocol):
    """What scores a query and a passage: a judge."""

    def key(self, query: str, passage: str) -> str:
        """Return the digest of everything that the score of this pair depends on."""
        ...

    def score(self, pairs: Sequence[tuple[str, str]], each: Each | None = None) -> list[float | None]:
        """Return a score for each (query, passage); None where there is none."""
        ...


def generate_queries(
    passages: datasets.Dataset,
    llm: LLM,
    prompt: Prompt,
    config: GenerateConfig,
    seed: int,
    journal: Journal,
    first_stage: FirstStage,
    *,
    examples: Sequence[Example] = (),
    own: Sequence[Sourced] = (),
    likelihood: Scorer | None = None,
    verdict: Scorer | None = None,
) -> tuple[datasets.Dataset, dict[str, int], dict[str, Any]]:
    """Queries for passages drawn uniformly without replacement.

    The passages drawn are the first of one seeded permutation, so a larger ``config.queries``
    goes on where a smaller one ended and finds its answers in the journal.

    Args:
        passages: The passages artifact.
        llm: Writes the queries.
        prompt: Rendered with ``passage`` and ``examples``, and with ``style``, ``persona`` and ``queries`` where the
            recipe sets styles, personas, and example queries without a passage.
        config: How many, how they are sampled, which are kept.
        seed: Seeds the draw, the order and every sampled token.
        journal: Where the LLM's answers are kept.
        first_stage: Retrievers over ``passages``, for the round trip and for vagueness.
        examples: The user's own queries as few-shot examples, their passages found.
        own: The user's dev queries, which ``config.styles="auto"`` fits the mix of styles to.
        likelihood: The judge for ``config.min_gain``.
        verdict: The judge for ``config.min_answerable``.

    Returns:
        The queries artifact in the order of the draw; counts: ``written``, ``kept``, ``dropped_`` for each reason, and
        ``misspelled``, the copies that are added; facts: ``dropped``, by reason a few of the queries, and
        ``styles``, the weights that were used.

    Raises:
        ConfigError: The settings contradict each other.
        LLMError: No query was usable.
    """
    check_styles(config, prompt, examples)
    write = _Writer(passages, llm, prompt, config, seed, journal, first_stage, list(examples), likelihood, verdict)
    facts: dict[str, Any] = {}
    weights: dict[str, float] = {}
    if config.styles == "auto":
        weights = read_styles(write.fit_styles(own))
    elif isinstance(config.styles, dict) and config.styles:
        weights = read_styles(config.styles)
    written = {style: weight for style, weight in weights.items() if style != MISSPELLED}
    if weights:
        facts["styles"] = weights
    rows = [row for row in range(len(write.drawn)) for _ in range(config.per_passage)]
    numbers = list(range(config.per_passage)) * len(write.drawn)
    styles: Sequence[str | None] = assign_styles(written, len(rows)) if written else [None] * len(rows)
    items = list(map(Item, rows, numbers, styles))
    queries, reasons = write(items, "writing queries")
    kept = [place for place, reason in enumerate(reasons) if reason is None]
    names = [name for name in (*_REASONS, *_MORE_REASONS) if name in _REASONS or name in write.filters]
    counts = {"written": len(items), "kept": len(kept)}
    counts |= {f"dropped_{reason}": reasons.count(reason) for reason in names}
    facts["dropped"] = _examples_of_dropped(queries, reasons, names)
    if not kept:
        dropped = ", ".join(f"{counts[f'dropped_{reason}']} {reason}" for reason in names)
        raise LLMError(
            f"none of the {len(items)} queries that {llm.name} wrote is usable ({dropped}); "
            f"the first is {queries[0][:60]!r}: try another llm.model or generate.prompt"
            if queries
            else "no query was to be written: generate.queries and generate.per_passage must be 1 or more"
        )
    named = config.prompt.rpartition("/")[2].removesuffix(".jinja")
    found = [(queries[place], write.ids[items[place].row], items[place].style or named) for place in kept]
    if MISSPELLED in weights:
        ratio = weights[MISSPELLED] / sum(written.values())
        misspelled = _misspelled([(query, source) for query, source, _ in found], ratio, seed)
        counts["misspelled"] = len(misspelled)
        found += misspelled
    rows_made = [
        {
            "query_id": digest([source, query]),
            "query": query,
            "source_passage_id": source,
            "style": style,
            "prompt_digest": prompt.digest,
            "model": llm.name,
        }
        for query, source, style in found
    ]
    return datasets.Dataset.from_list(rows_made, features=QUERIES_FEATURES), counts, facts


def prompt_name(config: GenerateConfig, examples: Sequence[Example] = ()) -> str:
    """Return the prompt that queries are written by: ``styled`` instead of ``query`` where that is what is set.

    Args:
        config: How queries are written.
        examples: The user's own queries.
    """
    styled = config.styles or config.personas or any(example.is_alone for example in examples)
    return "styled" if config.prompt == "query" and styled else config.prompt


def check_styles(config: GenerateConfig, prompt: Prompt, examples: Sequence[Example] = ()) -> None:
    """Check that styles, personas and example queries are known and that the prompt uses them.

    Args:
        config: How queries are written.
        prompt: The prompt of :func:`prompt_name`.
        examples: The user's own queries.

    Raises:
        ConfigError: They cannot be used; names the setting.
    """
    if isinstance(config.styles, dict):
        if config.styles:
            read_styles(config.styles)
    elif config.styles != "auto":
        raise ConfigError(f"generate.styles must be auto or weights by style, not {config.styles!r}")
    given = [(example["style"], "generate.examples") for example in config.examples if "style" in example]
    given += [(example.style, example.at) for example in examples if example.style is not None]
    for style, at in given:
        if style not in WRITTEN:
            raise ConfigError(f"{at}: there is no style {style!r} that the LLM writes: {', '.join(WRITTEN)}")
    if config.n_examples < 1:
        raise ConfigError(f"generate.n_examples must be 1 or more, not {config.n_examples}")
    if config.max_jaccard is not None and not 0 < config.max_jaccard <= 1:
        raise ConfigError(f"generate.max_jaccard must be above 0 and at most 1, not {config.max_jaccard}")
    if config.max_ties is not None and config.max_ties < 1:
        raise ConfigError(f"generate.max_ties must be 1 or more, not {config.max_ties}")
    if any(not isinstance(persona, str) or not persona.strip() for persona in config.personas):
        raise ConfigError("generate.personas must be texts that say who searches")
    needed: list[tuple[str, str, Any]] = [
        ("style", "generate.styles", config.styles),
        ("persona", "generate.personas", config.personas),
        ("queries", "generate.example_queries without a passage", any(example.is_alone for example in examples)),
    ]
    for variable, setting, given in needed:
        if given and variable not in prompt.variables:
            raise ConfigError(
                f"{setting} needs a prompt that uses {{{{ {variable} }}}}, and {prompt.name} (or its .chat.jinja) does "
                "not; see lce_trainer/synthesis/prompts/styled.jinja"
            )


@dataclass(frozen=True)
class Item:
    """A query to be written.

    Attributes:
        row: Of its passage among those drawn.
        number: Of the query among those of this passage, from 0.
        style: One of the styles that the LLM writes; None where the prompt names none.
    """

    row: int
    number: int
    style: str | None


class _Writer:
    """Has the LLM write queries for some passages, and says which are dropped and why."""

    def __init__(
        self,
        passages: datasets.Dataset,
        llm: LLM,
        prompt: Prompt,
        config: GenerateConfig,
        seed: int,
        journal: Journal,
        first_stage: FirstStage,
        examples: Sequence[Example],
        likelihood: Scorer | None,
        verdict: Scorer | None,
    ) -> None:
        self.drawn = np.random.default_rng(seed).permutation(len(passages))[: config.queries]
        if len(self.drawn) < config.queries:
            logger.info(
                "generate.queries is %d, the corpus has %d passages: all are used", config.queries, len(self.drawn)
            )
        sources = passages.select(self.drawn)
        self.ids, texts = sources["passage_id"][:], sources["text"][:]
        if not config.show_title:
            texts = [text.removeprefix(f"{title}\n") for text, title in zip(texts, sources["title"][:], strict=True)]
        self._passages = texts
        self._read = [cut_words(text, config.max_passage_words) for text in texts]
        self._llm, self._prompt, self._config, self._seed = llm, prompt, config, seed
        self._journal, self._first_stage = journal, first_stage
        self._pairs = [example for example in examples if example.passage is not None]
        self._queries = [example for example in examples if example.passage is None]
        settings = (config.max_jaccard, config.max_ties, config.min_gain, config.min_answerable)
        self.filters = [name for name, value in zip(_MORE_REASONS, settings, strict=True) if value is not None]
        self._likelihood, self._verdict = likelihood, verdict

    def __call__(self, items: Sequence[Item], desc: str, later: int = 0) -> tuple[list[str], list[str | None]]:
        """Return a query for each item, and why it is dropped; None where it is kept.

        Args:
            items: What is to be written.
            desc: Label of the progress bar.
            later: Further queries that will be written, for the quote of a dry run.
        """
        personas = self._personas(items)
        prompts = [self._render(item, persona) for item, persona in zip(items, personas, strict=True)]
        replies = self._complete(items, prompts, desc, later)
        queries = [clean_query(text) for text in replies]
        config = self._config
        reasons = _reasons_to_drop(queries, [self._passages[item.row] for item in items], self._echoes(items), config)
        # A base model goes on with a text and answers nobody: what it writes is taken for a query.
        if any(not isinstance(self._llm.reads(text), str) for text in prompts[:1]):
            _drop_replies(reasons, replies, [item.style for item in items])
        rows = [int(self.drawn[item.row]) for item in items]
        _drop_lost(reasons, queries, rows, config.roundtrip_k, self._first_stage)
        _drop_duplicates(reasons, queries)
        if config.max_jaccard is not None:
            _drop(reasons, "near_duplicate", queries, lambda some: near_duplicates(some, config.max_jaccard or 1.0))
        if config.max_ties is not None:
            _drop(reasons, "vague", queries, lambda some: vague_queries(some, config.max_ties or 1, self._first_stage))
        self._drop_by_judges(reasons, queries, [self._read[item.row] for item in items])
        return queries, reasons

    def fit_styles(self, own: Sequence[Sourced]) -> dict[str, float]:
        """Return the weights with which the styles come nearest to the user's queries, from a sample in each style."""
        if not own:
            raise ConfigError(
                "generate.styles=auto fits the mix of styles to evaluate.dev_queries, and the recipe names none: "
                "give weights, such as {keyword: 1, question: 1}"
            )
        rows = range(min(_SAMPLE, len(self.drawn)))
        items = [Item(row, 0, style) for row in rows for style in WRITTEN]
        later = len(self.drawn) * self._config.per_passage
        queries, reasons = self(items, "writing a sample in every style", later)
        samples: dict[str, list[Sourced]] = {style: [] for style in WRITTEN}
        for item, query, reason in zip(items, queries, reasons, strict=True):
            if reason is None:
                samples[str(item.style)].append(Sourced(query, [self._passages[item.row]]))
        if not any(samples.values()):
            raise LLMError(
                f"none of {len(items)} queries in all styles that {self._llm.name} wrote is usable; the first is "
                f"{queries[0][:60]!r}: try another llm.model or generate.prompt"
            )
        weights = mix_styles(own, samples)
        logger.info(
            "generate.styles: %s, by the %d dev queries and %s",
            ", ".join(f"{style} {weight:g}" for style, weight in weights.items()),
            len(own),
            ", ".join(f"{len(some)} of {len(rows)} usable in {style}" for style, some in samples.items()),
        )
        return weights

    def _personas(self, items: Sequence[Item]) -> list[str | None]:
        """Return who writes each query; in turn within each style, or a persona might never meet some of them."""
        personas: Sequence[str | None] = self._config.personas or [None]
        met: dict[str | None, int] = {}
        found = []
        for item in items:
            met[item.style] = met.get(item.style, -1) + 1
            found.append(personas[met[item.style] % len(personas)])
        return found

    def _render(self, item: Item, persona: str | None) -> str:
        examples = [
            _without_style(example)
            for example in self._config.examples
            if item.style is None or example.get("style") in (None, item.style)
        ]
        more: dict[str, Any] = {}
        if self._pairs or self._queries:
            passage_id = self.ids[item.row]
            seed, n = _stable_seed(self._seed, passage_id, -1), self._config.n_examples
            fitting = [each for each in self._pairs if item.style is None or each.style in (None, item.style)]
            # An example of this very passage would be repeated.
            fitting = [each for each in fitting if each.passage_id != passage_id]
            examples += [
                {"passage": cut_words(each.passage or "", self._config.max_passage_words), "query": each.query}
                for each in draw_examples(fitting, n, seed)
            ]
            if self._queries:
                more["queries"] = [each.query for each in draw_examples(self._queries, n, seed)]
        if item.style is not None:
            more["style"] = item.style
        if persona is not None:
            more["persona"] = persona
        return self._prompt.render(passage=self._read[item.row], examples=examples, **more)

    def _complete(self, items: Sequence[Item], prompts: Sequence[str], desc: str, later: int) -> list[str]:
        llm, config = self._llm, self._config
        seeds = [_stable_seed(self._seed, self.ids[item.row], item.number) for item in items]
        sampling = {
            "max_new_tokens": config.max_new_tokens,
            "temperature": config.temperature,
            "top_p": config.top_p,
            "stop": _STOP,
        }
        keys = [
            digest({"llm": llm.identity, "prompt": llm.reads(prompt), "seed": seed, **sampling})
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]

        def complete(batch: Sequence[int], each: Each) -> Sequence[str | None]:
            return llm.complete(
                [prompts[place] for place in batch],
                max_new_tokens=config.max_new_tokens,
                temperature=config.temperature,
                top_p=config.top_p,
                seeds=[seeds[place] for place in batch],
                stop=_STOP,
                each=each,
            )

        batches = plan_batches([item.row for item in items], self._seed)
        return [text or "" for text in answer_all(self._journal, keys, batches, complete, desc, later)]

    def _echoes(self, items: Sequence[Item]) -> set[tuple[str, ...]]:
        """Return the queries that stand in the prompt itself: a weak LLM repeats one instead of reading the passage."""
        own = [example.query for example in (*self._pairs, *self._queries)]
        lines = [*own, *(example["query"] for example in self._config.examples if "query" in example)]
        examples = [_without_style(example) for example in self._config.examples]
        for style in dict.fromkeys(item.style for item in items):
            more: dict[str, Any] = {} if style is None else {"style": style}
            more |= {"queries": []} if self._queries else {}
            more |= {"persona": self._config.personas[0]} if self._config.personas else {}
            for some in ([], examples) if style is not None else (examples,):
                frame = self._prompt.render(passage="", examples=some, **more).splitlines()
                lines += [*frame, *(line.partition(":")[2] for line in frame)]
        return {tuple(_words(line)) for line in lines}

    def _drop_by_judges(self, reasons: list[str | None], queries: Sequence[str], texts: Sequence[str]) -> None:
        config = self._config
        if config.min_gain is not None:
            if self._likelihood is None:
                raise ConfigError("generate.min_gain needs a judge of likelihood")
            left = [place for place, reason in enumerate(reasons) if reason is None]
            pairs = [(queries[place], texts[place]) for place in left]
            given = self._score(self._likelihood, pairs, "likelihood given the passage")
            alone = self._score(self._likelihood, [(query, "") for query, _ in pairs], "likelihood without a passage")
            for place, gain in zip(left, given - alone, strict=True):
                if not gain >= config.min_gain:
                    reasons[place] = "unlikely"
        if config.min_answerable is not None:
            if self._verdict is None:
                raise ConfigError("generate.min_answerable needs a judge of verdicts")
            left = [place for place, reason in enumerate(reasons) if reason is None]
            scores = self._score(self._verdict, [(queries[p], texts[p]) for p in left], "is it answered")
            for place, score in zip(left, scores, strict=True):
                # An abstention is no verdict, and never a no.
                if score < config.min_answerable:
                    reasons[place] = "unanswerable"

    def _score(self, judge: Scorer, pairs: Sequence[tuple[str, str]], desc: str) -> np.ndarray:
        """Return a judge's score of each (query, passage), float64; NaN where it abstains."""
        keys = [judge.key(*pair) for pair in pairs]
        batches = plan_batches([passage for _, passage in pairs], self._seed)
        scores = answer_all(
            self._journal, keys, batches, lambda batch, each: judge.score([pairs[i] for i in batch], each), desc
        )
        return np.array([np.nan if score is None else score for score in scores], dtype=np.float64)


def _without_style(example: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in example.items() if key != "style"}


def _drop(
    reasons: list[str | None], reason: str, queries: Sequence[str], which: Callable[[list[str]], list[int]]
) -> None:
    left = [place for place, known in enumerate(reasons) if known is None]
    for place in which([queries[place] for place in left]) if left else ():
        reasons[left[place]] = reason


def _examples_of_dropped(
    queries: Sequence[str], reasons: Sequence[str | None], names: Sequence[str]
) -> dict[str, list[str]]:
    """Return the first few queries dropped for each reason, and log them."""
    found: dict[str, list[str]] = {}
    for name in names:
        some = [query for query, reason in zip(queries, reasons, strict=True) if reason == name]
        if distinct := [query for query in dict.fromkeys(some) if query][:_EXAMPLES_OF_DROPPED]:
            found[name] = distinct
        if some:
            examples = f", such as {', '.join(map(repr, distinct))}" if distinct else ""
            share = 100 * len(some) / len(queries)
            logger.info("queries dropped, %s: %d, %.1f %%%s", name.replace("_", " "), len(some), share, examples)
    return found


def _misspelled(found: Sequence[tuple[str, str]], ratio: float, seed: int) -> list[tuple[str, str, str]]:
    """Return misspelled copies of queries, each with its source passage and style; none is like another query."""
    known = {tuple(_words(query)) for query, _ in found}
    made = []
    for query, source in found:
        for number in range(copies_of(ratio, seed, source, query)):
            slip = misspell(query, seed, number)
            if slip is not None and (words := tuple(_words(slip))) not in known:
                known.add(words)
                made.append((slip, source, MISSPELLED))
    return made


def plan_batches(belongs: Sequence[Hashable], seed: int, size: int = _BATCH, window: int = _WINDOW) -> list[list[int]]:
    """Batches in which what shares a prompt comes together, and whose every prefix is a fair sample of the work.

    Only a window of the work is regrouped, and its groups are taken in random order: by size or
    length, or as they first appear, what is done first would be the shortest or the most popular.
    Each window is twice the last one, so the more work there is, the more of it shares a prompt,
    and still at any time half of what is done are windows done whole.

    Args:
        belongs: Of each item, its group; the items must already be in random order.
        seed: Seeds the order of groups in a window.
        size: Items of a batch at most; a group is cut only if it is larger.
        window: Batches of the first window.

    Returns:
        Indices of the items, a list a batch. More items leave all whole windows as they are.
    """
    batches = []
    start, end = 0, size * window
    while start < len(belongs):
        groups: dict[Hashable, list[int]] = {}
        for item in range(start, min(end, len(belongs))):
            groups.setdefault(belongs[item], []).append(item)
        members = list(groups.values())
        batch: list[int] = []
        for number in np.random.default_rng((seed, start)).permutation(len(members)):
            if batch and len(batch) + len(members[number]) > size:
                batches.append(batch)
                batch = []
            batch += members[number]
            while len(batch) > size:
                batches.append(batch[:size])
                batch = batch[size:]
        batches.append(batch)
        start, end = end, end + 2 * (end - start)
    return batches


def cut_words(text: str, limit: int) -> str:
    """The first words of a text, its white space as it is."""
    for number, word in enumerate(_SHOWN_WORD.finditer(text), start=1):
        if number == limit:
            return text[: word.end()]
    return text


def clean_query(completion: str) -> str:
    """The query in what the LLM wrote: its first line without bullet, number, label or quotes."""
    completion = completion.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # half an emoji is no text
    query = " ".join(completion.strip().partition("\n")[0].split())
    before = None
    while query != before:
        before = query
        if (label := _LABEL.match(query)) is not None:
            query = query[label.end() :]
        for pair in _QUOTES:
            if len(query) > 1 and query[0] + query[-1] == pair:
                query = query[1:-1].strip()
    # A quote that was opened and cut off, or closed after its opening was part of the prompt.
    for quote in '"“”`':
        if query.count(quote) == 1:
            query = query.strip(quote).strip()
    return query


def _words(text: str) -> list[str]:
    """What two queries have in common when only case and punctuation tell them apart."""
    return _WORD.findall(text.lower())


def _stable_seed(seed: int, passage_id: str, n: int) -> int:
    hashed = hashlib.sha256(f"{seed}\0{passage_id}\0{n}".encode()).digest()
    return int.from_bytes(hashed[:8], "big") >> 1


def _reasons_to_drop(
    queries: Sequence[str], texts: Sequence[str], echoes: set[tuple[str, ...]], config: GenerateConfig
) -> list[str | None]:
    reasons: list[str | None] = []
    for query, text in zip(queries, texts, strict=True):
        words = _words(query)
        n_words = len(query.split())
        if not words:
            reasons.append("empty")
        elif n_words < config.min_words:
            reasons.append("too_short")
        elif n_words > config.max_words:
            reasons.append("too_long")
        elif _copies(words, text, config.max_copied_words):
            reasons.append("copied")
        elif tuple(words) in echoes:
            reasons.append("echo")
        else:
            reasons.append(None)
    return reasons


def _drop_replies(reasons: list[str | None], replies: Sequence[str], styles: Sequence[str | None]) -> None:
    """An instruct model may answer, announce a query or refuse, where it was to write one."""
    for item, (text, style) in enumerate(zip(replies, styles, strict=True)):
        if reasons[item] != "empty" and kind_of_reply(text) in _NO_QUERY.get(style, ("answer", "lead_in", "refusal")):
            reasons[item] = "reply"


def _copies(words: Sequence[str], text: str, limit: int) -> bool:
    """Whether more than ``limit`` words in a row stand in the text in the same order."""
    run = limit + 1
    if len(words) < run:
        return False
    source = _words(text)
    written = set(_runs(source, run))
    return any(part in written for part in _runs(words, run))


def _runs(words: Sequence[str], length: int) -> Iterable[tuple[str, ...]]:
    return (tuple(words[i : i + length]) for i in range(len(words) - length + 1))


def _drop_lost(
    reasons: list[str | None], queries: Sequence[str], rows: Sequence[int], k: int, first_stage: FirstStage
) -> None:
    """A query that does not bring its passage back asks for something else, or for nothing in particular."""
    kept = [item for item, reason in enumerate(reasons) if reason is None]
    if not k or not kept:
        return
    pools = first_stage.search([queries[item] for item in kept], k)
    back = set(pools.query[pools.passage == np.array([rows[item] for item in kept])[pools.query]].tolist())
    for place, item in enumerate(kept):
        if place not in back:
            reasons[item] = "roundtrip"


def _drop_duplicates(reasons: list[str | None], queries: Sequence[str]) -> None:
    seen: set[tuple[str, ...]] = set()
    for item, query in enumerate(queries):
        words = tuple(_words(query))
        if reasons[item] is None and words in seen:
            reasons[item] = "duplicate"
        elif reasons[item] is None:
            seen.add(words)
