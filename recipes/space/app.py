"""A search box that shows the first stage's order beside the reranked order: scores, latency, and the matched words.

``space.json`` names the model and says how the first stage works, ``passages.jsonl`` holds the passages that are
searched; without that file, passages are pasted. ``python app.py`` starts it on any machine.
"""

import html
import importlib.util
import json
import os
import re
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import bm25s
import numpy as np
import Stemmer
from bm25s.tokenization import Tokenizer

HERE = Path(__file__).parent
SHOWN = 10  # passages of each order
MOST_PASTED = 200  # passages, and characters of each below: one request must not hold the machine for minutes
MOST_CHARACTERS = 5000
MOST_RERANKED = 100
EXCERPT = 320  # characters of a passage that are shown before it is opened


@dataclass(frozen=True)
class Settings:
    """What ``space.json`` says.

    Attributes:
        model: Hub id of the reranker.
        dataset: Hub id of what it was trained on, if that is published.
        encoder: Hub id or ``package:NAME/FOLDER`` of the first stage's encoder; None for BM25 alone.
        bm25_weight: Share of BM25 in the first stage's score, beside the encoder's.
        fuse: Whether this first stage is the one that ``first_stage_weight`` in the model's config was fitted for.
        stemmer: Snowball's name of the language that words are stemmed in; None leaves them as they are.
        stopwords: Language whose stopwords are left out; None keeps them.
        top_k: Passages that each retriever brings.
        examples: Queries to try.
        passages: A sentence on which passages are searched.
    """

    model: str
    dataset: str | None = None
    encoder: str | None = None
    bm25_weight: float = 0.0
    fuse: bool = False
    stemmer: str | None = "english"
    stopwords: str | None = "english"
    top_k: int = 50
    examples: Sequence[str] = ()
    passages: str = ""


@dataclass(frozen=True)
class Passage:
    """A passage; its text starts with the title, if there is one, on a line of its own."""

    text: str
    title: str = ""


@dataclass(frozen=True)
class Found:
    """What a search found, in the order of the first stage.

    Attributes:
        passages: The candidates.
        bm25: BM25's score of each, shape ``(passages,)``.
        cosine: The encoder's, or None where there is none.
        first: The first stage's score of each.
        scores: The reranker's, logits.
        final: What the second order is by: ``scores``, or their weighted mean with ``first``.
        weight: Share of ``first`` in ``final``; None if ``final`` is ``scores``.
        seconds: What each stage took.
        searched: How many passages were searched.
        stems: Stems of the query's words.
    """

    passages: list[Passage]
    bm25: np.ndarray
    cosine: np.ndarray | None
    first: np.ndarray
    scores: np.ndarray
    final: np.ndarray
    weight: float | None
    seconds: dict[str, float]
    searched: int
    stems: frozenset[str]

    @property
    def order(self) -> np.ndarray:
        """Rows of the passages from the highest final score down; equal ones keep the first stage's order."""
        return np.argsort(-self.final, kind="stable")


# Words


# Where no space parts words, pairs of characters are indexed, and of Thai and alike triples, as Lucene does.
_PAIRS = (
    "\u2e80-\u2fd5\u3005-\u3007\u3021-\u3029\u3031-\u3035\u3038-\u303b\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff"
    "\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U000323af"
    "\u1100-\u11ff\u3130-\u318f\uac00-\ud7a3"
)
_TRIPLES = "\u0e01-\u0e3a\u0e40-\u0e4e\u0e81-\u0edf\u1000-\u109f\u1780-\u17d3\u17dc\u17dd\ua9e0-\ua9ff\uaa60-\uaa7f"


@cache
def _word_pattern() -> re.Pattern[str]:
    # Vowel signs and accents belong to a word (Hindi, Arabic, Thai), which \w does not know.
    marks = "".join(c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c) in ("Mn", "Mc"))
    return re.compile(f"([{_PAIRS}]+)|([{_TRIPLES}]+)|((?:(?![{_PAIRS}{_TRIPLES}])[\\w{re.escape(marks)}]){{2,}})")


