"""The input side: pairs a second that one core makes ready for the model, beside those that the model takes.

``python -m benchmarks.feed`` goes through the same groups (a MedQuAD question, its answer and BM25's competitors, whole
answers at their real lengths, cut at 256 tokens) with the dataloader of a training run, from texts that are tokenized
as they come and from token ids that are kept, and with what cuts pairs into batches for ``Reranker.score``; then it
trains on some of the groups, and scores them, with a packaged MiniLM. Tokenizers keep to one core, as they do in a
worker of a dataloader; the model has all cores, or the accelerator.
"""

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import datasets
from transformers import AutoTokenizer

from benchmarks import peers
from benchmarks.data import add_step_options, medquad_groups, prepare_checkpoint
from benchmarks.measure import PRECISIONS, arguments, device, save, seconds_of, spread
from benchmarks.turns import take_turns
from lce_trainer import Reranker
from lce_trainer.model.scoring import scoring_batches, tokens_at_once

TEXTS, KEPT, SCORING = "training, from texts", "training, from kept ids", "scoring, from texts"

Pairs = Sequence[tuple[str, str]]


def feeds(
    checkpoint: Path, groups: datasets.Dataset, batch: int, max_length: int, work: Path
) -> dict[str, Callable[[], int]]:
    """What makes the pairs of all groups ready, by name; each says how many pairs it made."""

    def loading(pretokenize: bool) -> Callable[[], int]:
        shared = peers.settings(work / f"pretokenize-{pretokenize}", steps=1, groups=batch)
        trainer = peers.ours(checkpoint, groups, max_length, shared, pretokenize=pretokenize)
        loader = trainer.get_train_dataloader()
        return lambda: sum(len(made.pairs) for made in loader)

    tokenizer, pairs = AutoTokenizer.from_pretrained(checkpoint), pairs_of(groups)
    tokens = tokens_at_once(None, device())
    return {
        TEXTS: loading(pretokenize=False),
        KEPT: loading(pretokenize=True),
        SCORING: lambda: sum(len(rows) for rows, _ in scoring_batches(tokenizer, pairs, max_length, tokens)),
    }


def pairs_of(groups: datasets.Dataset) -> Pairs:
    """Query and passage of each pair."""
    return [(row["query"], text) for row in groups for text in row["passages"]]


def rates(work: dict[str, Callable[[], int]], rounds: int) -> dict[str, list[float]]:
    """Pairs a second of each, in every round, after one that is not measured."""
    found: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(rounds + 1):
        for name, make in work.items():
            started = time.perf_counter()
            pairs = make()
            if turn:
                found[name].append(pairs / (time.perf_counter() - started))
    return found


def taken(
    checkpoint: Path, groups: datasets.Dataset, batch: int, max_length: int, steps: int, precision: str, work: Path
) -> dict[str, list[float]]:
    """Pairs a second that training takes, by step, and that scoring takes, by as many pairs as a step has."""
    first = groups.select(range(min(batch * (steps + 1), len(groups))))
    shared = peers.settings(work / precision, steps=steps + 1, groups=batch, bf16=precision == "bf16")
    trainer = peers.ours(checkpoint, first, max_length, shared)
    pairs = pairs_of(first)
    size = len(pairs) // (steps + 1)
    timed = take_turns({"": trainer}, steps)[""]
    reranker = Reranker.from_pretrained(checkpoint, dtype=PRECISIONS[precision], max_length=max_length)
    parts = [pairs[start : start + size] for start in range(0, size * (steps + 1), size)]
    seconds = [seconds_of(lambda part=part: reranker.score(part)) for part in parts]
    return {"training": [size / s for s in timed.seconds], "scoring": [size / s for s in seconds[1:]]}


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = arguments((__doc__ or "").split("\n")[0])
    add_step_options(parser)
    parser.add_argument("--groups", type=int, help="that are made ready; 256, or 32 in the short form")
    parser.add_argument("--rounds", type=int, help="over all groups; 9, or 3 in the short form")
    parser.add_argument("--steps", type=int, help="that the model takes; 9, or 2 in the short form")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--name", default="feed", help="of the results")
    args = parser.parse_args(argv)
    wanted, rounds, steps = (32, 3, 2) if args.short else (256, 9, 9)
    wanted, rounds, steps = args.groups or wanted, args.rounds or rounds, args.steps or steps
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    groups = medquad_groups(args.data, queries=wanted, size=args.group_size)
    with tempfile.TemporaryDirectory() as work:
        datasets.config.HF_DATASETS_CACHE = Path(work) / "cache"
        checkpoint = prepare_checkpoint(args.model, Path(work) / "model", max_length=args.max_length)
        made = rates(feeds(checkpoint, groups, args.batch, args.max_length, Path(work)), rounds)
        speeds = {name: spread(values) for name, values in made.items()}
        for precision in args.precision:
            used = taken(checkpoint, groups, args.batch, args.max_length, steps, precision, Path(work))
            speeds |= {f"{precision} {name} takes": spread(values) for name, values in used.items()}
    ratios: dict[str, float] = {}
    for precision in args.precision:
        for name, speed in speeds.items():
            if name in made:
                taker = name.partition(",")[0]
                what = f"{precision}: {name}, one core: pairs/s over what {taker} takes"
                ratios[what] = speed["median"] / speeds[f"{precision} {taker} takes"]["median"]
    print(f"\n{'pairs/s':30s} {'median':>8s} {'quartiles':>19s}")
    for name, speed in speeds.items():
        quartiles = f"{speed['q25']:.1f} to {speed['q75']:.1f}"
        print(f"{name:30s} {speed['median']:8.1f} {quartiles:>19s}", flush=True)
    chosen = {name: str(getattr(args, name)) for name in ("model", "batch", "group_size", "max_length")}
    save(args.out, args.name, {**chosen, "groups": len(groups), "rounds": rounds, "steps": steps}, speeds, ratios)


if __name__ == "__main__":
    main()
