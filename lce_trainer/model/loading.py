"""Load models and tokenizers, to be trained or to score, and make them fit together."""

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lce_trainer.compat import without_sharding
from lce_trainer.errors import TrainingError
from lce_trainer.model.adapters import load_merged
from lce_trainer.model.crossencoder import apply_prompt_settings, logit_score_tokens, read_json
from lce_trainer.model.families import family_of, first_position, has_trained_head, is_head_weight
from lce_trainer.model.modular import configure_head, read_modular_head, set_head
from lce_trainer.model.template import configure_template, keep_special_tokens
from lce_trainer.model.yes_no import answer_ids, configure_answers, is_language_model, set_answer_ids
from lce_trainer.names import failed, load_checkpoint, load_tokenizer_files, resolve_model

logger = logging.getLogger(__name__)


def load_model(
    name: str | Path,
    *,
    dropout: float | None = None,
    dtype: torch.dtype | str = torch.float32,
    yes_no: bool | None = None,
    trained: bool = False,
) -> PreTrainedModel:
    """Load a sequence classifier with one label, or a language model that answers yes or no.

    Args:
        name: Hub id, folder, or ``package:NAME/FOLDER``. A base gets a new head, from torch's RNG, which is logged;
            adapters are merged into their base, and a modular CrossEncoder becomes a plain classifier, see
            :mod:`lce_trainer.model.modular`.
        dropout: Set every dropout of the model to this; as configured if None.
        dtype: Of the weights. Training wants float32, whatever the checkpoint holds.
        yes_no: True: a language model scores by its answer; False: it gets a new head. None: as the
            checkpoint says, see :mod:`lce_trainer.model.yes_no`.
        trained: Refuse a base, which has no head to score with yet.

    Raises:
        TrainingError: There is no such model, the checkpoint lacks weights, its head has more than one label, or it
            is a base.
        ConfigError: The package of a ``package:`` name is missing.
    """
    path = resolve_model(str(name))
    if adapters := read_json(path, "adapter_config.json"):
        return _load_adapters(str(name), path, adapters, dropout, dtype)
    model, new = _load_model(str(name), path, dropout, dtype, yes_no, trained)
    if new:
        logger.info(
            "%s is a base model without a head to score with: %s are new, and are to be trained",
            *(name, ", ".join(new)),
        )
    return model


def _load_model(
    name: str, path: str, dropout: float | None, dtype: torch.dtype | str, yes_no: bool | None, trained: bool
) -> tuple[PreTrainedModel, list[str]]:
    """Load a model as :func:`load_model` does, and return the names of its weights that are new as well."""
    config = load_config(name)
    if has_trained_head(config) and config.num_labels != 1:
        raise TrainingError(f"{name} classifies into {config.num_labels} labels; a reranker has one")
    answers = _answers(config, path, yes_no)
    modular = read_modular_head(name, path) if answers is None and not has_trained_head(config) else None
    kind = AutoModelForCausalLM if answers is not None else AutoModelForSequenceClassification
    if trained and answers is None and modular is None and not has_trained_head(config):
        raise TrainingError(
            f"{name} is {_kind(config)}, with no head to score with: train it first, or pass yes_no=True if it is a "
            "language model that answers yes or no"
        )
    if modular is not None:
        configure_head(config, modular)
    config.num_labels = 1
    if dropout is not None:
        for key, value in config.to_dict().items():
            if "dropout" in key and isinstance(value, (int, float)) and not isinstance(value, bool):
                setattr(config, key, dropout)
    may_be_new = answers is None and not has_trained_head(config)
    with without_sharding():
        model, new = load_checkpoint(
            kind, name, path, lambda model, key: may_be_new and is_head_weight(model, key), config=config, dtype=dtype
        )
    if modular is not None:
        new = sorted(set(new) - set_head(model, modular))
    return model, new


def _load_adapters(
    name: str, path: str, settings: dict[str, Any], dropout: float | None, dtype: torch.dtype | str
) -> PreTrainedModel:
    """Load the base of a folder of adapters, and merge these into it.

    Raises:
        TrainingError: The base cannot be loaded, or the adapters lack their kind, their weights or the head.
    """
    task, base = settings.get("task_type"), settings.get("base_model_name_or_path")
    if task not in ("SEQ_CLS", "CAUSAL_LM") or not base:
        raise TrainingError(
            f"{name}/adapter_config.json must have task_type SEQ_CLS or CAUSAL_LM, and base_model_name_or_path; it has "
            f"{task!r} and {base!r}: set what the adapters were trained with"
        )
    model, new = _load_model(base, resolve_model(base), dropout, dtype, task == "CAUSAL_LM", False)
    if answers := logit_score_tokens(path):
        set_answer_ids(model.config, answers)
    return load_merged(model, name, path, new)


