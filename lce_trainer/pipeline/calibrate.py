"""The calibration of a reranker: probabilities by labelled pairs, kept in its config, and the page that draws them."""

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from lce_trainer.artifacts import MANIFEST, Manifest, file_sha256, read_manifest, replace_manifest
from lce_trainer.errors import ConfigError
from lce_trainer.evaluation.calibration import calibrate
from lce_trainer.evaluation.judged import LabelledPairs, read_pairs
from lce_trainer.evaluation.report import aligned
from lce_trainer.groups.near_duplicates import find_near_duplicates
from lce_trainer.hub.privacy import names_only
from lce_trainer.model.reranker import Reranker
from lce_trainer.model.saving import write_calibration
from lce_trainer.pipeline.evaluate import dev_groups, held_out_texts, measured_queries
from lce_trainer.pipeline.report import CALIBRATION, render_calibration, write_report
from lce_trainer.pipeline.run import Run
from lce_trainer.pipeline.stages import read_corpus
from lce_trainer.pipeline.train import held_out_groups, trained_queries

logger = logging.getLogger(__name__)

PAGE = "calibration.html"
_FEW = 100  # relevant pairs, below which the intervals are wide


def calibrate_model(model: str, pairs: str | None, precision: float | None, output: Path | None) -> dict[str, Any]:
    """Calibrate a reranker on labelled pairs, and write what was found into its folder.

    Args:
        model: A folder, a Hub id, or ``package:NAME/FOLDER``.
        pairs: A file of rows of query, passage and label, none of which the model was trained on.
        precision: The precision that a cut-off is chosen for; None for no cut-off.
        output: A new folder for a copy of the model; None writes into the model's own.

    Returns:
        What :func:`lce_trainer.evaluation.calibration.calibrate` found, with ``from``, ``labelled_by`` and ``page``.

    Raises:
        ConfigError: There are no pairs, or the calibration cannot be written where it should be.
        EvaluationError: The pairs cannot be read, or do not do to fit probabilities to.
        TrainingError: There is no such reranker.
    """
    if pairs is None:
        raise ConfigError("a model needs labelled pairs to be calibrated on: name a file of them by --pairs")
    _check(precision, output)
    if output is None:
        _check_own_folder(model)
    found, reranker = _calibrate(model, read_pairs(Path(pairs)), Path(pairs).name, "people", precision)
    folder = _keep(found, reranker, Path(model), output)
    name = str(names_only(model.rstrip("/"), Path.cwd()))
    (folder / PAGE).write_text(render_calibration(name, found), encoding="utf-8")
    return {**found, "page": str(folder / PAGE)}


def calibrate_run(run: Run, pairs: str | None, precision: float | None, output: Path | None) -> dict[str, Any]:
    """Calibrate the reranker that a recipe trained, as :func:`calibrate_model` does.

    Without ``pairs`` the recipe's dev queries are used, over the candidates of the first stage; and in a recipe without
    any, the groups that were held out from training, whose labels are the judge's. The evaluation stays valid, since no
    logit changes.

    Raises:
        ArtifactError: The model is missing, or was trained when other groups were held out.
    """
    _check(precision, output)
    before, model = run.manifest("model"), run.root / "model"
    if pairs is not None:
        labelled, source, by = _not_trained_on(run, read_pairs(run.find(pairs))), Path(pairs).name, "people"
    else:
        rows, source, by = judged_groups(run)
        labelled = _pairs_of(rows)
    found, reranker = _calibrate(str(model), labelled, source, by, precision)
    folder = _keep(found, reranker, model, output)
    if output is not None:
        (folder / PAGE).write_text(render_calibration(folder.name, found), encoding="utf-8")
        return {**found, "page": str(folder / PAGE)}
    _seal_again(run, before)
    page = write_report(run)
    return {**found, "page": None if page is None else str(page)}


def judged_groups(run: Run) -> tuple[datasets.Dataset, str, str]:
    """Return groups that the recipe's model was not trained on, where they come from, and who labelled them.

    They are its dev queries with the candidates of the first stage; or in a recipe without any, the groups that were
    held out from training, whose labels are the judge's.

    Raises:
        ArtifactError: The model was trained when other groups were held out.
    """
    dev = run.recipe.evaluate.dev_queries
    if dev is not None:
        read_corpus(run)
        return dev_groups(run, run.recipe.evaluate.top_k, None), Path(dev).name, "people"
    rows = held_out_groups(run, _measured_on(run))
    logger.warning("there are no dev queries: what is found is of the judge's labels, and not of people's")
    return rows, "the groups held out from training", "the judge of the groups"


