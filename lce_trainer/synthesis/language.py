"""Languages: which one a corpus is in, where its sentences and words end, and what of it a word index holds.

This is the one place that knows languages: the corpus is cut by :func:`sentences` and :func:`count_words`, BM25
indexes :func:`index_words` with a :class:`Language`'s stemmer and stopwords, prompts and cards call it by its name.
"""

import difflib
import logging
import math
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from lce_trainer.errors import ConfigError

logger = logging.getLogger(__name__)

# Every language that py3langid knows, with the names of Snowball's stemmer and of bm25s' stopwords where there are any.
_NAMES = """af Afrikaans|am Amharic|an Aragonese|ar Arabic|as Assamese|az Azerbaijani|be Belarusian|bg Bulgarian|
bn Bengali|br Breton|bs Bosnian|ca Catalan|cs Czech|cy Welsh|da Danish|de German|dz Dzongkha|el Greek|en English|
eo Esperanto|es Spanish|et Estonian|eu Basque|fa Persian|fi Finnish|fo Faroese|fr French|ga Irish|gl Galician|
gu Gujarati|he Hebrew|hi Hindi|hr Croatian|ht Haitian Creole|hu Hungarian|hy Armenian|id Indonesian|is Icelandic|
it Italian|ja Japanese|jv Javanese|ka Georgian|kk Kazakh|km Khmer|kn Kannada|ko Korean|ku Kurdish|ky Kyrgyz|la Latin|
lb Luxembourgish|lo Lao|lt Lithuanian|lv Latvian|mg Malagasy|mk Macedonian|ml Malayalam|mn Mongolian|mr Marathi|
ms Malay|mt Maltese|my Burmese|nb Norwegian Bokmål|ne Nepali|nl Dutch|nn Norwegian Nynorsk|no Norwegian|oc Occitan|
or Odia|pa Punjabi|pl Polish|ps Pashto|pt Portuguese|qu Quechua|ro Romanian|ru Russian|rw Kinyarwanda|
se Northern Sami|si Sinhala|sk Slovak|sl Slovenian|sq Albanian|sr Serbian|sv Swedish|sw Swahili|ta Tamil|te Telugu|
th Thai|tl Tagalog|tr Turkish|ug Uyghur|uk Ukrainian|ur Urdu|vi Vietnamese|vo Volapük|wa Walloon|xh Xhosa|yi Yiddish|
zh Chinese|zu Zulu"""
_LANGUAGES = dict(entry.strip().split(" ", 1) for entry in _NAMES.replace("\n", "").split("|"))
_STEMMERS = frozenset(
    """arabic armenian basque catalan danish dutch english finnish french german greek hindi hungarian indonesian irish
    italian lithuanian nepali norwegian portuguese romanian russian serbian spanish swedish tamil turkish
    yiddish""".split()  # noqa: SIM905
)
_STOPWORDS = frozenset(
    """english german dutch french spanish portuguese italian russian swedish norwegian turkish
    danish""".split()  # noqa: SIM905
)
_SAME_AS = {"nb": "norwegian", "nn": "norwegian"}

_SAMPLE = 200  # documents that a language is detected by
_SAMPLE_LETTERS = 1000  # of each
_FEW_LETTERS = 60  # of a Latin script, by which no language can be detected

# Scripts that put no spaces between words. A Chinese or Japanese word has about two characters, a Thai one about four.
_HAN_AND_KANA = (
    "\u2e80-\u2fd5\u3005-\u3007\u3021-\u3029\u3031-\u3035\u3038-\u303b\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff"
    "\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U000323af"
)
_THAI_AND_ALIKE = (
    "\u0e01-\u0e3a\u0e40-\u0e4e\u0e81-\u0edf\u1000-\u109f\u1780-\u17d3\u17dc\u17dd\ua9e0-\ua9ff\uaa60-\uaa7f"
)
_HANGUL = "\u1100-\u11ff\u3130-\u318f\uac00-\ud7a3"
_HAN_CHARACTERS, _THAI_CHARACTERS = 2, 4  # that count as one word


def _ranges(characters: Iterable[str]) -> str:
    """Characters in order as the ranges of a regular expression's class."""
    found: list[list[int]] = []
    for code in map(ord, characters):
        if found and found[-1][1] == code - 1:
            found[-1][1] = code
        else:
            found.append([code, code])
    return "".join(f"{re.escape(chr(low))}-{re.escape(chr(high))}" for low, high in found)


# Vowel signs and accents belong to a word (Hindi, Arabic, Thai), which \w does not know.
_MARKS = _ranges(c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c) in ("Mn", "Mc"))

