"""Training: pairs a second of our trainer and of what a user would pick instead, step by step in turn.

``python -m benchmarks.train`` gives every trainer the same checkpoint and the same groups in the same order (a MedQuAD
question, its answer and BM25's competitors, whole answers at their real lengths, cut at 256 tokens), and lets each
take one step after the other in one process. A ratio is the median over steps of the ratio of two trainers' seconds
for that step. Where the objective is the same, so must be the loss of every step, to rounding; the run fails if it is
not. :mod:`benchmarks.peers` says how each peer is set.

MFU is what the model must compute for the real tokens, forward and backward, over what a large square product reaches
on this machine in the same run. Padding earns nothing, and the last layer counts whole even for those who leave out
what is not read of it.

On a GPU the steps that are measured are run once before, because there the first product of a shape, or the first
attention, waits until a kernel is chosen or built for it, up to 0.1 s; a long run has that behind it.

Without dropout all compute the same, and the losses show it. With 0.1, as the checkpoint comes and is trained unless
one says otherwise, each draws its own, and the losses are not compared.

FlagEmbedding 1.4.2 runs beside transformers 5 and is measured where it is installed.
"""

import gc
import statistics
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import datasets
from transformers import AutoModelForSequenceClassification, Trainer

from benchmarks import peers
from benchmarks.data import add_step_options, medquad_groups, prepare_checkpoint, step_lengths
from benchmarks.measure import PRECISIONS, arguments, device, matmul_rate, median_ratio, save, spread
from benchmarks.roofline import model_flops
from benchmarks.turns import Timed, take_turns

OURS = "lce_trainer"
# How far a loss may be off ours. FlagEmbedding may read other last tokens of a passage that is cut; see peers.
ROUNDING = {"fp32": 2e-4, "bf16": 0.05}
OTHER_TOKENS = {"FlagEmbedding": 0.05}
NOT_IN_SHORT = {"lce_trainer, padded", "sentence-transformers, whole batch at once"}

Build = Callable[[Path, datasets.Dataset, int, dict[str, Any]], Trainer]


def systems() -> dict[str, Build]:
    """The trainers that can run here, by name."""
    found: dict[str, Build] = {OURS: peers.ours}
    if device().type != "cpu":
        found["lce_trainer, compiled"] = peers.ours_compiled
    found["lce_trainer, padded"] = partial(peers.ours, packing="none")
    if find_spec("sentence_transformers"):
        found["sentence-transformers"] = peers.sentence_transformers
        found["sentence-transformers, whole batch at once"] = partial(peers.sentence_transformers, mini_batch=-1)
    if find_spec("FlagEmbedding"):
        found["FlagEmbedding"] = peers.flag_embedding
    found["plain padded loop"] = peers.plain
    found["plain padded loop, length buckets"] = peers.bucketed
    return found


