"""Checkpoints of a run, and of what each process holds a part."""

import json
import re
from pathlib import Path
from typing import Any

from transformers.trainer_utils import HubStrategy

from lce_trainer.model.adapters import check_mergeable, merge_adapters
from lce_trainer.model.saving import save_cross_encoder_files, save_reranker
from lce_trainer.training.arguments import LCETrainingArguments


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
        save_cross_encoder_files(trainer.model, trainer.processing_class, Path(args.output_dir))


def save_merged(trainer: Any, folder: Path) -> None:
    """See :meth:`lce_trainer.training.trainer.LCETrainer.save_merged`."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    check_mergeable(model)
    weights = whole_weights(trainer)
    if trainer.is_world_process_zero():
        merged = merge_adapters(model, weights)
        save_reranker(merged, trainer.processing_class, trainer.args.max_length, folder)
        write_settings(trainer.args, folder)
