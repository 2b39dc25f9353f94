"""Styles of queries: in what proportion they are written, and misspelled queries made from well-spelled ones."""

import difflib
import hashlib
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from lce_trainer.errors import ConfigError

MISSPELLED = "misspelled"
# The styles that a language model writes, each with lines of its own in prompts/styled.jinja.
WRITTEN = ("keyword", "question", "sentence", "claim")

# Words whose misspelling is likely to be understood: of four letters or more, no number, no identifier.
_LONG_WORD = re.compile(r"(?<!\w)[^\W\d_]{4,}(?!\w)")
_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")  # of the keyboard


def read_styles(styles: Mapping[str, Any]) -> dict[str, float]:
    """Return the weights of the styles that the language model writes in, and of misspelled queries, above 0.

    Args:
        styles: ``generate.styles`` of a recipe.

    Raises:
        ConfigError: A style is not known, a weight is not a number of 0 or more, or no style is written at all.
    """
    known = (*WRITTEN, MISSPELLED)
    for style, weight in styles.items():
        if style not in known:
            near = difflib.get_close_matches(str(style), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise ConfigError(f"generate.styles has no style {style!r}; {hint}")
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
            raise ConfigError(f"generate.styles.{style} must be a weight, a number of 0 or more, not {weight!r}")
    weights = {style: float(styles[style]) for style in known if styles.get(style)}
    if not set(weights) - {MISSPELLED}:
        raise ConfigError(
            f"generate.styles gives no weight to a style that the LLM writes: one of {', '.join(WRITTEN)} "
            "must be above 0"
        )
    return weights


def assign_styles(weights: Mapping[str, float], count: int) -> list[str]:
    """Return the style of each of so many queries, so that every first part of them has the proportions of the whole.

    A style's turn comes when its share of the queries so far lags furthest behind its weight. Queries that follow
    each other, such as those of one passage, therefore differ in style where the weights allow it, and more queries
    leave the styles of the first ones as they are.

    Args:
        weights: Above 0, by style.
        count: Queries.
    """
    names = list(weights)
    shares = np.array([weights[name] for name in names]) / sum(weights.values())
    assigned = np.zeros(len(names))
    styles = []
    for place in range(count):
        chosen = int(np.argmax(np.round(shares * (place + 1) - assigned, 9)))
        assigned[chosen] += 1
        styles.append(names[chosen])
    return styles


def copies_of(ratio: float, seed: int, *key: str) -> int:
    """Return how many misspelled copies a query has where they are ``ratio`` times as many as the queries.

    It depends on the query alone, so more queries leave the copies of the first ones as they are.

    Args:
        ratio: 0 or more.
        seed: Seeds the draw.
        key: What identifies the query.
    """
    drawn = _generator(seed, "copies", *key).random()
    return math.floor(ratio) + int(drawn < ratio - math.floor(ratio))


def misspell(query: str, seed: int, number: int = 0) -> str | None:
    """Return a query with one slip of the fingers, the same for the same seed and number.

    Two neighbouring letters are swapped, or a letter is dropped, doubled, or replaced by its neighbour on a QWERTY
    keyboard; the first letter of a word stays. Of the four kinds each is drawn equally often where it is possible.

    Args:
        query: A text.
        seed: Seeds the draw.
        number: Another one gives another slip, as a rule.

    Returns:
        The text with one word changed; None if it has no word of four letters or more in an alphabet with small
        and capital letters (Latin, Greek, Cyrillic, Armenian).
    """
    words = [found for found in _LONG_WORD.finditer(query) if found.group().lower() != found.group().upper()]
    if not words:
        return None
    draw = _generator(seed, "misspell", str(number), query)
    word = words[int(draw.integers(len(words)))]
    text = word.group()
    kinds = [kind for kind in (_swapped, _dropped, _doubled, _neighbour) if kind(text)]
    options = kinds[int(draw.integers(len(kinds)))](text)
    return query[: word.start()] + options[int(draw.integers(len(options)))] + query[word.end() :]


def _swapped(word: str) -> list[str]:
    return [word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in range(1, len(word) - 1) if word[i] != word[i + 1]]


def _dropped(word: str) -> list[str]:
    return [word[:i] + word[i + 1 :] for i in range(1, len(word))]


def _doubled(word: str) -> list[str]:
    return [word[: i + 1] + word[i:] for i in range(1, len(word))]


def _neighbour(word: str) -> list[str]:
    found = []
    for i, letter in enumerate(word[1:], start=1):
        for row in _ROWS:
            place = row.find(letter.lower())
            near = [row[j] for j in (place - 1, place + 1) if place >= 0 and 0 <= j < len(row)]
            found += [word[:i] + (new.upper() if letter.isupper() else new) + word[i + 1 :] for new in near]
    return found


def _generator(seed: int, *key: str) -> np.random.Generator:
    hashed = hashlib.sha256("\0".join((str(seed), *key)).encode()).digest()
    return np.random.default_rng(int.from_bytes(hashed[:8], "big"))
