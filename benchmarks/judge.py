"""Likelihood judging: pairs a second of ours and of the loops that people write, in turn, with the same model.

``python -m benchmarks.judge`` asks how well MedQuAD answers explain 1, 2, 4 and 8 of its human questions each, with the
packaged prompt and the packaged Gemma-3-270M. The *naive loop* pads batches of pairs in the order given and takes the
logits of all their tokens. The *careful loop* sorts the pairs by length and takes the logits of the questions alone.
Both read instruction and passage again for every pair. The scores must be the same, to rounding; the run fails if they
are not. A ratio is the median over rounds of the ratio of two systems' seconds for the same pairs; the share of the
machine's own large matmul counts the products that a system makes, needed or not.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.data import MEDQUAD
from benchmarks.measure import arguments, matmul_rate, median_ratio, save, seconds_of, spread
from lce_trainer.synthesis.labeling import LabelConfig
from lce_trainer.synthesis.llm.local import TransformersLLM
from lce_trainer.synthesis.llm.protocol import LLMConfig
from lce_trainer.synthesis.prompts import load_prompt
from lce_trainer.synthesis.queries import cut_words

OURS, NAIVE, CAREFUL = "lce_trainer", "naive loop", "careful loop"
ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.1}  # nats a token

Pairs = Sequence[tuple[str, str]]
Score = Callable[[Pairs], list[float]]


def measure(
    *,
    queries: Sequence[int] = (1, 2, 4, 8),
    pairs: int = 32,
    rounds: int = 5,
    batch: int = 8,
    model: str = LLMConfig.model,
    dtype: str = "auto",
    data: Path = MEDQUAD,
) -> dict[str, Any]:
    """Race the systems.

    Args:
        queries: How many each passage meets, one race for each.
        pairs: Of a round.
        rounds: Of a race; who goes first changes from round to round.
        batch: Pairs of a batch of the two loops.
        model: As ``llm.model`` of a recipe.
        dtype: As ``llm.dtype`` of a recipe.
        data: Folder with MedQuAD's files.

    Returns:
        ``ratios`` by line of text, ``results`` by queries and system, and ``settings``.

    Raises:
        SystemExit: The data are not there, or two systems' scores differ by more than rounding.
    """
    llm = TransformersLLM(LLMConfig(model=model, dtype=dtype))
    lm, tokenizer = llm._loaded
    systems: dict[str, Score] = {
        OURS: lambda given: llm.score(*map(list, zip(*given, strict=True))),
        NAIVE: lambda given: naive_loop(lm, tokenizer, given, batch),
        CAREFUL: lambda given: careful_loop(lm, tokenizer, given, batch),
    }
    drawn = draw_pairs(data, queries, pairs, rounds + 1)
    peak = matmul_rate(lm.dtype)
    results: dict[str, Any] = {}
    ratios: dict[str, float] = {}
    for each in queries:
        warm_up, *parts = [next(drawn) for _ in range(rounds + 1)]
        for work in systems.values():
            work(warm_up[:batch])
        flops = {name: count_flops(work, parts[0]) for name, work in systems.items()} if each == max(queries) else {}
        seconds, worst = race(systems, parts, ROUNDING[lm.dtype])
        results[str(each)] = {
            name: {
                "pairs_per_second": spread([len(parts[0]) / one for one in spent]),
                "seconds": spent,
                "score_differs_by": worst[name],
                **({"gflop_per_second": flops[name] / spent[0] / 1e9} if flops else {}),
            }
            for name, spent in seconds.items()
        }
        for name in (NAIVE, CAREFUL):
            ratios[f"{each} queries a passage: pairs/s over those of the {name}"] = median_ratio(
                seconds[name], seconds[OURS]
            )
        for name, count in flops.items():
            ratios[f"{name}: share of the machine's own large matmul"] = count / seconds[name][0] / peak
    settings = {"pairs": pairs, "rounds": rounds, "batch": batch, "model": llm.name, "dtype": str(lm.dtype)}
    return {"settings": {**settings, "matmul_gflop_per_second": peak / 1e9}, "results": results, "ratios": ratios}


def naive_loop(model: Any, tokenizer: Any, pairs: Pairs, batch: int) -> list[float]:
    """Mean log-probability of each continuation's tokens: padded batches in the order given, all logits."""
    scores = []
    for start in range(0, len(pairs), batch):
        part = pairs[start : start + batch]
        encoded = tokenizer([p + c for p, c in part], return_tensors="pt", padding=True, padding_side="right")
        encoded = encoded.to(model.device)
        starts = torch.tensor([[len(ids)] for ids in tokenizer([p for p, _ in part])["input_ids"]], device=model.device)
        with torch.inference_mode():
            logits = model(**encoded).logits
            logprobs = logits[:, :-1].float().log_softmax(-1)
            found = logprobs.gather(2, encoded["input_ids"][:, 1:, None]).squeeze(2)
        position = torch.arange(1, encoded["input_ids"].shape[1], device=model.device)
        mask = (position >= starts) & encoded["attention_mask"][:, 1:].bool()
        scores += ((found * mask).sum(1) / mask.sum(1)).tolist()
    return scores


