"""A causal language model that runs in this process, through ``transformers``.

Prompts of one call share most of their tokens: the few-shot examples, and often the passage.
What is shared is computed once, as a key-value cache that the rest starts from.
"""

import contextlib
import copy
import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from lce_trainer.config import LLMConfig
from lce_trainer.errors import LLMError
from lce_trainer.llm_loading import load_model

TOP_TOKENS = 20  # the model abstains when no option is among these; a server reports no more
_LOGIT_ROWS = 256  # rows of logits a forward pass makes at most; one row is the whole vocabulary
_WORTH_SHARING = 24  # tokens; a shorter common context is cheaper to compute twice than to keep
_CANDIDATES = 256  # tokens looked at first for the nucleus, before the whole vocabulary is sorted


class TransformersLLM:
    """Any causal language model of the Hub, a folder, a GGUF file or an installed package.

    It is loaded at the first call, so a run whose answers are all journalled never loads it.

    Attributes:
        name: The model as the recipe writes it; of a local path only the last part.
    """

    def __init__(self, config: LLMConfig) -> None:
        path = Path(config.model).expanduser()
        self.name = path.name if path.is_absolute() or path.exists() else config.model
        self._config = config
        self._memo: tuple[Sequence[int], Any] = ((), None)

    def complete(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        seeds: Sequence[int],
        stop: Sequence[str],
    ) -> list[str]:
        """See :meth:`lce_trainer.llm.LLM.complete`."""
        sequences = self._encode(prompts, room=max_new_tokens)
        shared = _common_prefix(sequences, [len(ids) - 1 for ids in sequences])
        window = getattr(self._model.config.get_text_config(), "sliding_window", None)
        if window and max(map(len, sequences), default=0) + max_new_tokens > window:
            shared = 0  # padding stands between the prefix and the rest, and a sliding window would count it
        answers = [""] * len(prompts)
        for batch in self._batches([len(ids) - shared for ids in sequences]):
            width = max(len(sequences[index]) for index in batch)
            input_ids, mask = [], []
            for ids in (sequences[index] for index in batch):
                pads = width - len(ids)
                input_ids.append([*ids[:shared], *[0] * pads, *ids[shared:]])
                mask.append([1] * shared + [0] * pads + [1] * (width - shared - pads))
            sampling = _Sampling([seeds[index] for index in batch], width, temperature, top_p)
            with _clear_errors(), torch.inference_mode():
                output = self._model.generate(
                    self._tensor(input_ids),
                    attention_mask=self._tensor(mask),
                    past_key_values=_copies(self._prefix(sequences[0][:shared]), len(batch)),
                    generation_config=GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False),
                    logits_processor=LogitsProcessorList([sampling] if temperature > 0 else []),
                    stopping_criteria=StoppingCriteriaList([_Stop(self._tokenizer, stop, width)] if stop else []),
                )
            texts = self._tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
            for index, text in zip(batch, texts, strict=True):
                answers[index] = text[: _end(text, stop)]
        return answers

    def choose(self, prompts: Sequence[str], options: Sequence[Sequence[str]]) -> list[list[float] | None]:
        """See :meth:`lce_trainer.llm.LLM.choose`; probabilities are of the whole vocabulary."""
        sequences = self._encode(prompts)
        answers: list[list[float] | None] = [None] * len(prompts)
        for index, logits in self._last_logits(sequences, [1] * len(sequences)):
            probabilities = logits[0].softmax(-1)
            likeliest = set(probabilities.topk(min(TOP_TOKENS, len(probabilities))).indices.tolist())
            forms = self._first_tokens(prompts[index], options)
            if any(likeliest & tokens for tokens in forms):
                masses = [sum(probabilities[token].item() for token in sorted(tokens)) for tokens in forms]
                answers[index] = [mass / sum(masses) for mass in masses]
        return answers

    def score(self, prompts: Sequence[str], continuations: Sequence[str]) -> list[float]:
        """See :meth:`lce_trainer.llm.LLM.score`.

        A token that the prompt and the continuation share, where a tokenizer joins the two, counts
        as the continuation's.
        """
        sequences = self._encode([prompt + text for prompt, text in zip(prompts, continuations, strict=True)])
        distinct = list(dict.fromkeys(prompts))
        alone = dict(zip(distinct, self._encode(distinct), strict=True))
        starts = [
            _common_prefix([ids, alone[prompt]], [len(ids)]) for ids, prompt in zip(sequences, prompts, strict=True)
        ]
        for index, (ids, start) in enumerate(zip(sequences, starts, strict=True)):
            if start == 0 or start == len(ids):
                what = "continuation" if start else "prompt"
                raise LLMError(f"pair {index + 1} of {len(prompts)} has no tokens in its {what}: nothing to score")
        scores = [math.nan] * len(prompts)
        lengths = [len(ids) - start for ids, start in zip(sequences, starts, strict=True)]
        for index, logits in self._last_logits([ids[:-1] for ids in sequences], lengths):
            targets = self._tensor(sequences[index][starts[index] :])
            logprobs = logits.gather(1, targets[:, None]).squeeze(1) - logits.logsumexp(1)
            scores[index] = logprobs.mean().item()
            if not math.isfinite(scores[index]):
                text = continuations[index][:60]
                raise LLMError(f"{self.name} scores {text!r} as {scores[index]}: try llm.dtype=float32")
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

    def _batches(self, lengths: Sequence[int], rows: Sequence[int] | None = None) -> Iterator[list[int]]:
        """Indices in batches of like length, each within the token budget padded; longest first."""
        rows = rows or [1] * len(lengths)
        batch: list[int] = []
        for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
            padded = (len(batch) + 1) * lengths[batch[0]] if batch else 0
            if padded > self._config.batch_tokens or sum(rows[i] for i in batch) + rows[index] > _LOGIT_ROWS:
                if batch:
                    yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch

    def _last_logits(self, sequences: list[list[int]], rows: list[int]) -> Iterator[tuple[int, Tensor]]:
        """Logits after each of the last ``rows[i]`` tokens of sequence ``i``, in no particular order.

        Yields:
            Index of a sequence and its logits, shape ``(rows[i], vocabulary)``, float32 or wider.
        """
        shared = _common_prefix(sequences, [len(ids) - count for ids, count in zip(sequences, rows, strict=True)])
        prefix = self._prefix(sequences[0][:shared]) if sequences else None
        by_context: dict[tuple[int, ...], list[int]] = {}
        for index, (ids, count) in enumerate(zip(sequences, rows, strict=True)):
            by_context.setdefault(tuple(ids[: len(ids) - count]), []).append(index)
        alone = []
        for context, members in by_context.items():
            if len(members) > 1 and len(context) - shared >= _WORTH_SHARING:
                cache = self._extend(prefix, context[shared:])
                yield from self._forward(cache, len(context), members, sequences, rows)
            else:
                alone.extend(members)
        yield from self._forward(prefix, shared, alone, sequences, rows)

    def _forward(
        self, cache: Any, past: int, members: Sequence[int], sequences: list[list[int]], rows: list[int]
    ) -> Iterator[tuple[int, Tensor]]:
        """:meth:`_last_logits` of some sequences whose first ``past`` tokens are in ``cache``."""
        lengths = [len(sequences[index]) - past for index in members]
        for batch in self._batches(lengths, [rows[index] for index in members]):
            width = max(lengths[i] for i in batch)
            input_ids = self._tensor([sequences[members[i]][past:] + [0] * (width - lengths[i]) for i in batch])
            ends = self._tensor([[lengths[i]] for i in batch])
            counts = self._tensor([[rows[members[i]]] for i in batch])
            position = torch.arange(width, device=ends.device)
            wanted = (position < ends) & (position >= ends - counts)
            # Padding is on the right, where causal attention never looks, so no mask is needed. Only the
            # wanted rows go through the head; the model's own scaling and capping of logits still applies.
            head = self._model.get_output_embeddings()
            hook = head.register_forward_pre_hook(lambda _, args, wanted=wanted: (args[0][wanted][None], *args[1:]))
            try:
                with _clear_errors(), torch.inference_mode():
                    logits = self._model(
                        input_ids, past_key_values=_copies(cache, len(batch)), use_cache=cache is not None
                    ).logits[0]
            finally:
                hook.remove()
            logits = logits.split([rows[members[i]] for i in batch])
            for i, part in zip(batch, logits, strict=True):
                yield members[i], part.to(torch.promote_types(part.dtype, torch.float32))

    def _prefix(self, ids: Sequence[int]) -> Any:
        """The cache of a call's common prefix; the last one is kept for the next call."""
        if not ids:
            return None
        if ids != self._memo[0]:
            self._memo = (ids, self._extend(None, ids))
        return self._memo[1]

    def _extend(self, cache: Any, ids: Sequence[int]) -> Any:
        """A new cache: what ``cache`` holds, then ``ids``."""
        with _clear_errors(), torch.inference_mode():
            return self._model(
                self._tensor([list(ids)]), past_key_values=_copies(cache, 1), use_cache=True, logits_to_keep=1
            ).past_key_values


