"""Checkpoints that can be trusted after a crash.

``transformers`` writes a checkpoint file by file, so a killed run may leave half of one. A checkpoint
is sealed by a manifest with every file's size and hash, written last; a run goes on from the
newest one that verifies, and older ones are deleted only after a newer one is sealed.
"""

import logging
import math
import os
import pickle
import re
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import has_length

from lce_trainer.artifacts import MANIFEST, read_manifest, write_manifest, writing
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
        with writing(folder):
            yield
    finally:
        args.save_total_limit = limit
    ranks.wait_for_everyone()
    if args.should_save:
        with writing(folder):
            seal(folder)
        best = state.best_model_checkpoint
        rotate(output_dir, limit, [folder, *([Path(best)] if best else [])])


def save_at_step_ends(callbacks: Iterable[Any]) -> None:
    """Have transformers' checkpoint on SIGTERM wait for the end of the step that the signal comes in.

    Before that the step has spent random numbers and not changed the weights: a run that goes on from there
    would draw others.

    Args:
        callbacks: Of a trainer.
    """
    for callback in callbacks:
        if type(callback).__name__ == "JITCheckpointCallback":
            callback.on_step_begin = callback.on_pre_optimizer_step = lambda *args, **kwargs: None


def seal(folder: Path) -> None:
    """Seal a checkpoint as complete: all its files are on the disk, and their hashes in its manifest."""
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
    read_manifest(folder, _KIND)


def check_best(best: Path | None) -> None:
    """Check the checkpoint whose weights a run ends with; without it, transformers would keep those of the last step.

    Args:
        best: Its folder; None if nothing was ever evaluated.

    Raises:
        TrainingError: It is gone or damaged.
    """
    if best is None:
        return
    try:
        if (best / MANIFEST).is_file() or not any(best.glob("*")):
            verify(best)
    except ArtifactError as error:
        raise TrainingError(
            f"the best checkpoint cannot be loaded: {error}; train again with resume_from_checkpoint=True, which goes "
            "on from a checkpoint whose best one is there, or from the beginning"
        ) from None


@contextmanager
def tensors_alone(checkpoint: str | None) -> Iterator[None]:
    """Around the reading of a checkpoint's pickles, of which torch reads plain tensors and executes nothing.

    Raises:
        TrainingError: One of them holds something else.
    """
    try:
        yield
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))  # the rest is advice to execute it
        what = found[1] if found else "what is no tensor"
        raise TrainingError(
            f"{checkpoint} cannot be resumed: a file in it holds more than tensors ({what}), which is not executed"
        ) from None


def newest_checkpoint(output_dir: Path, needs_best: bool = False) -> Path | None:
    """Return the newest checkpoint that verifies; those that do not are named in the log.

    Args:
        output_dir: Of the run.
        needs_best: Skip those of a run whose best checkpoint is gone.
    """
    for folder in reversed(_checkpoints(output_dir)):
        try:
            verify(folder)
            step = _state(folder).best_global_step
            best = folder.with_name(f"checkpoint-{step}")
            if best.is_dir() or (needs_best and step is not None):
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


def checkpoint_to_resume(wanted: str | Path | bool | None, output_dir: Path, needs_best: bool = False) -> Path | None:
    """Return the checkpoint to resume from, the same on every rank; None to start from the beginning.

    Args:
        wanted: True for the newest one that verifies, or a checkpoint's folder.
        output_dir: Of the run.
        needs_best: As in :func:`newest_checkpoint`.

    Raises:
        TrainingError: There is no such checkpoint, or it is damaged.
    """
    found, problem = None, None
    if PartialState().is_main_process:
        try:
            found = _find(wanted, output_dir, needs_best)
        except ArtifactError as error:
            problem = str(error)
    answer: list[Any] = broadcast_object_list([found, problem])
    if answer[1] is not None:
        raise TrainingError(answer[1])
    return Path(answer[0]) if answer[0] else None


def _find(wanted: str | Path | bool | None, output_dir: Path, needs_best: bool) -> Path | None:
    if wanted is True:
        found = newest_checkpoint(output_dir, needs_best)
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
        logger.warning("%s was never sealed by a manifest: it may be incomplete", folder)
    return folder


def final_state(checkpoint: Path, args: TrainingArguments, batches: Any) -> TrainerState | None:
    """Return the state of a run that was over when it saved this checkpoint; None if it has steps to go.

    ``transformers`` would go on: it forgets that a run had stopped early, and makes one more step before it
    compares with how many there were to be. A run that something else stopped, like a limit of time, has steps to go.

    Args:
        checkpoint: Its folder.
        args: Of the run now.
        batches: Of an epoch on this rank; a stream's have no length.

    Raises:
        TrainingError: There are steps to go, and nothing to go on with but weights.
    """
    state = _state(checkpoint)
    epoch = max(-(-len(batches) // args.gradient_accumulation_steps), 1) if has_length(batches) else None  # in steps
    planned = args.max_steps if epoch is None or args.max_steps > 0 else math.ceil(args.num_train_epochs * epoch)
    if state.global_step >= planned:
        why = f"all {planned} steps were done; set num_train_epochs or max_steps higher to train on"
    elif state.max_steps == planned and _stopped_early(state):
        why = (
            f"early stopping ended it at step {state.global_step} of {planned}; to train all the same, start from "
            "its weights: pass the folder as model, with another output_dir"
        )
    else:
        if not any(checkpoint.glob("rng_state*.pth")):
            raise TrainingError(
                f"{checkpoint} holds weights alone (save_only_model), so its run cannot go on from step "
                f"{state.global_step}: pass the folder as model to start a new run from them"
            )
        if epoch is not None:
            _check_place(checkpoint, state, epoch, args.gradient_accumulation_steps / max(len(batches), 1))
        return None
    if args.should_log:
        logger.warning("nothing is trained: %s was saved by a run that is over: %s", checkpoint, why)
    return state


def _check_place(checkpoint: Path, state: TrainerState, epoch: int, step: float) -> None:
    """Warn if going on would not begin where the run stopped; an epoch has so many steps, a step is this part of it."""
    place = state.global_step // epoch + state.global_step % epoch * step
    if abs((state.epoch or 0) - place) > step / 2:
        logger.warning(
            "%s was saved %.2f epochs into its run, and is gone on from at %.2f, where step %d lies with %d steps an "
            "epoch: groups are missed or come twice. Either an epoch was ended early, or steps had another size",
            *(checkpoint, state.epoch or 0, place, state.global_step, epoch),
        )


def _stopped_early(state: TrainerState) -> bool:
    """Whether the patience of a saved early stopping callback had run out."""
    for saved in state.stateful_callbacks.values():
        for callback in saved if isinstance(saved, list) else [saved]:
            patience = callback.get("args", {}).get("early_stopping_patience")
            waited = callback.get("attributes", {}).get("early_stopping_patience_counter", 0)
            if patience is not None and waited >= patience:
                return True
    return False


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
