"""Judges: what says how well a passage answers a query.

``likelihood`` is the mean log-probability of the query's tokens after the passage, which small local models can give:
on MedQuAD their yes or no was at chance (AUC 0.50 to 0.53), their likelihood was not (0.66). ``verdict`` and ``grade``
ask a strong language model whether, or how well, the passage answers the query. ``pairwise`` asks it which of two
passages does so better. ``reranker`` is a cross-encoder.
"""

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from lce_trainer.artifacts import digest
from lce_trainer.errors import LabelError
from lce_trainer.model.reranker import Reranker
from lce_trainer.synthesis.llm.protocol import LLM, Each
from lce_trainer.synthesis.prompts import Prompt
from lce_trainer.synthesis.queries import cut_words

_YES = (" yes", " Yes", " YES", "yes", "Yes", "YES")
_NO = (" no", " No", " NO", "no", "No", "NO")
# Surface forms of each answer, and what an answer is worth.
_ANSWERS: dict[str, dict[float, tuple[str, ...]]] = {
    "verdict": {1.0: _YES, 0.0: _NO},
    "grade": {float(grade): (f" {grade}", str(grade)) for grade in range(4)},
}
_LEAST = 1e-4  # a probability is taken as no nearer than this to 0 or 1 where its log-odds are needed
_LETTERS = ((" A", "A"), (" B", "B"))


