"""Growth: time and memory of the stages that meet large inputs, from a thousand rows to a million.

``python -m benchmarks.growth`` runs, each size in a process of its own:

- ``passages``: documents into passages with a BM25 index over them, as ``lce-trainer generate`` does first;
- ``mine``: the candidates of 200 queries, as ``lce-trainer mine`` finds them;
- ``start``: from the groups on disk to the end of the first training step, as ``lce-trainer train`` begins; and once
  more (``start again``), when the table that ``datasets`` makes of a parquet file at its first reading is there;
- ``score``: ``Reranker.score`` of pairs that are made as they are asked for.

The texts are made of MedQuAD's, each of two stretches of other answers, with new words at the rate at which a growing
corpus brings them. Models are tiny and random: what is measured is everything around them.

Seconds start when the libraries are loaded. Memory is the highest resident set, which counts the pages of
memory-mapped files that were touched; and, sampled as it goes, the highest of what is the process's own. The slope is
the exponent of the size, fitted over all sizes: 1 is linear, 0 is flat.
"""

import contextlib
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from benchmarks.data import MEDQUAD, prepare_checkpoint
from benchmarks.measure import arguments, memory, quiet, save, slope

FULL = {"passages": 6, "mine": 6, "start": 5, "start again": 5, "score": 6}  # power of ten of the largest size
SHORT = {"passages": 5, "mine": 5, "start": 4, "start again": 4, "score": 4}
SMALLEST = {"passages": 3, "mine": 3, "start": 2, "start again": 2, "score": 3}
PASSAGES_PER_DOCUMENT = 2.46  # of MedQuAD's answers, cut at 100 words
QUERIES = 200


# ---- inputs


