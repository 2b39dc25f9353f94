"""Inference: pairs a second of ``Reranker.score``, ``CrossEncoder.predict`` and FlagEmbedding's reranker, in turn.

``python -m benchmarks.infer`` gives each the same checkpoint and the same pairs (MedQuAD questions with the answers
that BM25 finds for them, whole, cut at 256 tokens), one after the other in one process: the candidates of one query in
a call, as a search box has them, and of many. Each gets the batch size it is fastest with; ``CrossEncoder.predict`` is
shown with its own too, as a user calls it who chooses none. The scores must be the same, to rounding; the run fails if
they are not. A ratio is the median over rounds of the ratio of two systems' seconds for the same pairs.

bf16 is bfloat16 weights. FlagEmbedding has float16 only, on GPUs, so it has no figure for bf16. On a CPU,
``torch.compile``, ONNX Runtime and OpenVINO (where they are installed) run the stock model on our batches, padded: in
float32, OpenVINO in bfloat16 too, which ``Reranker`` does not offer, and both in int8, ONNX Runtime's rounded as it
goes and OpenVINO's calibrated on 100 other pairs. Their files are those of ``lce-trainer export``, and ``Reranker``
loads them; sentence-transformers' own backends for both run the same engines, and need ``optimum``, which has no
release for transformers 5. int8 scores are other scores: how far they are from those in float32 is printed, and what
that costs in ranking is not measured here. On a GPU ``torch.compile`` runs ours, packed. None of these is in the short
form.
"""

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor

from benchmarks.data import add_options, medquad_groups, prepare_checkpoint
from benchmarks.measure import PRECISIONS, arguments, device, median_ratio, save, seconds_of, spread
from lce_trainer import Reranker
from lce_trainer.model.export import export_reranker
from lce_trainer.model.exported import FILES, INT8, RUNTIMES
from lce_trainer.model.openvino import open_openvino
from lce_trainer.model.pairs import pad_pairs
from lce_trainer.model.scoring import scoring_batches

OURS = "lce_trainer"
CALIBRATED = 100  # pairs, none of which is timed
ROUNDING = {"fp32": 1e-4, "bf16": 0.05}  # of the largest score, or of 1 if that is less

Pairs = Sequence[tuple[str, str]]
Score = Callable[[Pairs, int], np.ndarray]


@dataclass
class System:
    """Something that scores pairs.

    Attributes:
        score: Of pairs, at a batch size.
        sizes: Batch sizes to choose from.
        unit: Of the batch sizes.
        chosen: The batch size.
        difference: The largest of a score from ours.
    """

    score: Score
    sizes: Sequence[int]
    unit: str
    chosen: int = 0
    difference: float = 0.0


def systems(
    checkpoint: Path, precision: str, max_length: int, calibration: Pairs = (), runtimes: bool = True
) -> dict[str, System]:
    """What can run here, by name; with other runtimes for the model, which take a minute to get ready, or without."""
    dtype, tokens, pairs = PRECISIONS[precision], (2048, 4096, 8192, 16384), (8, 16, 32, 64, 128)
    if device().type != "cpu":
        tokens, pairs = tuple(8 * size for size in tokens), tuple(8 * size for size in pairs)

    def load(**chosen: Any) -> Reranker:
        return Reranker.from_pretrained(checkpoint, dtype=dtype, max_length=max_length, **chosen)

    def ours(reranker: Reranker) -> System:
        return System(lambda given, size: reranker.score(given, batch_tokens=size), tokens, "tokens")

    padded = load(packing="none")
    found = {OURS: ours(load()), "lce_trainer, padded": ours(padded)}
    if runtimes and device().type != "cpu":
        compiled = load()
        compiled.model.compile(dynamic=True)
        found["lce_trainer, compiled"] = ours(compiled)
    elif runtimes and shutil.which("g++"):
        # Lengths are no constants, or every batch would be compiled anew.
        model = torch.compile(padded.model, dynamic=True)
        logits = over_batches(padded, lambda batch: model(**batch).logits)
        found["torch.compile, padded"] = System(logits, tokens, "tokens")
    if runtimes and device().type == "cpu":
        for name, score in exported(checkpoint, max_length, calibration).items():
            found[name] = System(score, tokens, "tokens")
    if find_spec("sentence_transformers"):
        from sentence_transformers import CrossEncoder

        encoder = CrossEncoder(
            str(checkpoint),
            max_length=max_length,
            model_kwargs={"dtype": dtype},
            activation_fn=torch.nn.Identity(),
            device=str(device()),
        )

        def predict(given: Pairs, size: int) -> np.ndarray:
            return encoder.predict(list(given), batch_size=size, show_progress_bar=False)

        found["sentence-transformers"] = System(predict, pairs, "pairs")
        found["sentence-transformers, its own batch size"] = System(predict, (32,), "pairs")
    if find_spec("FlagEmbedding") and precision == "fp32":
        from FlagEmbedding.inference.reranker.encoder_only.base import BaseReranker

        flag = BaseReranker(str(checkpoint), max_length=max_length, devices=[str(device())])
        found["FlagEmbedding"] = System(
            lambda given, size: np.array(flag.compute_score_single_gpu(list(given), batch_size=size)), pairs, "pairs"
        )
    return found


