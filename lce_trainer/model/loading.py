"""Load what is trained and what scores: models, tokenizers, and what makes them fit together."""

import logging
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lce_trainer.distributed import without_sharding
from lce_trainer.errors import TrainingError
from lce_trainer.model.adapters import load_merged
from lce_trainer.model.crossencoder import apply_prompt_settings, logit_score_tokens, read_json
from lce_trainer.model.families import family_of, first_position, has_trained_head
from lce_trainer.model.template import configure_template
from lce_trainer.model.yes_no import answer_ids, configure_answers, is_language_model, set_answer_ids
from lce_trainer.names import resolve_model

logger = logging.getLogger(__name__)


def load_model(
    name: str | Path,
    *,
    dropout: float | None = None,
    dtype: torch.dtype | str = torch.float32,
    yes_no: bool | None = None,
    trained: bool = False,
) -> PreTrainedModel:
    """A sequence classifier with one label, or a language model that answers yes or no.

    Args:
        name: Hub id, folder, or ``package:NAME/FOLDER``. A base gets a new head, from torch's RNG;
            adapters are merged into theirs.
        dropout: Set every dropout of the model to this; as configured if None.
        dtype: Of the weights. Training wants float32, whatever the checkpoint holds.
        yes_no: True: a language model scores by its answer; False: it gets a new head. None: as the
            checkpoint says, see :mod:`lce_trainer.model.yes_no`.
        trained: Refuse a base, which has no head to score with yet.

    Raises:
        TrainingError: There is no such model, its head has more than one label, or it is a base.
        ConfigError: The package of a ``package:`` name is missing.
    """
    path = resolve_model(str(name))
    if adapters := read_json(path, "adapter_config.json"):
        answering = adapters["task_type"] == "CAUSAL_LM"
        base = load_model(adapters["base_model_name_or_path"], dropout=dropout, dtype=dtype, yes_no=answering)
        if answers := logit_score_tokens(path):
            set_answer_ids(base.config, answers)
        return load_merged(base, path)
    config = load_config(name)
    if has_trained_head(config) and config.num_labels != 1:
        raise TrainingError(f"{name} classifies into {config.num_labels} labels; a reranker has one")
    answers = _answers(config, path, yes_no)
    kind = AutoModelForCausalLM if answers is not None else AutoModelForSequenceClassification
    if trained and answers is None and not has_trained_head(config):
        raise TrainingError(
            f"{name} is {_kind(config)}, with no head to score with: train it first, or pass yes_no=True if it is a "
            "language model that answers yes or no"
        )
    config.num_labels = 1
    if dropout is not None:
        for key, value in config.to_dict().items():
            if "dropout" in key and isinstance(value, (int, float)) and not isinstance(value, bool):
                setattr(config, key, dropout)
    try:
        with without_sharding():
            model: PreTrainedModel = kind.from_pretrained(path, config=config, dtype=dtype)
        return model
    except (OSError, ValueError) as error:
        raise TrainingError(f"no model at {str(name)!r}: {' '.join(str(error).split())}") from None


def load_config(name: str | Path) -> PreTrainedConfig:
    """The config of a model.

    Raises:
        TrainingError: There is no such model.
        ConfigError: The package of a ``package:`` name is missing.
    """
    try:
        return AutoConfig.from_pretrained(resolve_model(str(name)))
    except (OSError, ValueError) as error:
        raise TrainingError(f"no model at {str(name)!r}: {' '.join(str(error).split())}") from None


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """The fast tokenizer of a model; a missing pad token is the end-of-sequence token.

    Raises:
        TrainingError: There is no tokenizer of that name.
    """
    path = resolve_model(str(name))
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        apply_prompt_settings(tokenizer, path)
    except (OSError, ValueError) as error:
        raise TrainingError(f"no tokenizer at {str(name)!r}: {' '.join(str(error).split())}") from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def match_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Tell the model which token pads: a decoder's head reads the last one that does not."""
    config = model.config.get_text_config()
    if config.pad_token_id is None or family_of(model.config).is_decoder:
        config.pad_token_id = model.config.pad_token_id = tokenizer.pad_token_id


def configure_pairs(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """See to it that the tokenizer makes pairs as the model reads them, and both pad with one token.

    Raises:
        TrainingError: They do not fit together.
    """
    _configure_template(model.config, tokenizer, is_language_model(model))
    match_padding(model, tokenizer)


def pairing_tokenizer(name: str | Path, yes_no: bool | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model that would be trained, as training leaves it; no weights are loaded.

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
    """The tokens that a checkpoint answers with, empty if they are not known yet; None if it has or gets a head."""
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


def has_head(name: str | Path) -> bool:
    """Return whether a model ranks as it is: it has a head of its own, or answers yes or no.

    Raises:
        TrainingError: There is no such model.
    """
    path = resolve_model(str(name))
    if read_json(path, "adapter_config.json"):
        return True
    config = load_config(name)
    return has_trained_head(config) or _answers(config, path, None) is not None
