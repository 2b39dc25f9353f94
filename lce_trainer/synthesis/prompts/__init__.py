"""Prompts are jinja files: those in ``lce_trainer/synthesis/prompts/``, or yours.

``NAME.jinja`` is a text that a base model goes on with. ``NAME.chat.jinja`` beside it is what an
instruct model is given instead: turns, each ``{% call turn("user") %}…{% endcall %}``.

A template sees only the variables it is rendered with; one that it names and nobody gave is
an error, never an empty string. Templates run sandboxed: a recipe from a stranger can hold one.

What the variables hold is data. A passage that holds a model's control tokens, lines that look like
the prompt's own, or the tag that closes it, is given with these taken apart, and nothing else of it is
changed.
"""

import hashlib
import importlib.resources
import re
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lce_trainer.errors import PromptError

_ENVIRONMENT = ImmutableSandboxedEnvironment(
    undefined=jinja2.StrictUndefined,
    autoescape=False,  # the text goes to a language model, not to a browser
    trim_blocks=True,
    lstrip_blocks=True,
)
# Control tokens of the model families in use: <|im_end|>, <｜User｜>, <bos>, </s>, [INST], [SEP], <<SYS>>.
_CONTROL = re.compile(
    r"""<(?=\|[^<>|\n]{1,60}\|>|\|[^<>|\n]{1,60}>|｜[^<>｜\n]{1,60}｜>
        |/?(?:s|bos|eos|pad|unk|mask|cls|sep|sop|eop|eod|think|thinking|tools?|tool_calls?|tool_response|im_start|im_end
          |start_of_turn|end_of_turn|start_of_image|end_of_image|begin_of_text|end_of_text|endoftext|turn\||channel\|
          |unused\d+|extra_id_\d+|fim_\w+|reserved_\w+|0x[0-9a-f]{2})>)
      |<(?=</?SYS>>)
      |\[(?=/?(?:SEP|CLS|PAD|MASK|UNK|BOS|EOS|INST|SYSTEM_PROMPT|AVAILABLE_TOOLS
           |TOOL_CALLS|TOOL_RESULTS|gMASK|sMASK
           |THINK|multimodal)\])""",
    re.IGNORECASE | re.VERBOSE,
)
# "Search query:" before a variable: what a line of a passage must not begin with.
_LABEL = re.compile(r"^[ \t]*([^\s{}<>:?][^\n{}<>:?]{0,60}[:?])[ \t]*(?=\{\{|$)", re.MULTILINE)
_TAG = re.compile(r"</?([A-Za-z][\w-]*)>")


class Rendered(str):
    """A prompt's text, which also knows the turns that an instruct model is given instead of it.

    Attributes:
        has_control: Whether the template itself holds control tokens, which then keep their meaning.
    """

    has_control: bool
    _make_turns: Callable[[], list[dict[str, str]]]

    @property
    def turns(self) -> list[dict[str, str]]:
        """Turns of ``role`` and ``content``, the last of them the user's."""
        return self._make_turns()


@dataclass(frozen=True)
class Prompt:
    """A template that renders to what the language model reads.

    Attributes:
        name: The file, as error messages name it.
        source: Its text.
        chat_source: The text of its ``.chat.jinja``; None where there is none.
    """

    name: str
    source: str
    chat_source: str | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Go to another process as the sources, which are compiled there."""
        return Prompt, (self.name, self.source, self.chat_source)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the source, that of the chat included, 16 hex digits."""
        both = self.source if self.chat_source is None else f"{self.source}\0{self.chat_source}"
        return hashlib.sha256(both.encode()).hexdigest()[:16]

    @cached_property
    def variables(self) -> frozenset[str]:
        """The names of the variables that the template uses, and its ``.chat.jinja`` as well where there is one."""
        sources = [self.source] if self.chat_source is None else [self.source, self.chat_source]
        names = [jinja2.meta.find_undeclared_variables(_ENVIRONMENT.parse(source)) for source in sources]
        return frozenset(set.intersection(*names))

    def render(self, **variables: Any) -> Rendered:
        """The prompt's text; the file's last newline is not part of it.

        Raises:
            PromptError: The template names a variable that is not among ``variables``, or fails.
        """
        data = _neutral(variables, self._look_alikes)
        text = Rendered(_render(self._template, self.name, data, lambda role, caller: f"{caller().strip()}\n\n"))
        text.has_control = _CONTROL.search(self.source) is not None
        text._make_turns = partial(self._turns, data)
        return text

    def _turns(self, data: Mapping[str, Any]) -> list[dict[str, str]]:
        turns: list[dict[str, str]] = []

        def turn(role: str, caller: Callable[[], str]) -> str:
            turns.append({"role": role, "content": caller().strip()})
            return ""

        template, name = (self._template, self.name) if self._chat is None else (self._chat, self._chat_name)
        text = _render(template, name, data, turn)
        turns = turns or [{"role": "user", "content": text.strip()}]
        if turns[-1]["role"] != "user":
            raise PromptError(f"{name}: the last turn must be the user's, not the {turns[-1]['role']}'s")
        return turns

    @property
    def _chat_name(self) -> str:
        return f"{self.name.removesuffix('.jinja')}.chat.jinja"

    @cached_property
    def _template(self) -> jinja2.Template:
        return _compile(self.source, self.name)

    @cached_property
    def _chat(self) -> jinja2.Template | None:
        return None if self.chat_source is None else _compile(self.chat_source, self._chat_name)

    @cached_property
    def _look_alikes(self) -> tuple[re.Pattern[str], ...]:
        """What data must not hold as it is: lines that begin with one of the prompt's labels, and its tags."""
        source = f"{self.source}\n{self.chat_source or ''}"
        labels = sorted(set(_LABEL.findall(source)), key=len, reverse=True)
        tags = sorted(set(_TAG.findall(source)))
        found = []
        if labels:
            any_label = "|".join(
                r"\s+".join(map(re.escape, label[:-1].split())) + rf"\s*{re.escape(label[-1])}" for label in labels
            )
            found.append(re.compile(rf"\s*[\n\r\u2028\u2029\x0b\x0c\x85]\s*(?=(?:{any_label}))", re.IGNORECASE))
        if tags:
            found.append(re.compile(rf"<(?=\s*/?\s*(?:{'|'.join(map(re.escape, tags))})\s*>)", re.IGNORECASE))
        return tuple(found)