def over_batches(reranker: Reranker, logits: Callable[[dict[str, Tensor]], Tensor]) -> Score:
    """Scores by another runtime, fed as ours is."""

    def score(given: Pairs, size: int) -> np.ndarray:
        scores = np.zeros(len(given), dtype=np.float32)
        with torch.inference_mode():
            for rows, pairs in scoring_batches(reranker.tokenizer, given, reranker.max_length, size):
                batch = pad_pairs(reranker.tokenizer, pairs)
                scores[rows] = logits(send_to_device(batch, device()))[:, 0].float().cpu().numpy()
        return scores

    return score


def exported(checkpoint: Path, max_length: int, calibration: Pairs) -> dict[str, Score]:
    """The checkpoint in the files of each runtime that is installed, on as many threads as torch has."""
    found: dict[str, Score] = {}
    for to, runtime in RUNTIMES.items():
        if not all(map(find_spec, (runtime.package, *runtime.writers))):
            continue
        folder = checkpoint.parent / to
        if not folder.exists():  # one file serves all precisions
            export_reranker(str(checkpoint), to, folder, int8=True, sample=calibration or None)
        for backend in (to, f"{to}{INT8}"):
            reranker = Reranker.from_pretrained(folder, backend=backend, max_length=max_length)
            found[f"{runtime.name}, int8" if backend.endswith(INT8) else runtime.name] = scored_by(reranker)
        if to == "openvino":
            inputs, _, run = open_openvino(folder / FILES[to], "bf16")

            def logits(batch: dict[str, Tensor], inputs: Any = inputs, run: Any = run) -> Tensor:
                return torch.from_numpy(run({name: batch[name].numpy() for name in inputs}))

            found[f"{runtime.name}, bfloat16"] = over_batches(reranker, logits)
    return found


def scored_by(reranker: Reranker) -> Score:
    return lambda given, size: reranker.score(given, batch_tokens=size)


def choose_sizes(found: dict[str, System], pairs: Pairs) -> None:
    """Give each system the batch size it is fastest with."""
    for system in found.values():
        system.score(pairs[:16], system.sizes[0])
        seconds = {size: seconds_of(lambda size=size, s=system: s.score(pairs, size)) for size in system.sizes}
        system.chosen = min(seconds, key=seconds.__getitem__)