UNSPACED = re.compile(f"[{_HAN_AND_KANA}{_THAI_AND_ALIKE}]")
_HAN = re.compile(f"[{_HAN_AND_KANA}]")
_BY_CHARACTERS = re.compile(f"[{_HAN_AND_KANA}{_THAI_AND_ALIKE}{_HANGUL}]")
_WORD = re.compile(f"[\\w{_MARKS}]{{2,}}")
_WORD_OR_RUN = re.compile(
    f"([{_HAN_AND_KANA}{_HANGUL}]+)|([{_THAI_AND_ALIKE}]+)|"
    f"((?:(?![{_HAN_AND_KANA}{_HANGUL}{_THAI_AND_ALIKE}])[\\w{_MARKS}]){{2,}})"
)
_ATOM = re.compile(f"[{_HAN_AND_KANA}{_THAI_AND_ALIKE}][{_MARKS}]*|[^\\s{_HAN_AND_KANA}{_THAI_AND_ALIKE}]+|\\s+")

_FULL_WIDTH = "\u3000-\u303f\uff00-\uff65"  # punctuation, and the letters of East Asian typography
_RUNS = re.compile(
    f"[{_HAN_AND_KANA}{_THAI_AND_ALIKE}{_FULL_WIDTH}]+|[^{_HAN_AND_KANA}{_THAI_AND_ALIKE}{_FULL_WIDTH}]+"
)
_FULL_WIDTH_OR_UNSPACED = re.compile(f"[{_HAN_AND_KANA}{_THAI_AND_ALIKE}{_FULL_WIDTH}]")
_TOO_MANY_MARKS = re.compile(f"[{_MARKS}]{{31,}}")  # Unicode's Stream-Safe Text Format has at most thirty

# Common abbreviations, initials and the numbers of a list end no sentence; at rarer ones a passage may start.
_SENTENCE_END = re.compile(
    r" (?:(?<=[.!?…।॥؟۔።] )|(?<=[.!?…।॥؟۔።][\"'”’»)\]] ))(?![a-z])"
    r"(?<!\b(?:Dr|Mr|Ms|St|vs|cf|al)\. )(?<!\b(?:Mrs|Fig|e\.g|i\.e|bzw|Abb)\. )(?<!\bProf\. )(?<!\b[A-Zz0-9]\. )"
)
# Where no space follows.
_FULL_STOP = re.compile(f"[。！？｡]+[」』”’）】〉》)]* ?|[!?]+(?=[{_HAN_AND_KANA}])")
_CLAUSE_END = re.compile(r"[，、；：,;:][」』”’）】〉》)]* ?| ")


@dataclass(frozen=True)
class Language:
    """A language, and what a word index needs of it.

    Attributes:
        code: Of ISO 639-1.
        name: In English.
        stemmer: Snowball's name of the language; None if it has no stemmer.
        stopwords: bm25s' name of the language; None if it has no list of stopwords.
    """

    code: str
    name: str
    stemmer: str | None
    stopwords: str | None