def load_prompt(name_or_path: str, base: Path | None = None) -> Prompt:
    """A prompt of the package by name, or a ``.jinja`` file.

    Args:
        name_or_path: ``query``, ``likelihood``, ``verdict``, or the path of a file that ends in ``.jinja``; what
            instruct models are given instead stands beside it and ends in ``.chat.jinja``.
        base: Folder that a relative path is looked up in when it is not found as written.

    Raises:
        PromptError: There is no such prompt, or its syntax is wrong; the message names file and line.
    """
    if name_or_path.endswith(".jinja"):
        path = Path(name_or_path).expanduser()
        if not path.is_file() and base is not None:
            path = base / path
        chat = path.with_name(f"{path.name.removesuffix('.jinja')}.chat.jinja")
        try:
            prompt = Prompt(
                str(path),
                path.read_text(encoding="utf-8"),
                chat.read_text(encoding="utf-8") if chat.is_file() else None,
            )
        except UnicodeDecodeError as error:
            raise PromptError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
        except OSError as error:
            raise PromptError(f"no prompt at {path}: {error.strerror}") from None
    else:
        folder = importlib.resources.files(__name__)
        files = {file.name for file in folder.iterdir() if file.name.endswith(".jinja")}
        known = sorted(file.removesuffix(".jinja") for file in files if not file.endswith(".chat.jinja"))
        if name_or_path not in known:
            raise PromptError(
                f"no prompt {name_or_path!r}: name one of {', '.join(known)}, or a file of yours that ends in .jinja"
            )
        source, chat_source = (
            (folder / name).read_text(encoding="utf-8") if name in files else None
            for name in (f"{name_or_path}.jinja", f"{name_or_path}.chat.jinja")
        )
        prompt = Prompt(f"lce_trainer/synthesis/prompts/{name_or_path}.jinja", source or "", chat_source)
    name = prompt.name
    try:
        _ = prompt._template
        name = prompt._chat_name
        _ = prompt._chat
    except jinja2.TemplateSyntaxError as error:
        raise PromptError(f"{name}:{error.lineno}: {_one_line(error)}") from None
    return prompt


def turns_of(prompt: str) -> list[dict[str, str]]:
    """The turns of a rendered prompt; any other text is one turn of the user's."""
    return prompt.turns if isinstance(prompt, Rendered) else [{"role": "user", "content": prompt}]


def take_apart(text: str) -> str:
    """A text whose control tokens are no longer any: ``<|im_end|>`` becomes ``< |im_end|>``."""
    return _CONTROL.sub(lambda found: f"{found.group()} ", text)


def _neutral(value: Any, look_alikes: tuple[re.Pattern[str], ...]) -> Any:
    """The same data, its texts neither control tokens nor lines or tags of the prompt's own."""
    if isinstance(value, str):
        for pattern in look_alikes:
            value = pattern.sub(lambda found: "< " if found.group() == "<" else " ", value)
        return take_apart(value)
    if isinstance(value, Mapping):
        return {key: _neutral(item, look_alikes) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_neutral(item, look_alikes) for item in value]
    return value


def _compile(source: str, name: str) -> jinja2.Template:
    code = _ENVIRONMENT.compile(source, filename=name)
    return jinja2.Template.from_code(_ENVIRONMENT, code, _ENVIRONMENT.make_globals(None))


def _render(template: jinja2.Template, name: str, data: Mapping[str, Any], turn: Callable[..., str]) -> str:
    try:
        return template.render(**data, turn=turn)
    # A template can fail in any way its expressions can: {{ 1 / words }}, {{ passage + 1 }}.
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        line = next((frame.lineno for frame in reversed(frames) if frame.filename == name), None)
        place = f"{name}:{line}" if line else name
        given = ", ".join(sorted(data)) or "no variables"
        raise PromptError(f"{place}: {_one_line(error)}; the prompt is given {given}") from None


def _one_line(error: Exception) -> str:
    message = error.message if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {error}"
    return " ".join((message or str(error)).split())
