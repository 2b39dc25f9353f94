"""The report of a run, one HTML page that needs nothing else; and groups as text for the terminal."""

import json
import logging
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np

import lce_trainer
from lce_trainer.artifacts import MANIFEST, Manifest
from lce_trainer.errors import ConfigError
from lce_trainer.evaluation.metrics import MEASURES
from lce_trainer.evaluation.report import MEASURE_NAMES, baseline_of, parts, wins_and_losses
from lce_trainer.groups.convert import load_groups
from lce_trainer.hub.privacy import names_only
from lce_trainer.pipeline.charts import Axis, learning_curves, reliability_charts, score_histograms, templates
from lce_trainer.pipeline.evaluate import (
    FUSED,
    RERANKER,
    comparisons,
    dev_groups,
    judged_system,
    public_names,
    query_table,
    title_of,
    verdict_of,
)
from lce_trainer.pipeline.run import Run

logger = logging.getLogger(__name__)

PAGE = "report.html"
CALIBRATION = "calibration.json"  # beside a model's config

_TEMPLATE = "report.html.jinja"
# What each artifact is made from, the last one first.
_PARENTS = {"evaluation": "model", "model": "groups", "groups": "candidates", "candidates": "queries"}
_PARENTS |= {"queries": "passages"}
_STAGES = {
    "passages": "Passages of the corpus",
    "queries": "Queries written by the language model",
    "candidates": "Candidates of the first stage",
    "groups": "Groups, by the judge's labels",
    "model": "Training",
    "evaluation": "Evaluation",
}
_SECRET = re.compile(r"(^|_)(token|secret|password|api_key)$")
_EXAMPLES = 3  # groups
_NEGATIVES = 5  # of a group that are shown
_SAMPLED_QUERIES = 60  # that a model is quantized for
_SAMPLED_PASSAGES = 3  # of each


def write_report(run: Run) -> Path | None:
    """Write what a run has made as one HTML page into its folder, unless it stands there already.

    Returns:
        The page; None if its folder cannot be written into.
    """
    path = run.root / PAGE
    text = render_report(run)
    try:
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            part = path.with_name(f".{PAGE}.part")
            part.write_text(text, encoding="utf-8")
            part.replace(path)
    except OSError as error:  # a run in a folder that is only read is evaluated all the same
        logger.warning("%s is not written: %s", path, error.strerror)
        return None
    return path


def render_report(run: Run) -> str:
    """Return the page: what is there of the run, each artifact as long as the following one was made from it.

    The same artifacts and the same log of the training give the same page.

    Raises:
        ArtifactError: An artifact is damaged.
    """
    manifests = _manifests(run)
    groups = sample_groups(run, _EXAMPLES) if "groups" in manifests else []
    calibration = run.root / "model" / CALIBRATION
    calibrated = calibration.is_file() and "model" in manifests
    facts = manifests["groups"].facts if "groups" in manifests else {}
    return _render(
        name=run.root.name,
        is_run=True,
        comparisons=_comparisons(run, manifests["evaluation"]) if "evaluation" in manifests else [],
        calibration=reliability_charts(json.loads(calibration.read_text(encoding="utf-8"))) if calibrated else None,
        curves=learning_curves(run.root / "logs" / "model.json") if "model" in manifests else [],
        training=_training(manifests["model"]) if "model" in manifests else {},
        histograms=score_histograms(run.root / "groups" / "judged.parquet") if "groups" in manifests else [],
        judge=manifests["groups"].config.get("judge") if "groups" in manifests else None,
        source_first=facts.get("source_first", {}),
        human=facts.get("judge_on_human_labels", {}),
        shortcuts={name: value for name, value in facts.get("shortcut_auc", {}).items() if value == value},
        counts=[(_STAGES[name], *_counts(manifests[name])) for name in _STAGES if name in manifests],
        gauge=manifests["queries"].facts.get("gauge") if "queries" in manifests else None,
        dropped=manifests["queries"].facts.get("dropped", {}) if "queries" in manifests else {},
        groups=groups,
        libraries=_libraries(manifests),
        settings=[(name, _settings(run, manifests[name])) for name in _STAGES if name in manifests],
    )


def render_calibration(name: str, found: Mapping[str, Any]) -> str:
    """Return a page with the calibration of a model that no run has made.

    Args:
        name: The model's, as readers know it.
        found: What :func:`lce_trainer.evaluation.calibration.calibrate` found.
    """
    lists = ("comparisons", "curves", "histograms", "counts", "groups", "settings")
    dicts = ("training", "source_first", "human", "shortcuts", "dropped", "libraries")
    nothing: dict[str, Any] = {**{key: [] for key in lists}, **{key: {} for key in dicts}, "judge": None, "gauge": None}
    return _render(name=name, is_run=False, calibration=reliability_charts(found), **nothing)


