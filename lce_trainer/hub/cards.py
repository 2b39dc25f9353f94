"""Model card and dataset card, filled from the facts of a run.

A card holds what its reader can check: counts, settings, prompts, figures with their intervals. It never holds a
path of the machine it was written on, nor a token. What is not known is left out, not assumed.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import pyarrow.compute as pc
import pyarrow.parquet as pq
from huggingface_hub import DatasetCardData, EvalResult, ModelCardData

from lce_trainer.artifacts import read_manifest
from lce_trainer.errors import PublishError
from lce_trainer.hub.privacy import is_local, names_only

CARD = "README.md"
LEARNING_CURVE = "learning_curve.svg"
JUDGE_SCORES = "judge_scores.svg"
_MEASURES = {"ndcg@10": "nDCG@10", "mrr@10": "MRR@10", "map@10": "MAP@10"}
_SECRET_KEY = re.compile(r"(^|_)(token|secret|password|api_key)$")
_MACHINE_KEY = re.compile(r"(^|_)(dir|path|folder|checkpoint|run_name|local_rank)$")
_TOKEN = re.compile(r"hf_[A-Za-z0-9]{30,}")
_SHOWN = 300  # characters of each text in the dataset card's example
# Terms that a language model's maker puts on what the model writes, and on what is trained on that. Later Gemmas have
# an open licence; ``7b`` and its like are sizes and no versions.
_TERMS = (
    (
        re.compile(r"gemma(?![-_ ]?[4-9](?![\d.]*b))", re.IGNORECASE),
        "Gemma Terms of Use",
        "https://ai.google.dev/gemma/terms",
    ),
)
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z]{2,8})?|multilingual")


@dataclass
class Evaluation:
    """Figures on one set of judgments.

    Attributes:
        name: What was measured on, e.g. ``"MedQuAD, human test questions"``.
        rows: What ``evaluation.compare`` found, as dicts.
        table: The same as a Markdown table.
        system: Name of this model's row.
        queries: How many queries were measured.
        dataset_id: Hub id of the judgments, if they have one.
        split: Which part of them.
        notes: A sentence on what else to know, e.g. which candidates were reranked.
        verdict: One line: whether the model ranks better than the best of the others, by how much and how surely.
        synthetic: Whether a language model wrote the queries.
        general: Whether they are of general test sets.
        by_set: nDCG@10 on each of several test sets, as a Markdown table.
        picture: Name of the picture of the table, among the pictures of the model's repo; empty if there is none.
    """

    name: str
    rows: Sequence[Mapping[str, Any]]
    table: str
    system: str
    queries: int
    dataset_id: str | None = None
    split: str = "test"
    notes: str = ""
    verdict: str = ""
    synthetic: bool = False
    general: bool = False
    by_set: str = ""
    picture: str = ""


@dataclass
class RunFacts:
    """What the cards say about a run; whatever is left empty is left out.

    Attributes:
        model_name: Heading of the model's card.
        dataset_name: Heading of the dataset's card.
        base_model: Name of the base model as the recipe has it; linked if it is a Hub id.
        license: License identifier of the Hub that the publisher chose, e.g. ``"apache-2.0"``; None if none was.
        language: Language codes of queries and passages, ISO 639, e.g. ``["de"]``; empty if not known.
        model_id: Hub repo of the model, if it is to be published.
        dataset_id: Hub repo of the groups, if they are.
        trained_on: Groups made elsewhere that the model was trained on, by Hub id or name; empty if this run
            made them.
        corpus: What the documents are, in a sentence.
        corpus_source: Hub id or name of the documents.
        corpus_counts: Documents, passages, what was merged and dropped.
        llm: Name of the language model.
        prompts: Text of each prompt's template, by name.
        prompt_digests: Digest of each prompt, by name.
        prompt_examples: How many examples written by hand stand in each prompt, by name.
        judge: Which judge labeled.
        judge_model: The reranker or encoder that judged in the language model's place; empty where that judged.
        judge_settings: Its thresholds.
        query_counts: Queries written, dropped and why.
        candidate_counts: What mining found.
        label_counts: Groups, positives, negatives, what was dropped and why.
        costs: What the language model took in each stage: ``calls``, ``tokens_in``, ``tokens_out``, and where they are
            known ``seconds`` and ``money``.
        cost_per_group: What it took in all stages for each group: ``tokens``, ``seconds``, ``money``.
        shortcut_auc: AUC of each query-blind guesser.
        training: Settings of the training.
        checkpoint_chosen_on: What chose the best checkpoint, e.g. ``"100 human dev queries"``; empty if nothing did
            or it is not known.
        used_human_labels: Whether human labels took part in training or chose the checkpoint; None if not known.
        near_duplicates: Groups left out of training because their queries are near-duplicates of queries that the
            model is measured or chosen on.
        max_length: Tokens of query and passage the model reads.
        evaluations: Figures on human judgments, or on synthetic queries that are called that.
        merge: The ``share`` of the trained weights that was kept beside the base's; and where it was chosen the
            ``rule``, and as ``grid`` the nDCG@10 of each share, ``dev`` and ``general``. Empty if all were kept.
        calibration: What :func:`lce_trainer.evaluation.calibration.calibrate` found of the model, and ``from`` and
            ``labelled_by``; empty if it is not calibrated.
        model_pictures: SVG of each picture of the model's repo, by its name there.
        dataset_pictures: The same of the dataset's repo.
        libraries: Version of each library.
        example_query: For the code on the card.
        example_passages: For the code on the card.
    """

    model_name: str
    dataset_name: str
    base_model: str = ""
    license: str | None = None
    language: Sequence[str] = ()
    model_id: str | None = None
    dataset_id: str | None = None
    trained_on: str = ""
    corpus: str = ""
    corpus_source: str = ""
    corpus_counts: Mapping[str, int] = field(default_factory=dict)
    llm: str = ""
    prompts: Mapping[str, str] = field(default_factory=dict)
    prompt_digests: Mapping[str, str] = field(default_factory=dict)
    prompt_examples: Mapping[str, int] = field(default_factory=dict)
    judge: str = ""
    judge_model: str = ""
    judge_settings: Mapping[str, Any] = field(default_factory=dict)
    query_counts: Mapping[str, int] = field(default_factory=dict)
    candidate_counts: Mapping[str, int] = field(default_factory=dict)
    label_counts: Mapping[str, int] = field(default_factory=dict)
    costs: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    cost_per_group: Mapping[str, float] = field(default_factory=dict)
    shortcut_auc: Mapping[str, float] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    checkpoint_chosen_on: str = ""
    used_human_labels: bool | None = None
    near_duplicates: int = 0
    max_length: int | None = None
    evaluations: Sequence[Evaluation] = ()
    merge: Mapping[str, Any] = field(default_factory=dict)
    calibration: Mapping[str, Any] = field(default_factory=dict)
    model_pictures: Mapping[str, str] = field(default_factory=dict)
    dataset_pictures: Mapping[str, str] = field(default_factory=dict)
    libraries: Mapping[str, str] = field(default_factory=dict)
    example_query: str = "how do I remove white space from both ends of a string"
    example_passages: Sequence[str] = (
        "str.strip: return a copy of the string with leading and trailing white space removed.",
        "str.title: return a titlecased version of the string.",
    )


def model_card(folder: Path, facts: RunFacts, template: Path | None = None) -> str:
    """Return the text of a model's ``README.md``, from ``model_card_template.md``.

    Args:
        folder: The model's folder; its files show how pairs are read and scored.
        facts: What to say.
        template: Another template, filled with the same names.

    Raises:
        PublishError: The template does not render, a language code is none, or a fact holds a Hub token.
    """
    datasets = [name for name in (facts.dataset_id, hub_id(facts.trained_on)) if name]
    data = ModelCardData(
        language=_languages(facts),
        license=facts.license,
        library_name="sentence-transformers",
        pipeline_tag="text-ranking",
        tags=[
            *("cross-encoder", "reranker", "lce"),
            *(["synthetic"] if facts.llm else []),
            *("sentence-transformers", "transformers"),
        ],
        base_model=hub_id(facts.base_model),
        datasets=datasets or None,
        metrics=list(_MEASURES) if facts.evaluations else None,
        model_name=facts.model_name,
        eval_results=_eval_results(facts.evaluations) or None,
    )
    return fill_template(
        template or _find_template("model_card_template.md"),
        metadata=data.to_yaml().strip(),
        facts=facts,
        name=facts.model_id or "path/to/this/folder",
        dataset_link=_link(facts.dataset_id, "datasets/"),
        training=_public_settings(facts.training),
        stages=_stages(facts),
        terms=_terms(facts.llm, facts.base_model),
        by_template=(folder / "chat_template.jinja").is_file(),
        by_answer=(folder / "modules.json").is_file(),
        curve=LEARNING_CURVE if LEARNING_CURVE in facts.model_pictures else "",
    )


def dataset_card(artifacts: Mapping[str, Path], facts: RunFacts, template: Path | None = None) -> str:
    """Return the text of a dataset's ``README.md``, with counts and an example read from its groups.

    Args:
        artifacts: Folder of each artifact that is published, by config, ``groups`` among them.
        facts: What to say.
        template: Another template, filled with the same names.

    Raises:
        ArtifactError: An artifact is missing, unfinished or damaged.
        PublishError: The template does not render, a language code is none, or a fact holds a Hub token.
    """
    tables = {config: _tables(folder, config) for config, folder in artifacts.items()}
    splits = [_split(path) for path in tables["groups"]]
    data = DatasetCardData(
        language=_languages(facts),
        license=facts.license,
        pretty_name=facts.dataset_name,
        task_categories=["text-ranking"],
        size_categories=[_size_category(sum(split["groups"] for split in splits))],
        annotations_creators=["machine-generated"],
        language_creators=["machine-generated"],
        tags=["synthetic", "reranker", "lce", "hard-negatives", "sentence-transformers"],
        configs=[
            {
                "config_name": config,
                **({"default": True} if config == "groups" else {}),
                "data_files": [{"split": path.stem, "path": f"{config}/{path.name}"} for path in paths],
            }
            for config, paths in tables.items()
        ],
    )
    return fill_template(
        template or _find_template("dataset_card_template.md"),
        metadata=data.to_yaml().strip(),
        facts=facts,
        name=facts.dataset_id or "path/to/this/folder",
        model_link=_link(facts.model_id, ""),
        splits=splits,
        example=_example(tables["groups"][0]),
        others={config: _rows(paths) for config, paths in tables.items() if config != "groups"},
        stages=_stages(facts),
        terms=_terms(facts.llm),
        judge_scores=JUDGE_SCORES if JUDGE_SCORES in facts.dataset_pictures else "",
    )


def _languages(facts: RunFacts) -> list[str] | None:
    for code in facts.language:
        if not _LANGUAGE.fullmatch(code):
            raise PublishError(f"{code!r} is no language code: write publish.language as ISO 639 has it, e.g. en or de")
    return list(facts.language) or None


def _terms(*models: str) -> list[tuple[str, str]]:
    """Title and address of the terms that come with models of these names, as far as they are known."""
    return [(title, url) for name, title, url in _TERMS if any(name.search(model) for model in models)]


def fill_template(template: Path, **values: Any) -> str:
    """Return a card from its template.

    Args:
        template: A Jinja file; a name that it uses and that is not given is an error.
        **values: What it is filled with; ``name`` is the repo, for messages.

    Raises:
        PublishError: The template does not render, or a value holds a Hub token.
    """
    environment = jinja2.Environment(  # noqa: S701  (Markdown, not HTML)
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters.update(
        number=lambda value: f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}",
        cell=lambda value: str(names_only(value)).replace("|", "\\|").replace("\n", " "),
        words=lambda key: str(key).replace("_", " "),
        quoted=lambda text: json.dumps(text, ensure_ascii=False),  # a Python literal as well
        public=names_only,
        model=_model_in_words,
        dataset=_dataset_in_words,
        fenced=_fenced,
    )
    try:
        text = environment.from_string(template.read_text(encoding="utf-8")).render(**values)
    except (OSError, jinja2.TemplateError) as error:
        what = " ".join(str(error).split())
        raise PublishError(f"the card template {template} does not render: {what}") from None
    if _TOKEN.search(text):
        raise PublishError(f"a fact of the card {values['name']} holds a Hub token: remove it, and revoke the token")
    return re.sub(r"\n{3,}", "\n\n", text)


def _find_template(name: str) -> Path:
    """In a wheel every template lies in the package; in a checkout the model card's lies at the root."""
    here = Path(__file__).parent
    return next((folder / name for folder in (here, *here.parents[:2]) if (folder / name).is_file()), here / name)