class _Sampling(LogitsProcessor):  # type: ignore[misc]
    """Leaves one token a row, drawn by the Gumbel-max trick from temperature and nucleus.

    The noise is a hash of the row's seed, the step and the token: no random state, so a row's
    tokens do not depend on its batch, and near-equal logits of another batch rarely change them.
    """

    def __init__(self, seeds: Sequence[int], width: int, temperature: float, top_p: float) -> None:
        self.seeds = seeds
        self.width = width
        self.temperature = temperature
        self.top_p = top_p

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logprobs = (scores / self.temperature).log_softmax(-1)
        vocabulary = scores.shape[-1]
        keep = vocabulary if self.top_p >= 1 else min(_CANDIDATES, vocabulary)
        while True:
            top, tokens = logprobs.topk(keep)
            probabilities = top.exp()
            nucleus = probabilities.cumsum(-1) - probabilities < self.top_p
            if keep == vocabulary or not nucleus[:, -1].any():
                break
            keep = min(keep * 16, vocabulary)
        noise = _gumbel(self.seeds, input_ids.shape[1] - self.width, tokens)
        drawn = (top + noise).masked_fill(~nucleus, -math.inf).argmax(-1, keepdim=True)
        return torch.full_like(scores, -math.inf).scatter_(1, tokens.gather(1, drawn), 0.0)


