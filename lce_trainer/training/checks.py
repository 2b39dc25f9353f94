"""What is checked before a run: groups, model, settings, and arguments of ``transformers.Trainer`` that this trainer
would ignore, which are refused before they can mislead.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeAlias

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from torch import Tensor
from transformers import (
    PreTrainedTokenizerBase,
    TrainingArguments,
)

from lce_trainer.compat import use_one_gpu
from lce_trainer.errors import ConfigError, GroupsError, TrainingError, format_ids
from lce_trainer.groups.schema import check_groups, count_contradictions, validate_groups
from lce_trainer.model.loading import longest_input, match_padding
from lce_trainer.model.yes_no import answers_of
from lce_trainer.training.arguments import LCETrainingArguments
from lce_trainer.training.collator import GroupCollator
from lce_trainer.training.streaming import check_stream, is_stream

logger = logging.getLogger(__name__)

EvalDataset: TypeAlias = datasets.Dataset | Mapping[str, datasets.Dataset] | None

_BATCH = 4096  # groups whose texts are compared at once


def usable_groups(groups: Any, args: LCETrainingArguments) -> tuple[datasets.Dataset, dict[str, int]]:
    """Return the groups that can be trained on, and the counts of :func:`lce_trainer.groups.schema.validate_groups`.

    A stream is returned as it is: its rows are checked when they come.

    Raises:
        TrainingError: None is usable, or there is nothing to distil from.
        GroupsError: The rows are not groups.
    """
    if is_stream(groups):
        check_stream(groups, args)
        return groups, {}
    if not isinstance(groups, datasets.Dataset):
        raise TrainingError(f"train_dataset must be a datasets.Dataset of groups, not {type(groups).__name__}")
    usable, counts = validate_groups(groups)
    if not len(usable):
        raise TrainingError(
            f"none of {counts['groups_read']} groups is usable: {counts['groups_without_positive']} have no positive "
            f"and {counts['groups_without_negative']} no negative"
        )
    if args.distillation_weight:
        _check_scores(usable)
    batch = args.train_batch_size * (1 if args.split_groups else args.world_size)
    if args.dataloader_drop_last and len(usable) < batch:
        raise TrainingError(
            f"dataloader_drop_last leaves nothing of {len(usable)} groups, for a batch has {batch} on all devices: "
            "lower per_device_train_batch_size, or set dataloader_drop_last to false"
        )
    if torn := count_contradictions(usable):
        logger.warning(
            "%d of %d groups hold the same passage as a positive and with a lower label, so that it competes with "
            "itself: lce_trainer.to_groups keeps it once, with its highest label",
            *(torn, len(usable)),
        )
    return usable, counts


def _check_scores(groups: datasets.Dataset) -> None:
    """Check that no score is infinite, and that some group has two, since one alone says nothing."""
    table = groups.select_columns(["query_id", "scores"]).with_format("arrow")[:]
    lengths = pc.fill_null(pc.list_value_length(table["scores"]), 0).to_numpy()
    row, items = np.repeat(np.arange(len(lengths)), lengths), pc.list_flatten(table["scores"])
    infinite = pc.fill_null(pc.is_inf(items), False).to_numpy()
    if infinite.any():
        raise TrainingError(
            f"query {table['query_id'][int(row[infinite][0])].as_py()!r}: one of its scores is infinite, and is to be "
            "distilled from: write null for a score that is not known"
        )
    known = pc.fill_null(pc.is_finite(items), False).to_numpy()
    if not (np.bincount(row[known]) > 1).any():
        raise TrainingError(
            "distillation_weight is above 0, but no group has scores of two passages or more to learn from"
        )


def by_name(eval_dataset: EvalDataset) -> dict[str, datasets.Dataset]:
    """Return the evaluation sets by their names; a single one is ``eval_dataset``."""
    if eval_dataset is None:
        return {}
    return dict(eval_dataset) if isinstance(eval_dataset, Mapping) else {"eval_dataset": eval_dataset}


def check_eval(groups: Any, name: str, train: datasets.Dataset | None) -> None:
    """Check an evaluation set's rows, and warn of queries and passages that are trained on.

    Raises:
        GroupsError: The rows are not groups, or there are none.
        TrainingError: It is not a dataset.
    """
    if not isinstance(groups, datasets.Dataset):
        raise TrainingError(
            f"{name} must be a datasets.Dataset of groups, not {type(groups).__name__}; of rows of a stream make "
            "one: Dataset.from_list(list(stream.take(500)))"
        )
    groups = check_groups(groups, name)
    if not len(groups):
        raise GroupsError(f"{name} holds no group")
    table = groups.select_columns(["query", "passages", "labels"]).with_format("arrow")[:]
    lengths = pc.list_value_length(table["labels"]).to_numpy()
    relevant = pc.greater(pc.list_flatten(table["labels"]), 0).to_numpy()
    if empty := len(groups) - len(np.unique(np.repeat(np.arange(len(groups)), lengths)[relevant])):
        logger.warning("%s: %d of %d groups hold no positive; they count as 0", name, empty, len(groups))
    if isinstance(train, datasets.Dataset):
        _report_overlap(table, relevant, name, train)


def _report_overlap(table: pa.Table, relevant: np.ndarray, name: str, train: datasets.Dataset) -> None:
    """Warn of queries (but for case and outer spaces) and of passages (the very same text) that are trained on."""
    queries, passages = _normalized(table["query"]), pc.list_flatten(table["passages"])
    known: dict[str, list[pa.Array]] = {"queries": [], "passages": [], "positives": []}  # that the table has too
    for batch in train.select_columns(["query", "passages", "labels"]).with_format("arrow").iter(_BATCH):
        # Looking the many up among the few is quick, and what is left of them is few too.
        trained, texts = _normalized(batch["query"]), pc.list_flatten(batch["passages"])
        both = pc.is_in(texts, value_set=passages)
        positive = pc.and_(both, pc.greater(pc.list_flatten(batch["labels"]), 0))
        known["queries"] += trained.filter(pc.is_in(trained, value_set=queries)).chunks
        known["passages"] += texts.filter(both).chunks
        known["positives"] += texts.filter(positive).chunks
    values = {kind: pa.chunked_array(found, pa.string()) for kind, found in known.items()}
    shared = pc.is_in(queries, value_set=values["queries"]).to_numpy()
    trained_on = pc.is_in(passages, value_set=values["passages"]).to_numpy()
    as_positives = pc.is_in(passages, value_set=values["positives"]).to_numpy() & relevant
    if shared.any():
        logger.warning(
            "%s: %d of its %d queries are also trained on, so its figures are too high",
            *(name, shared.sum(), len(shared)),
        )
    if not trained_on.any():
        return
    logger.warning(
        "%s: %d of its %d passages are also trained on, and %d of its %d relevant ones as positives: its figures hold "
        "for these documents, and may be lower for new ones",
        name,
        trained_on.sum(),
        len(trained_on),
        as_positives.sum(),
        relevant.sum(),
    )


def _normalized(queries: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.utf8_trim_whitespace(pc.utf8_lower(queries))


def check_model(model: Any, tokenizer: PreTrainedTokenizerBase, args: LCETrainingArguments) -> None:
    """Check that the model is a reranker and reads ``max_length`` tokens.

    Raises:
        TrainingError: It is not, or does not.
    """
    if model.config.num_labels != 1 and answers_of(model) is None:
        raise TrainingError(f"the model has {model.config.num_labels} labels; a reranker has one: num_labels=1")
    limit = longest_input(model)
    if args.max_length > limit:
        raise TrainingError(f"max_length is {args.max_length}, but the model reads {limit} tokens at most")
    match_padding(model, tokenizer)


def check_finite(losses: Tensor, query_ids: Sequence[str], step: int, learning_rate: Callable[[], float]) -> None:
    """Stop at a loss that is no number.

    Args:
        losses: Of each group, shape ``(groups,)``.
        query_ids: Of each group.
        step: The one being made.
        learning_rate: Returns the learning rate, for the message.

    Raises:
        TrainingError: A loss is NaN or infinite; names the queries.
    """
    if bad := [query_id for query_id, finite in zip(query_ids, losses.isfinite().tolist(), strict=True) if not finite]:
        raise TrainingError(
            f"step {step}: the loss of queries {format_ids(bad)} is NaN or infinite, so the run stopped before the "
            f"weights were updated; lower learning_rate (now {learning_rate():.1e}), use bf16 in place of fp16, or "
            "inspect these groups"
        )


_ARGUMENTS = {
    "compute_loss_func": "the loss is LCE, which temperature, distillation_weight and the labels shape",
    "preprocess_logits_for_metrics": "compute_metrics gets the scores of each group, a number a passage",
}
_SETTINGS = {
    "per_device_eval_batch_size": "eval_batch_tokens sets how much is scored at once",
    "batch_eval_metrics": "compute_metrics is called once, with all groups",
    "include_for_metrics": "compute_metrics gets scores and labels, by group",
}


def check_arguments(
    args: LCETrainingArguments,
    collator: GroupCollator | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    more: Mapping[str, Any] | None = None,
) -> PreTrainedTokenizerBase | None:
    """Refuse what would have no effect, or another one than that of the settings; and use one GPU a process.

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
        wanted = args.data_seed if name == "seed" and args.data_seed is not None else getattr(args, name)
        if (own := getattr(collator, name)) != wanted:
            raise TrainingError(
                f"data_collator has {name}={own!r}, and args {wanted!r}: they must agree, since evaluations, "
                "forecasts, cached tokens and what is saved go by args; leave data_collator out, and it is made from "
                "args"
            )
    return collator.tokenizer


def _one_device(args: LCETrainingArguments) -> None:
    """Keep transformers from ``nn.DataParallel``.

    That splits a batch by rows, and pairs are packed into one row: a single GPU would do all the work, and without
    the half precision that was set.
    """
    if args.n_gpu > 1:
        logger.warning(
            "this process has %d GPUs and trains on one of them: start it with accelerate launch to use all of them, "
            "each by a process of its own",
            args.n_gpu,
        )
        use_one_gpu(args)
