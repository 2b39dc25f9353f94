"""A causal language model that runs in this process, through ``transformers``.

Prompts of one call share most of their tokens: the few-shot examples, and often the passage.
What is shared is computed once; :mod:`lce_trainer.synthesis.llm.tree` does it.
"""

import logging
import math
import re
import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lce_trainer.artifacts import digest
from lce_trainer.errors import LLMError
from lce_trainer.names import model_name, names_a_base
from lce_trainer.synthesis.cost import Usage
from lce_trainer.synthesis.llm.decode import decode, decode_plainly, sample
from lce_trainer.synthesis.llm.protocol import Each, LLMConfig, Need
from lce_trainer.synthesis.llm.replies import without_thinking
from lce_trainer.synthesis.llm.tree import common_prefix, cut_batches, last_logits, prefix_cache, takes_trees
from lce_trainer.synthesis.llm.weights import load_model, load_tokenizer
from lce_trainer.synthesis.prompts import Rendered, turns_of

logger = logging.getLogger(__name__)

TOP_TOKENS = 20  # the model abstains when no option is among these; a server reports no more
# Tokens of a forward pass by default: on a CPU what stays in its caches, on an accelerator what keeps it busy.
_CPU_TOKENS, _GPU_TOKENS = 1024, 16384
_WRITING = 16  # forward passes' worth of prompts that are written on together; each step reads all weights
_LOGSUMEXP_ROWS = 32  # of logits in float32 at once; one row is the whole vocabulary
_LOGSUMEXP_BYTES = 2**22  # of logits in float32 at once on a CPU: what fits its cache takes a third of the time


