"""Export a reranker to another runtime, check that it scores the same there, and measure how fast it is."""

import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from lce_trainer.errors import ConfigError, TrainingError
from lce_trainer.model.families import family_of, has_trained_head
from lce_trainer.model.loading import load_config
from lce_trainer.model.onnx import FILES, OnnxModel, quantize, require, write_onnx
from lce_trainer.model.reranker import Reranker
from lce_trainer.model.saving import set_scoring_config

LARGEST_DIFFERENCE = 1e-4  # of a score, which rounding to float32 explains
TORCH = "torch"  # the model as it is, packed where its family can be

_PAIRS = 64
_QUERY_TOKENS = 12
_PAIR_TOKENS = 256  # at most: a search result's passage
_ROUNDS = 3


@dataclass(frozen=True)
class Exported:
    """One form of a reranker, in float32 where its name does not say int8.

    Attributes:
        reranker: Scores with it.
        size: Bytes of its weights.
        difference: The largest difference of a score from that of the model in torch; None for the latter.
        pairs_per_second: On this machine, the median of several rounds.
    """

    reranker: Reranker
    size: int
    difference: float | None
    pairs_per_second: float


def export_onnx(name: str, folder: Path | None = None, *, int8: bool = False) -> tuple[Path, dict[str, Exported]]:
    """Write a reranker as ONNX, with its tokenizer and config, and compare it with the model.

    Args:
        name: Hub id or folder of a reranker.
        folder: The folder to write, new or empty; None adds ``onnx/`` to the model's own.
        int8: Write its int8 form as well.

    Returns:
        The folder, and each form by the name of its backend, ``torch`` first.

    Raises:
        ConfigError: The export extra is not installed, or the folder is not one that can be written.
        TrainingError: There is no such reranker, it cannot be exported, or a score of the file differs from the
            model's by 1e-4 or more; nothing is left in the folder then.
    """
    require("onnx", "onnxruntime", "onnxscript")
    folder, own = _target(name, folder)
    model = Reranker.from_pretrained(name, device="cpu", dtype=torch.float32, packing="none")
    folder.mkdir(parents=True, exist_ok=True)
    pairs = draw_pairs(model.tokenizer, min(model.max_length, _PAIR_TOKENS))
    with tempfile.TemporaryDirectory(prefix=".onnx-", dir=folder) as work:
        files = {backend: Path(work) / "onnx" / Path(file).name for backend, file in FILES.items()}
        files["onnx"].parent.mkdir()
        write_onnx(name, model.model, model.tokenizer, files["onnx"])
        found = {TORCH: Reranker(model.model, model.tokenizer, max_length=model.max_length)}
        found["onnx"] = _open(name, files["onnx"], model)
        scores = model.score(pairs)
        difference = float(np.abs(found["onnx"].score(pairs) - scores).max())
        if not difference < LARGEST_DIFFERENCE:
            raise TrainingError(
                f"{name}: a score of the ONNX file differs by {difference:.1e} from the model's, and rounding explains "
                f"{LARGEST_DIFFERENCE:g}: the file is wrong, and was deleted"
            )
        if int8:
            quantize(files["onnx"], files["onnx-int8"])
            found["onnx-int8"] = _open(name, files["onnx-int8"], model)
        speeds = _speeds(found, pairs)
        if not own:
            model.model.config.architectures = [type(model.model).__name__]
            set_scoring_config(model.model, model.tokenizer, model.max_length)
            model.model.config.save_pretrained(folder)
            model.tokenizer.save_pretrained(folder)
        files["onnx"].parent.rename(folder / "onnx")
    exported = {}
    for backend, reranker in found.items():
        if backend == TORCH:
            size, apart = sum(weight.nbytes for weight in model.model.parameters()), None
        else:
            size = sum(part.stat().st_size for part in folder.glob(f"{FILES[backend]}*"))
            apart = float(np.abs(reranker.score(pairs) - scores).max())
        exported[backend] = Exported(reranker, size, apart, speeds[backend])
    return folder, exported


def describe_export(exported: dict[str, Exported]) -> str:
    """Return the forms of a reranker as a table: size, largest difference of a score, pairs a second."""
    lines = [f"{'backend':10s}  {'MB':>8s}  {'largest difference':>18s}  {'pairs/s':>8s}"]
    for backend, one in exported.items():
        apart = "" if one.difference is None else f"{one.difference:.1e}"
        lines.append(f"{backend:10s}  {one.size / 1e6:8.1f}  {apart:>18s}  {one.pairs_per_second:8.1f}")
    tokens = min(next(iter(exported.values())).reranker.max_length, _PAIR_TOKENS)
    lines.append(
        f"Of {_PAIRS} pairs of drawn tokens, up to {tokens} tokens long, on {torch.get_num_threads()} threads of this "
        "machine; what int8 costs in ranking only your own queries say."
    )
    return "\n".join(lines)


def _target(name: str, folder: Path | None) -> tuple[Path, bool]:
    """Return the folder to write, and whether it is the model's own."""
    if folder is not None:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f"{folder} is not empty: name a new folder with --output, so that nothing is overwritten")
        return folder, False
    own = Path(name)
    plain = own.is_dir() and not (own / "adapter_config.json").exists()
    config = load_config(name) if plain else None
    if config is None or not (has_trained_head(config) or family_of(config).is_decoder):  # a decoder is refused later
        raise ConfigError(f"{name} is not the folder of a plain checkpoint: name a folder to write with --output")
    if (own / "onnx").exists():
        raise ConfigError(f"{own / 'onnx'} is there already: delete it, or name a new folder with --output")
    return own, True


def _open(name: str, file: Path, model: Reranker) -> Reranker:
    onnx = OnnxModel(name, file, model.model.config)
    return Reranker(onnx, model.tokenizer, max_length=model.max_length, packing="none")


def draw_pairs(tokenizer: PreTrainedTokenizerBase, longest: int) -> list[tuple[str, str]]:
    """Return pairs of drawn tokens of every length, in whatever language the tokenizer knows."""
    draw = random.Random(13)
    special = set(tokenizer.all_special_ids)
    ids = sorted(token for token in tokenizer.get_vocab().values() if token not in special)

    def text(tokens: int) -> str:
        return str(tokenizer.decode(draw.choices(ids, k=tokens)))

    queries = [text(draw.randint(2, _QUERY_TOKENS)) for _ in range(_PAIRS)]
    return [(query, text(max(longest * (place + 1) // _PAIRS, 1))) for place, query in enumerate(queries)]


def _speeds(found: dict[str, Reranker], pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Return the pairs a second of each, measured in turn after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(1 + _ROUNDS):
        for name, reranker in found.items():
            start = time.perf_counter()
            reranker.score(pairs)
            seconds[name].append(time.perf_counter() - start)
    return {name: len(pairs) / float(np.median(spent[1:])) for name, spent in seconds.items()}
