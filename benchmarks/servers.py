"""Whether a model behind a server answers as it does in this process: queries, and scores of the same pairs.

``python -m benchmarks.servers recipes/quickstart/recipe.yaml http://127.0.0.1:8080 http://127.0.0.1:8080/v1``
runs generate, mine and label here and behind each URL, and prints a row of Markdown for each. Pairs are those that
the run here has judged. Overrides of the recipe, ``key=value``, may stand among the URLs.
"""

import argparse
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np

from lce_trainer.errors import LCETrainerError
from lce_trainer.pipeline import stages
from lce_trainer.pipeline.run import Run, open_run
from lce_trainer.synthesis.judges import LikelihoodJudge
from lce_trainer.synthesis.llm.endpoint import EndpointLLM

TINY = (
    "llm.dtype=float32",
    "generate.queries=20",
    "mine.encoder=null",
    "mine.first_stage=bm25",
    "label.candidates=6",
    "label.random=1",
)
COLUMNS = (
    "model, and where it runs",
    "kept of the queries written",
    "words a query, mean ± sd",
    "groups",
    "correlation of scores",
    "largest difference, nats a token",
    "largest within a query's pool",
    "seconds a 1,000 scores",
)


def make(run: Run, passages: Path | None) -> None:
    """Run the data half, from the passages of another run where there is one."""
    if passages is not None and not (run.root / "passages").exists():
        shutil.copytree(passages, run.root / "passages")
    for stage in (stages.generate, stages.mine, stages.label):
        stage(run)


def judged_pairs(run: Run) -> tuple[list[tuple[str, str]], np.ndarray]:
    """Return the pairs that a run has judged, as texts, and the number of the query of each."""
    rows = datasets.Dataset.from_parquet(str(run.root / "groups" / "judged.parquet"), keep_in_memory=True)
    queries = dict(zip(*(run.table("queries")[name][:] for name in ("query_id", "query")), strict=True))
    texts = dict(zip(*(run.table("passages")[name][:] for name in ("passage_id", "text")), strict=True))
    pairs = [(queries[row["query_id"]], texts[row["passage_id"]]) for row in rows]
    return pairs, np.unique(rows["query_id"][:], return_inverse=True)[1]


def score(run: Run, pairs: Sequence[tuple[str, str]]) -> tuple[np.ndarray, float]:
    """Return the likelihood of each pair, and the seconds that a thousand take."""
    config = run.recipe.label
    judge = LikelihoodJudge(run.llm, run.prompt("likelihood"), config.examples, config.max_passage_words)
    judge.score(pairs[:1])
    began = time.monotonic()
    scores = np.array(judge.score(pairs), dtype=np.float64)
    return scores, (time.monotonic() - began) * 1000 / len(pairs)


def centred(scores: np.ndarray, query: np.ndarray) -> np.ndarray:
    """Return scores less the mean of their query's pool: what orders candidates."""
    return scores - (np.bincount(query, scores) / np.bincount(query))[query]


def describe(run: Run) -> list[str]:
    """Return the cells on the queries and groups that a run has made."""
    counts = run.manifest("queries").counts
    words = [len(query.split()) for query in run.table("queries")["query"][:]]
    groups = run.manifest("groups").counts["groups"] if (run.root / "groups" / "manifest.json").is_file() else None
    kept = f"{counts['kept']} of {counts['written']}"
    return [kept, f"{np.mean(words):.1f} ± {np.std(words):.1f}", "none" if groups is None else str(groups)]


def compare(recipe: Path, out: Path, urls: Sequence[str], overrides: Sequence[str]) -> list[list[str]]:
    """Return a row for the run here, and one for each URL."""
    settings = [*TINY, *overrides]
    local = open_run(recipe, [f"run_dir={out / 'local'}", "llm.endpoint=null", *settings])
    make(local, None)
    pairs, query = judged_pairs(local)
    wanted, seconds = score(local, pairs)
    rows = [[f"{local.llm.name}, in this process", *describe(local), "", "", "", f"{seconds:.1f}"]]
    for number, url in enumerate(urls):
        run = open_run(recipe, [f"run_dir={out / f'server-{number}'}", f"llm.endpoint={url}", *settings])
        name = url
        try:
            assert isinstance(run.llm, EndpointLLM)
            name = f"{run.llm.identity}, {url}"
            shutil.rmtree(run.root, ignore_errors=True)
            make(run, local.root / "passages")
            scores, seconds = score(run, pairs)
        except LCETrainerError as error:
            made = describe(run) if (run.root / "queries" / "manifest.json").is_file() else ["", "", ""]
            rows.append([name, *made, f"refused: {error}", "", "", ""])
            continue
        apart = np.abs(scores - wanted).max()
        within = np.abs(centred(scores, query) - centred(wanted, query)).max()
        figures = [f"{np.corrcoef(scores, wanted)[0, 1]:.4f}", f"{apart:.3f}", f"{within:.3f}", f"{seconds:.1f}"]
        rows.append([name, *describe(run), *figures])
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Compare, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("urls", nargs="+", metavar="URL or section.key=value")
    parser.add_argument("--out", type=Path, default=Path("runs/servers"))
    arguments = parser.parse_args(argv)
    urls = [word for word in arguments.urls if word.startswith("http")]
    overrides = [word for word in arguments.urls if not word.startswith("http")]
    rows = compare(arguments.recipe, arguments.out, urls, overrides)
    for row in (list(COLUMNS), ["---"] * len(COLUMNS), *rows):
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