def race(
    builds: dict[str, Build],
    checkpoint: Path,
    groups: datasets.Dataset,
    *,
    precision: str,
    batch: int,
    steps: int,
    warmup: int,
    max_length: int,
    same: bool = True,
) -> dict[str, Timed]:
    """Every trainer, a step each in turn.

    Raises:
        SystemExit: Two trainers' losses should be the ``same`` and differ by more than rounding.
    """
    with tempfile.TemporaryDirectory() as work:
        trainers = {}
        for i, (name, build) in enumerate(builds.items()):
            shared = peers.settings(Path(work) / str(i), steps=warmup + steps, groups=batch, bf16=precision == "bf16")
            trainers[name] = build(checkpoint, groups, max_length, shared)
        timed = take_turns(trainers, steps, warmup)
    del trainers
    gc.collect()
    for name, one in timed.items():
        allowed = max(ROUNDING[precision], OTHER_TOKENS.get(name, 0.0))
        worst = max(abs(a - b) for a, b in zip(one.losses, timed[OURS].losses, strict=True))
        if same and worst > allowed:
            raise SystemExit(f"{name}, {precision}: a step's loss differs by {worst:.1e} from ours: not the same work")
    return timed


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = arguments((__doc__ or "").split("\n")[0])
    add_step_options(parser)
    parser.add_argument("--steps", type=int, help="measured steps; 12, or 3 in the short form")
    parser.add_argument("--warmup", type=int, help="steps before; 1, or on a GPU those that are measured")
    parser.add_argument("--precision", nargs="+", choices=ROUNDING, default=list(ROUNDING))
    parser.add_argument("--only", nargs="+", help="names of the trainers, besides ours")
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.0, 0.1], help="of the checkpoint that all train")
    parser.add_argument("--name", default="train", help="of the results")
    args = parser.parse_args(argv)
    steps = args.steps or (3 if args.short else 12)
    left_out = NOT_IN_SHORT if args.short else set()
    wanted = {OURS, *args.only} if args.only else systems().keys() - left_out
    builds = {name: build for name, build in systems().items() if name in wanted}
    first, warmup = (args.warmup, args.warmup) if args.warmup is not None else (1, 1)  # first: that is measured
    if args.warmup is None and device().type != "cpu":
        first, warmup = 0, steps  # an epoch before
    wanted_groups = args.batch * (first + steps)
    groups = medquad_groups(args.data, queries=wanted_groups, size=args.group_size)
    if len(groups) < wanted_groups:
        raise SystemExit(f"{args.data} gives {len(groups)} groups, but {wanted_groups} are needed: lower --steps")
    results: dict[str, Any] = {}
    ratios: dict[str, float] = {}
    for dropout, precision in product(args.dropout, args.precision):
        what = f"{precision}, dropout {dropout:g}"
        with tempfile.TemporaryDirectory() as work:
            checkpoint = prepare_checkpoint(args.model, Path(work), max_length=args.max_length, dropout=dropout)
            lengths = step_lengths(checkpoint, groups, args.batch, args.max_length)[first:]
            weights = AutoModelForSequenceClassification.from_pretrained(checkpoint)
            needed = [3 * model_flops(weights, step) for step in lengths]
            rate = matmul_rate(PRECISIONS[precision])
            options = {"batch": args.batch, "steps": steps, "warmup": warmup, "max_length": args.max_length}
            timed = race(builds, checkpoint, groups, precision=precision, same=not dropout, **options)
            rate = max(rate, matmul_rate(PRECISIONS[precision]))
        results[what] = {
            "matmul_flops_per_second": rate,
            "trainers": {
                name: {
                    "pairs_per_second": spread([len(n) / s for n, s in zip(lengths, one.seconds, strict=True)]),
                    "mfu": spread([f / s / rate for f, s in zip(needed, one.seconds, strict=True)])["median"],
                    "seconds": one.seconds,
                    "cpu_seconds": one.cpu_seconds,
                    "losses": one.losses,
                }
                for name, one in timed.items()
            },
        }
        show(what, results[what]["trainers"])
        for name in [name for name in builds if name != OURS]:
            ratios[f"{what}: pairs/s over those of {name}"] = median_ratio(timed[name].seconds, timed[OURS].seconds)
    settings = {
        **{name: str(getattr(args, name)) for name in ("model", "batch", "group_size", "max_length")},
        "warmup": warmup,
        "steps": steps,
        "tokens_per_pair": spread([n for step in lengths for n in step]),
    }
    save(args.out, args.name, settings, results, ratios)


def show(what: str, trainers: dict[str, Any]) -> None:
    """The table of one precision and dropout."""
    rows: Iterable[tuple[str, dict[str, Any]]] = trainers.items()
    print(f"\n{what:44s} {'pairs/s':>8s} {'quartiles':>17s} {'MFU':>6s} {'CPU s':>6s}")
    for name, row in rows:
        speed = row["pairs_per_second"]
        quartiles = f"{speed['q25']:.1f} to {speed['q75']:.1f}"
        cpu = statistics.median(row["cpu_seconds"])
        print(f"{name:44s} {speed['median']:8.1f} {quartiles:>17s} {row['mfu']:6.1%} {cpu:6.2f}", flush=True)


if __name__ == "__main__":
    main()