def stretches(folder: Path, n: int, words: int | None, seed: int) -> Iterator[str]:
    """Texts of two stretches of MedQuAD's answers each, now and then with a word that no other text has.

    Args:
        folder: MedQuAD's.
        n: Texts.
        words: Of a text; None draws it from the answers' own.
        seed: Of every draw.
    """
    rng = np.random.default_rng(seed)
    answers = [text.split() for text in datasets.Dataset.from_parquet(str(folder / "corpus.parquet"))["text"]]
    whole = np.concatenate([np.array(answer, dtype=object) for answer in answers])
    sizes = np.full(n, words) if words else rng.choice([len(answer) for answer in answers], n)
    starts = rng.integers(0, len(whole) - sizes.max(), (n, 2))
    # About half as many new words as passages: what Heaps' law gives from MedQuAD's 74,000 words on.
    new = rng.random(n) < np.minimum(0.6 * sizes / 100, 1)
    numbers = rng.integers(0, max(n, 10), n)
    for size, (first, second), is_new, number in zip(sizes, starts, new, numbers, strict=True):
        text = [*whole[first : first + size // 2], *whole[second : second + size - size // 2]]
        if is_new:
            text[-1] = f"qx{number:x}"
        yield " ".join(text)


def write_documents(data: Path, folder: Path, size: int) -> None:
    """A parquet file of documents that make about ``size`` passages, and a recipe over it."""
    n = max(round(size / PASSAGES_PER_DOCUMENT), 1)

    def rows() -> Iterator[dict[str, str]]:
        for i, text in enumerate(stretches(data, n, None, seed=1)):
            yield {"doc_id": f"d{i}", "text": text}

    _stream(rows, folder / "documents.parquet")
    write_recipe(folder)


def write_queries(data: Path, folder: Path) -> None:
    """The queries artifact, beside the passages."""
    from lce_trainer.artifacts import save_artifact

    texts = list(stretches(data, QUERIES, 6, seed=2))
    rows = [{"query_id": f"q{i}", "query": text, "source_passage_id": ""} for i, text in enumerate(texts)]
    tables = {"train": datasets.Dataset.from_list(rows)}
    save_artifact(folder / "run" / "queries", tables, kind="queries", config={}, inputs={}, counts={})


def write_groups(data: Path, folder: Path, size: int) -> None:
    """The groups artifact, of eight passages a group, as the labeling stage writes it."""
    from lce_trainer.artifacts import write_manifest
    from lce_trainer.groups.schema import GROUPS_FEATURES

    out = folder / "run" / "groups"
    out.mkdir(parents=True)

    def rows() -> Iterator[dict[str, Any]]:
        queries, passages = stretches(data, size, 6, seed=3), stretches(data, 8 * size, 85, seed=4)
        for i, query in enumerate(queries):
            yield {
                "query_id": f"q{i}",
                "query": query,
                "passage_ids": [f"p{i}-{j}" for j in range(8)],
                "passages": [next(passages) for _ in range(8)],
                "labels": [1.0] + [0.0] * 7,
                "scores": [0.9] + [0.1] * 7,
            }

    _stream(rows, out / "train.parquet", GROUPS_FEATURES)
    write_manifest(out, ["train.parquet"], kind="groups", config={}, inputs={}, counts={})
    write_recipe(folder)
    prepare_checkpoint("random:tiny", folder / "model", max_length=128)


def write_recipe(folder: Path) -> None:
    """The recipe that the stages run by."""
    recipe = {
        "run_dir": str(folder / "run"),
        "corpus": {"source": str(folder / "documents.parquet"), "max_words": 100},
        "train": {"model": str(folder / "model"), "max_length": 128, "max_query_length": 32},
        # The queries stem from no passage, so none can be held out with its document.
        "evaluate": {"synthetic": {"documents": 0}},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML


def _stream(rows: Callable[[], Iterator[dict[str, Any]]], path: Path, features: Any = None) -> None:
    """Rows into a parquet file, a few thousand in memory at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = features.arrow_schema if features is not None else None
    writer = None
    waiting: list[dict[str, Any]] = []

    def flush() -> None:
        nonlocal writer
        table = pa.Table.from_pylist(waiting, schema)
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
        waiting.clear()

    for row in rows():
        waiting.append(row)
        if len(waiting) == 4096:
            flush()
    flush()
    if writer is not None:
        writer.close()


# ---- what is measured, each in a process of its own


def run_passages(folder: Path, size: int) -> None:
    """Documents into passages, with the index."""
    from lce_trainer.pipeline.run import open_run
    from lce_trainer.pipeline.stages import read_corpus

    read_corpus(open_run(folder / "recipe.yaml"))


def run_mine(folder: Path, size: int) -> None:
    """Candidates of all queries."""
    from lce_trainer.pipeline.run import open_run
    from lce_trainer.pipeline.stages import mine

    mine(open_run(folder / "recipe.yaml"))


class _FirstStepError(Exception):
    """Reached."""


def run_start(folder: Path, size: int) -> None:
    """Groups into a trainer, and its first step."""
    from lce_trainer.pipeline.run import open_run
    from lce_trainer.pipeline.stages import train
    from lce_trainer.training.trainer import LCETrainer

    step = LCETrainer.training_step

    def first_step(self: Any, *args: Any, **kwargs: Any) -> None:
        step(self, *args, **kwargs)
        raise _FirstStepError

    LCETrainer.training_step = first_step
    with contextlib.suppress(_FirstStepError):
        train(open_run(folder / "recipe.yaml"))


def run_score(folder: Path, size: int) -> None:
    """Scores of pairs that are made as they are asked for."""
    from lce_trainer import Reranker

    texts = json.loads((folder / "texts.json").read_text(encoding="utf-8"))
    scores = Reranker.from_pretrained(folder / "model").score(made_pairs(texts, size))
    assert scores.shape == (size,) and np.isfinite(scores).all()


def made_pairs(texts: Sequence[str], size: int) -> Iterator[tuple[str, str]]:
    """Query after query, each with every passage; each text is made when it is asked for, and nobody else's."""
    for row in range(size):
        query, passage = divmod(row, len(texts))
        yield f"{texts[query % len(texts)][:40]} {query}", f"{texts[passage]} {row}"


def write_texts(data: Path, folder: Path) -> None:
    """What pairs are made of."""
    (folder / "texts.json").write_text(json.dumps(list(stretches(data, 1000, 40, seed=5))), encoding="utf-8")
    prepare_checkpoint("random:tiny", folder / "model", max_length=64)


WORK = {"passages": run_passages, "mine": run_mine, "start": run_start, "start again": run_start, "score": run_score}


def measure(kind: str, folder: Path, size: int) -> dict[str, float]:
    """Run one of them here, and say what it took."""
    quiet()
    import lce_trainer.pipeline.stages  # noqa: F401 - what everything imports is loaded before the clock starts

    before = memory().get("own", 0)
    own, stop = [before], threading.Event()

    def sample() -> None:
        while not stop.wait(0.02):
            own.append(memory().get("own", 0))

    threading.Thread(target=sample, daemon=True).start()
    started = time.perf_counter()
    WORK[kind](folder, size)
    seconds = time.perf_counter() - started
    stop.set()
    return {"seconds": seconds, "peak": memory().get("peak", 0), "own": max(own), "before": before}


def in_own_process(kind: str, folder: Path, size: int) -> dict[str, float]:
    """The same in a new process."""
    command = [sys.executable, "-m", "benchmarks.growth", "--measure", kind, str(folder), str(size)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{kind} of {size:,} failed:\n{done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def grow(data: Path, kinds: Sequence[str], largest: dict[str, int]) -> dict[str, dict[int, dict[str, float]]]:
    """Every kind at every size."""
    found: dict[str, dict[int, dict[str, float]]] = {kind: {} for kind in kinds}
    inputs = {"passages": ("passages", "mine"), "start": ("start", "start again"), "score": ("score",)}
    for first, chain in inputs.items():
        chosen = [kind for kind in chain if kind in kinds]
        for power in range(SMALLEST[first], largest[first] + 1) if chosen else ():
            with tempfile.TemporaryDirectory() as work:
                folder, size = Path(work), 10**power
                if first == "passages":
                    write_documents(data, folder, size)
                    write_queries(data, folder)
                elif first == "start":
                    write_groups(data, folder, size)
                else:
                    write_texts(data, folder)
                for kind in chain:
                    row = in_own_process(kind, folder, size)
                    if kind in found:
                        found[kind][size] = row
                        show(kind, size, row)
    return found


def show(kind: str, size: int, row: dict[str, float]) -> None:
    """A line of the table."""
    gib = {name: row[name] / 2**30 for name in ("peak", "own", "before")}
    print(
        f"{kind:12s} {size:>9,} {row['seconds']:8.2f} s   resident {gib['peak']:5.2f} GiB, "
        f"its own {gib['own']:5.2f} GiB (from {gib['before']:.2f})",
        flush=True,
    )


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = arguments((__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, default=MEDQUAD, help="folder with MedQuAD's files")
    parser.add_argument("--kinds", nargs="+", choices=FULL, default=list(FULL))
    parser.add_argument("--largest", type=int, help="power of ten of the largest size; 4 to 5, 5 to 6 if not short")
    parser.add_argument("--measure", nargs=3, metavar=("KIND", "FOLDER", "SIZE"), help="one of them, in this process")
    args = parser.parse_args(argv)
    if args.measure:
        kind, folder, size = args.measure
        print(json.dumps(measure(kind, Path(folder), int(size))))
        return
    largest = dict(SHORT if args.short else FULL)
    if args.largest:
        largest = dict.fromkeys(largest, args.largest)
    found = grow(args.data, args.kinds, largest)
    ratios: dict[str, float] = {}
    for kind, rows in found.items():
        sizes, last = list(rows), rows[max(rows)]
        if len(sizes) > 1:
            ratios[f"{kind}: seconds grow as size to the power of"] = slope(
                sizes, [row["seconds"] for row in rows.values()]
            )
            ratios[f"{kind}: own memory grows as size to the power of"] = slope(
                sizes, [row["own"] for row in rows.values()]
            )
        ratios[f"{kind}: seconds at {sizes[-1]:,}"] = last["seconds"]
        ratios[f"{kind}: GiB resident at {sizes[-1]:,}"] = last["peak"] / 2**30
    settings = {"queries": QUERIES, "group_size": 8, "words": {"passages": "up to 100", "groups": 85, "pairs": 40}}
    save(args.out, "growth", settings, found, ratios)


if __name__ == "__main__":
    main()
