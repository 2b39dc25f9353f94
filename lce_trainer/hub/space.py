"""What goes into the Hub repo of a Space: the app of ``recipes/space``, filled in for one reranker."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from huggingface_hub import SpaceCardData

from lce_trainer.errors import PublishError
from lce_trainer.hub.cards import fill_template, hub_id
from lce_trainer.hub.contents import CARD, SPACE_PASSAGES, Repo, check_repo_id

APP = "app.py"
SETTINGS = "space.json"
REQUIREMENTS = "requirements.txt"
_GRADIO = re.compile(r"^gradio==([\d.]+)$", re.MULTILINE)
_PYTHON = "3.11"
_MOST_TITLE = 60  # characters


@dataclass(frozen=True)
class SpaceSettings:
    """What the app reads of ``space.json``; the names are those of ``Settings`` in ``recipes/space/app.py``.

    Attributes:
        model: Hub id of the reranker.
        dataset: Hub id of what it was trained on, if that is published.
        encoder: Hub id or ``package:NAME/FOLDER`` of the first stage's encoder; None for BM25 alone.
        bm25_weight: Share of BM25 in the first stage's score, beside the encoder's.
        fuse: Whether this first stage is the one that ``first_stage_weight`` in the model's config was fitted for.
        stemmer: Snowball's name of the language that words are stemmed in; None leaves them as they are.
        stopwords: Language whose stopwords are left out; None keeps them.
        top_k: Passages that each retriever of the first stage brings.
        examples: Queries to try.
        passages: A sentence on which passages are searched; empty where passages are pasted.
    """

    model: str
    dataset: str | None = None
    encoder: str | None = None
    bm25_weight: float = 0.0
    fuse: bool = False
    stemmer: str | None = None
    stopwords: str | None = None
    top_k: int = 50
    examples: Sequence[str] = ()
    passages: str = ""


def space_repo(
    repo_id: str,
    settings: SpaceSettings,
    passages: Iterable[Mapping[str, Any]] | None = None,
    *,
    license: str | None = None,
    packages: Sequence[str] = (),
    left_out: Sequence[str] = (),
) -> Repo:
    """Return what goes to a Space's repo.

    Args:
        repo_id: ``user/name``.
        settings: What the app reads.
        passages: Rows with ``text`` and ``title`` that are searched; None to have passages pasted.
        license: License identifier of the Hub, if there is one.
        packages: What the app needs besides its own requirements, as pip has it.
        left_out: What does not go and why, for the report.

    Raises:
        PublishError: The id is none, or the card cannot be written.
    """
    requirements = find_file(REQUIREMENTS).read_text(encoding="utf-8")
    version = _GRADIO.search(requirements)
    if version is None:
        raise PublishError(f"{find_file(REQUIREMENTS)} must name one version of gradio, as in gradio==6.31.0")
    title = f"{settings.model.rpartition('/')[2]}: before and after"
    data = SpaceCardData(
        title=title[:_MOST_TITLE],
        sdk="gradio",
        sdk_version=version[1],
        python_version=_PYTHON,
        app_file=APP,
        license=license,
        models=[settings.model],
        datasets=[settings.dataset] if settings.dataset else None,
        tags=["reranker", "cross-encoder", "lce"],
        emoji="🔎",
        colorFrom="blue",
        colorTo="green",
        pinned=False,
    )
    card = fill_template(find_file(CARD), metadata=data.to_yaml().strip(), name=repo_id, title=title, settings=settings)
    files: dict[str, Path | bytes] = {
        CARD: card.encode(),
        APP: find_file(APP).read_bytes(),
        REQUIREMENTS: "".join([requirements, *(f"{package}\n" for package in packages)]).encode(),
        SETTINGS: (json.dumps(asdict(settings), indent=1, ensure_ascii=False) + "\n").encode(),
    }
    if passages is not None:
        rows = ({"text": row["text"], "title": row["title"] or ""} for row in passages)
        files[SPACE_PASSAGES] = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows).encode()
    return Repo(check_repo_id(repo_id), "space", files, tuple(left_out))


def public_encoder(name: str) -> tuple[str | None, str]:
    """Return an encoder as others can load it, and the package to install for it.

    Args:
        name: A Hub id, a folder, or ``package:NAME/FOLDER``.

    Returns:
        The name, or None if the encoder is on this machine alone; and the requirement, empty if there is none.
    """
    if not name.startswith("package:"):
        return hub_id(name), ""
    found = metadata.packages_distributions().get(name.removeprefix("package:").partition("/")[0])
    return (name, f"{found[0]}=={metadata.version(found[0])}") if found else (None, "")


def find_file(name: str) -> Path:
    """Return a file of the app: in a wheel it lies in the package, in a checkout in ``recipes/space``."""
    here = Path(__file__).parent
    folders = (here / "space_files", here.parents[1] / "recipes" / "space")
    return next((folder / name for folder in folders if (folder / name).is_file()), folders[0] / name)
