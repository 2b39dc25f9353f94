"""A model of time and money for a large corpus: measured rates, multiplied out.

``python -m benchmarks.scale --documents 1000000 --queries 1000000 --gpus 1 8 64`` prints hours and money of each stage.
The rates are those of docs/benchmarks.md, of one H200 and of one core; what was not measured is marked as assumed there
and here. Put rates of your own in: ``--rate judge=400``.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """A stage of the path.

    Attributes:
        name: What it does.
        unit: What is counted.
        rate: Units a second, of one GPU or of one process.
        source: Where the rate comes from.
        on: What does it: ``GPUs`` that share it, ``one GPU`` or ``one core``.
        measured: Whether the rate was measured, and not assumed.
    """

    name: str
    unit: str
    rate: float
    source: str
    on: str = "GPUs"
    measured: bool = True


PASSAGES_PER_DOCUMENT = 2.46  # of MedQuAD's answers, cut at 100 words
KEPT = 0.6  # of the queries that MedQuAD's run wrote
SHARE = 0.9  # of a device's rate that is left when several work: assumed
STAGES = {
    "index": Stage("cut and index", "passages", 10_600, "10⁶ passages in 94 s, one process", on="one core"),
    "embed": Stage(
        "embed",
        "passages",
        10_980,
        "MiniLM-L6 scores so many pairs; a passage is taken for a pair",
        on="one GPU",
        measured=False,
    ),
    "write": Stage(
        "write queries", "queries written", 40, "a 4B LLM; a quarter of the rate of judging", measured=False
    ),
    "search": Stage(
        "round trip and mine",
        "BM25 searches of 10⁶ passages",
        500,
        "2 ms each on one core, with random postings of 40 words a passage",
        on="one core",
        measured=False,
    ),
    "judge": Stage(
        "judge",
        "pairs",
        170,
        "1,127 pairs a second with 0.6B parameters, four queries a passage; a 4B LLM is taken for 6.7 times as slow",
        measured=False,
    ),
    "train": Stage("train ModernBERT-base, two epochs", "pairs", 1_095, "rows of 8 groups, bfloat16"),
}


def work_of(documents: float, queries: float, candidates: int) -> dict[str, float]:
    """Return how many units each stage has."""
    passages = documents * PASSAGES_PER_DOCUMENT
    written = queries / KEPT
    return {
        "index": passages,
        "embed": passages,
        "write": written,
        "search": (written + queries) * passages / 1e6,  # time is in proportion to the passages
        "judge": queries * candidates,
        "train": 2 * queries * candidates,
    }


def hours(stage: Stage, units: float, gpus: int) -> float:
    """Return how long a stage takes."""
    devices = gpus * SHARE if gpus > 1 and stage.on == "GPUs" else 1.0
    return units / stage.rate / devices / 3600


def table(work: dict[str, float], gpus: Sequence[int], price: float) -> str:
    """Return a Markdown table of hours by stage and number of GPUs; ``*`` marks what rests on an assumed rate."""
    names = [f"{n} GPU" if n == 1 else f"{n} GPUs" for n in gpus]
    lines = [f"| stage | work | {' | '.join(names)} |", f"|---|---:|{'---:|' * len(gpus)}"]
    total = dict.fromkeys(gpus, 0.0)
    paid = dict.fromkeys(gpus, 0.0)
    for key, stage in STAGES.items():
        row = [hours(stage, work[key], n) for n in gpus]
        for n, one in zip(gpus, row, strict=True):
            total[n] += one
            paid[n] += one * price * {"GPUs": n, "one GPU": 1, "one core": 0}[stage.on]
        name = stage.name + ("" if stage.measured else "*") + ("" if stage.on == "GPUs" else f", on {stage.on}")
        took = " | ".join(f"{one:,.1f} h" for one in row)
        lines.append(f"| {name} | {work[key] / 1e6:,.1f} M {stage.unit} | {took} |")
    lines.append(f"| **all, one after the other** | | {' | '.join(f'**{total[n]:,.0f} h**' for n in gpus)} |")
    lines.append(f"| GPUs, at {price:g} an hour each | | {' | '.join(f'{paid[n]:,.0f}' for n in gpus)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=float, default=1e6)
    parser.add_argument("--queries", type=float, default=1e6, help="kept")
    parser.add_argument("--candidates", type=int, default=12, help="judged for each query")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--price", type=float, default=3.0, help="of a GPU's hour")
    parser.add_argument("--rate", action="append", default=[], metavar="STAGE=UNITS", help=f"of {', '.join(STAGES)}")
    args = parser.parse_args(argv)
    for one in args.rate:
        key, _, rate = one.partition("=")
        if key not in STAGES:
            parser.error(f"--rate {one}: a stage is one of {', '.join(STAGES)}")
        STAGES[key] = Stage(STAGES[key].name, STAGES[key].unit, float(rate), "yours", STAGES[key].on)
    print(table(work_of(args.documents, args.queries, args.candidates), args.gpus, args.price))


if __name__ == "__main__":
    main()