def _eval_results(evaluations: Sequence[Evaluation]) -> list[EvalResult]:
    return [
        EvalResult(
            task_type="text-ranking",
            task_name="Reranking",
            dataset_type=evaluation.dataset_id or "custom",
            dataset_name=evaluation.name,
            dataset_split=evaluation.split,
            metric_type=row["measure"],
            metric_name=_MEASURES[row["measure"]],
            metric_value=round(float(row["mean"]), 4),
        )
        for evaluation in evaluations
        for row in evaluation.rows
        if row["system"] == evaluation.system
    ]


def _stages(facts: RunFacts) -> list[tuple[str, Mapping[str, int]]]:
    stages = (
        ("corpus", facts.corpus_counts),
        ("queries", facts.query_counts),
        ("candidates", facts.candidate_counts),
        ("labels", facts.label_counts),
    )
    return [(name, counts) for name, counts in stages if counts]


def _tables(folder: Path, config: str) -> list[Path]:
    """Return an artifact's tables, the training split first."""
    names = sorted(read_manifest(folder, config).files, key=lambda name: (name != "train.parquet", name))
    return [folder / name for name in names]


def _rows(paths: Sequence[Path]) -> int:
    return sum(pq.read_metadata(path).num_rows for path in paths)


def _split(path: Path) -> dict[str, Any]:
    labels = pq.read_table(path, columns=["labels"])["labels"].combine_chunks().flatten()
    return {
        "name": path.stem,
        "groups": pq.read_metadata(path).num_rows,
        "passages": len(labels),
        "positives": pc.sum(pc.greater(labels, 0)).as_py() or 0,
    }


