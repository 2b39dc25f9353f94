"""Checkpoints that every loader scores alike."""

import json
import re
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import HubStrategy

from lce_trainer.adapters import check_mergeable, merge_adapters
from lce_trainer.notes import RAW_SCORES, write_notes
from lce_trainer.training_args import LCETrainingArguments
from lce_trainer.yes_no import answers_of


def save_reranker(model: Any, tokenizer: PreTrainedTokenizerBase, max_length: int, folder: Path) -> None:
    """Write a model, or its adapters, with its tokenizer.

    Args:
        model: The reranker, not wrapped for training.
        tokenizer: Its own.
        max_length: Tokens of a pair that it reads at most.
        folder: Made if it is missing.
    """
    note_format(model, tokenizer, max_length)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    add_notes(model, tokenizer, folder)


def note_format(model: Any, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
    """Write into config and tokenizer, before they are saved, how pairs are read and scored."""
    answers = answers_of(model)
    model.config.sentence_transformers = {**RAW_SCORES, **({"answer_ids": list(answers)} if answers else {})}
    tokenizer.model_max_length = max_length
    # Padding may shift the positions that a decoder counts; and only what is in init_kwargs is saved.
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "right" if answers is None else "left"
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        # How the last batch was cut and padded would be saved with it, and bind who reads that file alone.
        backend.no_truncation()
        backend.no_padding()


def add_notes(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write beside a saved model what ``CrossEncoder`` cannot tell from its config."""
    answers = answers_of(model)
    if answers is not None or hasattr(model, "peft_config"):
        write_notes(folder, answers, tokenizer)


def write_settings(args: LCETrainingArguments, folder: Path) -> None:
    """Write how a model was trained as JSON, in place of the pickle that transformers leaves."""
    (folder / "training_args.bin").unlink(missing_ok=True)
    settings = json.dumps(args.to_public_dict(), indent=2, sort_keys=True, default=str)
    (folder / "training_args.json").write_text(settings + "\n", encoding="utf-8")


def whole_weights(trainer: Any) -> dict[str, Any] | None:
    """All weights of a model of which each process holds a part; all processes must ask.

    Returns:
        On the first process the weights, on others nothing of use. None where each process holds the whole model.
    """
    if not trainer.is_fsdp_enabled and trainer.deepspeed is None:
        return None
    weights: dict[str, Any] = trainer.accelerator.get_state_dict(trainer.deepspeed or trainer.model)
    return weights


def is_ours(trainer: Any, output_dir: str | Path | None) -> bool:
    """Whether it is for us to write a model, which transformers would not, or not as a plain checkpoint.

    Args:
        trainer: Of the model.
        output_dir: Where transformers writes on its own; one named like a checkpoint is that of a run, any other
            folder is for everyone. None: where the user says.
    """
    if trainer.is_deepspeed_enabled:
        return bool(trainer.deepspeed is None)  # nothing was left to train
    return _in_parts(trainer) and not re.fullmatch(r"checkpoint-\d+", Path(output_dir or "").name)


def _in_parts(trainer: Any) -> bool:
    """Whether a run's checkpoints hold the model in parts, which nothing but a resumed run can read."""
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    return "FULL" not in str(getattr(plugin, "state_dict_type", "FULL"))


def ready_to_push(trainer: Any) -> None:
    """Put into the run's folder what transformers does not when it pushes a checkpoint in the middle of a run.

    That is the weights, where checkpoints are in parts, and what ``CrossEncoder`` cannot tell from a config. All
    processes must call.
    """
    args = trainer.args
    if not args.push_to_hub or args.hub_strategy == HubStrategy.END:
        return
    weights = whole_weights(trainer) if _in_parts(trainer) else None
    push = getattr(trainer, "push_in_progress", None)
    if args.should_save and (args.hub_always_push or push is None or push.is_done()):  # or none is made now
        if weights is not None:
            trainer._save(args.output_dir, weights)
        add_notes(trainer.model, trainer.processing_class, Path(args.output_dir))


def save_merged(trainer: Any, folder: Path) -> None:
    """See :meth:`lce_trainer.trainer.LCETrainer.save_merged`."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    check_mergeable(model)
    weights = whole_weights(trainer)
    if trainer.is_world_process_zero():
        merged = merge_adapters(model, weights)
        save_reranker(merged, trainer.processing_class, trainer.args.max_length, folder)
        write_settings(trainer.args, folder)
