"""What ``transformers.Trainer`` takes and this trainer would ignore: refused before it can mislead."""

import logging
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from transformers import PreTrainedTokenizerBase, TrainingArguments

from lce_trainer.collator import GroupCollator
from lce_trainer.errors import ConfigError, TrainingError
from lce_trainer.training_args import LCETrainingArguments

logger = logging.getLogger(__name__)

_ARGUMENTS = {
    "compute_loss_func": "the loss is LCE, which temperature, distillation_weight and the labels shape",
    "preprocess_logits_for_metrics": "compute_metrics gets the scores of each group, a number a passage",
}
_SETTINGS = {
    "per_device_eval_batch_size": "eval_batch_tokens says how much is scored at once",
    "batch_eval_metrics": "compute_metrics is called once, with all groups",
    "include_for_metrics": "compute_metrics gets scores and labels, by group",
}


def check_use(
    args: LCETrainingArguments,
    collator: GroupCollator | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    more: Mapping[str, Any] | None = None,
) -> PreTrainedTokenizerBase | None:
    """Refuse what would have no effect, or another one than the settings say; and use one GPU a process.

    Args:
        args: The settings.
        collator: The user's own; None if it is to be made from the settings.
        tokenizer: As given.
        more: What else ``transformers.Trainer`` is given.

    Returns:
        The tokenizer, the collator's if none was given.

    Raises:
        TrainingError: An argument would be ignored, or the collator is not what the settings describe.
        ConfigError: A setting would be ignored.
    """
    for name, reason in _ARGUMENTS.items():
        if more and more.get(name) is not None:
            raise TrainingError(f"{name} would not be used: {reason}; leave it out")
    defaults = {item.name: item.default for item in fields(TrainingArguments)}
    for name, reason in _SETTINGS.items():
        if (value := getattr(args, name)) not in (defaults[name], []):
            raise ConfigError(f"{name}={value!r} would not be used: {reason}; leave it out")
    _one_device(args)
    return tokenizer if collator is None else _check_collator(collator, tokenizer, args)


def _check_collator(collator: Any, tokenizer: Any, args: LCETrainingArguments) -> PreTrainedTokenizerBase:
    if not isinstance(collator, GroupCollator):
        raise TrainingError(f"data_collator must be a GroupCollator, not {type(collator).__name__}")
    if tokenizer is not None and collator.tokenizer is not tokenizer:
        raise TrainingError("data_collator has another tokenizer than processing_class: give both the same object")
    for name in (item.name for item in fields(GroupCollator) if item.name != "tokenizer"):
        asked = args.data_seed if name == "seed" and args.data_seed is not None else getattr(args, name)
        if (own := getattr(collator, name)) != asked:
            raise TrainingError(
                f"data_collator has {name}={own!r}, and args {asked!r}: they must agree, since evaluations, forecasts, "
                "cached tokens and what is saved go by args; leave data_collator out, and it is made from args"
            )
    return collator.tokenizer


def _one_device(args: LCETrainingArguments) -> None:
    """Keep transformers from ``nn.DataParallel``.

    That splits a batch by rows, and pairs are packed into one row: a single GPU would do all the work, and without
    the half precision that was asked for.
    """
    if args.n_gpu > 1:
        logger.warning(
            "this process sees %d GPUs and trains on one of them: start it with accelerate launch to use all of them, "
            "each by a process of its own",
            args.n_gpu,
        )
        args._n_gpu = 1
