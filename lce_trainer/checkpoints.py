"""Checkpoints that can be trusted after a crash.

``transformers`` writes a checkpoint file by file, so a killed run may leave half of one. A checkpoint
is sealed by a manifest with every file's size and hash, written last; a run goes on from the
newest one that verifies, and older ones are deleted only after a newer one is sealed.
"""

import logging
import math
import os
import re
import shutil
from collections.abc import Collection, Iterator, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from lce_trainer.artifacts import MANIFEST, file_sha256, read_manifest, write_manifest
from lce_trainer.errors import ArtifactError, TrainingError

logger = logging.getLogger(__name__)

_KIND = "checkpoint"


@contextmanager
def sealed_checkpoint(args: TrainingArguments, state: TrainerState, output_dir: Path) -> Iterator[None]:
    """Around the saving of a checkpoint: it is sealed when all ranks are done, and only then are older ones deleted."""
    ranks = PartialState()
    folder = output_dir / f"checkpoint-{state.global_step}"
    if args.should_save:
        shutil.rmtree(folder, ignore_errors=True)  # what a killed run has left of it
    ranks.wait_for_everyone()
    limit, args.save_total_limit = args.save_total_limit, None  # transformers deletes too early
    try:
        yield
    finally:
        args.save_total_limit = limit
    ranks.wait_for_everyone()
    if args.should_save:
        seal(folder)
        best = state.best_model_checkpoint
        rotate(output_dir, limit, [folder, *([Path(best)] if best else [])])


def seal(folder: Path) -> None:
    """Declare a checkpoint complete: all its files are on the disk, and their hashes in its manifest."""
    files = [file for file in folder.rglob("*") if file.is_file() and file.name != MANIFEST]
    for file in files:
        with file.open("rb") as written:
            os.fsync(written.fileno())  # an older checkpoint may be deleted on the word of the manifest
    names = [str(file.relative_to(folder)) for file in files]
    write_manifest(folder, names, kind=_KIND, config={}, inputs={}, counts={})


def verify(folder: Path) -> None:
    """Check a checkpoint against its manifest.

    Raises:
        ArtifactError: It was never sealed, or a file is missing or not what was written.
    """
    for name, facts in read_manifest(folder, _KIND).files.items():
        if file_sha256(folder / name) != facts["sha256"]:
            raise ArtifactError(f"{folder / name} is not what was written")


def newest_checkpoint(output_dir: Path) -> Path | None:
    """The newest checkpoint that verifies; those that do not are named in the log."""
    for folder in reversed(_checkpoints(output_dir)):
        try:
            verify(folder)
            best = folder.with_name(f"checkpoint-{_state(folder).best_global_step}")
            if best.is_dir():
                verify(best)  # what the run would end with
        except ArtifactError as error:
            logger.warning("checkpoint skipped: %s: %s", folder.name, error)
            continue
        return folder
    return None


def rotate(output_dir: Path, limit: int | None, keep: Collection[Path]) -> None:
    """Delete checkpoints until ``limit`` are left: first those that were never sealed, then the oldest.

    Args:
        output_dir: Where they are.
        limit: How many to leave; None or 0: all.
        keep: Never deleted, whatever the limit.
    """
    found = _checkpoints(output_dir)
    kept = {folder.resolve() for folder in keep}
    deletable = [folder for folder in found if folder.resolve() not in kept]
    deletable.sort(key=lambda folder: (folder / MANIFEST).is_file())  # stable: still oldest first
    for folder in deletable[: max(len(found) - limit, 0) if limit else 0]:
        shutil.rmtree(folder)


def checkpoint_to_resume(wanted: str | Path | bool | None, output_dir: Path) -> Path | None:
    """The checkpoint to go on from, the same on every rank; None to start from the beginning.

    Args:
        wanted: True for the newest one that verifies, or a checkpoint's folder.
        output_dir: Of the run.

    Raises:
        TrainingError: There is no such checkpoint, or it is damaged.
    """
    found, complaint = None, None
    if PartialState().is_main_process:
        try:
            found = _find(wanted, output_dir)
        except ArtifactError as error:
            complaint = str(error)
    answer: list[Any] = broadcast_object_list([found, complaint])
    if answer[1] is not None:
        raise TrainingError(answer[1])
    return Path(answer[0]) if answer[0] else None


def _find(wanted: str | Path | bool | None, output_dir: Path) -> Path | None:
    if wanted is True:
        found = newest_checkpoint(output_dir)
        if found is None:
            logger.warning("%s holds no checkpoint to go on from: training starts from the beginning", output_dir)
        else:
            logger.info("going on from %s", found)
        return found
    if not wanted:
        if left := _checkpoints(output_dir):
            logger.warning(
                "training starts from the beginning, though %s holds checkpoints up to %s: pass "
                "resume_from_checkpoint=True to go on from there, or use another output_dir",
                output_dir,
                left[-1].name,
            )
        return None
    folder = Path(wanted)
    if not (folder / TRAINER_STATE_NAME).is_file():
        raise ArtifactError(f"there is no checkpoint at {folder} (a folder with {TRAINER_STATE_NAME})")
    if (folder / MANIFEST).is_file():
        verify(folder)
    else:
        logger.warning("%s was never sealed by a manifest: nothing tells whether it is whole", folder)
    return folder


def final_state(checkpoint: Path, args: TrainingArguments, batches: Sized) -> TrainerState | None:
    """The state of a run that was over when it saved this checkpoint; None if it has steps to go.

    ``transformers`` would go on: it forgets that a run had stopped early, and takes one more step before it
    looks how many there were to be.

    Args:
        checkpoint: Its folder.
        args: Of the run now.
        batches: Of an epoch on this rank.
    """
    state = _state(checkpoint)
    planned = args.max_steps
    if planned <= 0:
        planned = math.ceil(args.num_train_epochs * max(-(-len(batches) // args.gradient_accumulation_steps), 1))
    stopped = state.stateful_callbacks.get("TrainerControl", {}).get("args", {}).get("should_training_stop")
    return state if state.global_step >= planned or (stopped and state.max_steps == planned) else None


def _state(checkpoint: Path) -> TrainerState:
    return TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))


def _checkpoints(output_dir: Path) -> list[Path]:
    """Oldest first, by number."""
    found = [
        (int(match[1]), folder)
        for folder in output_dir.glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", folder.name))
    ]
    return [folder for _, folder in sorted(found)]
