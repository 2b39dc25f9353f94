"""The attacks on a reranker: how often what is added to a passage lifts it above a relevant one."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets

from lce_trainer.errors import ConfigError
from lce_trainer.evaluation.attacks import PLAIN, attacks, draw_triples, measure_attacks
from lce_trainer.evaluation.report import aligned
from lce_trainer.groups.convert import load_groups
from lce_trainer.groups.schema import check_groups
from lce_trainer.hub.privacy import names_only
from lce_trainer.model.reranker import Reranker
from lce_trainer.model.template import keeps_special_tokens
from lce_trainer.pipeline.calibrate import judged_groups
from lce_trainer.pipeline.run import Run

logger = logging.getLogger(__name__)

_FEW = 50  # queries, below which the intervals are wide
_NEGATIVES = 4  # of a query
_SEED = 13


def attack_model(model: str, groups: str | None, queries: int, special_tokens: bool) -> dict[str, Any]:
    """Attack a reranker.

    Args:
        model: A folder, a Hub id, or ``package:NAME/FOLDER``.
        groups: Judged groups, or rows that become groups, in any layout that training takes.
        queries: Of these, drawn by a seed, at most.
        special_tokens: Whether special tokens in passages keep their meaning for the measurement.

    Returns:
        ``from``, ``labelled_by``, ``queries``, ``triples``, ``special_tokens_in_texts``, and ``attacks``, the rows of
        :func:`lce_trainer.evaluation.attacks.measure_attacks`.

    Raises:
        ConfigError: There are no groups, or less than one query is wanted.
        GroupsError: The groups cannot be read.
        EvaluationError: No query has both a relevant passage and another.
        TrainingError: There is no such reranker.
    """
    if groups is None:
        raise ConfigError("a model needs judged groups or pairs to be attacked on: name them by --groups")
    return _attack(model, _read_groups(groups), Path(groups).name, "people", queries, special_tokens, _SEED)


def attack_run(run: Run, groups: str | None, queries: int, special_tokens: bool) -> dict[str, Any]:
    """Attack the reranker that a recipe trained, as :func:`attack_model` does.

    Without ``groups`` the recipe's dev queries are used, over the candidates of the first stage; and in a recipe
    without any, the groups that were held out from training, whose labels are the judge's.

    Raises:
        ArtifactError: The model is missing, or was trained when other groups were held out.
    """
    run.manifest("model")
    if groups is None:
        rows, source, by = judged_groups(run)
    else:
        path = run.find(groups)
        rows, source, by = _read_groups(str(path) if path.exists() else groups), Path(groups).name, "people"
    return _attack(str(run.root / "model"), rows, source, by, queries, special_tokens, run.recipe.seed)


def describe_attacks(found: Mapping[str, Any]) -> str:
    """Return attacks as plain text, what :func:`attack_model` returns."""
    table = [["added to the negative", "above the positive [95 % CI]", "lift [95 % CI]"]]
    for row in found["attacks"]:
        lift = f"{row['lift']:+.1%} [{row['lift_low']:+.1%}, {row['lift_high']:+.1%}]"
        share = f"{row['share']:.1%} [{row['low']:.1%}, {row['high']:.1%}]"
        table.append([row["attack"], share, "" if row["attack"] == PLAIN else lift])
    tokens = "keep their meaning" if found["special_tokens_in_texts"] else "are text"
    return "\n".join(
        [
            f"{found['triples']:,} triples of {found['queries']:,} queries, from {found['from']}, labelled by "
            f"{found['labelled_by']}",
            *aligned(table),
            f"before the negative, or behind it where the row says so; special tokens in passages {tokens}",
        ]
    )


def write_attacks(found: Mapping[str, Any], path: Path) -> None:
    """Write attacks as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def _read_groups(name: str) -> datasets.Dataset:
    return check_groups(load_groups(name), name)


def _attack(
    model: str, groups: datasets.Dataset, source: str, by: str, queries: int, special_tokens: bool, seed: int
) -> dict[str, Any]:
    if queries < 1:
        raise ConfigError(f"--queries must be 1 or more, not {queries}")
    triples = draw_triples(groups, queries, _NEGATIVES, seed)
    if len(triples) < _FEW:
        logger.warning("%d queries are few, and the intervals will be wide: judge %d or more", len(triples), _FEW)
    reranker = Reranker.from_pretrained(model, special_tokens_in_texts=special_tokens or None)
    tokenizer = reranker.tokenizer
    separator = tokenizer.sep_token or tokenizer.eos_token or "[SEP]"
    chosen = attacks(tokenizer.pad_token or "[PAD]", separator)
    logger.info("%d attacks on %d queries", len(chosen), len(triples))
    rows = measure_attacks(lambda pairs: reranker.score(pairs, progress=True), triples, chosen, seed)
    return {
        "model": names_only(model.rstrip("/"), Path.cwd()),
        "from": source,
        "labelled_by": by,
        "queries": len(triples),
        "triples": sum(map(len, triples)),
        "special_tokens_in_texts": keeps_special_tokens(tokenizer),
        "attacks": rows,
    }
