"""A trained reranker: load it, score pairs, rank passages."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lce_trainer.errors import ConfigError, TrainingError
from lce_trainer.hardware import DTYPES, best_device
from lce_trainer.model.families import float32_head
from lce_trainer.model.loading import configure_pairs, load_model, load_tokenizer, longest_input
from lce_trainer.model.modular import save_modular
from lce_trainer.model.packed.packing import batch_scores, disable_packing, enable_packing
from lce_trainer.model.saving import save_reranker
from lce_trainer.model.scoring import score_pairs, tokens_at_once


@dataclass(frozen=True)
class RankedPassage:
    """A passage in its place.

    Attributes:
        index: Among the passages that were ranked.
        score: Raw logit, or a probability where :meth:`Reranker.rank` was called for one.
        passage: Its text.
    """

    index: int
    score: float
    passage: str


class Reranker:
    """A cross-encoder with one label, ready to score.

    The scores are raw logits, those of ``AutoModelForSequenceClassification`` and of
    ``sentence_transformers.CrossEncoder`` on the same checkpoint.

    Example::

        reranker = Reranker.from_pretrained("out")
        reranker.rank("what is a moon", ["A moon is ...", "Rivers flow ..."], top_k=1)
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int | None = None,
        packing: Literal["auto", "none"] = "auto",
        special_tokens_in_texts: bool | None = None,
    ) -> None:
        """Wrap a loaded model; see :meth:`from_pretrained`."""
        if max_length is not None and (not isinstance(max_length, int) or max_length < 1):
            raise ConfigError(f"max_length must be a number of tokens, 1 or more, not {max_length!r}")
        if packing not in ("auto", "none"):
            raise ConfigError(f"packing must be 'auto' or 'none', not {packing!r}")
        self.model = model.eval()
        self.tokenizer = tokenizer
        configure_pairs(model, tokenizer, special_tokens_in_texts)
        limit = longest_input(model)
        self.max_length = max_length or min(tokenizer.model_max_length, limit)
        if self.max_length > limit:
            raise TrainingError(f"max_length={self.max_length}, but the model reads {limit} tokens at most")
        if packing == "auto":
            enable_packing(self.model)
        else:
            disable_packing(self.model)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        max_length: int | None = None,
        yes_no: bool | None = None,
        packing: Literal["auto", "none"] = "auto",
        special_tokens_in_texts: bool | None = None,
        backend: Literal["torch", "onnx", "onnx-int8", "openvino", "openvino-int8"] = "torch",
    ) -> "Reranker":
        """Load a reranker.

        Args:
            name: Hub id, folder, or ``package:NAME/FOLDER``.
            device: An accelerator if there is one, else the CPU.
            dtype: Of the weights; as saved if None.
            max_length: Tokens of a pair at most; what the checkpoint was trained with if None.
            yes_no: Score by a language model's answer, see :mod:`lce_trainer.model.yes_no`; if None, that
                of a checkpoint which says so.
            packing: With auto pairs are scored without padding where the model's family can be, and
                with none padded.
            special_tokens_in_texts: With False ``[SEP]``, ``<pad>`` and the like are text where they stand in a query
                or passage, so that no author of a passage can use them; with True they keep their meaning. If None, as
                the model was trained, and False where its checkpoint does not say.
            backend: With onnx and onnx-int8 ONNX Runtime scores on the CPU, and with openvino and openvino-int8
                OpenVINO, with the file that ``lce-trainer export`` has written; pairs are padded then, and device,
                dtype and yes_no are not chosen.

        Raises:
            TrainingError: There is no such model, its checkpoint lacks weights or a tokenizer, or it is not a reranker
                with one label.
            ConfigError: The package of a ``package:`` name is missing, there is no such device, dtype or backend, or
                what the backend needs is not installed.
        """
        if backend != "torch":
            texts = special_tokens_in_texts
            return cls._from_exported(name, backend, max_length, texts, device=device, dtype=dtype, yes_no=yes_no)
        place = _resolve_device(device)
        if not isinstance(dtype, torch.dtype) and dtype not in (None, "auto", *DTYPES):
            raise ConfigError(f"dtype must be 'auto' or one of {', '.join(DTYPES)}, not {dtype!r}")
        model = load_model(name, dtype=dtype or "auto", yes_no=yes_no, trained=True)
        return cls(
            model.to(place),
            load_tokenizer(name),
            max_length=max_length,
            packing=packing,
            special_tokens_in_texts=special_tokens_in_texts,
        )

    @classmethod
    def _from_exported(
        cls, name: str | Path, backend: str, max_length: int | None, special_tokens_in_texts: bool | None, **chosen: Any
    ) -> "Reranker":
        from lce_trainer.model.exported import FILES, load_exported

        if backend not in FILES:
            raise ConfigError(f"backend must be one of torch, {', '.join(FILES)}, not {backend!r}")
        wrong = {key: value for key, value in chosen.items() if value is not None and str(value) != "cpu"}
        if wrong:
            key, value = next(iter(wrong.items()))
            raise ConfigError(
                f"{key}={str(value)!r} cannot be chosen with backend={backend!r}, whose file scores on a CPU"
            )
        return cls(
            load_exported(name, backend),
            load_tokenizer(name),
            max_length=max_length,
            packing="none",
            special_tokens_in_texts=special_tokens_in_texts,
        )

    def save_pretrained(self, folder: str | Path, *, modular: bool = False) -> None:
        """Write a plain checkpoint; adapters that were loaded are part of it.

        Args:
            folder: Made if it is missing.
            modular: Write the modules of sentence-transformers instead, as Ettin's rerankers have them, see
                :func:`lce_trainer.model.modular.save_modular`.

        Raises:
            TrainingError: The backend is not torch, and its file is no checkpoint; or the head cannot be said in
                modules.
            ConfigError: Modules are wanted, and sentence-transformers is not installed.
        """
        if not hasattr(self.model, "save_pretrained"):
            raise TrainingError(
                "an exported file cannot be saved as a checkpoint: copy its folder, or load the model with torch"
            )
        save = save_modular if modular else save_reranker
        save(self.model, self.tokenizer, self.max_length, Path(folder))

    def score(
        self,
        pairs: Iterable[tuple[str, str]],
        *,
        batch_tokens: int | None = None,
        progress: bool = False,
        accelerator: Accelerator | None = None,
        calibrated: bool = False,
    ) -> np.ndarray:
        """Score queries with passages.

        Pairs are read, tokenized and scored in windows of 16,384, of which only the scores are kept: millions of
        them may come from a generator. Equal pairs of a window get the very same score.

        Args:
            pairs: Query and passage of each.
            batch_tokens: Tokens, padding included, in one forward pass at most. None: as many as are fast, 4096 on a
                CPU and 65536 on an accelerator.
            progress: Show a bar.
            accelerator: Share the pairs among the processes that ``accelerate launch`` started. Every process must
                call, with the same pairs in the same order, and gets all scores. If None, this process scores all.
            calibrated: Return the probability that the passage answers the query, by the calibration that
                ``lce-trainer calibrate`` has written into the model's config:
                ``sigmoid(slope * logit + intercept)``.

        Returns:
            Raw logits, or probabilities, float32, shape ``(pairs,)``; higher is more relevant. Also a model in half
            precision computes the last product in float32.

        Raises:
            ConfigError: The model has no calibration.
            TrainingError: Something is not a pair of strings, ``batch_tokens`` is less than 1, or processes that
                share the pairs were given different ones.
        """
        slope, intercept = self._calibration() if calibrated else (1.0, 0.0)
        with float32_head(self.model):
            logits = score_pairs(
                lambda batch: batch_scores(self.model, batch, self.model, self.tokenizer, self.model.device),
                self.tokenizer,
                pairs,
                self.max_length,
                tokens_at_once(batch_tokens, self.model.device),
                accelerator,
                disable=not (progress and (accelerator is None or accelerator.is_local_main_process)),
            )
        return _probabilities(logits, slope, intercept) if calibrated else logits

    def _calibration(self) -> tuple[float, float]:
        """Return slope and intercept of the probabilities' logits.

        Raises:
            ConfigError: The model's config has none, or what it has is none.
        """
        found = getattr(self.model.config, "calibration", None)
        if found is None:
            raise ConfigError(
                "the model has no calibration, so its scores are no probabilities: run lce-trainer calibrate with "
                "labelled pairs that it was not trained on"
            )
        values: list[Any] = [found.get(key) for key in ("slope", "intercept")] if isinstance(found, dict) else [None]
        if not all(isinstance(value, (int, float)) and np.isfinite(value) for value in values) or values[0] <= 0:
            raise ConfigError(
                "config.json: calibration must hold a slope above 0 and an intercept, two numbers, not "
                f"{repr(found)[:80]}: run lce-trainer calibrate again"
            )
        return float(values[0]), float(values[1])

    def rank(
        self,
        query: str,
        passages: Sequence[str],
        top_k: int | None = None,
        *,
        first_stage_scores: Sequence[float] | None = None,
        calibrated: bool = False,
    ) -> list[RankedPassage]:
        """Return passages from the most relevant down; equal scores keep their order.

        Args:
            query: The text that passages are ranked for.
            passages: Candidates.
            top_k: How many are returned; all if None.
            first_stage_scores: What brought each passage gave it, e.g. an encoder's cosine. Both scores are
                standardized over the passages and added by the weight that training found on dev queries
                (``first_stage_weight`` in the model's config, one half where there is none).
            calibrated: Give each passage the probability that it answers the query, see :meth:`score`, in place of
                its logit; the order is the same.

        Raises:
            TrainingError: There is not one first-stage score for each passage.
            ConfigError: Probabilities are wanted of a model without a calibration, or together with
                ``first_stage_scores``, for which none was fitted.
        """
        if calibrated and first_stage_scores is not None:
            raise ConfigError(
                "calibrated=True gives the reranker's own probabilities, and its score together with "
                "first_stage_scores has none: pass one of the two"
            )
        slope, intercept = self._calibration() if calibrated else (1.0, 0.0)
        scores = self.score([(query, passage) for passage in passages])
        if first_stage_scores is not None:
            if len(first_stage_scores) != len(passages):
                raise TrainingError(
                    f"{len(first_stage_scores)} first_stage_scores for {len(passages)} passages: give one for each"
                )
            weight = float(getattr(self.model.config, "first_stage_weight", 0.5))
            first_stage = np.asarray(first_stage_scores, dtype=np.float64)
            scores = weight * _standardized(first_stage) + (1 - weight) * _standardized(scores.astype(np.float64))
        order = np.argsort(-scores, kind="stable")[:top_k]
        if calibrated:  # after sorting: logits that differ may round to one probability
            scores = _probabilities(scores, slope, intercept)
        return [RankedPassage(int(i), float(scores[i]), passages[i]) for i in order]


def _probabilities(logits: np.ndarray, slope: float, intercept: float) -> np.ndarray:
    """Return ``sigmoid(slope * logit + intercept)`` of each logit, float32."""
    found: np.ndarray = torch.sigmoid(torch.from_numpy(slope * logits.astype(np.float64) + intercept)).float().numpy()
    return found


def _standardized(scores: np.ndarray) -> np.ndarray:
    """Return scores less their mean, over their standard deviation; all 0 where they are equal."""
    centred: np.ndarray = scores - scores.mean() if len(scores) else scores
    spread = centred.std() if len(scores) else 0.0
    return centred / spread if spread > 0 else centred


def _resolve_device(name: str | torch.device | None) -> torch.device:
    """Return the device of this name, or the best one for None.

    Raises:
        ConfigError: There is no such device on this machine.
    """
    if name is None:
        return best_device()
    try:
        device = torch.device(name)
        kind = torch.get_device_module(device) if device.type != "cpu" else torch.cpu
        there = kind.is_available() and (device.index or 0) < kind.device_count()
    except (RuntimeError, TypeError, AttributeError):
        there = False
    if not there:
        raise ConfigError(
            f"device={str(name)!r}: this machine has no such device; the best that it has is {best_device()}"
        )
    return device
