"""Have an LLM write the queries that passages of the corpus answer, and keep the usable ones."""

import hashlib
import logging
import re
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import datasets
import numpy as np

from lce_trainer.artifacts import digest
from lce_trainer.errors import LLMError
from lce_trainer.settings import option
from lce_trainer.synthesis.journal import Journal, ask
from lce_trainer.synthesis.llm.protocol import LLM, Each
from lce_trainer.synthesis.llm.replies import kind_of_reply
from lce_trainer.synthesis.prompts import Prompt
from lce_trainer.synthesis.retrieval.hybrid import FirstStage

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
    prompt: str = option("query", "A prompt of lce_trainer/synthesis/prompts by name, or the path of a .jinja file.")
    examples: list[dict[str, str]] = option([], "Few-shot examples of your domain: passage, query.")
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


def generate_queries(
    passages: datasets.Dataset,
    llm: LLM,
    prompt: Prompt,
    config: GenerateConfig,
    seed: int,
    journal: Journal,
    first_stage: FirstStage,
) -> tuple[datasets.Dataset, dict[str, int]]:
    """Queries for passages drawn uniformly without replacement.

    The passages drawn are the first of one seeded permutation, so a larger ``config.queries``
    goes on where a smaller one ended and finds its answers in the journal.

    Args:
        passages: The passages artifact.
        llm: Writes the queries.
        prompt: Rendered with ``passage`` and ``examples``.
        config: How many, how they are sampled, which are kept.
        seed: Seeds the draw, the order and every sampled token.
        journal: Where the LLM's answers are kept.
        first_stage: Retrievers over ``passages``, for the round trip.

    Returns:
        The queries artifact in the order of the draw, and counts: ``asked``, ``kept``, and
        ``dropped_`` for each reason.

    Raises:
        LLMError: No query was usable.
    """
    drawn = np.random.default_rng(seed).permutation(len(passages))[: config.queries]
    if len(drawn) < config.queries:
        logger.info("generate.queries is %d, the corpus has %d passages: all are used", config.queries, len(drawn))
    sources = passages.select(drawn)
    ids, texts = sources["passage_id"][:], sources["text"][:]
    items = [(row, n) for row in range(len(drawn)) for n in range(config.per_passage)]
    if not config.show_title:
        texts = [text.removeprefix(f"{title}\n") for text, title in zip(texts, sources["title"][:], strict=True)]
    shown = [cut_words(text, config.max_passage_words) for text in texts]
    prompts = [prompt.render(passage=text, examples=config.examples) for text in shown]
    seeds = [_stable_seed(seed, ids[row], n) for row, n in items]
    sampling = {
        "max_new_tokens": config.max_new_tokens,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "stop": _STOP,
    }
    keys = [
        digest({"llm": llm.identity, "prompt": llm.reads(prompts[row]), "seed": seeds[item], **sampling})
        for item, (row, _) in enumerate(items)
    ]

    def complete(batch: Sequence[int], each: Each) -> Sequence[str | None]:
        return llm.complete(
            [prompts[items[item][0]] for item in batch],
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            seeds=[seeds[item] for item in batch],
            stop=_STOP,
            each=each,
        )

    batches = plan_batches([row for row, _ in items], seed)
    replies = [text or "" for text in ask(journal, keys, batches, complete, "writing queries")]
    queries = [clean_query(text) for text in replies]

    reasons = _reasons_to_drop(queries, [texts[row] for row, _ in items], _echoes(prompt, config), config)
    # A base model goes on with a text and answers nobody: what it writes is taken for a query.
    if any(not isinstance(llm.reads(text), str) for text in prompts[:1]):
        _drop_replies(reasons, replies)
    _drop_lost(reasons, queries, [int(drawn[row]) for row, _ in items], config.roundtrip_k, first_stage)
    _drop_duplicates(reasons, queries)
    kept = [item for item, reason in enumerate(reasons) if reason is None]
    counts = {"asked": len(items), "kept": len(kept)}
    counts |= {f"dropped_{reason}": reasons.count(reason) for reason in _REASONS}
    if not kept:
        dropped = ", ".join(f"{counts[f'dropped_{reason}']} {reason}" for reason in _REASONS)
        raise LLMError(
            f"none of the {len(items)} queries that {llm.name} wrote is usable ({dropped}); "
            f"the first is {queries[0][:60]!r}: try another llm.model or generate.prompt"
            if queries
            else "no query was asked for: generate.queries and generate.per_passage must be 1 or more"
        )
    rows = [
        {
            "query_id": digest([ids[items[item][0]], queries[item]]),
            "query": queries[item],
            "source_passage_id": ids[items[item][0]],
            "style": config.prompt.rpartition("/")[2].removesuffix(".jinja"),
            "prompt_digest": prompt.digest,
            "model": llm.name,
        }
        for item in kept
    ]
    return datasets.Dataset.from_list(rows, features=QUERIES_FEATURES), counts


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


def _echoes(prompt: Prompt, config: GenerateConfig) -> set[tuple[str, ...]]:
    """The queries that stand in the prompt itself: a weak LLM repeats one instead of reading the passage."""
    frame = prompt.render(passage="", examples=config.examples).splitlines()
    lines = [*frame, *(line.partition(":")[2] for line in frame)]
    lines += [example["query"] for example in config.examples if "query" in example]
    return {tuple(_words(line)) for line in lines}


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


def _drop_replies(reasons: list[str | None], replies: Sequence[str]) -> None:
    """An instruct model may answer, announce a query or refuse, where it was to write one."""
    for item, text in enumerate(replies):
        if reasons[item] != "empty" and kind_of_reply(text) in ("answer", "lead_in", "refusal"):
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
