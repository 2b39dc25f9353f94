"""The training stage: a recipe's groups into a reranker's folder."""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import PartialState
from transformers import EarlyStoppingCallback, set_seed

from lce_trainer.artifacts import MANIFEST, digest, write_manifest
from lce_trainer.checkpoints import SealCheckpoints, newest_checkpoint
from lce_trainer.groups import load_groups
from lce_trainer.precision import resolve_dtype
from lce_trainer.reranker import load_model, load_tokenizer
from lce_trainer.run import Run, is_stale
from lce_trainer.trainer import LCETrainer
from lce_trainer.training_args import LCETrainingArguments

logger = logging.getLogger(__name__)


def fit_reranker(run: Run, dev: datasets.Dataset | None) -> None:
    """Train in up to two phases: the warm start's groups, then the judged ones.

    Args:
        run: The recipe being run; ``model`` and ``warm_start_model`` are written under its root.
        dev: Human queries as groups, to choose the best checkpoint by; if None, a part of the
            judged groups is held out for that.
    """
    config = run.recipe.train
    model = config.model
    inputs = {}
    if config.warm_start.pairs:
        warm = config.warm_start
        arguments = {
            **config.arguments,
            "distillation_weight": 1.0,
            "distillation_temperature": warm.temperature,
            "learning_rate": warm.learning_rate,
            "group_size": warm.group_size,
            "num_train_epochs": 1,
            "max_steps": -1,
        }
        inputs = {"warm_start": run.manifest("warm_start").digest}
        _fit(run, "warm_start_model", model, run.table("warm_start"), dev, arguments, inputs)
        model = str(run.root / "warm_start_model")
        inputs = {"warm_start_model": run.manifest("warm_start_model").digest}
    if config.groups is None:
        groups = run.table("groups")
        inputs["groups"] = run.manifest("groups").digest
    else:
        groups = load_groups(config.groups)
    if dev is None:
        halves = groups.train_test_split(test_size=config.dev_fraction, seed=run.recipe.seed)
        groups, dev = halves["train"], halves["test"]
    _fit(run, "model", model, groups, dev, config.arguments, inputs)


def _fit(
    run: Run,
    name: str,
    model: str,
    groups: datasets.Dataset,
    dev: datasets.Dataset,
    arguments: Mapping[str, Any],
    inputs: Mapping[str, str],
) -> None:
    config = run.recipe.train
    shape = {
        "base": config.model,
        "arguments": dict(arguments),
        "precision": config.precision,
        "dropout": config.dropout,
        "early_stopping_patience": config.early_stopping_patience,
        "seed": run.recipe.seed,
        "groups": config.groups,
        "dev": digest(dev.to_list()),
    }
    folder = run.root / name
    stale = is_stale(folder, name, shape, inputs)
    PartialState().wait_for_everyone()  # before rank 0 can finish and change the answer
    if not stale:
        return
    # Checkpoints of other settings or other groups must not be taken up.
    checkpoints = run.root / "checkpoints" / f"{name}-{digest([shape, dict(inputs)])}"
    trainer = _trainer(run, model, groups, dev, arguments, checkpoints)
    newest = newest_checkpoint(checkpoints)
    if newest is not None:
        logger.info("%s: going on from %s", name, newest)
    PartialState().wait_for_everyone()
    trainer.train(resume_from_checkpoint=str(newest) if newest else None)
    trainer.save_model(str(folder))
    if trainer.is_world_process_zero():
        (run.root / "logs").mkdir(exist_ok=True)
        trainer.state.save_to_json(str(run.root / "logs" / f"{name}.json"))
        names = [file.name for file in folder.iterdir() if file.is_file() and file.name not in (MANIFEST, "README.md")]
        facts = {"max_length": trainer.args.max_length, "dev_ndcg@10": trainer.state.best_metric}
        counts = {**trainer.counts, "steps": trainer.state.global_step}
        write_manifest(folder, names, kind=name, config=shape, inputs=inputs, counts=counts, facts=facts)
        shutil.rmtree(checkpoints)
    PartialState().wait_for_everyone()


def _trainer(
    run: Run,
    model: str,
    groups: datasets.Dataset,
    dev: datasets.Dataset,
    arguments: Mapping[str, Any],
    checkpoints: Path,
) -> LCETrainer:
    config = run.recipe.train
    args = LCETrainingArguments(
        **{
            "output_dir": str(checkpoints),
            "seed": run.recipe.seed,
            "bf16": resolve_dtype(config.precision) == torch.bfloat16,
            "eval_strategy": "steps",
            "eval_steps": 0.2,
            "save_strategy": "steps",
            "save_steps": 0.2,
            "save_total_limit": 2,
            "load_best_model_at_end": True,
            "metric_for_best_model": "ndcg@10",
            "report_to": "none",
            **arguments,
        }
    )
    set_seed(args.seed)  # a new head is drawn from it
    callbacks = [SealCheckpoints()]
    if config.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(config.early_stopping_patience))
    return LCETrainer(
        model=load_model(model, dropout=config.dropout),
        args=args,
        train_dataset=groups,
        eval_dataset=dev,
        processing_class=load_tokenizer(model),
        callbacks=callbacks,
    )
