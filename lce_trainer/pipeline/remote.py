"""What of this machine a recipe needs on another one: its own file, and the files and folders that it names."""

from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal
from urllib.parse import urlsplit

from lce_trainer.artifacts import MANIFEST
from lce_trainer.errors import ConfigError
from lce_trainer.hub.jobs import JobSettings, Submission
from lce_trainer.hub.privacy import is_local
from lce_trainer.pipeline.run import Run

# How a key names what it names. file: a file, here or beside the recipe. data: that, or a folder, or a Hub id.
# script: a file beside the recipe. prompt: a .jinja file, or the name of a prompt. model: a folder or file here, a Hub
# id, or package:NAME.
Kind = Literal["file", "data", "script", "prompt", "model"]
NAMING: dict[str, Kind] = {
    "corpus.source": "data",
    "corpus.script": "script",
    "llm.model": "model",
    "generate.prompt": "prompt",
    "generate.example_queries": "file",
    "mine.encoder": "model",
    "label.reranker": "model",
    "label.encoder": "model",
    "label.prompt": "prompt",
    "train.model": "model",
    "train.groups": "data",
    "evaluate.queries": "file",
    "evaluate.dev_queries": "file",
    "evaluate.benchmark": "data",
    "evaluate.rerankers": "model",
    "evaluate.synthetic.prompt": "prompt",
    "evaluate.synthetic.model": "model",
    "evaluate.synthetic.reranker": "model",
}
_INCLUDE = "--include"
_FILE_ENDINGS = (".csv", ".gguf", ".gz", ".json", ".jsonl", ".md", ".parquet", ".tsv", ".txt", ".zip", ".zst")
_HARMLESS = (".DS_Store", ".gitattributes", ".gitignore", ".gitkeep")
_THIS_MACHINE = ("localhost", "127.0.0.1", "0.0.0.0", "::1")  # noqa: S104 - names of hosts, not bound


def prepare_job(
    run: Run, recipe: Path, overrides: Sequence[str], settings: JobSettings, include: Sequence[str] = ()
) -> Submission:
    """Find out what a job needs, and refuse what would not work there; contacts nobody.

    Files keep their names, relative to the folder where the command is started or to the recipe's, so that both here
    and there an artifact counts as made from the same things.

    Args:
        run: The recipe, read.
        recipe: Its file.
        overrides: With which it was read.
        settings: Where and how the job runs.
        include: Files and folders besides those that the recipe names, such as those that its script reads.

    Raises:
        ConfigError: A path is absolute, leads out of the folder, or does not exist; or what it names is a folder that
            must not go.
        JobError: A secret is not set, or stands in a file.
    """
    for endpoint in _endpoints(run):
        if (urlsplit(str(endpoint)).hostname or "") in _THIS_MACHINE:
            raise ConfigError(
                f"the endpoint {endpoint} is a server on this machine, which a job cannot reach: name one that it can, "
                "or null for a model that runs in the job"
            )
    for key, value in run.recipe.train.arguments.items():
        if isinstance(value, str) and is_local(value, run.base):
            raise ConfigError(
                f"train.{key} is {value}, a path of this machine, and no files go up for this key: leave it out"
            )
    files: dict[str, Path] = {recipe.name: recipe}
    named_by = {recipe.name: "the recipe"}
    for key, name in (*_named(run), *((_INCLUDE, name) for name in include)):
        found = _find(run, key, name)
        if found is None:
            continue
        top = PurePosixPath(name).as_posix()
        for file_name, path in _files_of(run, key, top, found).items():
            if not any(f"{file_name}/".startswith(f"{other}/") for other in named_by):
                named_by[top if file_name.startswith(f"{top}/") else file_name] = key
            if file_name in files and not files[file_name].samefile(path):
                raise ConfigError(
                    f"{key}: {path} and {files[file_name]} would both be {file_name} in the job: rename one of them"
                )
            files[file_name] = path
    submission = Submission(recipe.name, tuple(overrides), files, named_by, run.root, settings, _extras(run))
    submission.check(submission.secrets())
    return submission


def _endpoints(run: Run) -> list[str]:
    found: list[str] = []
    for value in (run.recipe.llm.endpoint, run.recipe.evaluate.synthetic.endpoint):
        found += [value] if isinstance(value, str) else value or []
    return found