def words_at(text: str) -> Iterator[tuple[int, int, str]]:
    """Yield start, end and small letters of each word of a text that BM25 indexes, stopwords included."""
    for match in _word_pattern().finditer(text):
        pairs, triples, word = match.groups()
        if word:
            yield match.start(), match.end(), word.lower()
            continue
        size, run = (2, pairs) if pairs else (3, triples)
        for i in range(max(len(run) - size + 1, 1)):
            part = run[i : i + size]
            yield match.start() + i, match.start() + i + len(part), part.lower()


class Words:
    """Stems of words; stopwords have none."""

    def __init__(self, stemmer: str | None, stopwords: str | None) -> None:
        """Load what a language needs."""
        self._stem: Callable[[str], str] = Stemmer.Stemmer(stemmer).stemWord if stemmer else str
        self._stopwords = frozenset(Tokenizer(stopwords=stopwords).stopwords)

    def stems_at(self, text: str) -> Iterator[tuple[int, int, str]]:
        """Yield start, end and stem of each word that counts."""
        for start, end, word in words_at(text):
            if word not in self._stopwords:
                yield start, end, self._stem(word)

    def stems(self, text: str) -> list[str]:
        """Return the stems of a text in order."""
        return [stem for _, _, stem in self.stems_at(text)]


# Search


@dataclass
class Index:
    """Passages, indexed for the first stage.

    Attributes:
        passages: All of them.
        words: Makes stems.
        encoder: Embeds texts; None for BM25 alone.
    """

    passages: Sequence[Passage]
    words: Words
    encoder: Any = None
    _bm25: Any = field(default=None, init=False)
    _vectors: np.ndarray | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        """Index the passages."""
        stems = [self.words.stems(passage.text) for passage in self.passages]
        if any(stems):
            self._bm25 = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
            self._bm25.index(stems, create_empty_token=False, show_progress=False)
        if self.encoder is not None:
            self._vectors = _unit(self.encoder.encode_document([passage.text for passage in self.passages]))

    def bm25(self, stems: Sequence[str]) -> np.ndarray:
        """Return BM25's score of every passage, float64, shape ``(passages,)``."""
        known = [stem for stem in stems if self._bm25 is not None and stem in self._bm25.vocab_dict]
        if not known:
            return np.zeros(len(self.passages))
        return np.asarray(self._bm25.get_scores(known), dtype=np.float64)

    def cosine(self, query: str) -> np.ndarray | None:
        """Return the encoder's cosine with every passage; None without an encoder."""
        if self._vectors is None:
            return None
        return (self._vectors @ _unit(self.encoder.encode_query([query]))[0]).astype(np.float64)


def search(
    query: str,
    index: Index,
    score: Callable[[list[tuple[str, str]]], Any],
    *,
    top_k: int,
    bm25_weight: float = 0.0,
    weight: float | None = None,
    everything: bool = False,
) -> Found:
    """Find passages with the first stage, and rerank them.

    Args:
        query: What is searched.
        index: Where.
        score: Returns the reranker's logit of each (query, passage).
        top_k: Passages that each retriever of the first stage brings at most.
        bm25_weight: Share of BM25 in the first stage's score, where there is an encoder.
        weight: Share of the first stage in the final score; None orders by the reranker alone.
        everything: Rerank all passages, those that no retriever brings too.
    """
    started = time.perf_counter()
    stems = index.words.stems(query)
    bm25, cosine = index.bm25(stems), index.cosine(query)
    brought = [row for row in np.argsort(-bm25, kind="stable")[:top_k] if bm25[row] > 0]
    if cosine is not None:
        brought += list(np.argsort(-cosine, kind="stable")[:top_k])
    rows = np.arange(len(bm25)) if everything else np.array(sorted(set(brought)), dtype=np.int64)
    bm25, cosine = bm25[rows], None if cosine is None else cosine[rows]
    first = bm25 if cosine is None else mean(bm25, cosine, bm25_weight)
    order = np.argsort(-first, kind="stable")
    rows, bm25, first = rows[order], bm25[order], first[order]
    cosine = None if cosine is None else cosine[order]
    passages = [index.passages[row] for row in rows]
    between = time.perf_counter()
    pairs = [(query, passage.text) for passage in passages]
    scores = np.asarray(score(pairs), dtype=np.float64).reshape(len(pairs)) if pairs else np.zeros(0)
    seconds = {"first": between - started, "reranker": time.perf_counter() - between}
    final = scores if weight is None else mean(first, scores, weight)
    return Found(passages, bm25, cosine, first, scores, final, weight, seconds, len(index.passages), frozenset(stems))