class Judge(Protocol):
    """What scores pairs of a query and a passage."""

    @property
    def name(self) -> str:
        """The name of the model that judges, as artifacts record it."""
        ...

    def key(self, query: str, passage: str) -> str:
        """Return the digest of everything that the score of this pair depends on."""
        ...

    def score(self, pairs: Sequence[tuple[str, str]], each: Each | None = None) -> list[float | None]:
        """Return a score for each (query, passage), higher is better; None where the judge abstains.

        Args:
            pairs: A query and a passage each.
            each: Called with the place and the score of each that comes alone, see
                :data:`lce_trainer.synthesis.llm.protocol.Each`.

        Raises:
            LabelError: A score is not a finite number.
            LLMError: The language model does not answer.
        """
        ...

    def decide(self, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """Return which scores make a positive and which a negative, each of shape ``(pairs,)``.

        None if the scores mean nothing by themselves, and a passage is compared with the query's source passage.
        """
        ...

    def scale(self, scores: np.ndarray) -> np.ndarray:
        """Return the scores on a scale on which differences can be added to an encoder's, shape ``(pairs,)``."""
        ...


class LikelihoodJudge:
    """The mean log-probability of the query's tokens after the passage, in nats a token."""

    def __init__(self, llm: LLM, prompt: Prompt, examples: Sequence[dict[str, str]], max_passage_words: int) -> None:
        """Take the model, the prompt (given ``passage`` and ``examples``), and how much of a passage it reads."""
        self.name = llm.name
        self._llm, self._prompt, self._examples, self._words = llm, prompt, list(examples), max_passage_words

    def key(self, query: str, passage: str) -> str:
        """See :meth:`Judge.key`."""
        text, continuation = self._render(query, passage)
        pair = (self._llm.reads(text), continuation)
        return digest({"judge": "likelihood", "llm": self._llm.identity, "pair": pair, "options": ()})

    def score(self, pairs: Sequence[tuple[str, str]], each: Each | None = None) -> list[float | None]:
        """See :meth:`Judge.score`; this judge never abstains."""
        prompts, continuations = zip(*(self._render(*pair) for pair in pairs), strict=True)

        def check(place: int, score: float) -> float:
            if not math.isfinite(score):
                raise LabelError(f"{self.name} scored the query {pairs[place][0][:60]!r} {score}, not a finite number")
            return score

        alone = each and (lambda place, score: each(place, check(place, score)))
        return list(map(check, range(len(pairs)), self._llm.score(prompts, continuations, alone)))

    def decide(self, scores: np.ndarray) -> None:
        """Return None: a likelihood depends on the query, so only passages of one query can be compared."""

    def scale(self, scores: np.ndarray) -> np.ndarray:
        """Return the scores as they are."""
        return scores

    def _render(self, query: str, passage: str) -> tuple[str, str]:
        text = self._prompt.render(passage=cut_words(passage, self._words), examples=self._examples)
        return text, query if text[-1:].isspace() else f" {query}"


class ChoiceJudge:
    """The expected answer of a language model that is given a choice: the probability of yes, or a grade from 0 to 3.

    The answer is read from the probabilities of the first token, summed over surface forms. Where no form is among
    the likeliest tokens the judge abstains; that is never a no.
    """

    def __init__(
        self,
        kind: str,
        llm: LLM,
        prompt: Prompt,
        examples: Sequence[dict[str, str]],
        max_passage_words: int,
        positive_above: float,
        negative_below: float,
    ) -> None:
        """Take the model and the question.

        Args:
            kind: ``verdict`` or ``grade``.
            llm: Answers.
            prompt: Rendered with ``passage``, ``query`` and ``examples``.
            examples: For the prompt.
            max_passage_words: Words of a passage that the model reads.
            positive_above: A score from here on makes a positive.
            negative_below: A score up to here makes a negative.
        """
        self.name = llm.name
        self._kind, self._llm, self._prompt = kind, llm, prompt
        self._examples, self._words = list(examples), max_passage_words
        self._positive_above, self._negative_below = positive_above, negative_below

    def key(self, query: str, passage: str) -> str:
        """See :meth:`Judge.key`."""
        options = [form for forms in _ANSWERS[self._kind].values() for form in forms]
        pair = (self._llm.reads(self._render(query, passage)), "")
        return digest({"judge": self._kind, "llm": self._llm.identity, "pair": pair, "options": options})

    def score(self, pairs: Sequence[tuple[str, str]], each: Each | None = None) -> list[float | None]:
        """See :meth:`Judge.score`."""
        answers = _ANSWERS[self._kind]

        def expected(masses: Sequence[float] | None) -> float | None:
            return None if masses is None else float(np.dot(masses, list(answers)))

        alone = each and (lambda place, masses: each(place, expected(masses)))
        prompts = [self._render(*pair) for pair in pairs]
        return [expected(masses) for masses in self._llm.choose(prompts, list(answers.values()), alone)]

    def decide(self, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See :meth:`Judge.decide`; an abstention is neither."""
        return scores >= self._positive_above, scores <= self._negative_below

    def scale(self, scores: np.ndarray) -> np.ndarray:
        """Return the log-odds of yes; a grade as it is."""
        return scores if self._kind != "verdict" else _log_odds(scores)

    def _render(self, query: str, passage: str) -> str:
        shown = cut_words(passage, self._words)
        return self._prompt.render(passage=shown, query=query, examples=self._examples)


class PairwiseJudge:
    """What says which of two passages answers a query better.

    It is asked about both orders of the two, and its log-odds are averaged, so that a liking for the first or for the
    second place cancels. Where it abstains in one order it abstains.
    """

    def __init__(
        self, llm: LLM, prompt: Prompt, examples: Sequence[dict[str, str]], max_passage_words: int, opponents: int
    ) -> None:
        """Take the model and the question.

        Args:
            llm: Answers.
            prompt: Rendered with ``query``, ``first``, ``second`` and ``examples``.
            examples: For the prompt.
            max_passage_words: Words of a passage that the model reads.
            opponents: How many other candidates of its query each passage is compared with.
        """
        self.name, self.opponents = llm.name, opponents
        self._llm, self._prompt, self._examples, self._words = llm, prompt, list(examples), max_passage_words

    def key(self, query: str, first: str, second: str) -> str:
        """Return the digest of everything that the answer to this question depends on."""
        options = [form for forms in _LETTERS for form in forms]
        rendered = (self._llm.reads(self._render(query, first, second)), "")
        return digest({"judge": "pairwise", "llm": self._llm.identity, "pair": rendered, "options": options})

    def compare(self, battles: Sequence[tuple[str, str, str]], each: Each | None = None) -> list[float | None]:
        """Return how likely the first passage of each (query, first, second) is preferred, in this order of the two.

        Args:
            battles: A query and two passages each.
            each: As for :meth:`Judge.score`.

        Raises:
            LLMError: The language model does not answer.
        """

        def first(masses: Sequence[float] | None) -> float | None:
            return None if masses is None else float(masses[0])

        alone = each and (lambda place, masses: each(place, first(masses)))
        prompts = [self._render(*battle) for battle in battles]
        return [first(masses) for masses in self._llm.choose(prompts, _LETTERS, alone)]

    @staticmethod
    def wins(first: np.ndarray, swapped: np.ndarray) -> np.ndarray:
        """Return how likely one passage beats another, from the answers in both orders.

        Args:
            first: How likely it is preferred where it stands first, shape ``(battles,)``; NaN for an abstention.
            swapped: How likely the other one is where that stands first.
        """
        won: np.ndarray = 1 / (1 + np.exp((_log_odds(swapped) - _log_odds(first)) / 2))
        return won

    def decide(self, scores: np.ndarray) -> None:
        """Return None: a strength is known beside those of the other candidates of a query only."""

    def scale(self, scores: np.ndarray) -> np.ndarray:
        """Return the scores as they are, see :func:`lce_trainer.synthesis.battles.strengths`."""
        return scores

    def _render(self, query: str, first: str, second: str) -> str:
        shown = {"first": cut_words(first, self._words), "second": cut_words(second, self._words)}
        return self._prompt.render(query=query, examples=self._examples, **shown)


class RerankerJudge:
    """A cross-encoder, such as a strong reranker from the Hub; its scores are logits."""

    def __init__(self, model: str, batch_tokens: int | None = None) -> None:
        """Load a reranker by its Hub id or folder.

        Raises:
            TrainingError: There is no such model, or it is not a reranker.
        """
        self.name = model
        self._reranker = Reranker.from_pretrained(model)
        self._batch_tokens = batch_tokens

    def key(self, query: str, passage: str) -> str:
        """See :meth:`Judge.key`."""
        return digest({"judge": "reranker", "model": self.name, "pair": (query, passage)})

    def score(self, pairs: Sequence[tuple[str, str]], each: Each | None = None) -> list[float | None]:
        """See :meth:`Judge.score`; this judge never abstains."""
        return list(self._reranker.score(list(pairs), batch_tokens=self._batch_tokens).tolist())

    def decide(self, scores: np.ndarray) -> None:
        """Return None: rerankers differ in what their logits mean."""

    def scale(self, scores: np.ndarray) -> np.ndarray:
        """Return the scores as they are."""
        return scores


def _log_odds(probabilities: np.ndarray) -> np.ndarray:
    inside = np.clip(probabilities, _LEAST, 1 - _LEAST)
    odds: np.ndarray = np.log(inside / (1 - inside))
    return odds
