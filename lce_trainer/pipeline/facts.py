"""What a run publishes: the facts on its cards, and the files of its repos.

Facts are gathered from the manifests of the artifacts: from what was made, and not from what the recipe says today.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import datasets
import yaml

from lce_trainer.artifacts import MANIFEST, Manifest, load_table, read_manifest
from lce_trainer.errors import ArtifactError, ConfigError
from lce_trainer.evaluation.report import WORSE, baseline_of, markdown, part_table, parts
from lce_trainer.hub.cards import JUDGE_SCORES, LEARNING_CURVE, Evaluation, RunFacts, dataset_card, model_card
from lce_trainer.hub.contents import Repo, dataset_repo, model_repo
from lce_trainer.hub.privacy import names_only
from lce_trainer.pipeline.charts import draw_comparison, draw_curve, draw_histograms, learning_curves, score_histograms
from lce_trainer.pipeline.evaluate import (
    GENERAL,
    RERANKER,
    SYNTHETIC,
    comparisons,
    judged_system,
    public_names,
    query_table,
    title_of,
)
from lce_trainer.pipeline.report import CALIBRATION
from lce_trainer.pipeline.run import Run
from lce_trainer.pipeline.space import space_of
from lce_trainer.synthesis.journal import read_usage
from lce_trainer.synthesis.labeling import LabelConfig

logger = logging.getLogger(__name__)


def gather_facts(run: Run) -> RunFacts:
    """Return what the cards say.

    Raises:
        ArtifactError: An artifact is missing, or was made from others than those that are there now.
    """
    recipe, model = run.recipe, run.manifest("model")
    own = model.config.get("groups") is None
    folder = groups_folder(run)
    chosen_on, human = _checkpoint(model)
    facts = RunFacts(
        model_name=(recipe.publish.model_id or run.root.name).rpartition("/")[2],
        dataset_name=(recipe.publish.dataset_id or f"{run.root.name}-groups").rpartition("/")[2],
        base_model=model.config["base"],
        license=recipe.publish.license,
        language=_language(run, own),
        model_id=recipe.publish.model_id,
        dataset_id=recipe.publish.dataset_id if folder is not None else None,
        trained_on="" if own else names_only(recipe.train.groups, run.base),
        training={**model.config["arguments"], **{f"lora_{k}": v for k, v in model.config.get("lora", {}).items()}},
        checkpoint_chosen_on=chosen_on,
        used_human_labels=human if own or human else None,  # labels made elsewhere may be anybody's
        near_duplicates=sum(count for what, count in model.counts.items() if what.startswith("near_duplicates_")),
        max_length=model.facts["max_length"],
        evaluations=_evaluations(run, model),
        merge=model.facts.get("merge", {}),
        calibration=_calibration(run),
        libraries=model.libraries,
    )
    if folder is not None:
        first = load_table(folder, "groups")[0]
        facts.example_query, facts.example_passages = first["query"], first["passages"][:2]
        _add_labels(facts, read_manifest(folder, "groups"))
    if own:
        _add_sources(facts, run)
    _add_pictures(facts, run, folder)
    if folder is not None:
        _add_costs(facts, {**({"queries": run.root / "queries"} if own else {}), "labels": folder})
    return facts


def groups_folder(run: Run) -> Path | None:
    """Return the groups that the model was trained on; None if they are no artifact of ours.

    Raises:
        ArtifactError: The model was trained on others than those that are there now.
    """
    model = run.manifest("model")
    trained_on = model.config.get("groups")
    if trained_on is None:
        run.check_parent("model", "groups")
        return run.root / "groups"
    folder = run.find(run.recipe.train.groups or "")
    if run.recipe.train.groups is None or not (folder / MANIFEST).is_file():
        return None
    if not isinstance(trained_on, dict) or read_manifest(folder, "groups").digest not in trained_on.values():
        raise ArtifactError(f"the model was trained on other groups than those in {folder}: run lce-trainer train")
    return folder


def _add_labels(facts: RunFacts, groups: Manifest) -> None:
    """Add how groups were labeled, by their own manifest."""
    config, judge = groups.config, groups.config.get("judge", "")
    settings = {item.name for item in fields(LabelConfig)} - {"judge", "examples"}
    if judge != "pairwise":
        settings -= {"opponents"}
    if judge == "encoder":
        settings -= {"judge_weight", "max_passage_words", "encoder"}
    facts.llm, facts.judge_model = groups.facts.get("llm", ""), groups.facts.get("judge_model", "")
    facts.judge = judge
    shown = {key: value for key, value in config.items() if key in settings and value is not None}
    if (choice := groups.facts.get("judge_weight")) is not None:
        shown["judge_weight"] = (
            f"{choice['chosen']:g}, which ranked the source passages of {choice['documents']} documents highest"
        )
    if (weight := groups.facts.get("bm25_weight_chosen_on_dev")) is not None:
        shown["bm25_weight"] = (
            f"{weight:g}, the least that ranked the human dev queries within a standard error of the best"
        )
        facts.used_human_labels = True
    facts.judge_settings = shown
    facts.label_counts = groups.counts
    facts.shortcut_auc = groups.facts.get("shortcut_auc", {})
    if groups.facts.get("prompt"):
        facts.prompts = {judge: groups.facts["prompt"]}
        facts.prompt_digests = {judge: config["prompt_digest"]}
        facts.prompt_examples = {judge: len(config.get("examples", ()))}


def _add_sources(facts: RunFacts, run: Run) -> None:
    """Add what the groups of this run were made from."""
    for name, parent in (("groups", "candidates"), ("candidates", "queries"), ("queries", "passages")):
        run.check_parent(name, parent)
    passages, queries = run.manifest("passages"), run.manifest("queries")
    facts.corpus_source = names_only(passages.config.get("source") or passages.config.get("script") or "", run.base)
    facts.corpus_counts = passages.counts
    facts.query_counts = queries.counts
    facts.llm = facts.llm or queries.facts.get("llm", "")
    facts.candidate_counts = run.manifest("candidates").counts
    facts.prompts = {"query": queries.facts["prompt"], **facts.prompts}
    facts.prompt_digests = {"query": queries.config["prompt_digest"], **facts.prompt_digests}
    facts.prompt_examples = {"query": len(queries.config.get("examples", ())), **facts.prompt_examples}


def _add_costs(facts: RunFacts, folders: Mapping[str, Path]) -> None:
    """Add what the language model took, by manifests, and by journals the seconds, which manifests do not hold."""
    costs: dict[str, dict[str, float]] = {}
    for stage, folder in folders.items():
        found = read_manifest(folder, "groups" if stage == "labels" else stage).facts.get("cost")
        if found:
            costs[stage] = {key: found[key] for key in ("calls", "tokens_in", "tokens_out", "money") if key in found}
            used = read_usage(folder / "journal.jsonl")
            if used is not None and used.calls == found["calls"]:
                costs[stage]["seconds"] = round(used.seconds, 1)
    groups = facts.label_counts.get("groups", 0)
    facts.costs = costs
    if len(costs) == len(folders) and groups:
        kinds = {"tokens": ("tokens_in", "tokens_out"), "seconds": ("seconds",), "money": ("money",)}
        facts.cost_per_group = {
            name: sum(cost[key] for cost in costs.values() for key in keys) / groups
            for name, keys in kinds.items()
            if all(key in cost for cost in costs.values() for key in keys)
        }


def _language(run: Run, own: bool) -> tuple[str, ...]:
    """Return the codes of the corpus' languages, as it was read or as the recipe has them; empty if not known."""
    given = tuple(code.strip() for code in (run.recipe.publish.language or "").split(",") if code.strip())
    found = run.manifest("passages").facts.get("language") if own else None
    if not found:
        return given
    found = (found,) if isinstance(found, str) else tuple(found)
    if given and given != found:
        logger.warning("publish.language is %s, but the corpus is %s, which is what the cards name", given, found)
    return found