def mean(first: np.ndarray, second: np.ndarray, weight: float) -> np.ndarray:
    """Return the mean of two scores, each standardized over the candidates; ``weight`` is that of the first."""
    return weight * _standardized(first) + (1 - weight) * _standardized(second)


def _standardized(scores: np.ndarray) -> np.ndarray:
    centred = scores - scores.mean() if len(scores) else scores
    spread = centred.std() if len(scores) else 0.0
    return centred / spread if spread > 0 else centred


def _unit(vectors: Any) -> np.ndarray:
    vectors = np.asarray(vectors, dtype=np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


# What is searched, and with what


def read_settings(path: Path = HERE / "space.json") -> Settings:
    """Return the settings of this Space."""
    given = json.loads(path.read_text(encoding="utf-8"))
    return Settings(**{**given, "examples": tuple(given.get("examples", ()))})  # a list could not be a key of a cache


def read_passages(path: Path = HERE / "passages.jsonl") -> list[Passage]:
    """Return the passages of this Space; none if it has no such file."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8") as lines:
        return [Passage(**json.loads(line)) for line in lines]


def pasted_passages(text: str) -> list[Passage]:
    """Return the passages that were pasted, one a line.

    Raises:
        ValueError: There are more than this Space takes.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) > MOST_PASTED:
        raise ValueError(f"These are {len(lines):,} passages, and {MOST_PASTED} at most are ranked here.")
    if any(len(line) > MOST_CHARACTERS for line in lines):
        raise ValueError(f"A passage is longer than {MOST_CHARACTERS:,} characters: cut it into several lines.")
    return [Passage(line) for line in lines]


@cache
def load_reranker(name: str) -> Any:
    """Load a reranker that gives logits; only safetensors are read, and no code of the checkpoint runs."""
    import torch
    from sentence_transformers import CrossEncoder

    return CrossEncoder(name, activation_fn=torch.nn.Identity(), model_kwargs={"use_safetensors": True})


@cache
def load_encoder(name: str | None) -> Any:
    """Load the first stage's encoder, which reads 256 tokens of a text as in the run that fitted the weights."""
    if name is None:
        return None
    from sentence_transformers import SentenceTransformer

    if name.startswith("package:"):
        package, _, folder = name.removeprefix("package:").partition("/")
        name = str(Path(importlib.util.find_spec(package).origin).parent / folder)
    encoder = SentenceTransformer(name, model_kwargs={"use_safetensors": True})
    encoder.max_seq_length = min(256, encoder.max_seq_length or 256)
    return encoder


@cache
def load_index(settings: Settings) -> Index:
    """Index the passages of this Space."""
    passages = read_passages()
    return Index(passages, load_words(settings), load_encoder(settings.encoder) if passages else None)


@cache
def load_words(settings: Settings) -> Words:
    """Load what this Space's language needs."""
    return Words(settings.stemmer, settings.stopwords)


def of_config(reranker: Any, name: str) -> Any:
    """Return what the model's ``config.json`` says by a name; None where it says nothing."""
    return getattr(getattr(reranker, "config", None), name, None)


# Pages


def highlight(text: str, words: Words, stems: frozenset[str]) -> str:
    """Return a text as HTML, in which the words that the query holds too are marked."""
    spans: list[list[int]] = []
    for start, end, stem in words.stems_at(text):
        if stem in stems:
            if spans and start <= spans[-1][1]:
                spans[-1][1] = max(end, spans[-1][1])
            else:
                spans.append([start, end])
    parts, at = [], 0
    for start, end in spans:
        parts += [html.escape(text[at:start]), "<mark>", html.escape(text[start:end]), "</mark>"]
        at = end
    return "".join([*parts, html.escape(text[at:])])


