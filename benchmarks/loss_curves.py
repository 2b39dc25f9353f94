"""The same data, model and steps by our trainer and by sentence-transformers': the loss curves are one.

``python -m benchmarks.loss_curves`` trains both, one group a step under ``MultipleNegativesRankingLoss`` and four
under ``ListNetLoss`` (see :mod:`benchmarks.peers` for why these are LCE), prints the largest difference of the two
losses at any step, and exits with 1 if it is above 1e-4. Everything else is what both call the same: AdamW, a linear
schedule with warmup, weight decay, clipping, truncation.
"""

import tempfile
from pathlib import Path
from typing import Any

import datasets

from benchmarks import peers
from benchmarks.data import MEDQUAD, PACKAGED, medquad_groups, prepare_checkpoint
from benchmarks.measure import arguments, save
from benchmarks.turns import take_turns

LIMIT = 1e-4
OBJECTIVES = {"MultipleNegativesRankingLoss": 1, "ListNetLoss": 4}  # groups a step


def compare(
    checkpoint: Path,
    groups: datasets.Dataset,
    loss: str,
    steps: int,
    max_length: int,
    work: Path,
    learning_rate: float = 5e-5,
) -> dict[str, list[float]]:
    """Losses of each step, by trainer."""
    size, warmup = OBJECTIVES[loss], max(steps // 10, 1)
    shared = peers.settings(work, steps=steps, groups=size, warmup_steps=warmup, learning_rate=learning_rate)
    trainers = {
        "lce_trainer": peers.ours(checkpoint, groups, max_length, shared),
        "sentence-transformers": peers.sentence_transformers(checkpoint, groups, max_length, shared, loss=loss),
    }
    return {name: timed.losses for name, timed in take_turns(trainers, steps, warmup=0).items()}


def largest_difference(losses: dict[str, list[float]]) -> float:
    """At any step, between any two curves."""
    return max(max(step) - min(step) for step in zip(*losses.values(), strict=True))


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = arguments((__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default=PACKAGED)
    parser.add_argument("--data", type=Path, default=MEDQUAD, help="folder with MedQuAD's files")
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--steps", type=int, help="40, or 6 in the short form")
    args = parser.parse_args(argv)
    steps = args.steps or (6 if args.short else 40)
    groups = medquad_groups(args.data, queries=max(OBJECTIVES.values()) * steps)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as work:
        checkpoint = prepare_checkpoint(args.model, Path(work) / "model", max_length=args.max_length)
        for loss in OBJECTIVES:
            results[loss] = compare(checkpoint, groups, loss, steps, args.max_length, Path(work) / loss)
    differences = {loss: largest_difference(curves) for loss, curves in results.items()}
    ratios = {
        f"largest difference of loss from sentence-transformers' {loss}": difference
        for loss, difference in differences.items()
    }
    settings = {"model": args.model, "steps": steps, "max_length": args.max_length, "groups_a_step": OBJECTIVES}
    save(args.out, "loss_curves", settings, results, ratios)
    return int(max(differences.values()) > LIMIT)


if __name__ == "__main__":
    raise SystemExit(main())
