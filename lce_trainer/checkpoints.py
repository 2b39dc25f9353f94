"""Checkpoints that can be trusted after a crash.

``transformers`` writes a checkpoint file by file, so a killed run may leave half of one. A checkpoint
is sealed by a manifest with every file's size and hash, written last; a run goes on from the
newest one that verifies.
"""

import logging
import re
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from lce_trainer.artifacts import MANIFEST, file_sha256, read_manifest, write_manifest
from lce_trainer.errors import ArtifactError

logger = logging.getLogger(__name__)

_KIND = "checkpoint"


class SealCheckpoints(TrainerCallback):  # type: ignore[misc]
    """Writes each checkpoint's manifest, once every rank has written its part."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Seal the checkpoint that was just saved."""
        from accelerate import PartialState

        PartialState().wait_for_everyone()
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            seal(folder)


def seal(folder: Path) -> None:
    """Declare a checkpoint complete."""
    names = [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file() and file.name != MANIFEST]
    write_manifest(folder, names, kind=_KIND, config={}, inputs={}, counts={})


def newest_checkpoint(output_dir: Path) -> Path | None:
    """The newest checkpoint whose every file is as its manifest says; damaged ones are named in the log."""
    found = sorted(
        (int(match[1]), folder)
        for folder in output_dir.glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", folder.name))
    )
    for _, folder in reversed(found):
        try:
            manifest = read_manifest(folder, _KIND)
            for name, facts in manifest.files.items():
                if file_sha256(folder / name) != facts["sha256"]:
                    raise ArtifactError(f"{folder / name} is not what was written")
        except ArtifactError as error:
            logger.warning("checkpoint skipped: %s", error)
            continue
        return folder
    return None


def final_state(checkpoint: Path) -> TrainerState | None:
    """The state of a run that was over when it saved this checkpoint; None if it has steps to go.

    ``transformers`` forgets that a run had stopped early, and would go on.
    """
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    over = state.stateful_callbacks["TrainerControl"]["args"]["should_training_stop"]
    return state if over else None
