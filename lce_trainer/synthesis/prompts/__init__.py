"""Prompts are jinja files: those in ``lce_trainer/synthesis/prompts/``, or yours.

A template sees only the variables it is rendered with; one that it names and nobody gave is
an error, never an empty string. Templates run sandboxed: a recipe from a stranger can hold one.
"""

import hashlib
import importlib.resources
import traceback
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lce_trainer.errors import PromptError

_ENVIRONMENT = ImmutableSandboxedEnvironment(
    undefined=jinja2.StrictUndefined,
    autoescape=False,  # the text goes to a language model, not to a browser
    trim_blocks=True,
    lstrip_blocks=True,
)


@dataclass(frozen=True)
class Prompt:
    """A template that renders to what the language model reads.

    Attributes:
        name: The file, as error messages name it.
        source: Its text.
    """

    name: str
    source: str

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the source, 16 hex digits."""
        return hashlib.sha256(self.source.encode()).hexdigest()[:16]

    def render(self, **variables: Any) -> str:
        """The prompt's text; the file's last newline is not part of it.

        Raises:
            PromptError: The template names a variable that is not among ``variables``, or fails.
        """
        try:
            return self._template.render(**variables)
        # A template can fail in any way its expressions can: {{ 1 / words }}, {{ passage + 1 }}.
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            line = next((frame.lineno for frame in reversed(frames) if frame.filename == self.name), None)
            place = f"{self.name}:{line}" if line else self.name
            given = ", ".join(sorted(variables)) or "no variables"
            raise PromptError(f"{place}: {_one_line(error)}; the prompt is given {given}") from None

    @cached_property
    def _template(self) -> jinja2.Template:
        code = _ENVIRONMENT.compile(self.source, filename=self.name)
        return jinja2.Template.from_code(_ENVIRONMENT, code, _ENVIRONMENT.make_globals(None))


def load_prompt(name_or_path: str, base: Path | None = None) -> Prompt:
    """A prompt of the package by name, or a ``.jinja`` file.

    Args:
        name_or_path: ``query``, ``likelihood``, ``verdict``, or the path of a file that ends in ``.jinja``.
        base: Folder that a relative path is looked up in when it is not found as written.

    Raises:
        PromptError: There is no such prompt, or its syntax is wrong; the message names file and line.
    """
    if name_or_path.endswith(".jinja"):
        path = Path(name_or_path).expanduser()
        if not path.is_file() and base is not None:
            path = base / path
        try:
            prompt = Prompt(str(path), path.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise PromptError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
        except OSError as error:
            raise PromptError(f"no prompt at {path}: {error.strerror}") from None
    else:
        folder = importlib.resources.files(__name__)
        known = sorted(file.name.removesuffix(".jinja") for file in folder.iterdir() if file.name.endswith(".jinja"))
        if name_or_path not in known:
            raise PromptError(
                f"no prompt {name_or_path!r}: name one of {', '.join(known)}, or a file of yours that ends in .jinja"
            )
        source = (folder / f"{name_or_path}.jinja").read_text(encoding="utf-8")
        prompt = Prompt(f"lce_trainer/synthesis/prompts/{name_or_path}.jinja", source)
    try:
        _ = prompt._template
    except jinja2.TemplateSyntaxError as error:
        raise PromptError(f"{prompt.name}:{error.lineno}: {_one_line(error)}") from None
    return prompt


def _one_line(error: Exception) -> str:
    message = error.message if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {error}"
    return " ".join((message or str(error)).split())
