"""Checkpoints that every loader scores alike."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lce_trainer.model.crossencoder import RAW_SCORES, write_cross_encoder_files
from lce_trainer.model.yes_no import answers_of


def save_reranker(model: Any, tokenizer: PreTrainedTokenizerBase, max_length: int, folder: Path) -> None:
    """Write a model, or its adapters, with its tokenizer.

    Args:
        model: The reranker, not wrapped for training.
        tokenizer: The model's.
        max_length: Tokens of a pair that it reads at most.
        folder: Made if it is missing.
    """
    set_scoring_config(model, tokenizer, max_length)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_cross_encoder_files(model, tokenizer, folder)


def set_scoring_config(model: Any, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
    """Write into config and tokenizer, before they are saved, how pairs are read and scored."""
    answers = answers_of(model)
    model.config.sentence_transformers = {**RAW_SCORES, **({"answer_ids": list(answers)} if answers else {})}
    tokenizer.model_max_length = max_length
    # Padding may shift the positions that a decoder counts; and only what is in init_kwargs is saved.
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "right" if answers is None else "left"
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        # How the last batch was cut and padded would be saved with it, and bind who reads that file alone.
        backend.no_truncation()
        backend.no_padding()


def save_cross_encoder_files(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write beside a saved model what ``CrossEncoder`` cannot learn from its config."""
    # safetensors writes for the owner alone; the other files are for whom the umask lets read them.
    for weights in folder.glob("*.safetensors"):
        for settings in ("adapter_config.json", "config.json"):
            if (folder / settings).is_file():
                weights.chmod((folder / settings).stat().st_mode & 0o777)
                break
    answers = answers_of(model)
    if answers is not None or hasattr(model, "peft_config"):
        write_cross_encoder_files(folder, answers, tokenizer)


def write_first_stage_weight(folder: Path, weight: float) -> None:
    """Write into a saved model's config how much the first stage's scores count beside its own.

    Args:
        folder: Of the saved model.
        weight: From 0 to 1, see :meth:`lce_trainer.model.reranker.Reranker.rank`.
    """
    _write_config(folder, "first_stage_weight", weight)


def write_calibration(folder: Path, calibration: Mapping[str, float]) -> None:
    """Write into a saved model's config how its logits become probabilities.

    Args:
        folder: Of the saved model.
        calibration: ``slope`` and ``intercept``, see :meth:`lce_trainer.model.reranker.Reranker.score`; what else it
            holds is kept for readers.
    """
    _write_config(folder, "calibration", dict(calibration))


def _write_config(folder: Path, key: str, value: Any) -> None:
    path, part = folder / "config.json", folder / ".config.json.part"
    config = json.loads(path.read_text(encoding="utf-8"))
    config[key] = value
    part.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    part.replace(path)