def _checkpoint(model: Manifest) -> tuple[str, bool | None]:
    """Return what the checkpoint was chosen on, and whether that was human labels; empty and None if not known."""
    dev = model.facts.get("dev")
    if dev is None:
        return "", None
    if not dev["chose_checkpoint"]:
        return "", False
    what = "human dev queries" if dev["human"] else "groups held out from training"
    return f"{dev['queries']} {what}", dev["human"]


def _calibration(run: Run) -> dict[str, Any]:
    path = run.root / "model" / CALIBRATION
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _evaluations(run: Run, model: Manifest) -> list[Evaluation]:
    if not (run.root / "evaluation" / MANIFEST).is_file():
        return []
    manifest = run.manifest("evaluation")
    if manifest.inputs.get("model") != model.digest:
        raise ArtifactError(
            f"{run.root / 'evaluation'} holds the figures of another model: run lce-trainer evaluate, or delete it to "
            "publish without figures"
        )
    evaluations = []
    for split in comparisons(manifest):
        results = run.table("evaluation", split)
        evaluations.append(
            Evaluation(
                name=title_of(split) if split in (SYNTHETIC, GENERAL) else f"human queries, {title_of(split)}",
                rows=results.to_list(),
                table=markdown(results),
                system=RERANKER,
                queries=results[0]["queries"],
                notes=manifest.facts.get("notes", {}).get(split, ""),
                verdict=manifest.facts.get("verdict", {}).get(split, ""),
                synthetic=split == SYNTHETIC,
                general=split == GENERAL,
                by_set=_by_set(run, split, results),
                picture=f"{split}.svg",
            )
        )
    return evaluations


