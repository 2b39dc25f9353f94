"""How a recipe's settings are declared: each with its default and a sentence of help."""

from dataclasses import field
from typing import Any


def option(default: Any, help: str) -> Any:
    """A dataclass field with a help text, which ``lce-trainer config`` and the documentation print.

    Args:
        default: The value where a recipe names none; a list or dict is copied for each recipe.
        help: A sentence on what the setting does, and in which unit.
    """
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})
