"""Export a reranker to another runtime, check that it scores the same there, and measure how fast it is."""

import logging
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lce_trainer.errors import ConfigError, TrainingError
from lce_trainer.model.exported import FILES, INPUTS, INT8, RUNTIMES, ExportedModel, require, weights_of
from lce_trainer.model.families import family_of, has_trained_head
from lce_trainer.model.loading import load_config
from lce_trainer.model.onnx import quantize_onnx, write_onnx
from lce_trainer.model.openvino import quantize_openvino, write_openvino
from lce_trainer.model.pairs import pad_pairs
from lce_trainer.model.reranker import Reranker
from lce_trainer.model.saving import set_scoring_config
from lce_trainer.model.scoring import scoring_batches
from lce_trainer.model.yes_no import is_language_model

LARGEST_DIFFERENCE = 1e-4  # of a score, which rounding to float32 explains
TORCH = "torch"  # the model as it is, packed where its family can be

_EXAMPLES = (("a b", "c d e"), ("f", "g"), ("h i j", "k"))
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


def export_reranker(
    name: str,
    to: str,
    folder: Path | None = None,
    *,
    int8: bool = False,
    sample: Sequence[tuple[str, str]] | None = None,
) -> tuple[Path, dict[str, Exported]]:
    """Write a reranker for another runtime, with its tokenizer and config, and compare it with the model.

    Args:
        name: Hub id or folder of a reranker.
        to: ``onnx`` or ``openvino``.
        folder: The folder to write, new or empty; None adds the folder ``onnx/`` or ``openvino/`` to the model's own.
        int8: Write its int8 form as well.
        sample: Queries and passages that OpenVINO's int8 form is quantized for, some hundred; drawn tokens if None.
            That of ONNX needs none.

    Returns:
        The folder, and each form by the name of its backend, ``torch`` first.

    Raises:
        ConfigError: The runtime's extra is not installed, or the folder is not one that can be written.
        TrainingError: There is no such reranker, it cannot be exported, or a score of the file differs from the
            model's by 1e-4 or more; nothing is left in the folder then.
    """
    runtime = RUNTIMES[to]
    require(runtime, runtime.package, *runtime.writers)
    folder, own = _target(name, to, folder)
    model = Reranker.from_pretrained(name, device="cpu", dtype=torch.float32, packing="none")
    kind = type(model.model).__name__
    if is_language_model(model.model) or family_of(model.model.config).is_decoder:
        raise TrainingError(
            f"{name} is a decoder ({kind}), and only encoders are exported: serve a decoder with vLLM, which loads "
            "the checkpoint as it is"
        )
    folder.mkdir(parents=True, exist_ok=True)
    pairs = draw_pairs(model.tokenizer, min(model.max_length, _PAIR_TOKENS))
    rounded = f"{to}{INT8}"
    with tempfile.TemporaryDirectory(prefix=f".{to}-", dir=folder) as work:
        files = {backend: Path(work) / FILES[backend] for backend in (to, rounded)}
        files[to].parent.mkdir()
        write, what = (write_openvino if to == "openvino" else write_onnx), f"{kind} cannot be exported to"
        _run(f"{name}: {what} {runtime.name}", write, model.model, _example(model.tokenizer), files[to])
        found = {TORCH: Reranker(model.model, model.tokenizer, max_length=model.max_length)}
        found[to] = _open(name, to, files[to], model)
        scores = model.score(pairs)
        difference = float(np.abs(found[to].score(pairs) - scores).max())
        if not difference < LARGEST_DIFFERENCE:
            raise TrainingError(
                f"{name}: a score of the {runtime.name} file differs by {difference:.1e} from the model's, and "
                f"rounding explains {LARGEST_DIFFERENCE:g}: the file is wrong, and was deleted"
            )
        if int8:
            what = f"{name}: {runtime.name} cannot make the int8 form of {kind}"
            if to == "openvino":
                inputs = _inputs(model, found[to].model.inputs, sample or pairs)
                _run(what, quantize_openvino, files[to], files[rounded], inputs, model.model)
            else:
                _run(what, quantize_onnx, files[to], files[rounded])
            found[rounded] = _open(name, rounded, files[rounded], model)
        speeds = _speeds(found, pairs)
        if not own:
            model.model.config.architectures = [kind]
            set_scoring_config(model.model, model.tokenizer, model.max_length)
            model.model.config.save_pretrained(folder)
            model.tokenizer.save_pretrained(folder)
        files[to].parent.rename(folder / to)
    exported = {}
    for backend, reranker in found.items():
        if backend == TORCH:
            size, apart = sum(weight.nbytes for weight in model.model.parameters()), None
        else:
            parts = (folder / FILES[backend], folder / weights_of(backend))
            size = sum(part.stat().st_size for part in parts if part.exists())
            apart = float(np.abs(reranker.score(pairs) - scores).max())
        exported[backend] = Exported(reranker, size, apart, speeds[backend])
    return folder, exported