class TransformersLLM:
    """Any causal language model of the Hub, a folder, a GGUF file or an installed package.

    It is loaded at the first call, so a run whose answers are all journalled never loads it.
    """

    def __init__(self, config: LLMConfig) -> None:
        self._config = config
        self._memo: tuple[Sequence[int], Any] = ((), None)
        self._usage = Usage()

    @cached_property
    def name(self) -> str:
        """The model as the recipe writes it; of local files the last part of the path, and a digest."""
        return model_name(self._config.model)

    @cached_property
    def identity(self) -> str:
        """The name, and in a chat a digest of the template: the answers of a base model are those of its name."""
        return f"{self.name} chat {digest(self._template)[:8]}" if self._chats else self.name

    @property
    def usage(self) -> Usage:
        """Tokens in as they were encoded, whether they were computed or shared."""
        return self._usage

    def check(self, need: Need) -> None:
        """See :meth:`lce_trainer.synthesis.llm.protocol.LLM.check`; a model in this process can do everything."""
        how = "its chat template" if self._chats else "completion"
        logger.info("%s runs here and is spoken to by %s (llm.chat: %s)", self.name, how, self._config.chat)

    def reads(self, prompt: str) -> Any:
        """See :meth:`lce_trainer.synthesis.llm.protocol.LLM.reads`."""
        return turns_of(prompt) if self._chats else str(prompt)

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
        """See :meth:`lce_trainer.synthesis.llm.protocol.LLM.complete`."""
        began = time.monotonic()
        sequences = self._encode([self._text(prompt) for prompt in prompts], self._plain(prompts), max_new_tokens)
        past, cache = self._shared(sequences, [1] * len(sequences))
        answers = [""] * len(prompts)
        tokens_out = 0

        def text(tokens: Sequence[int]) -> str:
            said = str(self._tokenizer.decode(tokens, skip_special_tokens=True))
            return without_thinking(said) if self._chats else said

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
            tokens_out += sum(map(len, written))
            for index, said in zip(batch, map(text, written), strict=True):
                answers[index] = said[: _end(said, stop)]
        self._count(began, sequences, tokens_out)
        return answers

    def choose(
        self, prompts: Sequence[str], options: Sequence[Sequence[str]], each: Each | None = None
    ) -> list[list[float] | None]:
        """See :meth:`lce_trainer.synthesis.llm.protocol.LLM.choose`; probabilities are of the whole vocabulary."""
        began = time.monotonic()
        texts = [self._text(prompt) for prompt in prompts]
        plain = self._plain(prompts)
        sequences = self._encode(texts, plain)
        answers: list[list[float] | None] = [None] * len(prompts)
        for logits, places in self._last_logits(sequences, [1] * len(sequences)):
            for index, (place,) in places.items():
                probabilities = logits[place].to(_wide(logits)).softmax(-1)
                likeliest = set(probabilities.topk(min(TOP_TOKENS, len(probabilities))).indices.tolist())
                forms = self._first_tokens(texts[index], options, plain)
                if any(likeliest & tokens for tokens in forms):
                    masses = [sum(probabilities[token].item() for token in sorted(tokens)) for tokens in forms]
                    answers[index] = [mass / sum(masses) for mass in masses]
        self._count(began, sequences)
        return answers

    def score(self, prompts: Sequence[str], continuations: Sequence[str], each: Each | None = None) -> list[float]:
        """See :meth:`lce_trainer.synthesis.llm.protocol.LLM.score`.

        A token that the prompt and the continuation share, where a tokenizer joins the two, counts
        as the continuation's.
        """
        began = time.monotonic()
        rendered = {str(prompt): prompt for prompt in prompts}
        before = {text: self._text(prompt) for text, prompt in rendered.items()}
        texts = [before[str(prompt)] for prompt in prompts]
        if self._chats:
            continuations = [self._inert(text.strip()) for text in continuations]
        plain = self._plain(prompts)
        sequences = self._encode([text + more for text, more in zip(texts, continuations, strict=True)], plain)
        distinct = list(before.values())
        alone = dict(zip(distinct, self._encode(distinct, plain), strict=True))
        starts = [common_prefix([ids, alone[text]], [len(ids)]) for ids, text in zip(sequences, texts, strict=True)]
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
            rows = _LOGSUMEXP_BYTES // (4 * logits.shape[1]) if logits.device.type == "cpu" else _LOGSUMEXP_ROWS
            total = torch.cat([part.to(wide).logsumexp(1) for part in torch.split(logits, max(rows, 1))])
            logprobs = (logits[flat, targets].to(wide) - total[flat]).double().cpu().numpy()
            cuts = np.cumsum([len(at) for at in places.values()])[:-1]
            for index, part in zip(places, np.split(logprobs, cuts), strict=True):
                scores[index] = float(part.mean())
        for score, text in zip(scores, continuations, strict=True):
            if not math.isfinite(score):
                raise LLMError(f"{self.name} scores {text[:60]!r} as {score}: try llm.dtype=float32")
        self._count(began, sequences)
        return scores

    def _count(self, began: float, sequences: Sequence[Sequence[int]], tokens_out: int = 0) -> None:
        self._usage += Usage(
            calls=len(sequences),
            tokens_in=sum(map(len, sequences)),
            tokens_out=tokens_out,
            seconds=time.monotonic() - began,
        )

    @cached_property
    def _template(self) -> str | None:
        """The chat template of the model's own."""
        tokenizer = self._loaded[1] if "_loaded" in self.__dict__ else load_tokenizer(self._config)
        template: str | None = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None
        if isinstance(tokenizer.chat_template, dict):
            template = tokenizer.chat_template.get("default")
        return template

    @cached_property
    def _chats(self) -> bool:
        """Whether the model is spoken to in its chat template."""
        wanted = self._config.chat
        if wanted == "auto":
            return self._template is not None and not names_a_base(self.name)
        if wanted and self._template is None:
            raise LLMError(f"{self.name} has no chat template, and llm.chat is true: set llm.chat=false")
        return bool(wanted)

    def _text(self, prompt: str) -> str:
        """What is encoded: the prompt, or its turns in the chat template, up to where the model's own turn begins."""
        if not self._chats:
            return str(prompt)
        turns = [{**turn, "content": self._inert(turn["content"])} for turn in turns_of(prompt)]
        try:
            text = str(
                self._tokenizer.apply_chat_template(
                    turns,
                    chat_template=self._template,
                    tokenize=False,
                    add_generation_prompt=True,
                    enable_thinking=False,
                )
            )
        except Exception as error:  # a template can fail in any way its expressions can
            reason = " ".join(str(error).split()) or type(error).__name__
            raise LLMError(f"the chat template of {self.name} does not take the prompt: {reason}") from error
        # A template that makes every answer begin with thinking has it end at once.
        return f"{text}\n</think>\n\n" if text.rstrip().endswith("<think>") else text

    @cached_property
    def _control(self) -> re.Pattern[str]:
        """The tokenizer's control tokens, as they would be read in a text."""
        added = [str(token.content) for token in self._tokenizer.added_tokens_decoder.values() if token.special]
        tokens = sorted({*added, *self._tokenizer.all_special_tokens}, key=len, reverse=True)
        tokens = [token for token in tokens if len(token) > 1]  # one of a single character cannot be set apart
        return re.compile("|".join(map(re.escape, tokens)) or "(?!)")

    def _inert(self, text: str) -> str:
        """A text of data in which nothing is a control token: the first character is set apart."""
        while True:
            apart = self._control.sub(lambda found: f"{found.group()[0]} {found.group()[1:]}", text)
            if apart == text:
                return text
            text = apart

    def _plain(self, prompts: Sequence[str]) -> bool:
        """Whether nothing in the texts is a control token, which only templates may hold: a chat's, or the user's."""
        return not self._chats and not any(isinstance(prompt, Rendered) and prompt.has_control for prompt in prompts)

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

    def _encode(self, texts: Sequence[str], plain: bool, room: int = 0) -> list[list[int]]:
        """Token ids of each text, with the model's own start token; an error where one does not fit.

        Args:
            texts: What is encoded.
            plain: Whether control tokens in it are text like any other.
            room: Tokens that must fit behind it.
        """
        if not texts:
            return []
        encoded: list[list[int]] = self._tokenizer(
            list(texts), add_special_tokens=not self._chats, split_special_tokens=plain
        )["input_ids"]
        window = getattr(self._model.config.get_text_config(), "max_position_embeddings", None) or math.inf
        for index, ids in enumerate(encoded):
            if not ids or len(ids) + room > window:
                fits = f"at most {window - room} fit into {self.name}: shorten it (max_passage_words)"
                raise LLMError(
                    f"prompt {index + 1} of {len(texts)} ({texts[index][:40]!r}…) has {len(ids)} tokens; "
                    + (fits if ids else "it must hold some text")
                )
        return encoded

    def _first_tokens(self, prompt: str, options: Sequence[Sequence[str]], plain: bool) -> list[set[int]]:
        """The tokens that each option's forms start with after this prompt."""

        def encode(text: str) -> list[int]:
            found = self._tokenizer(text, add_special_tokens=False, split_special_tokens=plain)["input_ids"]
            return list(found)

        tail = prompt[-32:]
        before = encode(tail)
        found: list[set[int]] = []
        for forms in options:
            tokens = set()
            for form in forms:
                ids = encode(tail + form)
                if ids[: len(before)] != before:  # the tokenizer joins the prompt's end with the form
                    ids = [*before, *encode(form)]
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