def _render(**parts: Any) -> str:
    environment = templates()
    environment.filters.update(words=lambda key: str(key).replace("_", " "), cut=_cut, number=_number)
    template = environment.get_template(_TEMPLATE)
    return template.render(version=lce_trainer.__version__, negatives_shown=_NEGATIVES, **parts)


def sample_groups(run: Run, count: int) -> list[dict[str, Any]]:
    """Return groups of a run drawn at random by the recipe's seed, in the order in which they stand.

    They are those that the recipe makes, or those that it names as ``train.groups``.

    Args:
        run: A recipe whose groups are made.
        count: How many; all of them if there are fewer.

    Returns:
        Of each ``query``, ``positives`` and ``negatives``, which are ``(passage, label, soft label or None)``.

    Raises:
        ConfigError: ``count`` is below 1.
        ArtifactError: The groups are not made yet.
        DataError: The groups that the recipe names cannot be read.
    """
    if count < 1:
        raise ConfigError(f"the number of groups must be 1 or more, not {count}")
    given = run.recipe.train.groups
    if given is None:
        table = run.table("groups")
    else:
        table = load_groups(str(run.find(given)) if run.find(given).exists() else given)
    order = np.random.default_rng(run.recipe.seed).permutation(len(table))
    return [_group(row) for row in table.select(np.sort(order[:count]))]


def sample_pairs(run: Run) -> tuple[list[tuple[str, str]], str]:
    """Return queries with candidates, some hundred, that a model is quantized for; their labels play no part.

    They are of the groups of the run, so that none is a dev query that rankings are measured on; or, where it has no
    groups, the dev queries with what the first stage brings.

    Returns:
        The pairs, and what they are, in words.
    """
    if run.recipe.train.groups is None and not (run.root / "groups" / MANIFEST).is_file():
        rows = dev_groups(run, _SAMPLED_PASSAGES, _SAMPLED_QUERIES)
        pairs = [(row["query"], passage) for row in rows for passage in row["passages"]]
        return pairs, f"{len(pairs)} pairs of dev queries"
    pairs = [
        (group["query"], passage)
        for group in sample_groups(run, _SAMPLED_QUERIES)
        for passage, _, _ in (group["positives"][:1] + group["negatives"])[:_SAMPLED_PASSAGES]
    ]
    return pairs, f"{len(pairs)} pairs of the groups"


def describe_groups(groups: Sequence[Mapping[str, Any]], width: int) -> str:
    """Return groups as text: the query, and a line for each passage with its label and soft label.

    Args:
        groups: From :func:`sample_groups`.
        width: Columns of the terminal that a line is cut to; a wide character fills two.
    """
    lines = []
    for group in groups:
        lines += ["", "query                   " + _one_line(group["query"], width - 24)]
        for kind in ("positives", "negatives"):
            for passage, label, score in group[kind]:
                soft = "" if score is None else f"{score:+.2f}"
                lines.append(f"  {kind[:-1]} {label:>4g} {soft:>6}  " + _one_line(passage, width - 24))
    return "\n".join(lines[1:])


def _one_line(text: str, width: int) -> str:
    """Return a text as one line of at most so many columns; what would steer a terminal becomes a space."""
    text = re.sub(r"\s+", " ", "".join(" " if unicodedata.category(c)[0] == "C" else c for c in text)).strip()
    columns = np.cumsum([_columns(c) for c in text])
    if not text or columns[-1] <= width:
        return text
    return text[: int(np.searchsorted(columns, width - 1, side="right"))].rstrip() + "…"


