"""The template that a decoder reads a query and a passage in, which its tokenizer keeps.

An encoder's tokenizer parts the two texts by its own separators. A decoder's puts nothing between
them, so they go through a chat template with the roles ``query`` and ``document`` (and ``system``,
for another instruction). It lies in the checkpoint as ``chat_template.jinja``, survives saving and
pushing, and is what ``sentence_transformers.CrossEncoder`` renders pairs with, from its release 5.4
on. Whatever tokenizer has such a template, its pairs go through it, in training and after.

Pairs are tokenized as one text, as :class:`CrossEncoder` does, so that words join where the texts
meet; what does not fit is taken from the passage, and never from the query or the template.
"""

import importlib.resources
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from lce_trainer.errors import TrainingError
from lce_trainer.model.families import family_of, has_trained_head

logger = logging.getLogger(__name__)

_KEEPS = "special_tokens_in_texts"  # in tokenizer_config.json

JOINTS = 2  # tokens that a pair may have beyond those of its texts and its template, where these meet


@dataclass(frozen=True)
class PairTemplate:
    """The parts of a chat template for pairs.

    Attributes:
        head: Text before the query.
        middle: Between query and passage.
        tail: After the passage; the score is read at its last token.
        strips: Whether the texts lose the white space around them.
        structured: Whether the messages are lists of typed parts.
        tail_ids: Tokens that a pair ends with, whatever it holds.
        overhead: Tokens of a pair without query and passage, at most.
    """

    head: str
    middle: str
    tail: str
    strips: bool
    structured: bool
    tail_ids: tuple[int, ...] = ()
    overhead: int = 0

    def render(self, query: str, passage: str) -> str:
        """Return the text of a pair."""
        if self.strips:
            query, passage = query.strip(), passage.strip()
        return f"{self.head}{query}{self.middle}{passage}{self.tail}"


def pair_template(tokenizer: PreTrainedTokenizerBase) -> PairTemplate | None:
    """Return the template that a tokenizer's pairs go through; None if it joins pairs by its own separators.

    Raises:
        TrainingError: Its chat template loses the query or the passage, or puts the passage first.
    """
    return None if tokenizer.chat_template is None else _parse_template(tokenizer, str(tokenizer.chat_template))


