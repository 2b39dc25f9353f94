"""Every exception lce_trainer raises on purpose.

::

    LCETrainerError
    ├── ConfigError          a recipe or an override that cannot be used
    ├── ArtifactError        a stage's folder that is missing, unfinished or damaged
    ├── DataError            a file or dataset whose rows cannot be read
    ├── CorpusError          documents that cannot be read
    ├── GroupsError          rows that are not training groups
    ├── PromptError          a prompt template that does not render
    ├── LLMError             a language model that cannot be loaded or does not answer
    ├── LabelError           a judgment that cannot be read
    ├── TrainingError        a training run that cannot start or go on
    ├── EvaluationError      judgments or runs that cannot be compared
    ├── PublishError         a model or dataset that cannot be uploaded
    ├── JobError             a job on another machine that cannot be started, or failed
    └── FirstProcessError    of several processes another one, the first, has ended the work

A message says what was expected, what came and what to do. It never holds a token.
"""

from collections.abc import Sequence


class LCETrainerError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(LCETrainerError):
    """A recipe or an override that cannot be used."""


class ArtifactError(LCETrainerError):
    """A stage's folder that is missing, unfinished or damaged."""


class DataError(LCETrainerError):
    """A file or dataset whose rows cannot be read."""


class CorpusError(LCETrainerError):
    """Documents that cannot be read."""


class GroupsError(LCETrainerError):
    """Rows that are not training groups."""


class PromptError(LCETrainerError):
    """A prompt template that does not render."""


class LLMError(LCETrainerError):
    """A language model that cannot be loaded or does not answer."""


class LabelError(LCETrainerError):
    """A judgment that cannot be read."""


class TrainingError(LCETrainerError):
    """A training run that cannot start or go on."""


class EvaluationError(LCETrainerError):
    """Judgments or runs that cannot be compared."""


class PublishError(LCETrainerError):
    """A model or dataset that cannot be uploaded."""


class JobError(LCETrainerError):
    """A job on another machine that cannot be started, or failed."""


class FirstProcessError(LCETrainerError):
    """The first of several processes has ended the work, and raises why: this one follows it."""


def format_ids(ids: Sequence[str]) -> str:
    """Return the first of the ids that a message is about, each shortened; a query without an id goes by its text."""
    return ", ".join(repr(str(name)[:80]) for name in ids[:8]) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