def _columns(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _group(row: Mapping[str, Any]) -> dict[str, Any]:
    passages, labels = row["passages"], row["labels"]
    scores = row.get("scores") or [None] * len(passages)
    found = list(zip(passages, labels, scores, strict=True))
    return {
        "query": row["query"],
        "positives": [item for item in found if item[1] > 0],
        "negatives": [item for item in found if item[1] <= 0],
    }


def _manifests(run: Run) -> dict[str, Manifest]:
    """Return the manifests of the artifacts that belong together: what is older or newer than the rest is left out."""
    found: dict[str, Manifest] = {}
    latest = next((name for name in _PARENTS if (run.root / name / MANIFEST).is_file()), "passages")
    if not (run.root / latest / MANIFEST).is_file():
        return found
    found[latest] = run.manifest(latest)
    for name, parent in _PARENTS.items():
        if name not in found or not (run.root / parent / MANIFEST).is_file():
            continue
        manifest = run.manifest(parent)
        if found[name].inputs.get(parent) == manifest.digest:
            found[parent] = manifest
        elif name == "evaluation":  # of the model before this one
            del found[name]
            found[parent] = manifest
        elif parent in found[name].inputs:
            logger.warning(
                "%s holds other %s than those that its %s was made from: the report leaves them out",
                run.root,
                parent,
                name,
            )
    return found


def _comparisons(run: Run, manifest: Manifest) -> list[dict[str, Any]]:
    return [_comparison(run, manifest, name) for name in comparisons(manifest)]


def _comparison(run: Run, manifest: Manifest, name: str) -> dict[str, Any]:
    results = run.table("evaluation", name)
    public = public_names(results["system"], run.base)
    rows = [{**row, "system": public[row["system"]]} for row in results.to_list()]
    results = datasets.Dataset.from_list(rows, features=results.features)
    baseline = baseline_of(results)
    line, system = verdict_of(results, name), judged_system(name)
    systems: dict[str, dict[str, Any]] = {}
    for row in results.to_list():
        systems.setdefault(row["system"], {})[row["measure"]] = row
    ndcg = [measures["ndcg@10"] for measures in systems.values()]
    axis = Axis(min(row["ci_low"] for row in ndcg), max(row["ci_high"] for row in ndcg), least=0.0, most=1.0)
    queries = query_table(run, name)
    found: dict[str, Any] = {
        "title": title_of(name),
        "queries": results[0]["queries"],
        "outcome": line.partition(":")[0],
        "verdict": line.partition(": ")[2],
        "note": manifest.facts.get("notes", {}).get(name, ""),
        "baseline": baseline,
        "shipped": system,
        "measures": [(measure, MEASURE_NAMES[measure]) for measure in MEASURES],
        "systems": systems,
        "axis": axis,
        "parts": {},
        "wins": [],
        "losses": [],
    }
    if queries is not None:
        original = next(old for old, new in public.items() if new == baseline)
        found["parts"] = parts(queries, system, original, run.recipe.seed)
        found["wins"], found["losses"] = wins_and_losses(queries, system, original)
        found["part_systems"] = [(original, baseline), (RERANKER, RERANKER), (FUSED, FUSED)]
    return found


def _training(model: Manifest) -> dict[str, str]:
    """Return what the training came to, as words."""
    found = {}
    dev, first_stage = model.facts.get("dev"), model.facts.get("first_stage", {})
    if dev is not None:
        what = "human dev queries" if dev["human"] else "groups held out from training"
        chose = "chosen on" if dev["chose_checkpoint"] else "not chosen, measured on"
        found["checkpoint"] = f"{chose} {dev['queries']:,} {what}"
    if merge := model.facts.get("merge"):
        found["share of the trained weights, beside the base's"] = f"{merge['share']:g}"
        for one in merge.get("grid", ()):
            figures = [f"{name} nDCG@10 {one[name]['mean']:.3f}" for name in ("dev", "general")]
            found[f"with {one['share']:g} of the trained weights"] = ", ".join(figures)
    if "weight" in first_stage:
        found["weight of the first stage beside the reranker"] = f"{first_stage['weight']:.2f}"
    if "bm25_weight" in first_stage:
        found["weight of BM25 in the first stage"] = f"{first_stage['bm25_weight']:.2f}"
    for name in ("reranker", "first_stage", "fused"):
        if (value := first_stage.get(f"dev_ndcg@10_{name}")) is not None:
            found[f"dev nDCG@10, {name.replace('_', ' ')}"] = f"{value:.3f}"
    return found


def _counts(manifest: Manifest) -> tuple[list[tuple[str, int]], list[str]]:
    """Return what was counted, and the names of what was counted and never came up."""
    some = [(name.replace("_", " "), count) for name, count in manifest.counts.items() if count]
    return some, [name.replace("_", " ") for name, count in manifest.counts.items() if not count]


def _libraries(manifests: Mapping[str, Manifest]) -> dict[str, str]:
    """Return the versions of the libraries, of all that took part."""
    found: dict[str, list[str]] = {}
    for manifest in manifests.values():
        for name, version in manifest.libraries.items():
            if version not in found.setdefault(name, []):
                found[name].append(version)
    return {name: ", ".join(versions) for name, versions in found.items()}


def _settings(run: Run, manifest: Manifest) -> list[tuple[str, str]]:
    """Return the settings that an artifact was made with, without secrets and paths of the machine."""
    return [(key, _as_text(value)) for key, value in _public_settings(run, manifest.config).items()]


def _public_settings(run: Run, settings: Mapping[str, Any]) -> dict[str, Any]:
    public = {}
    for key, value in settings.items():
        if _SECRET.search(key):
            continue
        public[key] = _public_settings(run, value) if isinstance(value, Mapping) else value
    return dict(names_only(public, run.base))


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _cut(text: str | None, length: int = 320) -> str:
    """Return the start of a text, which ends at a word."""
    text = text or ""
    if len(text) <= length:
        return text
    return text[:length].rpartition(" ")[0] + " …" if " " in text[:length] else f"{text[:length]}…"


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"