def careful_loop(model: Any, tokenizer: Any, pairs: Pairs, batch: int) -> list[float]:
    """The same with pairs of like length together and the logits of the continuations alone."""
    whole = tokenizer([p + c for p, c in pairs])["input_ids"]
    starts = [len(ids) for ids in tokenizer([p for p, _ in pairs])["input_ids"]]
    order = sorted(range(len(pairs)), key=lambda index: -len(whole[index]))
    scores = [0.0] * len(pairs)
    for start in range(0, len(pairs), batch):
        part = order[start : start + batch]
        encoded = tokenizer.pad({"input_ids": [whole[i] for i in part]}, padding_side="left", return_tensors="pt")
        encoded = encoded.to(model.device)
        keep = max(len(whole[i]) - starts[i] for i in part)
        position = (encoded["attention_mask"].cumsum(1) - 1).clamp_min(0)
        with torch.inference_mode():
            logits = model(**encoded, position_ids=position, logits_to_keep=keep + 1).logits
            logprobs = logits[:, :-1].float().log_softmax(-1)
            found = logprobs.gather(2, encoded["input_ids"][:, -keep:, None]).squeeze(2)
        for index, row in zip(part, found, strict=True):
            scores[index] = row[starts[index] - len(whole[index]) :].mean().item()
    return scores


def draw_pairs(folder: Path, queries: Sequence[int], pairs: int, parts: int) -> Iterator[list[tuple[str, str]]]:
    """Rendered prompts and continuations, part after part for each number of queries a passage meets.

    No passage and no question is in two parts of one race.
    """
    if not (folder / "corpus.parquet").is_file():
        raise SystemExit(f"no corpus.parquet in {folder}: name the folder with MedQuAD's files by --data")
    passages = datasets.Dataset.from_parquet(str(folder / "corpus.parquet")).shuffle(seed=13)["text"]
    asked = datasets.Dataset.from_parquet(str(folder / "queries-dev.parquet")).shuffle(seed=13)["query"][:]
    prompt, config = load_prompt("likelihood"), LabelConfig()
    for each in queries:
        texts, questions = iter(passages), 0
        for _ in range(parts):
            part: list[tuple[str, str]] = []
            while len(part) < pairs:
                shown = prompt.render(
                    passage=cut_words(next(texts), config.max_passage_words), examples=config.examples
                )
                part += [(shown, f" {asked[(questions + i) % len(asked)]}") for i in range(each)]
                questions += each
            # Not passage after passage: who judges query by query does not meet them so.
            yield [part[i] for i in np.random.default_rng(each).permutation(len(part))]


def race(
    systems: dict[str, Score], parts: Sequence[Pairs], rounding: float
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of each system for each part, and how far its scores are from ours at most."""
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    worst = dict.fromkeys(systems, 0.0)
    names = list(systems)
    for turn, part in enumerate(parts):
        scores: dict[str, list[float]] = {}
        for name in names[turn % len(names) :] + names[: turn % len(names)]:

            def work(name: str = name, part: Pairs = part, scores: dict[str, list[float]] = scores) -> None:
                scores[name] = systems[name](part)

            seconds[name].append(seconds_of(work))
        for name in names:
            worst[name] = max(worst[name], float(np.abs(np.subtract(scores[name], scores[OURS])).max()))
            if worst[name] > rounding:
                raise SystemExit(f"{name}: a score differs by {worst[name]:.1e} from ours: not the same work")
    return seconds, worst


def count_flops(work: Score, part: Pairs) -> int:
    """Of the matrix products that it makes."""
    with FlopCounterMode(display=False) as counter:
        work(part)
    return int(counter.get_total_flops())


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = arguments((__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, default=MEDQUAD, help="folder with MedQuAD's files")
    parser.add_argument(
        "--queries", type=int, nargs="+", help="that each passage meets: 1 2 4 8, or 4 in the short form"
    )
    parser.add_argument("--pairs", type=int, help="of a round: 32, or 16 in the short form")
    parser.add_argument("--rounds", type=int, help="5, or 2 in the short form")
    parser.add_argument("--batch", type=int, default=8, help="pairs of a batch of the loops")
    parser.add_argument("--model", default=LLMConfig.model, help="as llm.model of a recipe")
    parser.add_argument("--dtype", default="auto", help="as llm.dtype of a recipe")
    args = parser.parse_args(argv)
    figures = measure(
        queries=args.queries or ([4] if args.short else [1, 2, 4, 8]),
        pairs=args.pairs or (16 if args.short else 32),
        rounds=args.rounds or (2 if args.short else 5),
        batch=args.batch,
        model=args.model,
        dtype=args.dtype,
        data=args.data,
    )
    print(f"{'pairs/s, median (quartiles)':28s} " + " ".join(f"{name:>24s}" for name in (OURS, NAIVE, CAREFUL)))
    for each, row in figures["results"].items():
        speeds = [row[name]["pairs_per_second"] for name in (OURS, NAIVE, CAREFUL)]
        shown = (f"{s['median']:.2f} ({s['q25']:.2f} to {s['q75']:.2f})" for s in speeds)
        print(f"{each + ' queries a passage':28s} " + " ".join(f"{one:>24s}" for one in shown))
    save(args.out, "judge", figures["settings"], figures["results"], figures["ratios"])


if __name__ == "__main__":
    main()