def _example(path: Path) -> str:
    rows = next(pq.ParquetFile(path).iter_batches(batch_size=1), None)
    if rows is None:
        return ""
    row = {
        key: [_short(item) for item in value[:3]] if isinstance(value, list) else _short(value)
        for key, value in rows.to_pylist()[0].items()
    }
    return json.dumps(row, indent=1, ensure_ascii=False)


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4)
    return f"{value[:_SHOWN]}…" if isinstance(value, str) and len(value) > _SHOWN else value


def _size_category(rows: int) -> str:
    """The Hub's own classes, https://huggingface.co/docs/hub/datasets-cards."""
    bounds = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))
    return next((name for bound, name in bounds if rows < bound), "10M<n<100M")


def _public_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without secrets and without what only means something on the machine of the run."""
    return {
        key: value
        for key, value in settings.items()
        if value is not None and not _SECRET_KEY.search(key) and not _MACHINE_KEY.search(key)
    }


def hub_id(name: str) -> str | None:
    """The name, if it can only be a Hub id: not a package's model, not a folder here."""
    return name if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not is_local(name) else None


def _link(repo_id: str | None, kind: str) -> str:
    return f"[{repo_id}](https://huggingface.co/{kind}{repo_id})" if repo_id else ""


def _model_in_words(name: str) -> str:
    if name.startswith("package:"):
        package = name.removeprefix("package:").partition("/")[0]
        return f"`{package}` (the Python package `{package.replace('_', '-')}`)"
    return _link(hub_id(name), "") or f"`{names_only(name)}`"


def _dataset_in_words(name: str) -> str:
    return _link(hub_id(name), "datasets/") or f"`{names_only(name)}`"


def _fenced(text: str, language: str) -> str:
    """A code block that its own text cannot close."""
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall(r"`{3,}", text))])
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
