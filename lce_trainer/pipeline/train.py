"""The training stage: a recipe's groups into a reranker's folder."""

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from transformers import (
    AutoModel,
    EarlyStoppingCallback,
    ProgressCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from lce_trainer.artifacts import MANIFEST, content_digest, digest, read_manifest, write_manifest
from lce_trainer.errors import ArtifactError, ConfigError, TrainingError
from lce_trainer.groups.convert import load_groups
from lce_trainer.groups.near_duplicates import find_near_duplicates
from lce_trainer.hardware import resolve_dtype
from lce_trainer.model.adapters import lora
from lce_trainer.model.loading import load_config, load_model, load_tokenizer, pairing_tokenizer
from lce_trainer.model.saving import write_first_stage_weight
from lce_trainer.pipeline.run import Run, is_stale, processes
from lce_trainer.training.arguments import LCETrainingArguments
from lce_trainer.training.checks import check_arguments
from lce_trainer.training.collator import GroupCollator
from lce_trainer.training.trainer import LCETrainer

logger = logging.getLogger(__name__)

# Training arguments of every recipe, where it does not name them itself.
TRAINING_DEFAULTS: dict[str, Any] = {
    "eval_strategy": "steps",
    "eval_steps": 0.2,
    "save_strategy": "steps",
    "save_steps": 0.2,
    "save_total_limit": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "ndcg@10",
    "restore_callback_states_from_checkpoint": True,
    "disable_tqdm": False,
    "report_to": "none",
}


def train_reranker(
    run: Run,
    dev: datasets.Dataset | None,
    measured_on: Mapping[str, Sequence[str]],
    merge: Callable[[datasets.Dataset, Path], Mapping[str, Any]],
    first_stage_weight: Callable[[Path], Mapping[str, float]],
) -> None:
    """Train on the recipe's groups, or on those that it names.

    Args:
        run: The recipe being run; ``model`` is written under its root.
        dev: Human queries as groups, to choose the best checkpoint by; if None, a part of the
            groups is held out for that.
        measured_on: Queries that the model will be measured or chosen on, by name; it must not learn from them.
        merge: Called with the dev groups and the trained model's folder; merges it with its base, and says how.
        first_stage_weight: Called with the model's folder after that; finds how much the first stage counts beside it.
    """
    human = dev is not None
    inputs = {"groups": run.manifest("groups").digest} if run.recipe.train.groups is None else {}
    if run.recipe.train.merge == "auto":
        inputs["general"] = run.manifest("general").digest
    groups, left_out = _leave_out_near_duplicates(_read_groups(run), measured_on, run.recipe.train.near_duplicates)
    if dev is None:
        groups, dev = _hold_out(groups, run.recipe.train.dev_fraction, run.recipe.seed)
    _train(run, groups, dev, inputs, human, left_out, partial(merge, dev), first_stage_weight)


def held_out_groups(run: Run, measured_on: Mapping[str, Sequence[str]]) -> datasets.Dataset:
    """Return the groups that a recipe without human dev queries keeps to choose the best checkpoint by.

    Args:
        run: A recipe whose model is trained.
        measured_on: As :func:`train_reranker` was given it.

    Raises:
        ArtifactError: The model was trained when others were held out, so it may have learned from these.
    """
    groups, _ = _leave_out_near_duplicates(_read_groups(run), measured_on, run.recipe.train.near_duplicates)
    _, held = _hold_out(groups, run.recipe.train.dev_fraction, run.recipe.seed)
    if run.manifest("model").config.get("dev") != digest(held.to_list()):
        raise ArtifactError(
            f"{run.root / 'model'} was trained when other groups were held out, so it may have learned from these: run "
            "lce-trainer train with this recipe again"
        )
    return held


def trained_queries(run: Run, measured_on: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the queries of a recipe's groups without those left out as near-duplicates of measured ones."""
    groups, _ = _leave_out_near_duplicates(_read_groups(run), measured_on, run.recipe.train.near_duplicates)
    return list(groups["query"][:])


def _read_groups(run: Run) -> datasets.Dataset:
    given = run.recipe.train.groups
    return run.table("groups") if given is None else load_groups(str(_found(run, given) or given))


def check_training(run: Run) -> None:
    """Check what can be checked of the training settings without groups.

    Raises:
        LCETrainerError: They cannot be used, or there is no such base model.
    """
    args = _arguments(run, run.recipe.train.arguments, run.root / "checkpoints")
    check_arguments(args)
    tokenizer = pairing_tokenizer(run.recipe.train.model, args.yes_no)
    GroupCollator(tokenizer, args.group_size, args.max_length, args.max_query_length)
    lora(run.recipe.train.lora)
    if run.recipe.train.near_duplicates is not None:
        find_near_duplicates((), (), run.recipe.train.near_duplicates)
    if run.recipe.train.lora.r and run.recipe.train.lora.target_modules:
        _check_targets(run.recipe.train.model, run.recipe.train.lora.target_modules)


def _check_targets(model: str, targets: Sequence[str]) -> None:
    """Check that each name that adapters are asked for is a layer's; PEFT passes over one that is not among others."""
    with torch.device("meta"):
        layers = [
            name
            for name, module in AutoModel.from_config(load_config(model)).named_modules()
            if isinstance(module, torch.nn.Linear)
        ]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in layers):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
            raise ConfigError(f"train.lora.target_modules: {model} has no layer {target!r}; there are {known}")


def _leave_out_near_duplicates(
    groups: datasets.Dataset, measured_on: Mapping[str, Sequence[str]], threshold: float | None
) -> tuple[datasets.Dataset, dict[str, list[str]]]:
    """Leave out the groups whose query is nearly one that the model is measured or chosen on.

    Returns:
        The other groups; and by the name of what is measured on the ids of those left out, empty where none was
        looked for. A group that is near several counts for the first.

    Raises:
        TrainingError: No group is left.
    """
    if threshold is None:
        return groups, {}
    names = [name for name, queries in measured_on.items() for _ in queries]
    known = [query for queries in measured_on.values() for query in queries]
    texts = groups["query"][:]
    nearest = find_near_duplicates(texts, known, threshold)
    left_out: dict[str, list[str]] = {name: [] for name in measured_on}
    ids = groups["query_id"][:] if "query_id" in groups.column_names else texts
    for row in np.flatnonzero(nearest >= 0):
        left_out[names[nearest[row]]].append(str(ids[row]))
    if (nearest >= 0).any():
        some = int(np.flatnonzero(nearest >= 0)[0])
        logger.warning(
            "%d of %d groups are left out of training: their queries are near-duplicates of those of %s, such as %r of "
            "%r (train.near_duplicates=%g)",
            *((nearest >= 0).sum(), len(groups), " and ".join(name for name, found in left_out.items() if found)),
            *(texts[some][:80], known[nearest[some]][:80], threshold),
        )
    kept = np.flatnonzero(nearest < 0)
    if not len(kept):
        raise TrainingError(
            f"the queries of all {len(groups)} groups are near-duplicates of queries that the model is measured on: "
            "train on others, or set train.near_duplicates to null and do not trust the figures"
        )
    return groups.select(kept) if len(kept) < len(groups) else groups, left_out


def _hold_out(groups: datasets.Dataset, fraction: float, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """The groups without a random part of them, and that part."""
    held = max(round(len(groups) * fraction), 1)
    if fraction <= 0 or held >= len(groups):
        raise TrainingError(
            f"{len(groups)} groups cannot be parted by train.dev_fraction={fraction}: there must be some to train on "
            "and some to choose the best checkpoint by; set evaluate.dev_queries, or another fraction"
        )
    order = np.random.default_rng(seed).permutation(len(groups))
    return groups.select(np.sort(order[held:])), groups.select(np.sort(order[:held]))


def _found(run: Run, groups: str) -> Path | None:
    """Where groups lie, here or beside the recipe; None if they do not, as a Hub dataset."""
    path = run.find(groups)
    return path if path.exists() else None


def _which_groups(run: Run, groups: str | None) -> str | dict[str, str] | None:
    """The groups that a recipe names and what is in them, so that edited ones count as changed."""
    path = _found(run, groups) if groups else None
    if groups is None or path is None:
        return groups
    if (path / MANIFEST).is_file():
        return {groups: read_manifest(path).digest}
    return {groups: content_digest(path)}


def _train(
    run: Run,
    groups: datasets.Dataset,
    dev: datasets.Dataset,
    inputs: Mapping[str, str],
    human_dev: bool,
    left_out: Mapping[str, Sequence[str]],
    merge: Callable[[Path], Mapping[str, Any]],
    first_stage_weight: Callable[[Path], Mapping[str, float]],
) -> None:
    config = run.recipe.train
    name, model, arguments = "model", config.model, config.arguments
    shape: dict[str, Any] = {
        "base": config.model,
        "arguments": dict(arguments),
        "precision": config.precision,
        "dropout": config.dropout,
        "near_duplicates": config.near_duplicates,
        "early_stopping_patience": config.early_stopping_patience,
        "seed": run.recipe.seed,
        "groups": _which_groups(run, config.groups),
        "dev": digest(dev.to_list()),
    }
    if any(left_out.values()):
        shape["left_out"] = digest({name: sorted(ids) for name, ids in left_out.items()})
    if config.lora.r:
        shape["lora"] = asdict(config.lora)
    if config.merge != "none":
        shape["merge"] = config.merge
    folder = run.root / name
    stale = is_stale(folder, name, shape, inputs)
    processes().wait_for_everyone()  # before the first can finish and change the answer
    if stale:
        # Checkpoints of other settings or other groups must not be taken up.
        checkpoints = run.root / "checkpoints" / f"{name}-{digest([shape, dict(inputs)])}"
        trainer = _trainer(run, name, model, groups, dev, arguments, checkpoints)
        trainer.train(resume_from_checkpoint=any(checkpoints.glob("checkpoint-*")))
        if trainer.is_world_process_zero() and folder.exists():
            shutil.rmtree(folder)  # of other settings, its manifest among them
        (trainer.save_merged if config.lora.r else trainer.save_model)(str(folder))
        if trainer.is_world_process_zero():
            (run.root / "logs").mkdir(exist_ok=True)
            trainer.state.save_to_json(str(run.root / "logs" / f"{name}.json"))
            merged = dict(merge(folder))
            first_stage = dict(first_stage_weight(folder))
            write_first_stage_weight(folder, first_stage["weight"])
            names = [file.name for file in folder.iterdir() if file.is_file()]
            chose = trainer.args.load_best_model_at_end or config.early_stopping_patience is not None
            facts = {
                "max_length": trainer.args.max_length,
                "dev_ndcg@10": trainer.state.best_metric,
                "dev": {"queries": len(dev), "human": human_dev, "chose_checkpoint": chose},
                "first_stage": first_stage,
                **({"merge": merged} if merged else {}),
            }
            near = {f"near_duplicates_{name}": len(ids) for name, ids in left_out.items()}
            counts = {**trainer.counts, **near, "steps": trainer.state.global_step}
            write_manifest(folder, names, kind=name, config=shape, inputs=inputs, counts=counts, facts=facts)
    processes().wait_for_everyone()  # until none reads a checkpoint any more
    if processes().is_main_process:
        for left in (run.root / "checkpoints").glob(f"{name}-*"):
            shutil.rmtree(left)


def _trainer(
    run: Run,
    name: str,
    model: str,
    groups: datasets.Dataset,
    dev: datasets.Dataset,
    arguments: Mapping[str, Any],
    checkpoints: Path,
) -> LCETrainer:
    config = run.recipe.train
    args = _arguments(run, arguments, checkpoints)
    set_seed(args.seed)  # a new head is drawn from it
    callbacks = []
    if config.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(config.early_stopping_patience))
    trainer = LCETrainer(
        model=load_model(model, dropout=config.dropout, yes_no=args.yes_no),
        args=args,
        train_dataset=groups,
        eval_dataset=dev,
        processing_class=load_tokenizer(model),
        callbacks=callbacks,
        peft_config=lora(config.lora),
    )
    if not args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(_Progress(name))
    return trainer


def _arguments(run: Run, chosen: Mapping[str, Any], output_dir: Path) -> LCETrainingArguments:
    """The settings of a phase: those the recipe chooses over those of every recipe."""
    return LCETrainingArguments(
        **{
            "output_dir": str(output_dir),
            "seed": run.recipe.seed,
            "bf16": resolve_dtype(run.recipe.train.precision) == torch.bfloat16,
            **TRAINING_DEFAULTS,
            **chosen,
        }
    )


class _Progress(ProgressCallback):  # type: ignore[misc]
    """A bar, and a line an evaluation, where transformers prints every log as a dict."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.latest: dict[str, float] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(f"training {self.name.replace('_', ' ')}")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        if "loss" in logs:
            self.latest = logs
        if "eval_ndcg@10" in logs:
            message = "dev nDCG@10 {eval_ndcg@10:.3f}".format_map(logs)
            if self.latest:
                message += ", loss {loss:.3f} where guessing costs {loss_if_guessing:.3f}".format_map(self.latest)
            logger.info("%s: step %d of %d: %s", self.name, state.global_step, state.max_steps, message)