def _extras(run: Run) -> tuple[str, ...]:
    """Return the extras of lce_trainer that the recipe needs, as far as it shows which."""
    recipe = run.recipe
    makes_groups = recipe.train.groups is None
    models = [recipe.train.model, recipe.mine.encoder or "", recipe.label.encoder or ""]
    if makes_groups and recipe.llm.endpoint is None:
        models.append(recipe.llm.model)
    found = {
        "dense": recipe.mine.encoder is not None or recipe.label.encoder is not None,
        "gguf": any(model.endswith(".gguf") for model in models),
        "peft": recipe.train.lora.r > 0,
        "quickstart": any(model.startswith("package:") for model in models),
    }
    return tuple(extra for extra, needed in found.items() if needed)


def _named(run: Run) -> Iterator[tuple[str, str]]:
    """Yield each key that may name files, with each name that it holds."""
    for key in NAMING:
        value: Any = run.recipe
        for part in key.split("."):
            value = getattr(value, part)
        for name in [value] if isinstance(value, str) else value or []:
            yield key, name


def _find(run: Run, key: str, name: str) -> Path | None:
    """Return what a name stands for on this machine; None if that is no file of it.

    Raises:
        ConfigError: It is a path that a job could not have, or that does not exist.
    """
    kind = NAMING.get(key, "file")
    if (kind == "prompt" and not name.endswith(".jinja")) or (kind == "model" and name.startswith("package:")):
        return None
    path = PurePosixPath(name)
    if path.is_absolute() or PureWindowsPath(name).is_absolute() or name.startswith("~") or ".." in path.parts:
        raise ConfigError(
            f"{key} names {name}, and a job has only what lies in the folder of the recipe or in the one where this "
            f"command is started: put it there, and name it relative to that folder"
        )
    places = {"script": [run.base], "model": [Path()]}.get(kind, [Path(), run.base])
    found = next((place / name for place in places if (place / name).exists()), None)
    if found is None and (kind in ("file", "script", "prompt") or _looks_like_a_path(name)):
        raise ConfigError(f"{key} names {name}, and there is no such file here or beside the recipe")
    return found


def _looks_like_a_path(name: str) -> bool:
    """Whether a name cannot be a Hub id."""
    return name.startswith(".") or name.count("/") > 1 or name.endswith(("/", *_FILE_ENDINGS))


def _files_of(run: Run, key: str, name: str, found: Path) -> dict[str, Path]:
    """Return the files that go up for a file or folder, by their names among the inputs.

    Raises:
        ConfigError: The folder is empty, is the home folder or one around it, or holds the run folder, the recipe or
            hidden files.
    """
    if found.is_file():
        files = {name: found}
        chat = found.with_name(f"{found.name.removesuffix('.jinja')}.chat.jinja")
        if NAMING.get(key) == "prompt" and chat.is_file():
            files[str(PurePosixPath(name).with_name(chat.name))] = chat
        return files
    place = found.resolve()
    inside = {"the home folder": Path.home(), "the run folder": run.root, "the recipe": run.base}
    for what, folder in inside.items():
        if folder.resolve().is_relative_to(place):
            raise ConfigError(
                f"{key} names the folder {found}, which holds {what}, and all of it would go up: name one that holds "
                "nothing else"
            )
    inner = {path.relative_to(found).as_posix(): path for path in sorted(found.rglob("*")) if path.is_file()}
    hidden = [inner_name for inner_name in inner if any(part.startswith(".") for part in inner_name.split("/"))]
    # Such as the .cache that a download leaves beside a model, or reading beside an artifact, which go by their files.
    if NAMING.get(key) == "model" or (found / MANIFEST).is_file():
        inner = {inner_name: path for inner_name, path in inner.items() if inner_name not in hidden}
    elif hidden := [inner_name for inner_name in hidden if PurePosixPath(inner_name).name not in _HARMLESS]:
        raise ConfigError(
            f"{key} names the folder {found}, which holds hidden files, such as {hidden[0]}: they may be private: move "
            "them away, or name a folder without any"
        )
    if not inner:
        raise ConfigError(f"{key} names the folder {found}, which holds no files")
    return {f"{name}/{inner_name}": path for inner_name, path in inner.items()}