def race(found: dict[str, System], rounds: Sequence[Pairs], precision: str) -> dict[str, list[float]]:
    """Seconds of each system for each round of pairs, by name.

    Raises:
        SystemExit: Two systems' scores differ by more than rounding, so they were not doing the same.
    """
    if device().type != "cpu":  # kernels are chosen for each shape, see benchmarks.train
        for system in found.values():
            for pairs in rounds:
                system.score(pairs, system.chosen)
    seconds: dict[str, list[float]] = {name: [] for name in found}
    names = list(found)
    for turn, pairs in enumerate(rounds):
        scores = {}
        for name in names[turn % len(names) :] + names[: turn % len(names)]:

            def work(name: str = name, pairs: Pairs = pairs, scores: dict[str, Any] = scores) -> None:
                scores[name] = found[name].score(pairs, found[name].chosen)

            seconds[name].append(seconds_of(work))
        largest = max(1.0, float(np.abs(scores[OURS]).max()))
        for name in names:
            worst = float(np.abs(scores[name] - scores[OURS]).max())
            found[name].difference = max(found[name].difference, worst)
            if worst > largest * ROUNDING["bf16" if "bfloat16" in name else precision] and "int8" not in name:
                raise SystemExit(f"{name}, {precision}: a score differs by {worst:.1e} from ours: not the same work")
    return seconds


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = arguments((__doc__ or "").split("\n")[0])
    add_options(parser)
    parser.add_argument("--queries", type=int, nargs="+", help="in a call; 1 and 4, or 1 in the short form")
    parser.add_argument("--candidates", type=int, default=32, help="of a query")
    parser.add_argument("--rounds", type=int, help="calls of each kind: 9, or 3 in the short form")
    parser.add_argument("--precision", nargs="+", choices=ROUNDING, default=list(ROUNDING))
    parser.add_argument("--name", default="infer", help="of the results")
    args = parser.parse_args(argv)
    rounds = args.rounds or (3 if args.short else 9)
    args.queries = args.queries or ([1] if args.short else [1, 4])
    calls = max(args.queries) * (rounds + 1)
    groups = medquad_groups(args.data, queries=calls + -(-CALIBRATED // args.candidates), size=args.candidates)
    every = [(row["query"], text) for row in groups for text in row["passages"]]
    pairs, calibration = every[: calls * args.candidates], every[calls * args.candidates :][:CALIBRATED]
    results: dict[str, Any] = {}
    ratios: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as work:
        checkpoint = prepare_checkpoint(args.model, Path(work) / "model", max_length=args.max_length)
        for precision in args.precision:
            found = systems(checkpoint, precision, args.max_length, calibration, runtimes=not args.short)
            for queries in args.queries:
                size = queries * args.candidates
                first, *parts = [pairs[start : start + size] for start in range(0, size * (rounds + 1), size)]
                choose_sizes(found, first[: args.candidates] if args.short else first)
                seconds = race(found, parts, precision)
                what = f"{precision}, {queries} {'query' if queries == 1 else 'queries'} a call"
                results[what] = {
                    name: {
                        "pairs_per_second": spread([len(p) / s for p, s in zip(parts, spent, strict=True)]),
                        "batch_size": found[name].chosen,
                        "difference": found[name].difference,
                        "seconds": spent,
                    }
                    for name, spent in seconds.items()
                }
                show(what, results[what], found)
                for name in found:
                    if name != OURS:
                        ratios[f"{what}: pairs/s over those of {name}"] = median_ratio(seconds[name], seconds[OURS])
    chosen = {name: str(getattr(args, name)) for name in ("model", "queries", "candidates", "max_length")}
    save(args.out, args.name, {**chosen, "rounds": rounds}, results, ratios)


def show(what: str, rows: dict[str, Any], found: dict[str, System]) -> None:
    """The table of one precision and number of queries."""
    print(f"\n{what:41s} {'pairs/s':>8s} {'quartiles':>17s}  batch")
    for name, row in rows.items():
        speed = row["pairs_per_second"]
        quartiles = f"{speed['q25']:.1f} to {speed['q75']:.1f}"
        apart = f"  a score differs by up to {row['difference']:.2f}" if "int8" in name else ""
        size = f"{row['batch_size']} {found[name].unit}"
        print(f"{name:41s} {speed['median']:8.1f} {quartiles:>17s}  {size}{apart}", flush=True)


if __name__ == "__main__":
    main()
