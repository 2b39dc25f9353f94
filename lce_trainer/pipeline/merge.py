"""What of the training is kept: weights between those of the base and the trained ones, after training."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
from torch import Tensor

from lce_trainer.errors import ConfigError
from lce_trainer.evaluation.compare import compare, rerank
from lce_trainer.hardware import best_device, resolve_dtype
from lce_trainer.model.loading import has_head, load_model, load_tokenizer
from lce_trainer.model.merging import interpolate
from lce_trainer.model.reranker import Reranker
from lce_trainer.model.saving import save_reranker
from lce_trainer.pipeline.evaluate import _in_domain
from lce_trainer.pipeline.general import load_general
from lce_trainer.pipeline.run import Run

logger = logging.getLogger(__name__)

GRID = (0.0, 0.25, 0.5, 0.75, 1.0)  # shares of the trained weights
RULE = (
    "the share with the highest sum of nDCG@10 on the dev queries and mean nDCG@10 over the general test sets; of "
    "equal ones the largest"
)


def check_merge(run: Run) -> None:
    """Check that the base can be merged with what it is trained to.

    Raises:
        ConfigError: It has no head of its own, or there is nothing to choose a share by.
    """
    config = run.recipe.train
    if config.merge == "none":
        return
    if not has_head(config.model, config.arguments.get("yes_no")):
        raise ConfigError(
            f"train.merge={config.merge}: {config.model} has no head of its own, and a new one has nothing to be "
            "merged with: name a reranker as train.model, or set train.merge to none"
        )
    if config.merge == "auto" and not run.recipe.evaluate.benchmark:
        raise ConfigError(
            "train.merge=auto chooses by general test sets beside the dev queries: name some in evaluate.benchmark, "
            "such as nano_beir, or give a share, such as train.merge=0.5"
        )


def merge_with_base(run: Run, dev: datasets.Dataset, folder: Path) -> dict[str, Any]:
    """Merge a trained model with its base as ``train.merge`` says, in its folder.

    Adapters are merged into the model before, so that these are the weights of whole models.

    Args:
        run: The recipe being run.
        dev: Groups that the best checkpoint was chosen by, where the recipe names no human dev queries.
        folder: Of the trained model.

    Returns:
        ``share`` of the trained weights that is kept; and where it was chosen the ``rule``, and as ``grid`` of each
        share the ``dev`` and ``general`` nDCG@10, each with ``mean``, ``low`` and ``high``. Empty where nothing is
        merged.

    Raises:
        TrainingError: The two are not of one architecture.
    """
    config = run.recipe.train
    if config.merge == "none":
        return {}
    base = load_model(config.model, yes_no=config.arguments.get("yes_no")).state_dict()
    found: dict[str, Any] = {"share": config.merge}
    if config.merge == "auto":
        grid = _measure(run, dev, base, folder)
        best = max(grid, key=lambda one: (one["dev"]["mean"] + one["general"]["mean"], one["share"]))
        found = {"share": best["share"], "rule": RULE, "grid": grid}
    share = float(found["share"])
    logger.info("model: %g of the trained weights are kept, and %g of the base's", share, 1 - share)
    if share < 1:
        model = load_model(folder, trained=True)
        model.load_state_dict(interpolate(base, model.state_dict(), share))
        tokenizer = load_tokenizer(folder)
        save_reranker(model, tokenizer, tokenizer.model_max_length, folder)
    return found


def _measure(run: Run, dev: datasets.Dataset, base: Mapping[str, Tensor], folder: Path) -> list[dict[str, Any]]:
    """Return the figures of each share of the grid."""
    config, general = run.recipe.evaluate, load_general(run)
    if config.dev_queries is not None:
        judged, _ = _in_domain(run, config.dev_queries, None)
        queries, pools, qrels = judged.queries, judged.pools, judged.qrels
    else:
        queries = [(str(i), query) for i, query in enumerate(dev["query"])]
        pools = [[(str(j), text) for j, text in enumerate(passages)] for passages in dev["passages"]]
        qrels = {str(i): {str(j): label for j, label in enumerate(labels)} for i, labels in enumerate(dev["labels"])}
    runs: dict[str, dict[str, Any]] = {"dev": {}, "general": {}}
    for share in GRID:
        model = load_model(folder, trained=True)
        model.load_state_dict(interpolate(base, model.state_dict(), share))
        reranker = Reranker(model.to(best_device(), resolve_dtype(config.precision)), load_tokenizer(folder))
        score = _scorer(reranker, config.batch_tokens)
        runs["dev"][f"{share:g}"] = rerank(queries, pools, score)
        runs["general"][f"{share:g}"] = rerank(general.judged.queries, general.judged.pools, score)
    tables = {
        "dev": compare(runs["dev"], qrels, baseline="0", seed=run.recipe.seed),
        "general": compare(
            runs["general"],
            general.judged.qrels,
            baseline="0",
            relevant_from=general.relevant_from,
            sets=general.sets,
            seed=run.recipe.seed,
        ),
    }
    grid: list[dict[str, Any]] = [{"share": share} for share in GRID]
    for name, table in tables.items():
        for row in table.to_list():
            if row["measure"] == "ndcg@10":
                one = grid[GRID.index(float(row["system"]))]
                one[name] = {"mean": row["mean"], "low": row["ci_low"], "high": row["ci_high"]}
    for one in grid:
        logger.info(
            "model: with %g of the trained weights dev nDCG@10 is %.3f, and %.3f over the general test sets",
            *(one["share"], one["dev"]["mean"], one["general"]["mean"]),
        )
    return grid


def _scorer(reranker: Reranker, batch_tokens: int | None) -> Any:
    return lambda pairs: reranker.score(pairs, batch_tokens=batch_tokens, progress=True)