class _Stop(StoppingCriteria):  # type: ignore[misc]
    """Ends a row once its continuation holds a stop string."""

    def __init__(self, tokenizer: Any, stop: Sequence[str], width: int) -> None:
        self.tokenizer = tokenizer
        self.stop = stop
        self.width = width

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        texts = self.tokenizer.batch_decode(input_ids[:, self.width :], skip_special_tokens=True)
        return torch.tensor([_end(text, self.stop) < len(text) for text in texts], device=input_ids.device)


def _end(text: str, stop: Sequence[str]) -> int:
    """Where the first stop string begins, or the text's length."""
    return min((place for place in map(text.find, stop) if place >= 0), default=len(text))


def _gumbel(seeds: Sequence[int], step: int, tokens: Tensor) -> Tensor:
    """Standard Gumbel noise, shape of ``tokens``, a function of (row's seed, step, token) alone.

    The hash is splitmix64 (Steele, Lea & Flood 2014, https://doi.org/10.1145/2660193.2660195).
    """
    state = torch.tensor([seed % 2**63 for seed in seeds], device=tokens.device)[:, None]
    for value in (torch.tensor(step, device=tokens.device), tokens):
        state = state + (value + 1) * -0x61C8864680B583EB
        state = (state ^ (state >> 30 & 2**34 - 1)) * -0x40A7B892E31B1A47
        state = (state ^ (state >> 27 & 2**37 - 1)) * -0x6B2FB644ECCEEE15
        state = state ^ (state >> 31 & 2**33 - 1)
    uniform = ((state & 2**23 - 1).float() + 0.5) * 2.0**-23
    return -torch.log(-torch.log(uniform))


def _common_prefix(sequences: Sequence[list[int]], limits: Sequence[int]) -> int:
    """Length of the prefix that all sequences share, at most the least limit; 0 for fewer than two."""
    if len(sequences) < 2:
        return 0
    first, last = min(sequences), max(sequences)
    shared = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return min(shared, *limits)


def _copies(cache: Any, count: int) -> Any:
    """A cache for ``count`` rows that a forward pass may write into."""
    if cache is None:
        return None
    cache = copy.deepcopy(cache)
    if count > 1:
        cache.batch_repeat_interleave(count)
    return cache


@contextlib.contextmanager
def _clear_errors() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise LLMError("the accelerator ran out of memory: lower llm.batch_tokens") from None