def describe_export(exported: dict[str, Exported], sample: str = "the drawn pairs") -> str:
    """Return the forms of a reranker as a table: size, largest difference of a score, pairs a second.

    Args:
        exported: From :func:`export_reranker`.
        sample: What OpenVINO's int8 form was quantized for, in words.
    """
    lines = [f"{'backend':13s}  {'MB':>8s}  {'largest difference':>18s}  {'pairs/s':>8s}"]
    for backend, one in exported.items():
        apart = "" if one.difference is None else f"{one.difference:.1e}"
        lines.append(f"{backend:13s}  {one.size / 1e6:8.1f}  {apart:>18s}  {one.pairs_per_second:8.1f}")
    tokens = min(next(iter(exported.values())).reranker.max_length, _PAIR_TOKENS)
    lines.append(
        f"Of {_PAIRS} pairs of drawn tokens, up to {tokens} tokens long, on {torch.get_num_threads()} threads of this "
        "machine; what int8 costs in ranking only your own queries say."
    )
    if f"openvino{INT8}" in exported:
        lines.append(f"The ranges of int8 activations are calibrated on {sample}.")
    elif f"onnx{INT8}" in exported:
        lines.append("The ranges of int8 activations are dynamic, those of each batch.")
    return "\n".join(lines)


def _target(name: str, to: str, folder: Path | None) -> tuple[Path, bool]:
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
    if (own / to).exists():
        raise ConfigError(f"{own / to} is there already: delete it, or name a new folder with --output")
    return own, True


def _example(tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    """Return the inputs of a batch whose pairs differ in length."""
    _, encoded = next(scoring_batches(tokenizer, _EXAMPLES, 64, 1000))
    batch = pad_pairs(tokenizer, encoded)
    return {name: batch[name] for name in INPUTS if name in batch}


def _inputs(model: Reranker, names: Sequence[str], pairs: Sequence[tuple[str, str]]) -> list[dict[str, np.ndarray]]:
    """Return the inputs of each pair alone, without padding."""
    batches = scoring_batches(model.tokenizer, pairs, model.max_length, 1)
    padded = [pad_pairs(model.tokenizer, encoded) for _, encoded in batches]
    return [{name: batch[name].numpy() for name in names} for batch in padded]


def _run(what: str, work: Callable[..., None], *given: Any) -> None:
    """Run an exporter.

    Raises:
        TrainingError: It fails, over whatever it stumbles over in a model's code.
    """
    try:
        with quietly():
            work(*given)
    except Exception as error:
        raise TrainingError(f"{what}: {' '.join(str(error.__cause__ or error).split())[:300]}") from error


def _open(name: str, backend: str, file: Path, model: Reranker) -> Reranker:
    opened = ExportedModel(name, backend, file, model.model.config)
    return Reranker(opened, model.tokenizer, max_length=model.max_length, packing="none")


@contextmanager
def quietly() -> Iterator[None]:
    """Keep what other libraries print, log and warn of off the terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        # Not the null device, which would be closed: libraries keep what they find as sys.stdout when imported.
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


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
