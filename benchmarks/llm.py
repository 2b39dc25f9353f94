"""Writing queries and judging pairs: this process and a server of the same model, in turn, on the same threads.

``python -m benchmarks.llm recipes/quickstart/recipe.yaml http://127.0.0.1:8080`` takes passages, queries and candidates
of a finished run, and the recipe's own prompts and sampling. A round is one part of them: queries for some passages,
then the likelihood and the verdict of some pairs, candidates of one query after the other. Who goes first changes from
round to round, and the other waits meanwhile. Give the server as many threads as this process has, and room for several
requests at once. The server keeps what it has read of a prompt, as it comes: every prompt begins alike. Answers in
writing differ where sampling does, so tokens a second stand beside queries a second.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import median_ratio, save, spread
from lce_trainer.errors import LCETrainerError, LLMError
from lce_trainer.pipeline.run import Run, open_run
from lce_trainer.synthesis.judges import ChoiceJudge, LikelihoodJudge
from lce_trainer.synthesis.llm.protocol import LLM
from lce_trainer.synthesis.queries import cut_words

OURS, SERVER = "lce_trainer", "server"
WRITE, TOKENS, LIKELIHOOD, VERDICT = (
    "queries written",
    "tokens written",
    "pairs judged by likelihood",
    "pairs judged by verdict",
)

Pairs = Sequence[tuple[str, str]]


def write(run: Run, llm: LLM, passages: Sequence[str], seed: int) -> int:
    """Write a query for each passage; returns the tokens that were written."""
    config = run.recipe.generate
    prompt = run.prompt("query")
    before = llm.usage.tokens_out
    llm.complete(
        [
            prompt.render(passage=cut_words(text, config.max_passage_words), examples=config.examples)
            for text in passages
        ],
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        seeds=[seed + place for place in range(len(passages))],
        stop=["\n"],
    )
    return llm.usage.tokens_out - before


def judges(run: Run, llm: LLM) -> dict[str, Callable[[Pairs], Any]]:
    """Return the judges that a model can serve, by what they are called here."""
    config = run.recipe.label
    found: dict[str, Callable[[Pairs], Any]] = {}
    common = config.examples, config.max_passage_words
    for name, need, judge in (
        (LIKELIHOOD, "score", LikelihoodJudge(llm, run.prompt("likelihood"), *common)),
        (VERDICT, "choose", ChoiceJudge("verdict", llm, run.prompt("verdict"), *common, 0.5, 0.5)),
    ):
        try:
            llm.check(need)
        except LLMError as error:
            print(f"{name}: {error}")
            continue
        found[name] = judge.score
    return found


def drawn(run: Run, rounds: int, passages: int, queries: int) -> list[tuple[list[str], list[tuple[str, str]]]]:
    """Return the passages and the pairs of each round; none stands in two rounds.

    Raises:
        SystemExit: The run has not made them, or too few.
    """
    try:
        texts = run.table("passages")["text"][:]
        of_id = dict(zip(run.table("passages")["passage_id"][:], texts, strict=True))
        asked = dict(zip(*(run.table("queries")[name][:] for name in ("query_id", "query")), strict=True))
        rows = run.table("candidates").select_columns(["query_id", "passage_ids"]).to_list()
    except LCETrainerError as error:
        raise SystemExit(f"the run has no candidates, make them first: {error}") from None
    order = np.random.default_rng(13)
    some = order.permutation(len(texts))[: rounds * passages]
    pools = order.permutation(len(rows))[: rounds * queries]
    if len(some) < rounds * passages or len(pools) < rounds * queries:
        raise SystemExit(f"the run has {len(texts)} passages and {len(rows)} queries: ask for fewer rounds")
    parts = []
    for number in range(rounds):
        mine = pools[number * queries : (number + 1) * queries]
        pairs = [
            (asked[rows[place]["query_id"]], of_id[passage])
            for place in mine
            for passage in rows[place]["passage_ids"][: run.recipe.label.candidates]
        ]
        parts.append(([texts[place] for place in some[number * passages : (number + 1) * passages]], pairs))
    return parts


def measure(
    recipe: Path, url: str, overrides: Sequence[str], rounds: int, passages: int, queries: int
) -> dict[str, Any]:
    """Race the two.

    Returns:
        ``settings``, ``results`` by work and system, and ``ratios``: our rates over the server's, medians over rounds.
    """
    runs = {
        OURS: open_run(recipe, ["llm.endpoint=null", *overrides]),
        SERVER: open_run(recipe, [f"llm.endpoint={url}", *overrides]),
    }
    parts = drawn(runs[OURS], rounds + 1, passages, queries)
    able = {name: judges(run, run.llm) for name, run in runs.items()}
    seconds: dict[str, dict[str, list[float]]] = {}
    tokens: dict[str, list[int]] = {name: [] for name in runs}
    scores: dict[str, dict[str, list[Any]]] = {}
    for number, (texts, pairs) in enumerate(parts):
        names = [OURS, SERVER] if number % 2 else [SERVER, OURS]
        for work in (WRITE, LIKELIHOOD, VERDICT):
            if work != WRITE and not all(work in known for known in able.values()):
                continue
            for name in names:
                began = time.perf_counter()
                if work == WRITE:
                    tokens[name].append(write(runs[name], runs[name].llm, texts, 1000 * number))
                else:
                    scores.setdefault(work, {}).setdefault(name, []).extend(able[name][work](pairs))
                if number:  # the first round warms up
                    seconds.setdefault(work, {}).setdefault(name, []).append(time.perf_counter() - began)
    results: dict[str, Any] = {}
    ratios: dict[str, float] = {}
    for work, by_name in seconds.items():
        count = passages if work == WRITE else len(parts[1][1])
        results[work] = {name: spread([count / one for one in spent]) for name, spent in by_name.items()}
        ratios[f"{work}: a second, over those of the server"] = median_ratio(by_name[SERVER], by_name[OURS])
    rates = {
        name: [count / one for count, one in zip(tokens[name][1:], seconds[WRITE][name], strict=True)] for name in runs
    }
    results[TOKENS] = {name: spread(found) for name, found in rates.items()}
    ratios[f"{TOKENS}: a second, over those of the server"] = median_ratio(rates[OURS], rates[SERVER])
    for work, by_name in scores.items():
        ours, theirs = (np.array([np.nan if one is None else one for one in by_name[name]]) for name in (OURS, SERVER))
        both = ~np.isnan(ours) & ~np.isnan(theirs)
        results[work]["correlation of scores"] = float(np.corrcoef(ours[both], theirs[both])[0, 1])
    settings = {
        "rounds": rounds,
        "passages": passages,
        "pairs": len(parts[1][1]),
        "here": runs[OURS].llm.identity,
        "server": runs[SERVER].llm.identity,
    }
    return {"settings": settings, "results": results, "ratios": ratios}


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("url")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--passages", type=int, default=48, help="of a round, each gets a query")
    parser.add_argument("--queries", type=int, default=10, help="of a round, each with its candidates")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder for the results")
    args = parser.parse_args(argv)
    figures = measure(args.recipe, args.url, args.overrides, args.rounds, args.passages, args.queries)
    for work, row in figures["results"].items():
        shown = (
            f"{row[name]['median']:8.2f} ({row[name]['q25']:.2f} to {row[name]['q75']:.2f})" for name in (OURS, SERVER)
        )
        more = f"  correlation {row['correlation of scores']:.4f}" if "correlation of scores" in row else ""
        print(f"{work + ' a second':40s} " + " ".join(f"{one:>28s}" for one in shown) + more)
    save(args.out, "llm", figures["settings"], figures["results"], figures["ratios"])


if __name__ == "__main__":
    main()