def describe_calibration(found: Mapping[str, Any]) -> str:
    """Return a calibration as plain text."""
    table = [["", "ECE [95 % CI]", "Brier", "log loss"]]
    for name, figures in (("sigmoid of the logit", found["before"]), ("calibrated", found["after"])):
        ece = f"{figures['ece']:.3f} [{figures['ece_low']:.3f}, {figures['ece_high']:.3f}]"
        table.append([name, ece, f"{figures['brier']:.4f}", f"{figures['log_loss']:.4f}"])
    lines = [
        f"{found['pairs']:,} pairs of {found['queries']:,} queries, {found['relevant']:,} relevant, from "
        f"{found['from']}, labelled by {found['labelled_by']}",
        *aligned(table),
        "figures: each fifth of the queries by what the others fit; ECE: 15 bins of equally many pairs",
        f"probability = sigmoid({found['slope']:.4g} × logit {found['intercept']:+.4g})",
    ]
    if (cut := found["cut_off"]) is not None:
        lines.append(
            f"cut-off for a precision of {cut['wanted']:g}: probability {cut['probability']:.3f} "
            f"(logit {cut['logit']:.3f})"
        )
        precision = "no pair is left"
        if cut["precision"] is not None:
            interval = f"[{cut['precision_low']:.3f}, {cut['precision_high']:.3f}]"
            precision = (
                f"precision {cut['precision']:.3f} {interval}, recall {cut['recall']:.3f}, {cut['pairs']:,} pairs"
            )
        lines.append(f"where other queries choose it: {precision}")
    return "\n".join(lines)


def _check(precision: float | None, output: Path | None) -> None:
    """Check what can be checked before the model is loaded."""
    if precision is not None and not 0 < precision <= 1:
        raise ConfigError(f"--precision must be above 0 and up to 1, not {precision:g}")
    if output is not None and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"{output} is not empty: name a new folder, so that nothing is overwritten")


def _check_own_folder(model: str) -> None:
    folder = Path(model)
    what = None
    if not folder.is_dir():
        what = f"{model} is no folder that a calibration can be written into"
    elif (folder / MANIFEST).is_file():
        what = f"{folder} is the model of a run, which its manifest seals: name the recipe in its place"
    elif not (folder / "config.json").is_file():
        what = f"{folder} has no config.json to keep a calibration in"
    if what is not None:
        raise ConfigError(f"{what}; or name a new folder for a plain copy of the model by --output")


def _calibrate(
    model: str, labelled: LabelledPairs, source: str, by: str, precision: float | None
) -> tuple[dict[str, Any], Reranker]:
    numbers = {query: number for number, query in enumerate(dict.fromkeys(labelled.queries))}
    query = np.array([numbers[text] for text in labelled.queries])
    if labelled.relevant.sum() < _FEW:
        logger.warning(
            "%d relevant pairs are few, and the intervals will be wide: label %d or more", labelled.relevant.sum(), _FEW
        )
    reranker = Reranker.from_pretrained(model)
    logger.info("%s pairs are scored", f"{len(labelled.queries):,}")
    logits = reranker.score(list(zip(labelled.queries, labelled.passages, strict=True)), progress=True)
    found = calibrate(logits, labelled.relevant, query, precision)
    return {**found, "from": source, "labelled_by": by}, reranker


def _measured_on(run: Run) -> dict[str, list[str]]:
    """Return the queries that training was kept from."""
    return {**measured_queries(run), **held_out_texts(run)}


def _not_trained_on(run: Run, labelled: LabelledPairs) -> LabelledPairs:
    """Leave out the pairs whose query is nearly one that the model was trained on, by ``train.near_duplicates``."""
    threshold = run.recipe.train.near_duplicates
    if threshold is None:
        return labelled
    new = find_near_duplicates(labelled.queries, trained_queries(run, _measured_on(run)), threshold) < 0
    if new.all():
        return labelled
    logger.warning("%d of %d pairs are left out: the model was trained on their queries", (~new).sum(), len(new))
    kept = np.flatnonzero(new).tolist()
    return LabelledPairs(
        [labelled.queries[i] for i in kept], [labelled.passages[i] for i in kept], labelled.relevant[kept]
    )


def _pairs_of(rows: Any) -> LabelledPairs:
    """Return the pairs of groups; one that stands twice counts once, and as relevant where one of the two is."""
    found: dict[tuple[str, str], bool] = {}
    for row in rows:
        for passage, label in zip(row["passages"], row["labels"], strict=True):
            pair = (row["query"], passage)
            found[pair] = found.get(pair, False) or label > 0
    queries, passages = [query for query, _ in found], [passage for _, passage in found]
    return LabelledPairs(queries, passages, np.array(list(found.values()), dtype=bool))


def _keep(found: Mapping[str, Any], reranker: Reranker, own: Path, output: Path | None) -> Path:
    """Write a calibration into the model's config, or into that of a copy, and the figures beside it as JSON."""
    kept = {"slope": found["slope"], "intercept": found["intercept"]}
    if found["cut_off"] is not None:
        kept |= {"cut_off": found["cut_off"]["probability"], "cut_off_precision": found["cut_off"]["wanted"]}
    folder = own if output is None else output
    if output is not None:
        reranker.save_pretrained(output)
    write_calibration(folder, kept)
    text = json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    (folder / CALIBRATION).write_text(text, encoding="utf-8")
    return folder


def _seal_again(run: Run, before: Manifest) -> None:
    """Write the manifest of a model whose config has got a calibration, and that of the evaluation of its logits.

    Raises:
        ArtifactError: The evaluation is damaged.
    """
    path = run.root / "model" / "config.json"
    files = {**before.files, path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)}}
    model = replace(before, files=files)
    replace_manifest(run.root / "model", model)
    if (run.root / "evaluation" / MANIFEST).is_file():
        evaluation = read_manifest(run.root / "evaluation")
        if evaluation.inputs.get("model") == before.digest:
            inputs = {**evaluation.inputs, "model": model.digest}
            replace_manifest(run.root / "evaluation", replace(evaluation, inputs=inputs))
