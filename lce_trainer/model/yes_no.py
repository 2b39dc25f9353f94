"""Rerankers that answer yes or no: language models as they are, scored by logit(yes) - logit(no).

The chat template of such a model, like Qwen3-Reranker, puts a question about a pair, and the answer is
read off its language-model head at the last token. It is loaded, trained and saved as the
``ForCausalLM`` checkpoint that it is, so that whoever else uses it goes on as before. Turned into
a classifier with one label, as is also done, it would score the same, but its head would no longer
be part of the language model, its format another, and a tied embedding would have to be untied.

Which tokens answer is in the config, under ``sentence_transformers``, and in the
``1_LogitScore`` of ``modules.json``, where ``sentence_transformers.CrossEncoder`` reads it. A
language model whose config names none is a base for a new classification head, unless ``yes_no`` is
true; the prompt is then that of Qwen3-Reranker, in the model's own chat format.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lce_trainer.errors import TrainingError
from lce_trainer.model.template import is_for_pairs, pair_template

logger = logging.getLogger(__name__)

# Source: the model card of https://huggingface.co/Qwen/Qwen3-Reranker-0.6B.
_SYSTEM = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".'
)
_INSTRUCT = "Given a web search query, retrieve relevant passages that answer the query"
_MARKS = {"system": "instructqzx", "query": "queryqzx", "document": "documentqzx"}


def pair_logits(model: nn.Module, inputs: Mapping[str, Tensor], unwrapped: PreTrainedModel) -> Tensor:
    """Return the logit of each pair of a padded batch.

    Args:
        model: The reranker; it may be wrapped for training.
        inputs: ``input_ids`` and whatever else the model takes of that shape, ``(pairs, width)``,
            padded on the right.
        unwrapped: The reranker itself.

    Returns:
        Shape ``(pairs,)``; float32 or wider if the answer is yes or no, since the difference of two
        rounded logits would be a coarse score.
    """
    answers = answers_of(unwrapped)
    if answers is None:
        logits: Tensor = model(**inputs).logits
        return logits[:, 0]
    mask = inputs["attention_mask"]
    # Padding goes to the left, so that the last token is in one place and the head reads no other.
    position = torch.arange(mask.shape[1], device=mask.device) - (mask.shape[1] - mask.sum(dim=1, keepdim=True))
    position_ids = position.clamp(min=0)
    with _only_rows(unwrapped.get_output_embeddings(), answers):
        logits = model(
            input_ids=inputs["input_ids"].gather(1, position_ids),
            attention_mask=(position >= 0).to(mask.dtype),
            position_ids=position_ids,
            logits_to_keep=1,
        ).logits[:, -1]
    return _difference(logits, answers)


def answer_scores(model: PreTrainedModel, states: Tensor) -> Tensor:
    """Return the score of each pair from the last layer's state at its last token.

    Args:
        model: A language model that answers yes or no.
        states: Shape ``(pairs, width)``.

    Returns:
        Shape ``(pairs,)``, as of :func:`pair_logits`.
    """
    head, answers = model.get_output_embeddings(), answer_ids(model.config) or ()
    with _only_rows(head, answers):
        return _difference(head(states), answers)


def _difference(logits: Tensor, answers: Sequence[int]) -> Tensor:
    """logit(yes) - logit(no), or logit(yes) if that is the only answer, of logits of these rows or of all."""
    chosen = range(len(answers)) if logits.shape[-1] == len(answers) else answers
    scores = logits[:, chosen[0]]
    return scores - logits[:, chosen[1]] if len(answers) > 1 else scores


def answers_of(model: Any) -> tuple[int, ...] | None:
    """Return the tokens that a reranker answers with, yes first; None if it has a classification head."""
    return answer_ids(model.config) if is_language_model(model) else None


def answer_ids(config: PreTrainedConfig) -> tuple[int, ...] | None:
    """Return the tokens that answer, yes first, by a config; None if it does not name them."""
    ids = (getattr(config, "sentence_transformers", None) or {}).get("answer_ids")
    return None if ids is None else tuple(ids)


def set_answer_ids(config: PreTrainedConfig, answers: Sequence[int]) -> None:
    """Write into a config which tokens answer, yes first."""
    config.sentence_transformers = {
        **(getattr(config, "sentence_transformers", None) or {}),
        "answer_ids": list(answers),
    }


def is_language_model(model: Any) -> bool:
    """Return whether a model has a language-model head, with adapters or without."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "ForCausalLM" in type(base).__name__


def configure_answers(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """Set in the config of a language model which tokens answer, and in its tokenizer the question about a pair.

    Raises:
        TrainingError: yes or no is not one token, or there is no chat template to ask by.
    """
    if answer_ids(config) is None:
        ids = [tokenizer.convert_tokens_to_ids(answer) for answer in ("yes", "no")]
        if None in ids or tokenizer.unk_token_id in ids:
            raise TrainingError(
                "the tokenizer has no tokens 'yes' and 'no', so this language model cannot answer with one; load it as "
                "AutoModelForSequenceClassification with num_labels=1, which gives it a new head"
            )
        set_answer_ids(config, ids)
        if not is_for_pairs(tokenizer):
            tokenizer.chat_template = question_template(tokenizer)
            logger.info("the question to the language model is whether a document meets the query: yes or no")
    pair_template(tokenizer)


def question_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Qwen3-Reranker's question about a pair, in a model's own chat format.

    Returns:
        A chat template of the roles ``query`` and ``document``, and ``system`` for another instruction.

    Raises:
        TrainingError: The tokenizer has no chat template, or one that does not render a question.
    """
    user = "<Instruct>: {system}\n<Query>: {query}\n<Document>: {document}".format_map(_MARKS)
    chats = [
        [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": user}],
        [{"role": "user", "content": f"{_SYSTEM}\n\n{user}"}],  # some know no system role
    ]
    for chat in chats if tokenizer.chat_template else []:
        # A template can fail in any way its expressions can.
        try:
            text = tokenizer.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
        except Exception as error:
            logger.debug("the chat template failed: %s", error)
            continue
        if _SYSTEM in text and user in text:
            return _as_template(text)
    raise TrainingError(
        "to answer yes or no about a pair the model needs a chat template: set tokenizer.chat_template, or load the "
        "model as AutoModelForSequenceClassification with num_labels=1, which gives it a new head"
    )


def _as_template(text: str) -> str:
    """Return a chat template that renders the text, with the messages in place of the marks."""
    pieces, rest = [], text
    for role, mark in _MARKS.items():
        before, _, rest = rest.partition(mark)
        content = f'messages | selectattr("role", "eq", "{role}") | map(attribute="content") | first'
        default = f" | default({json.dumps(_INSTRUCT)})" if role == "system" else ""
        pieces += [json.dumps(before, ensure_ascii=False), content + default]
    return "".join(f"{{{{ {piece} }}}}" for piece in [*pieces, json.dumps(rest, ensure_ascii=False)])


@contextmanager
def _only_rows(head: nn.Module | None, rows: Sequence[int]) -> Iterator[None]:
    """Let a plain linear head compute these rows alone, in float32 or wider, whatever autocast says."""
    if type(head) is not nn.Linear or "forward" in head.__dict__:
        yield
        return

    def forward(states: Tensor) -> Tensor:
        wide = torch.promote_types(states.dtype, torch.float32)
        with torch.autocast(states.device.type, enabled=False):
            bias = None if head.bias is None else head.bias[list(rows)].to(wide)
            return F.linear(states.to(wide), head.weight[list(rows)].to(wide), bias)

    head.forward = forward  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del head.forward