def worse_verdicts(run: Run) -> list[str]:
    """Return the verdicts of the run's evaluations, human, synthetic or general, that say that its model is worse."""
    if not (run.root / "evaluation" / MANIFEST).is_file():
        return []
    verdicts = run.manifest("evaluation").facts.get("verdict", {}).values()
    return [line for line in verdicts if line.startswith(WORSE)]


def _by_set(run: Run, split: str, results: datasets.Dataset) -> str:
    """Return the figures on each of several test sets as a Markdown table; empty where there is one."""
    queries = query_table(run, split)
    title, system, baseline = "test set", judged_system(split), baseline_of(results)
    found = {} if queries is None else parts(queries, system, baseline, run.recipe.seed)
    return part_table(title, found[title], system, baseline) if title in found else ""


def _add_pictures(facts: RunFacts, run: Run, groups: Path | None) -> None:
    pictures = {}
    for evaluation in facts.evaluations:
        names = public_names([row["system"] for row in evaluation.rows], run.base)
        system = judged_system(evaluation.picture.removesuffix(".svg"))
        pictures[evaluation.picture] = draw_comparison(evaluation.rows, names, system)
    charts = learning_curves(run.root / "logs" / "model.json")
    if charts:
        pictures[LEARNING_CURVE] = draw_curve(charts[0])
    facts.model_pictures = pictures
    charts = [] if groups is None else score_histograms(groups / "judged.parquet")
    facts.dataset_pictures = {JUDGE_SCORES: draw_histograms(charts)} if charts else {}


def repos(run: Run, include_passages: bool = False) -> tuple[Repo, ...]:
    """Return what a run's dataset, model and Space hold, each with its card; of those that the recipe names.

    Args:
        run: A recipe whose model is trained.
        include_passages: Publish the passages without a licence too.

    Raises:
        ConfigError: The recipe names no repo, or one for groups that this package did not make.
        ArtifactError: An artifact is missing, or was made from others than those that are there now.
        PublishError: A card cannot be written, or the model's folder is no model.
    """
    config = run.recipe.publish
    if config.space_id is not None and config.model_id is None:
        raise ConfigError(
            f"the Space {config.space_id} loads the model from the Hub: name its repo too, publish.model_id=user/name"
        )
    if config.model_id is None and config.dataset_id is None:
        raise ConfigError("name the repos to publish to: publish.model_id=user/name, publish.dataset_id=user/name")
    facts, folder = gather_facts(run), groups_folder(run)
    if config.dataset_id is not None and folder is None:
        raise ConfigError(
            f"publish.dataset_id is {config.dataset_id}, but the model was trained on groups made elsewhere "
            f"({facts.trained_on}), which are not this recipe's to publish: leave publish.dataset_id out"
        )
    made = []
    if config.dataset_id is not None and folder is not None:
        artifacts, left_out = {"groups": folder}, []
        if not facts.trained_on:
            artifacts |= {name: run.root / name for name in ("queries", "candidates", "passages")}
            if config.license is None and not include_passages:
                del artifacts["passages"]
                left_out = ["passages: there is no licence for them; set publish.license, or add --include-passages"]
        made.append(
            dataset_repo(config.dataset_id, artifacts, dataset_card(artifacts, facts), left_out, facts.dataset_pictures)
        )
    if config.model_id is not None:
        model = run.root / "model"
        made.append(model_repo(config.model_id, model, model_card(model, facts), _recipe(run), facts.model_pictures))
    if config.space_id is not None:
        made.append(space_of(run, config.space_id, facts, include_passages))
    return tuple(made)


def _recipe(run: Run) -> str:
    """Return the recipe as YAML: every setting, as the artifacts were made with it, and no path nor address."""
    recipe, model = asdict(run.recipe), run.manifest("model").config
    for section, key in (("train", "arguments"), ("llm", "endpoint")):
        del recipe[section][key]
    del recipe["run_dir"]
    del recipe["publish"]["space_id"]  # so that a Space published later changes nothing in the model's repo
    sections = {"corpus": "passages", "generate": "queries", "mine": "candidates", "label": "groups"}
    if model.get("groups") is not None:  # nothing was made by these
        for section in ("llm", "generate", "mine", "label"):
            del recipe[section]
            sections.pop(section, None)
    for section, name in (*sections.items(), ("train", "model"), ("evaluate", "evaluation")):
        if (run.root / name / MANIFEST).is_file():
            made = run.manifest(name).config
            recipe[section] |= {key: made[key] for key in recipe[section] if key in made and key != "groups"}
    recipe["evaluate"]["synthetic"] = {
        key: value for key, value in recipe["evaluate"]["synthetic"].items() if key != "endpoint"
    }
    recipe["seed"] = model["seed"]
    recipe["train"] |= {"model": model["base"], **model["arguments"]}
    return yaml.safe_dump(names_only(recipe, run.base), sort_keys=False, allow_unicode=True)