def load_config(name: str | Path) -> PreTrainedConfig:
    """Load the config of a model.

    Raises:
        TrainingError: There is no such model.
        ConfigError: The package of a ``package:`` name is missing.
    """
    path = resolve_model(str(name))
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # damaged files fail in whichever way their library fails
        raise failed(str(name), path, error) from None


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """Load the fast tokenizer of a model; a missing pad token is the end-of-sequence token.

    Raises:
        TrainingError: There is no tokenizer of that name.
    """
    path = resolve_model(str(name))
    tokenizer: PreTrainedTokenizerBase = load_tokenizer_files(str(name), path)
    apply_prompt_settings(tokenizer, path)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def match_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Set in the model's config which token pads: a decoder's head reads the last one that does not."""
    config = model.config.get_text_config()
    if config.pad_token_id is None or family_of(model.config).is_decoder:
        config.pad_token_id = model.config.pad_token_id = tokenizer.pad_token_id


def configure_pairs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, special_tokens_in_texts: bool | None = None
) -> None:
    """Have the tokenizer make pairs as the model reads them, and both pad with one token.

    Args:
        model: Its config may be changed.
        tokenizer: Is changed.
        special_tokens_in_texts: Whether they keep their meaning, see
            :func:`lce_trainer.model.template.keep_special_tokens`.

    Raises:
        TrainingError: They do not fit together.
    """
    words, rows = max(tokenizer.get_vocab().values(), default=0), model.get_input_embeddings().num_embeddings
    if words >= rows:
        raise TrainingError(
            f"the tokenizer has token ids up to {words}, but the model embeds {rows} tokens: they belong to different "
            "models, or the model was not resized for added tokens (model.resize_token_embeddings)"
        )
    _configure_template(model.config, tokenizer, is_language_model(model))
    keep_special_tokens(tokenizer, special_tokens_in_texts)
    match_padding(model, tokenizer)


def pairing_tokenizer(name: str | Path, yes_no: bool | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model that would be trained, as training leaves it; no weights are loaded.

    Raises:
        TrainingError: There is no such model, or tokenizer and model do not fit together.
        ConfigError: The package of a ``package:`` name is missing.
    """
    config, tokenizer = load_config(name), load_tokenizer(name)
    _configure_template(config, tokenizer, _answers(config, resolve_model(str(name)), yes_no) is not None)
    return tokenizer


def longest_input(model: PreTrainedModel) -> int:
    """Return the number of tokens that the model has positions for."""
    positions = int(getattr(model.config, "max_position_embeddings", None) or 1 << 30)
    return positions - first_position(model.config)


def _answers(config: PreTrainedConfig, path: str, yes_no: bool | None) -> tuple[int, ...] | None:
    """Return the tokens that a checkpoint answers with, empty if not known yet; None if it has or gets a head."""
    writes = any("ForCausalLM" in kind for kind in config.architectures or [])
    if yes_no and not writes:
        raise TrainingError(f"{path} is {_kind(config)}, which cannot answer yes or no")
    if not writes or yes_no is False:
        return None
    answers = answer_ids(config) or logit_score_tokens(path)
    if answers is not None:
        set_answer_ids(config, answers)
    elif yes_no is None and "rerank" in path.lower():
        logger.warning(
            "%s does not say that it answers yes or no, so it gets a new head; pass yes_no=True if it does", path
        )
    return answers or (() if yes_no else None)


def _configure_template(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, answers: bool) -> None:
    if answers:
        configure_answers(tokenizer, config)
    else:
        configure_template(tokenizer, config)


def _kind(config: PreTrainedConfig) -> str:
    return " ".join(config.architectures or [config.model_type])


def has_head(name: str | Path, yes_no: bool | None = None) -> bool:
    """Return whether a model ranks as it is: it has a head of its own, a modular one too, or answers yes or no.

    Args:
        name: Hub id, folder, or ``package:NAME/FOLDER``.
        yes_no: As :func:`load_model`.

    Raises:
        TrainingError: There is no such model, or its modules are no head that can be read.
    """
    path = resolve_model(str(name))
    if read_json(path, "adapter_config.json"):
        return True
    config = load_config(name)
    if has_trained_head(config) or _answers(config, path, yes_no) is not None:
        return True
    return read_modular_head(str(name), path) is not None
