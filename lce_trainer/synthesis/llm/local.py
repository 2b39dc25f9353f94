"""A causal language model that runs in this process, through ``transformers``.

Prompts of one call share most of their tokens: the few-shot examples, and often the passage.
What is shared is computed once; :mod:`lce_trainer.synthesis.llm.tree` does it.
"""

import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lce_trainer.errors import LLMError
from lce_trainer.names import model_name
from lce_trainer.synthesis.llm.decode import decode, decode_plainly, sample
from lce_trainer.synthesis.llm.protocol import Each, LLMConfig
from lce_trainer.synthesis.llm.tree import common_prefix, cut_batches, last_logits, prefix_cache, takes_trees
from lce_trainer.synthesis.llm.weights import load_model

TOP_TOKENS = 20  # the model abstains when no option is among these; a server reports no more
# Tokens of a forward pass by default: on a CPU what stays in its caches, on an accelerator what keeps it busy.
_CPU_TOKENS, _GPU_TOKENS = 1024, 16384
_WRITING = 4  # forward passes' worth of prompts that are written on together; each step reads all weights
_LOGSUMEXP_ROWS = 32  # rows of logits in float32 at once; one row is the whole vocabulary


class TransformersLLM:
    """Any causal language model of the Hub, a folder, a GGUF file or an installed package.

    It is loaded at the first call, so a run whose answers are all journalled never loads it.
    """

    def __init__(self, config: LLMConfig) -> None:
        self._config = config
        self._memo: tuple[Sequence[int], Any] = ((), None)

    @cached_property
    def name(self) -> str:
        """The model as the recipe writes it; of local files the last part of the path, and a digest."""
        return model_name(self._config.model)

    def complete(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        seeds: Sequence[int],
        stop: Sequence[str],
        each: Each | None = None,
    ) -> list[str]:
        """See :meth:`lce_trainer.synthesis.llm.LLM.complete`."""
        sequences = self._encode(prompts, room=max_new_tokens)
        past, cache = self._shared(sequences, [1] * len(sequences))
        answers = [""] * len(prompts)

        def text(tokens: Sequence[int]) -> str:
            return str(self._tokenizer.decode(tokens, skip_special_tokens=True))

        def ended(tokens: Sequence[int]) -> bool:
            return bool(stop) and _end(said := text(tokens), stop) < len(said)

        for batch in cut_batches([len(ids) - past for ids in sequences], _WRITING * self._budget):
            inside = [sequences[index] for index in batch]

            def draw(logits: Tensor, rows: Sequence[int], step: int, batch: Sequence[int] = batch) -> Tensor:
                return sample(logits, [seeds[batch[row]] for row in rows], step, temperature, top_p)

            if self._trees:
                written = decode(self._model, inside, cache, past, max_new_tokens, draw, ended, self._budget)
            else:
                written = decode_plainly(self._model, inside, max_new_tokens, draw, ended)
            for index, said in zip(batch, map(text, written), strict=True):
                answers[index] = said[: _end(said, stop)]
        return answers

    def choose(
        self, prompts: Sequence[str], options: Sequence[Sequence[str]], each: Each | None = None
    ) -> list[list[float] | None]:
        """See :meth:`lce_trainer.synthesis.llm.LLM.choose`; probabilities are of the whole vocabulary."""
        sequences = self._encode(prompts)
        answers: list[list[float] | None] = [None] * len(prompts)
        for logits, places in self._last_logits(sequences, [1] * len(sequences)):
            for index, (place,) in places.items():
                probabilities = logits[place].to(_wide(logits)).softmax(-1)
                likeliest = set(probabilities.topk(min(TOP_TOKENS, len(probabilities))).indices.tolist())
                forms = self._first_tokens(prompts[index], options)
                if any(likeliest & tokens for tokens in forms):
                    masses = [sum(probabilities[token].item() for token in sorted(tokens)) for tokens in forms]
                    answers[index] = [mass / sum(masses) for mass in masses]
        return answers

    def score(self, prompts: Sequence[str], continuations: Sequence[str], each: Each | None = None) -> list[float]:
        """See :meth:`lce_trainer.synthesis.llm.LLM.score`.

        A token that the prompt and the continuation share, where a tokenizer joins the two, counts
        as the continuation's.
        """
        sequences = self._encode([prompt + text for prompt, text in zip(prompts, continuations, strict=True)])
        distinct = list(dict.fromkeys(prompts))
        alone = dict(zip(distinct, self._encode(distinct), strict=True))
        starts = [
            common_prefix([ids, alone[prompt]], [len(ids)]) for ids, prompt in zip(sequences, prompts, strict=True)
        ]
        for index, (ids, start) in enumerate(zip(sequences, starts, strict=True)):
            if start == 0 or start == len(ids):
                what = "continuation" if start else "prompt"
                raise LLMError(f"pair {index + 1} of {len(prompts)} has no tokens in its {what}: nothing to score")
        scores = [math.nan] * len(prompts)
        lengths = [len(ids) - start for ids, start in zip(sequences, starts, strict=True)]
        for logits, places in self._last_logits([ids[:-1] for ids in sequences], lengths):
            flat = self._tensor([place for at in places.values() for place in at])
            targets = self._tensor([token for index in places for token in sequences[index][starts[index] :]])
            wide = _wide(logits)
            total = torch.cat([part.to(wide).logsumexp(1) for part in torch.split(logits, _LOGSUMEXP_ROWS)])
            logprobs = (logits[flat, targets].to(wide) - total[flat]).double().cpu().numpy()
            cuts = np.cumsum([len(at) for at in places.values()])[:-1]
            for index, part in zip(places, np.split(logprobs, cuts), strict=True):
                scores[index] = float(part.mean())
        for score, text in zip(scores, continuations, strict=True):
            if not math.isfinite(score):
                raise LLMError(f"{self.name} scores {text[:60]!r} as {score}: try llm.dtype=float32")
        return scores

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        return load_model(self._config)

    @property
    def _model(self) -> Any:
        return self._loaded[0]

    @property
    def _tokenizer(self) -> Any:
        return self._loaded[1]

    @property
    def _budget(self) -> int:
        return self._config.batch_tokens or (_CPU_TOKENS if self._model.device.type == "cpu" else _GPU_TOKENS)

    @cached_property
    def _trees(self) -> bool:
        return takes_trees(self._model)

    def _tensor(self, values: Sequence[Any]) -> Tensor:
        return torch.tensor(values, device=self._model.device)

    def _encode(self, texts: Sequence[str], room: int = 0) -> list[list[int]]:
        """Token ids of each text, with the model's own start token; an error where one does not fit."""
        if not texts:
            return []
        encoded: list[list[int]] = self._tokenizer(list(texts))["input_ids"]
        window = getattr(self._model.config.get_text_config(), "max_position_embeddings", None) or math.inf
        for index, ids in enumerate(encoded):
            if not ids or len(ids) + room > window:
                fits = f"at most {window - room} fit into {self.name}: shorten it (max_passage_words)"
                raise LLMError(
                    f"prompt {index + 1} of {len(texts)} ({texts[index][:40]!r}…) has {len(ids)} tokens; "
                    + (fits if ids else "it must hold some text")
                )
        return encoded

    def _first_tokens(self, prompt: str, options: Sequence[Sequence[str]]) -> list[set[int]]:
        """The tokens that each option's forms start with after this prompt."""
        tail = prompt[-32:]
        before = self._tokenizer(tail, add_special_tokens=False)["input_ids"]
        found: list[set[int]] = []
        for forms in options:
            tokens = set()
            for form in forms:
                ids = self._tokenizer(tail + form, add_special_tokens=False)["input_ids"]
                if ids[: len(before)] != before:  # the tokenizer joins the prompt's end with the form
                    ids = [*before, *self._tokenizer(form, add_special_tokens=False)["input_ids"]]
                tokens.update(ids[len(before) : len(before) + 1])
            if not tokens or any(tokens & others for others in found):
                raise LLMError(f"the option {list(forms)!r} cannot be told from the others by its first token")
            found.append(tokens)
        return found

    def _last_logits(
        self, sequences: list[list[int]], counts: list[int]
    ) -> Iterator[tuple[Tensor, dict[int, list[int]]]]:
        """See :func:`lce_trainer.synthesis.llm.tree.last_logits`."""
        past, cache = self._shared(sequences, counts)
        if sequences:
            yield from last_logits(self._model, sequences, counts, cache, past, self._budget, trees=self._trees)

    def _shared(self, sequences: list[list[int]], counts: list[int]) -> tuple[int, Any]:
        """How many tokens a call's sequences share before those that are read, and their cache.

        The last one is kept for the next call. It depends on the call alone, and so do the answers.
        """
        past = common_prefix(sequences, [len(ids) - count for ids, count in zip(sequences, counts, strict=True)])
        if not past or not self._trees:
            return 0, None
        if sequences[0][:past] != self._memo[0]:
            self._memo = (sequences[0][:past], prefix_cache(self._model, sequences[0][:past]))
        return past, self._memo[1]


def _wide(logits: Tensor) -> torch.dtype:
    """At least float32."""
    return torch.promote_types(logits.dtype, torch.float32)


def _end(text: str, stop: Sequence[str]) -> int:
    """Where the first stop string begins, or the text's length."""
    return min((place for place in map(text.find, stop) if place >= 0), default=len(text))
