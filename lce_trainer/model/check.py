"""What loads a checkpoint, and whether it then scores as :class:`Reranker` does.

Loaders that are installed are tried on pairs of drawn tokens; of servers that are not, rules say what they read.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lce_trainer.compat import find_file
from lce_trainer.model.crossencoder import read_json
from lce_trainer.model.export import draw_pairs, quietly
from lce_trainer.model.exported import FILES, INT8, runtime_of
from lce_trainer.model.families import family_of
from lce_trainer.model.reranker import Reranker
from lce_trainer.model.template import pair_template
from lce_trainer.model.yes_no import is_language_model
from lce_trainer.names import resolve_model

SAME, OTHER, FAILS, EXPECTED, UNKNOWN = "same scores", "other scores", "does not load", "should load", "not tried"
_TOLERANCE = {"onnx": 1e-4, "openvino": 1e-4}
_EXACT = 1e-5
_MOST_TOKENS = 128


@dataclass(frozen=True)
class Loader:
    """What one loader makes of a checkpoint.

    Attributes:
        name: Of the loader.
        outcome: ``same scores``, ``other scores`` or ``does not load`` where it was tried or a rule says so; ``should
            load`` where a rule says so; ``not tried``.
        detail: How far the scores are apart, why it does not load, or what to know or do.
    """

    name: str
    outcome: str
    detail: str


@dataclass(frozen=True)
class _Checkpoint:
    name: str
    path: str
    reranker: Reranker
    pairs: Sequence[tuple[str, str]]
    scores: np.ndarray

    @property
    def kind(self) -> str:
        return str(self.reranker.model.config.model_type)

    def served_by(self, server: str) -> bool:
        return server in family_of(self.reranker.model.config).servers

    def holds(self, file: str) -> bool:
        return find_file(self.path, file) is not None


class _FailsError(Exception):
    """A loader does not load the checkpoint, for a reason that is known."""


def check_model(name: str) -> list[Loader]:
    """Return what each loader makes of a reranker.

    Args:
        name: Hub id or folder of a reranker.

    Raises:
        TrainingError: :class:`Reranker` itself does not load it.
    """
    path = resolve_model(name)
    reranker = Reranker.from_pretrained(name, device="cpu", dtype=torch.float32)
    pairs = draw_pairs(reranker.tokenizer, min(reranker.max_length, _MOST_TOKENS))
    found = _Checkpoint(name, path, reranker, pairs, reranker.score(pairs))
    loaders = [
        Loader("lce_trainer.Reranker", SAME, f"{reranker.max_length} tokens of a pair at most"),
        _tried("transformers, AutoModelForSequenceClassification", found, _by_transformers),
        _tried('transformers, pipeline("text-classification")', found, _by_pipeline),
        _tried("sentence-transformers, CrossEncoder", found, _by_cross_encoder, "sentence_transformers"),
    ]
    for backend, file in FILES.items():
        runtime = runtime_of(backend)
        if found.holds(file):
            loaders.append(_tried(f"{runtime.name}, {file}", found, _by_backend(backend), runtime.package, backend))
        elif not backend.endswith(INT8):
            detail = f"there is no {file}: lce-trainer export {name} --to {backend} writes it"
            loaders.append(Loader(runtime.name, UNKNOWN, detail))
    return [*loaders, _tei(found), _vllm(found), _gguf(found)]


def describe_loaders(name: str, loaders: Sequence[Loader]) -> str:
    """Return a line for each loader, aligned."""
    widths = [max(len(getattr(one, column)) for one in loaders) for column in ("name", "outcome")]
    lines = [f"{one.name:{widths[0]}s}  {one.outcome:{widths[1]}s}  {one.detail}".rstrip() for one in loaders]
    return "\n".join([f"{name}:", *(f"  {line}" for line in lines)])


def _tried(
    name: str,
    found: _Checkpoint,
    score: Callable[[_Checkpoint], np.ndarray],
    package: str | None = None,
    backend: str = "",
) -> Loader:
    """Load a checkpoint, score the pairs, and compare."""
    if package is not None and find_spec(package) is None:
        return Loader(name, UNKNOWN, f"{package} is not installed")
    try:
        with quietly():
            scores = np.asarray(score(found), dtype=np.float64).reshape(-1)
    except _FailsError as error:
        return Loader(name, FAILS, str(error))
    except Exception as error:  # whatever a library raises for a checkpoint that it was not written for
        lines = str(error).strip().splitlines() or [""]
        return Loader(name, FAILS, f"{type(error).__name__}: {lines[0][:160]}")
    if scores.shape != found.scores.shape:
        return Loader(name, OTHER, f"{scores.size} scores for {found.scores.size} pairs: it has more than one label")
    wanted = found.scores.astype(np.float64)
    apart = float(np.abs(scores - wanted).max())
    if apart <= _TOLERANCE.get(backend, _EXACT):
        return Loader(name, SAME, f"largest difference {apart:.0e}")
    if float(np.abs(scores - 1 / (1 + np.exp(-wanted))).max()) <= _EXACT:
        what = 'the sigmoid of the score, in the same order; pass function_to_apply="none" for the score itself'
        return Loader(name, OTHER, what if score is _by_pipeline else "the sigmoid of the score, in the same order")
    if backend.endswith(INT8):
        return Loader(name, OTHER, f"largest difference {apart:.1e}, which is what int8 rounds")
    return Loader(name, OTHER, f"largest difference {apart:.1e}")


def _load_classifier(found: _Checkpoint) -> Any:
    """Return the model as ``AutoModelForSequenceClassification`` loads it, with all its weights."""
    if _answers(found):
        raise _FailsError("it is a language model that answers yes or no, and no classifier")
    model, info = AutoModelForSequenceClassification.from_pretrained(
        found.path, dtype=torch.float32, output_loading_info=True
    )
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise _FailsError(f"it makes up weights: {missing}; lce-trainer convert writes a plain checkpoint")
    return model.eval()


def _by_transformers(found: _Checkpoint) -> np.ndarray:
    model, tokenizer, scores = _load_classifier(found), AutoTokenizer.from_pretrained(found.path), []
    with torch.inference_mode():
        for query, passage in found.pairs:
            encoded = tokenizer(
                query, passage, truncation="longest_first", max_length=found.reranker.max_length, return_tensors="pt"
            )
            scores.append(model(**encoded).logits.double().numpy())
    return np.concatenate(scores)


def _by_pipeline(found: _Checkpoint) -> np.ndarray:
    _load_classifier(found)
    pipe = transformers.pipeline(
        "text-classification", model=found.path, tokenizer=found.path, device="cpu", dtype=torch.float32
    )
    rows = [{"text": query, "text_pair": passage} for query, passage in found.pairs]
    return np.array([answer["score"] for answer in pipe(rows, truncation=True)])


def _by_cross_encoder(found: _Checkpoint) -> np.ndarray:
    from sentence_transformers import CrossEncoder

    model = CrossEncoder(found.path, device="cpu", model_kwargs={"dtype": torch.float32})
    return np.asarray(model.predict(list(found.pairs), show_progress_bar=False))


def _by_backend(backend: Any) -> Callable[[_Checkpoint], np.ndarray]:
    def score(found: _Checkpoint) -> np.ndarray:
        return Reranker.from_pretrained(found.name, backend=backend).score(list(found.pairs))

    return score


def _tei(found: _Checkpoint) -> Loader:
    name = "text-embeddings-inference, /rerank"
    if found.holds("adapter_config.json"):
        return Loader(name, FAILS, "it reads no adapters: lce-trainer convert merges them")
    if _answers(found) or "tei" in family_of(found.reranker.model.config).refused_by:
        return Loader(name, FAILS, f"it has no classification head for {found.kind}")
    if not found.served_by("tei"):
        return Loader(name, UNKNOWN, f"no rule says whether it has a classification head for {found.kind}")
    if found.holds("modules.json") and not _has_head(found):
        return Loader(name, FAILS, "it does not read modular heads: lce-trainer convert writes a plain checkpoint")
    if not found.holds("tokenizer.json"):
        return Loader(name, FAILS, "it reads tokenizer.json alone, which is missing: AutoTokenizer saves one")
    if len((read_json(found.path, "config.json") or {}).get("id2label") or {}) != 1:
        return Loader(name, FAILS, "config.json has no id2label of one label")
    if _template(found):
        return Loader(name, OTHER, "it does not apply the chat template that the model reads pairs in")
    return Loader(name, EXPECTED, f"it has a head for {found.kind}; it gives the sigmoid unless raw_scores is true")


def _vllm(found: _Checkpoint) -> Loader:
    name = "vLLM, /score"
    if found.holds("adapter_config.json"):
        return Loader(name, FAILS, "it reads no adapters of a classifier: lce-trainer convert merges them")
    if _answers(found):
        detail = "it needs --hf-overrides with the tokens of yes and no, and the prompt as a score template"
        return Loader(name, EXPECTED, detail)
    if not _has_head(found):
        return Loader(name, FAILS, "it does not read modular heads: lce-trainer convert writes a plain checkpoint")
    if not found.served_by("vllm"):
        return Loader(name, FAILS, f"it scores with no classifier of {found.kind}")
    if _template(found):
        return Loader(name, OTHER, "it needs the model's chat template as --chat-template, or it reads bare pairs")
    return Loader(name, EXPECTED, f"it scores with classifiers of {found.kind}")


def _gguf(found: _Checkpoint) -> Loader:
    name = "llama.cpp, as GGUF"
    if found.served_by("gguf") and _has_head(found):
        return Loader(name, EXPECTED, f"its converter keeps the head of {found.kind}")
    return Loader(name, FAILS, f"its converter drops what lies between {found.kind}'s last layer and the score")


def _has_head(found: _Checkpoint) -> bool:
    """Return whether the checkpoint is a plain sequence classifier."""
    config = read_json(found.path, "config.json") or {}
    return any("ForSequenceClassification" in str(kind) for kind in config.get("architectures") or [])


def _answers(found: _Checkpoint) -> bool:
    return is_language_model(found.reranker.model)


def _template(found: _Checkpoint) -> bool:
    return pair_template(found.reranker.tokenizer) is not None
