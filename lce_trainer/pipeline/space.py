"""A run's Space: the same first stage and the same weights as in its evaluation, as far as others can load them."""

from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np

from lce_trainer.artifacts import MANIFEST, read_manifest
from lce_trainer.hub.cards import RunFacts
from lce_trainer.hub.contents import Repo
from lce_trainer.hub.privacy import names_only
from lce_trainer.hub.space import SpaceSettings, public_encoder, space_repo
from lce_trainer.pipeline.run import Run
from lce_trainer.synthesis.language import find_language

MOST_PASSAGES = 5000  # so that a Space on two cores has embedded them some two minutes after it was started
_EXAMPLES = 4


def space_of(run: Run, repo_id: str, facts: RunFacts, include_passages: bool = False) -> Repo:
    """Return what a run's Space holds.

    Args:
        run: A recipe whose model is trained.
        repo_id: ``user/name`` of the Space.
        facts: What the cards say of the run; its ``model_id`` is what the Space loads.
        include_passages: Publish the passages without a licence too.

    Raises:
        PublishError: The id is none, or the card cannot be written.
    """
    left_out: list[str] = []
    packages = ["peft>=0.18,<1"] if (run.root / "model" / "adapter_config.json").is_file() else []
    chosen: dict[str, Any] = run.manifest("model").facts.get("first_stage", {})
    encoder, same_first_stage = None, True
    if "dense" in run.recipe.mine.retrievers and run.recipe.mine.encoder is not None:
        encoder, package = public_encoder(run.recipe.mine.encoder)
        packages += [package] if package else []
        if encoder is None:
            same_first_stage = False
            left_out.append(
                f"the encoder {names_only(run.recipe.mine.encoder, run.base)}: it is on this machine alone, so the "
                "Space's first stage is BM25, and its second order is the reranker's alone"
            )
    bm25, has_passages = run.root / "passages" / "bm25", (run.root / "passages" / MANIFEST).is_file()
    words: dict[str, Any] = {}
    if has_passages:
        words = read_manifest(bm25, "bm25").config
    elif facts.language:
        language = find_language(facts.language[0])
        words = {"stemmer": language.stemmer, "stopwords": language.stopwords}
    passages, sentence = None, ""
    if not has_passages:
        left_out.append("passages: this recipe has cut none, so the Space takes pasted ones")
    elif facts.license is None and not include_passages:
        left_out.append(
            "passages: there is no licence for them, so the Space takes pasted ones; set publish.license, or add "
            "--include-passages"
        )
    else:
        table = run.table("passages")
        passages, sentence = _cut(table), f"It searches {min(len(table), MOST_PASSAGES):,} passages."
        if len(table) > MOST_PASSAGES:
            sentence = f"It searches {MOST_PASSAGES:,} of {len(table):,} passages, drawn evenly over the corpus."
            left_out.append(
                f"{len(table) - MOST_PASSAGES:,} of {len(table):,} passages: a Space takes {MOST_PASSAGES:,}, drawn "
                "evenly over the corpus"
            )
    settings = SpaceSettings(
        model=facts.model_id or "",
        dataset=facts.dataset_id,
        encoder=encoder,
        bm25_weight=float(chosen.get("bm25_weight", 0.0)) if encoder is not None else 0.0,
        fuse=same_first_stage and "dev_ndcg@10_fused" in chosen,
        stemmer=words.get("stemmer"),
        stopwords=words.get("stopwords"),
        top_k=run.recipe.evaluate.top_k,
        examples=_examples(run) if passages is not None else (),
        passages=sentence,
    )
    return space_repo(repo_id, settings, passages, license=facts.license, packages=packages, left_out=left_out)


def _cut(table: datasets.Dataset) -> datasets.Dataset:
    """Return the passages that go, all of them or as many as a Space takes, evenly over the table."""
    if len(table) <= MOST_PASSAGES:
        return table
    return table.select(np.linspace(0, len(table) - 1, MOST_PASSAGES).round().astype(int))


def _examples(run: Run) -> Sequence[str]:
    """Return queries to try: synthetic ones, drawn evenly; none if the recipe has written none."""
    if not (run.root / "queries" / MANIFEST).is_file():
        return ()
    queries = run.table("queries")["query"][:]
    rows = np.linspace(0, len(queries) - 1, min(_EXAMPLES, len(queries))).round().astype(int)
    return tuple(dict.fromkeys(queries[row] for row in rows))