def find_language(name: str) -> Language:
    """Return a language by its code (``de``) or its English name (``German``).

    Raises:
        ConfigError: There is none of that name; names the nearest.
    """
    wanted = name.strip().lower().replace("_", "-").partition("-")[0]
    by_name = {known.lower(): code for code, known in _LANGUAGES.items()}
    code = wanted if wanted in _LANGUAGES else by_name.get(name.strip().lower())
    if code is None:
        near = difflib.get_close_matches(name.lower(), [*by_name, *_LANGUAGES], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ": write a code of two letters, as in de, or auto"
        raise ConfigError(f"corpus.language: {name!r} is no language that is known{hint}")
    key = _SAME_AS.get(code, _LANGUAGES[code].lower())
    return Language(code, _LANGUAGES[code], key if key in _STEMMERS else None, key if key in _STOPWORDS else None)


def detect_language(texts: Iterable[str]) -> Language:
    """Return the language that most of the text is in.

    Args:
        texts: A few hundred documents; the start of each is enough.
    """
    from py3langid import classify  # loads a model, which takes a second

    votes: Counter[str] = Counter()
    for text in texts:
        sample = text[:_SAMPLE_LETTERS]
        letters = sum(map(str.isalpha, sample))
        if letters:
            votes[classify(sample)[0]] += letters
            if any(ord(letter) > 0x2FF and letter.isalpha() for letter in sample):
                votes[""] += letters  # not Latin, so that little of it is enough
    certain = votes.pop("", 0)
    if certain + votes.total() < _FEW_LETTERS and not certain:
        logger.warning("there is too little text to detect its language by: English is assumed, set corpus.language")
        return find_language("en")
    code = max(sorted(votes), key=votes.__getitem__)
    logger.info("the corpus is in %s", _LANGUAGES.get(code, code))
    return find_language(code)


def sentences(line: str, max_words: int) -> Iterator[str]:
    """Cut a line at its sentences; one of too many words is cut at clauses or between words.

    Joined, they are the line again. Sentences are found by their punctuation, abbreviations mostly told apart.

    Args:
        line: Text without line breaks.
        max_words: Words of a piece at most.
    """
    unspaced = UNSPACED.search(line) is not None
    for sentence in _cut_after(line, _SENTENCE_END, _FULL_STOP if unspaced else None):
        if count_words(sentence) <= max_words:
            yield sentence
            continue
        for clause in _cut_after(sentence, _CLAUSE_END) if unspaced else [sentence]:
            yield from _cut_evenly(clause, max_words)


def _cut_after(text: str, *ends: re.Pattern[str] | None) -> Iterator[str]:
    """Pieces of a text that each end with a match of one of the patterns, except before a small letter."""
    cuts = sorted({found.end() for end in ends if end is not None for found in end.finditer(text)})
    start = 0
    for cut in cuts:
        if cut < len(text) and not (ends[0] is _SENTENCE_END and text[cut].islower()):
            yield text[start:cut]
            start = cut
    yield text[start:]


def count_words(text: str) -> int:
    """Return how many words a text has; without spaces between them, by the number of its characters."""
    if text.isascii() or not (characters := len(UNSPACED.findall(text))):
        return len(text.split())
    han = len(_HAN.findall(text))
    others = len(UNSPACED.sub(" ", text).split())
    return others + math.ceil(han / _HAN_CHARACTERS + (characters - han) / _THAI_CHARACTERS)


def _cut_evenly(text: str, max_words: int) -> Iterator[str]:
    """Pieces of much the same length, cut between words, or between characters where no space parts words."""
    if UNSPACED.search(text):
        atoms = _ATOM.findall(text)
        weights = [
            0.0 if atom.isspace() else 1.0 if not UNSPACED.match(atom)
            else 1 / (_HAN_CHARACTERS if _HAN.match(atom) else _THAI_CHARACTERS)
            for atom in atoms
        ]  # fmt: skip
    else:
        atoms = re.findall(r"\S+\s*|\s+", text)
        weights = [float(not atom.isspace()) for atom in atoms]
    total = sum(weights)
    pieces = max(math.ceil(total / max_words), 1)
    while True:
        cut: list[list[str]] = [[] for _ in range(pieces)]
        before = 0.0
        for atom, weight in zip(atoms, weights, strict=True):
            # The first piece in which a whole atom fits by its place: with weights of 1, i * n // pieces.
            cut[min(int((before + 1e-9) * pieces / max(total, 1)), pieces - 1)].append(atom)
            before += weight
        found = ["".join(part) for part in cut if part]
        if pieces >= len(atoms) or all(count_words(part) <= max_words for part in found):
            yield from found
            return
        pieces += 1


def without_long_runs(word: str, longest: int) -> tuple[list[str], int]:
    """Leave long runs of letters out of a text without spaces, unless they are of a script that has none.

    Returns:
        What is left of it, and how many runs were left out.
    """
    if not UNSPACED.search(word):
        return [], 1
    word, dropped = _TOO_MANY_MARKS.subn("", word)
    kept: list[list[str]] = [[]]
    for run in _RUNS.findall(word):
        if len(run) > longest and not _FULL_WIDTH_OR_UNSPACED.match(run):
            dropped += 1
            kept.append([])
        else:
            kept[-1].append(run)
    return ["".join(runs) for runs in kept if runs], dropped


def index_words(text: str) -> list[str]:
    """Return what a word index holds of a text, in order and in small letters.

    Words of two letters or more; where no space parts words, and in Korean, pairs of characters, of Thai and alike
    triples. Source: Lucene's CJKAnalyzer, which does so for Chinese, Japanese and Korean.
    """
    text = text.lower()
    if text.isascii() or not _BY_CHARACTERS.search(text):
        return _WORD.findall(text)
    found = []
    for han, thai, word in _WORD_OR_RUN.findall(text):
        if word:
            found.append(word)
        else:
            run, size = (han, 2) if han else (thai, 3)
            found += [run[i : i + size] for i in range(max(len(run) - size + 1, 1))]
    return found