def pair_overhead(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the number of tokens of a pair besides its query and passage, at most."""
    template = pair_template(tokenizer)
    return template.overhead if template else int(tokenizer.num_special_tokens_to_add(pair=True))


def configure_template(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """Have the tokenizer make pairs that the model can read.

    A decoder without a trained head gets ``pair_template.jinja``, unless its chat template is
    written for pairs, with the roles ``query`` and ``document``. A decoder that is a reranker
    keeps what it was trained with. An encoder keeps its separators.

    Args:
        tokenizer: Its ``chat_template`` may be set.
        config: The model's.

    Raises:
        TrainingError: The model is a trained reranker whose chat template does not hold a pair.
    """
    if is_for_pairs(tokenizer):
        pair_template(tokenizer)
    elif not family_of(config).is_decoder:
        tokenizer.chat_template = None  # for chats; a tokenizer that has one would put every pair through it
    elif not has_trained_head(config):
        begins = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        tokenizer.chat_template = ("{{ bos_token }}" if begins else "") + _default_template()
        logger.info("pairs go through pair_template.jinja, which is saved with the model")
    elif tokenizer.chat_template is not None:
        pair_template(tokenizer)
    else:
        logger.warning(
            "this decoder's tokenizer has no template for pairs, so query and passage are joined with nothing between "
            "them; set tokenizer.chat_template to what the model was trained with"
        )


def is_for_pairs(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the chat template names the roles ``query`` and ``document``."""
    named = re.findall(r"""["'](query|document)["']""", str(tokenizer.chat_template or ""))
    return set(named) == {"query", "document"}


def plain_backend(tokenizer: PreTrainedTokenizerBase) -> Any:
    """Return the tokenizer's own engine, set to cut and pad nothing, and to read special tokens in texts as text.

    Where pairs go through a template, whose special tokens keep their meaning, those of texts are left to
    :func:`as_text`.
    """
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.chat_template is None and not keeps_special_tokens(tokenizer)
    return backend


def keep_special_tokens(tokenizer: PreTrainedTokenizerBase, keep: bool | None) -> None:
    """Set whether special tokens that stand in a query or passage, such as ``[SEP]``, keep their meaning.

    The choice is saved in ``tokenizer_config.json``. Without a template ``split_special_tokens`` is set besides, by
    which other loaders of the checkpoint read them as text too.

    Args:
        tokenizer: Is changed; its chat template must be the one of its pairs.
        keep: None leaves the choice that the tokenizer was saved with: they are text where it has none.
    """
    keep = keeps_special_tokens(tokenizer) if keep is None else keep
    tokenizer.init_kwargs.pop(_KEEPS, None)
    if keep:
        tokenizer.init_kwargs[_KEEPS] = True
    splits = tokenizer.chat_template is None and not keep  # it would split those of a template as well
    tokenizer.split_special_tokens = tokenizer.init_kwargs["split_special_tokens"] = splits


def keeps_special_tokens(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether special tokens in texts keep their meaning; see :func:`keep_special_tokens`."""
    return bool(tokenizer.init_kwargs.get(_KEEPS, False))


def as_text(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[str]:
    """Return texts in which nothing is read as a special token: ``<|im_end|>`` becomes ``< |im_end|>``.

    Only what the tokenizer would not take for text by itself is changed; and nothing, where special tokens in texts
    shall keep their meaning.
    """
    if keeps_special_tokens(tokenizer):
        return list(texts)
    pattern = _control_tokens(tokenizer, str(tokenizer.chat_template or ""), len(tokenizer))
    return list(texts) if pattern is None else [_set_apart(pattern, text) for text in texts]


def _set_apart(pattern: re.Pattern[str], text: str) -> str:
    while pattern.search(text):  # tokens can overlap, so that setting one apart leaves another
        text = pattern.sub(lambda found: f"{found.group()[0]} {found.group()[1:]}", text)
    return text


@lru_cache(maxsize=16)
def _control_tokens(tokenizer: PreTrainedTokenizerBase, template: str, size: int) -> re.Pattern[str] | None:
    """Return what finds the special tokens of texts; ``template`` and ``size`` make the cache notice changes."""
    added = [token for token in tokenizer.added_tokens_decoder.values() if token.special or token.content in template]
    tokens = {str(token.content) for token in added} | set(tokenizer.all_special_tokens)
    if tokenizer.is_fast and not template:
        # A unigram model may have <pad> among its own pieces.
        backend = plain_backend(tokenizer)
        around = ("{}", "a {} a", "a{}a")
        tokens = {
            token
            for token in tokens - {tokenizer.unk_token}
            for form in around
            if backend.token_to_id(token) in backend.encode(form.format(token), add_special_tokens=False).ids
        }
    long = sorted((token for token in tokens if len(token) > 1), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, long))) if long else None


def _default_template() -> str:
    source = importlib.resources.files("lce_trainer.model").joinpath("pair_template.jinja").read_text(encoding="utf-8")
    return source.removesuffix("\n")


@lru_cache(maxsize=16)
def _parse_template(tokenizer: PreTrainedTokenizerBase, source: str) -> PairTemplate:
    """Parse a tokenizer's chat template; ``source``, its text, makes the cache notice another one."""
    query, passage = "queryqzx", "passageqzx"
    for structured in (False, True):
        head, _, rest = _rendered(tokenizer, query, passage, structured).partition(query)
        middle, found, tail = rest.partition(passage)
        for strips in (False, True):
            template = PairTemplate(head, middle, tail, strips, structured)
            probe = ("  two words ", "\n a passage\n")
            if found and template.render(*probe) == _rendered(tokenizer, *probe, structured):
                return _with_token_counts(tokenizer, template)
    raise TrainingError(
        "the tokenizer's chat template does not hold a query and then a document, each as it is, from messages of "
        f"these roles: {source[:200]!r}; set tokenizer.chat_template to one that does, like "
        "lce_trainer/model/pair_template.jinja"
    )


def _rendered(tokenizer: PreTrainedTokenizerBase, query: str, passage: str, structured: bool) -> str:
    texts = {"query": query, "document": passage}
    messages = [
        {"role": role, "content": [{"type": "text", "text": text}] if structured else text}
        for role, text in texts.items()
    ]
    # A template can fail in any way its expressions can; one that fails holds no pair.
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:
        logger.debug("the chat template failed: %s", error)
        return ""


def _with_token_counts(tokenizer: PreTrainedTokenizerBase, template: PairTemplate) -> PairTemplate:
    """Add a template's token counts, found as sentence-transformers finds them: by what two renderings share."""
    backend = plain_backend(tokenizer)
    texts = [template.render(text, text) for text in ("0", "1 2 3 4", "")]
    one, other, empty = (encoding.ids for encoding in backend.encode_batch(texts, add_special_tokens=False))
    shared = next((i for i, (a, b) in enumerate(zip(one[::-1], other[::-1], strict=False)) if a != b), 0)
    overhead = max(len(empty), len(one) - 2) + JOINTS
    return replace(template, tail_ids=tuple(one[len(one) - shared :]), overhead=overhead)