def excerpt(text: str, words: Words, stems: frozenset[str]) -> str:
    """Return the part of a long text that its first matched word is in."""
    if len(text) <= EXCERPT:
        return text
    first = next((start for start, _, stem in words.stems_at(text) if stem in stems), 0)
    begin = 0 if first < EXCERPT * 2 // 3 else first - EXCERPT // 4
    begin = text.rfind(" ", 0, begin) + 1 if begin else 0
    end = begin + EXCERPT
    if end < len(text):
        end = text.rfind(" ", begin, end) if " " in text[begin + EXCERPT // 2 : end] else end
    return f"{'… ' if begin else ''}{text[begin:end]}{' …' if end < len(text) else ''}"


def matched(text: str, words: Words, query: str) -> list[str]:
    """Return the query's words that a text holds, in whatever form, as the query spells them."""
    there = frozenset(words.stems(text))
    spelled = {stem: query[start:end] for start, end, stem in reversed(list(words.stems_at(query)))}
    return [word for stem, word in reversed(spelled.items()) if stem in there]


def page(found: Found, query: str, words: Words, settings: Settings, calibration: Any = None) -> str:
    """Return both orders as HTML, the first stage's and the reranked one."""
    if not found.passages:
        return message("No passage shares a word with this query.")
    place = {int(row): rank for rank, row in enumerate(found.order, 1)}
    name = "BM25" if found.cosine is None else "encoder" if not settings.bm25_weight else "encoder + BM25"
    ours = f'<a href="https://huggingface.co/{html.escape(settings.model)}">{html.escape(settings.model)}</a>'
    how = "by the reranker alone"
    if found.weight is not None:
        how = f"{1 - found.weight:.0%} reranker + {found.weight:.0%} first stage"
    first = [_card(found, row, row + 1, place[row], query, words, None) for row in range(len(found.passages))[:SHOWN]]
    second = [_card(found, int(row), place[int(row)], row + 1, query, words, calibration, True) for row in found.order]
    count = len(found.passages)
    shown = f", the first {SHOWN} shown" if count > SHOWN else ""
    return (
        '<div class="lce"><div class="columns">'
        f"<section><h3>First stage: {name}</h3>"
        f"<p>{_took(found.seconds['first'])} for {_count(found.searched, 'passage')}: "
        f"{_count(count, 'candidate')}{shown}</p>"
        f"<ol>{''.join(first)}</ol></section>"
        f"<section><h3>Reranked: {ours}</h3>"
        f"<p>{_took(found.seconds['reranker'])} for {_count(count, 'candidate')}; {how}</p>"
        f"<ol>{''.join(second[:SHOWN])}</ol></section></div></div>"
    )


def _card(
    found: Found, row: int, rank: int, other: int, query: str, words: Words, calibration: Any, reranked: bool = False
) -> str:
    """Return one passage as HTML."""
    passage = found.passages[row]
    body = passage.text.removeprefix(passage.title).strip() if passage.title else passage.text
    short = excerpt(body, words, found.stems)
    text = f"<p>{highlight(short, words, found.stems)}</p>"
    if short != body:
        whole = highlight(body, words, found.stems)
        text = f"<details><summary><p>{text[3:-4]}</p></summary><p>{whole}</p></details>"
    title = f"<h4>{highlight(passage.title, words, found.stems)}</h4>" if passage.title else ""
    terms = matched(passage.text, words, query)
    why = " ".join(f"<b>{html.escape(term)}</b>" for term in terms) or "no word of the query"
    return (
        f'<li class="{"reranked" if reranked else "first"}"><div class="line"><span class="rank">{rank}</span>'
        f"{_move(rank, other, reranked)}"
        f'<span class="scores">{_scores(found, row, calibration, reranked)}</span></div>'
        f'{title}{text}<div class="why">matched: {why}</div></li>'
    )


def _move(rank: int, other: int, reranked: bool) -> str:
    """Return how far a passage moved."""
    if not reranked:
        return f'<span class="move">now {other}</span>' if other != rank else '<span class="move">stays</span>'
    if other == rank:
        return '<span class="move">stays</span>'
    up = other > rank
    return f'<span class="move {"up" if up else "down"}">{"▲" if up else "▼"} {abs(other - rank)}, was {other}</span>'


def _scores(found: Found, row: int, calibration: Any, reranked: bool) -> str:
    """Return a passage's scores in words."""
    if not reranked:
        parts = [] if found.cosine is None else [f"cosine {found.cosine[row]:.3f}"]
        return " · ".join([*parts, f"BM25 {found.bm25[row]:.2f}"])
    parts = [f"logit {found.scores[row]:.2f}"]
    if isinstance(calibration, dict):
        logit = calibration["slope"] * found.scores[row] + calibration["intercept"]
        parts = [f"{0.5 * (1 + np.tanh(logit / 2)):.0%} answers", *parts]
    if found.weight is not None:
        parts.append(f"fused {found.final[row]:.2f}")
    return " · ".join(parts)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _took(seconds: float) -> str:
    return f"{seconds * 1000:,.0f} ms" if seconds >= 0.0095 else f"{seconds * 1000:.1f} ms"


def message(text: str) -> str:
    """Return a sentence as HTML."""
    return f'<div class="lce"><p class="message">{html.escape(text)}</p></div>'


RERANKER_ALONE = "the reranker alone"
WITH_FIRST_STAGE = "reranker and first stage, by the weight of the model"


def respond(query: str, pasted: str, top_k: float, order: str, settings: Settings) -> str:
    """Return the page for what was typed; what goes wrong is a sentence on it."""
    query = (query or "").strip()[:MOST_CHARACTERS]
    if not query:
        return message("Type a query and press Search.")
    try:
        own = pasted_passages(pasted or "")
    except ValueError as error:
        return message(str(error))
    words = load_words(settings)
    try:
        index = Index(own, words, load_encoder(settings.encoder)) if own else load_index(settings)
        if not index.passages:
            return message("Paste the passages to rank, one a line.")
        reranker = load_reranker(settings.model)
    except (OSError, ValueError, ImportError) as error:  # what huggingface_hub and transformers raise
        private = "" if os.environ.get("HF_TOKEN") else " If it is private, this Space needs the secret HF_TOKEN."
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return message(f"A model could not be loaded: {str(error).splitlines()[0]}.{private}")
    weight = of_config(reranker, "first_stage_weight") if settings.fuse and order != RERANKER_ALONE else None
    found = search(
        query,
        index,
        lambda pairs: reranker.predict(pairs, batch_size=32, show_progress_bar=False),
        top_k=min(int(top_k), MOST_RERANKED),
        bm25_weight=settings.bm25_weight,
        weight=weight,
        everything=bool(own),
    )
    return page(found, query, words, settings, of_config(reranker, "calibration"))


CSS = """
#results, #results .html-container { padding: 0 !important; }
.lce { color: var(--body-text-color); --quiet: #52525b; } .dark .lce { --quiet: #a1a1aa; }
.lce .columns { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 1.25rem; }
@media (max-width: 720px) {
  .lce .columns { grid-template-columns: 86% 86%; gap: .8rem; overflow-x: auto; scroll-snap-type: x mandatory; }
  .lce section { scroll-snap-align: start; }
}
.lce h3 { font-size: 1.05rem; font-weight: 600; margin: 0; overflow-wrap: anywhere; }
.lce h4 { font-size: .95rem; font-weight: 600; margin: .35rem 0 0; overflow-wrap: anywhere; }
.lce p { margin: .3rem 0 0; line-height: 1.45; overflow-wrap: anywhere; white-space: pre-line; }
.lce section > p, .lce .scores, .lce .why { color: var(--quiet); font-size: .84rem; }
.lce ol { list-style: none; margin: .7rem 0 0; padding: 0; }
.lce li { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: .6rem .75rem;
  margin: 0 0 .6rem; background: var(--block-background-fill); font-size: .92rem; }
.lce .line { display: flex; flex-wrap: wrap; gap: .2rem .6rem; align-items: baseline; }
.lce .rank { font-weight: 700; min-width: 1.2rem; }
.lce .scores { margin-left: auto; font-variant-numeric: tabular-nums; }
.lce .move { font-size: .8rem; color: var(--quiet); }
.lce .up { color: #15803d; font-weight: 600; } .dark .lce .up { color: #4ade80; }
.lce .down { color: #b45309; } .dark .lce .down { color: #fbbf24; }
.lce mark { background: #fde68a; color: #1f2937; border-radius: 3px; padding: 0 .12em; }
.lce .why { margin-top: .35rem; } .lce .why b { font-weight: 600; color: var(--body-text-color); margin-right: .35em; }
.lce summary { cursor: pointer; list-style: none; } .lce summary::-webkit-details-marker { display: none; }
.lce summary p::after { content: " more"; color: var(--link-text-color); }
.lce details[open] summary p { display: none; }
.lce details[open] summary::after { content: "less"; color: var(--link-text-color); font-size: .85rem; }
.lce .message { padding: .8rem 0; }
"""


def build(settings: Settings) -> Any:
    """Return the page with the search box."""
    import gradio as gr

    has_passages = bool(read_passages())
    links = f"[{settings.model}](https://huggingface.co/{settings.model})"
    if settings.dataset:
        links += f", trained on [{settings.dataset}](https://huggingface.co/datasets/{settings.dataset})"
    what = settings.passages or "Paste passages, one a line, and rank them for a query."

    def answer(query: str, pasted: str, top_k: float, order: str) -> str:
        return respond(query, pasted, top_k, order, settings)

    def from_link(request: gr.Request, pasted: str, top_k: float, order: str) -> tuple[Any, Any]:
        query = dict(request.query_params).get("q", "")  # a link to a search: ?q=…
        if not query:  # whoever types already must not lose it
            return gr.skip(), gr.skip()
        return query, answer(query, pasted, top_k, order)

    with gr.Blocks(title=settings.model, analytics_enabled=False) as demo:
        gr.Markdown(f"# Before and after reranking\n{links}. {what}")
        with gr.Row(equal_height=True):
            query = gr.Textbox(
                placeholder="Type a query",
                show_label=False,
                container=False,
                scale=5,
                min_width=260,
                autofocus=True,
                elem_id="query",
            )
            button = gr.Button("Search", variant="primary", scale=1, min_width=120, elem_id="search")
        examples = None
        if has_passages and settings.examples:
            examples = gr.Examples([[example] for example in settings.examples], [query], label="Queries to try")
        results = gr.HTML(message("Type a query and press Search."), elem_id="results", render=False)
        if has_passages:
            results.render()
        with gr.Accordion("Passages of your own", open=not has_passages):
            pasted = gr.Textbox(
                label=f"One passage a line, {MOST_PASTED} at most",
                info="Where there are any, these are ranked, all of them." if has_passages else None,
                lines=6,
                max_lines=12,
                elem_id="pasted",
            )
        if not has_passages:
            results.render()
        with gr.Accordion("How it is ranked", open=False):
            top_k = gr.Slider(
                10,
                MOST_RERANKED,
                value=min(max(settings.top_k, 10), MOST_RERANKED),
                step=10,
                label="Passages that each retriever of the first stage brings",
            )
            choices = [WITH_FIRST_STAGE, RERANKER_ALONE] if settings.fuse else [RERANKER_ALONE]
            order = gr.Radio(choices, value=choices[0], label="The second order is that of")
        inputs = [query, pasted, top_k, order]
        gr.on([button.click, query.submit], answer, inputs, results, api_name="search")
        if examples is not None:
            examples.load_input_event.then(answer, inputs, results, api_visibility="private")
        demo.load(from_link, [pasted, top_k, order], [query, results], api_visibility="private")
    return demo


if __name__ == "__main__":
    import gradio

    SETTINGS = read_settings()
    try:  # so that the first search does not wait for them; it says what is wrong
        load_reranker(SETTINGS.model)
        load_index(SETTINGS)
    except (OSError, ValueError, ImportError) as problem:
        print(f"{type(problem).__name__}: {problem}", file=sys.stderr)
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    build(SETTINGS).queue(default_concurrency_limit=1).launch(css=CSS, theme=gradio.themes.Default(**fonts))
