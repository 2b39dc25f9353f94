"""Near-duplicates among short texts: MinHash brings the pairs that may be alike, and their exact similarity decides."""

import re
import unicodedata
from collections.abc import Sequence

import numpy as np

from lce_trainer.errors import ConfigError

_LENGTH = 3  # characters of a shingle
_PERMUTATIONS = 128
_RECALL = (0.05, 0.95)  # weights of false positives, which are checked, and of false negatives, which are lost
_HIGHEST = 0.95  # that hashing takes; what is above is found by the exact similarity
_WORD = re.compile(r"\w+")


def find_near_duplicates(texts: Sequence[str], known: Sequence[str], threshold: float) -> np.ndarray:
    """Find texts that say nearly the same, letter by letter, as one that is known.

    Two texts are as similar as the sets of their character 3-grams overlap (Jaccard), case, punctuation and white space
    apart. The pairs to compare come from MinHash with locality-sensitive hashing (Broder 1997, by ``datasketch``),
    which finds nearly all that are above the threshold; every pair that it brings is compared exactly.

    Args:
        texts: What is looked up.
        known: What it may repeat.
        threshold: Similarity from which on two texts are near-duplicates, above 0 and up to 1.

    Returns:
        Row of the most similar known text, -1 where none is a near-duplicate, int64, shape ``(texts,)``.

    Raises:
        ConfigError: The threshold is not above 0 and up to 1.
    """
    if not 0 < threshold <= 1:
        raise ConfigError(f"near-duplicates need a similarity above 0 and up to 1 to be known by, not {threshold}")
    from datasketch import MinHash, MinHashLSH  # which imports scipy; scoring must not wait for it

    shingles = [_shingles(text) for text in known]
    index = MinHashLSH(threshold=min(threshold, _HIGHEST), num_perm=_PERMUTATIONS, weights=_RECALL)
    rows = [row for row, some in enumerate(shingles) if some]
    hashes = MinHash.generator((_bytes(shingles[row]) for row in rows), num_perm=_PERMUTATIONS)
    for row, value in zip(rows, hashes, strict=True):
        index.insert(row, value)
    distinct = {text: _shingles(text) for text in texts}
    some = [text for text, found in distinct.items() if found]
    best: dict[str, int] = {}
    hashes = MinHash.generator((_bytes(distinct[text]) for text in some), num_perm=_PERMUTATIONS)
    for text, value in zip(some, hashes, strict=True):
        similar = {row: _jaccard(distinct[text], shingles[row]) for row in sorted(index.query(value))}
        row = max(similar, key=lambda row: similar[row], default=-1)
        if row >= 0 and similar[row] >= threshold:
            best[text] = row
    return np.array([best.get(text, -1) for text in texts], dtype=np.int64)


def _shingles(text: str) -> frozenset[str]:
    """Return the character 3-grams of a text's words, one space between them; of a shorter text itself."""
    plain = " ".join(_WORD.findall(unicodedata.normalize("NFKC", text).casefold()))
    return frozenset(plain[i : i + _LENGTH] for i in range(max(len(plain) - _LENGTH + 1, 1))) if plain else frozenset()


def _bytes(shingles: frozenset[str]) -> list[bytes]:
    return [shingle.encode("utf-8", "surrogatepass") for shingle in sorted(shingles)]


def _jaccard(one: frozenset[str], other: frozenset[str]) -> float:
    return len(one & other) / len(one | other)
