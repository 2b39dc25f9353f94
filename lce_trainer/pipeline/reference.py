"""Every key that a recipe can hold, with its type, default and help, read from the dataclasses that declare them."""

import dataclasses
import difflib
import enum
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import yaml
from transformers import TrainingArguments

from lce_trainer.errors import ConfigError
from lce_trainer.pipeline.config import Recipe, TrainConfig
from lce_trainer.pipeline.train import TRAINING_DEFAULTS
from lce_trainer.training.arguments import LCETrainingArguments

# Training arguments whose default the rest of the recipe decides.
_FROM_THE_RECIPE = {"seed": "the recipe's seed", "bf16": "by train.precision", "output_dir": "checkpoints, in run_dir"}


@dataclass(frozen=True)
class Key:
    """A key of a recipe.

    Attributes:
        name: The key as an override spells it, such as ``train.learning_rate``.
        type: The values it takes, such as ``int | null``.
        default: Its value, as YAML, where a recipe does not name it.
        help: A sentence on what it does.
        inherited: Whether it is one of transformers' own training arguments.
    """

    name: str
    type: str
    default: str
    help: str
    inherited: bool = False


@dataclass(frozen=True)
class Section:
    """A section of a recipe; the keys that stand outside of every section have the name ``""``."""

    name: str
    help: str
    keys: tuple[Key, ...]


def recipe_sections() -> list[Section]:
    """Return every section of a recipe in the order in which the stages use them."""
    return list(_sections(Recipe, ""))


def find_keys(wanted: str | None = None) -> list[Section]:
    """Return the sections whose name begins with ``wanted``, or the one key of that name in its section.

    Args:
        wanted: ``train``, ``train.lora`` or ``train.learning_rate``; None for everything.

    Raises:
        ConfigError: No section and no key has this name; names the nearest.
    """
    everything = recipe_sections()
    if wanted is None:
        return everything
    found = [section for section in everything if f"{section.name}.".startswith(f"{wanted}.")]
    if not found:
        found = [
            dataclasses.replace(section, keys=(key,))
            for section in everything
            for key in section.keys
            if key.name == wanted
        ]
    if not found:
        names = [section.name for section in everything if section.name]
        keys = [key.name for section in everything for key in section.keys]
        near = difflib.get_close_matches(wanted, names + keys, n=1, cutoff=0.5) or [
            key for key in keys if key.endswith(f".{wanted}")
        ]
        hint = f"did you mean {near[0]!r}?" if near else f"sections: {', '.join(names)}"
        raise ConfigError(f"a recipe has no section and no key {wanted!r}; {hint}")
    return found


def _sections(cls: type, name: str) -> Iterator[Section]:
    hints = typing.get_type_hints(cls)
    nested = {
        item.name: hints[item.name] for item in dataclasses.fields(cls) if dataclasses.is_dataclass(hints[item.name])
    }
    keys = [
        _key(item, hints[item.name], name)
        for item in dataclasses.fields(cls)
        if item.name not in nested and not (cls is TrainConfig and item.name == "arguments")
    ]
    if cls is TrainConfig:
        taken = {item.name for item in dataclasses.fields(cls)}
        keys += [key for key in training_keys(name) if key.name.rpartition(".")[2] not in taken]
    yield Section(name, " ".join((cls.__doc__ or "").split("\n\n")[0].split()), tuple(keys))
    for key, inner in nested.items():
        yield from _sections(inner, f"{name}.{key}" if name else key)


def training_keys(section: str = "train") -> list[Key]:
    """Return the fields of ``LCETrainingArguments`` as keys: the trainer's own first, then transformers'."""
    hints = typing.get_type_hints(LCETrainingArguments)
    own = set(LCETrainingArguments.__annotations__)
    items = [item for item in dataclasses.fields(LCETrainingArguments) if item.init]
    items.sort(key=lambda item: item.name not in own)
    known = {item.name for item in dataclasses.fields(TrainingArguments)}
    keys = []
    for item in items:
        key = _key(item, hints[item.name], section)
        if section and item.name in TRAINING_DEFAULTS:
            key = dataclasses.replace(key, default=as_yaml(TRAINING_DEFAULTS[item.name]))
        elif section and item.name in _FROM_THE_RECIPE:
            key = dataclasses.replace(key, default=_FROM_THE_RECIPE[item.name])
        keys.append(dataclasses.replace(key, inherited=item.name in known and item.name not in own))
    return keys


def _key(item: "dataclasses.Field[Any]", hint: Any, section: str) -> Key:
    default = item.default
    if item.default_factory is not dataclasses.MISSING:
        default = item.default_factory()
    name = f"{section}.{item.name}" if section else item.name
    return Key(name, _type_name(hint), as_yaml(default), " ".join(item.metadata.get("help", "").split()))


def _type_name(hint: Any) -> str:
    """Return a type as a reader of YAML knows it: ``null`` for None, the values of a Literal or an enumeration."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is type(None):
        return "null"
    if origin in (types.UnionType, typing.Union):
        names = dict.fromkeys(_type_name(argument) for argument in arguments)
        if len(names) > 1 and any(" | " in name for name in names):
            names.pop("str", None)  # the spelled values of an enumeration are its strings
        return " | ".join(sorted(names, key=lambda name: name == "null"))
    if origin is Literal:
        return " | ".join(map(as_yaml, arguments))
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        values = [as_yaml(member) for member in hint]
        return " | ".join(values) if len(values) <= 6 else "str"
    plain = origin or hint
    return str(getattr(plain, "__name__", plain))


def as_yaml(value: Any) -> str:
    """Return a value as one line of YAML; a small float as ``2e-5``, which recipes read as a number."""
    if isinstance(value, enum.Enum):
        value = value.value
    if value == "":
        return '""'
    if isinstance(value, float):
        return f"{value:g}".replace("e-0", "e-")
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")
