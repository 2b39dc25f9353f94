"""What a comparison found: as text, query by query, and by kinds of queries."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np

from lce_trainer.errors import EvaluationError
from lce_trainer.evaluation.compare import _bootstrap
from lce_trainer.evaluation.metrics import MEASURES, Qrels, Run, ranking, ranking_metrics

MEASURE_NAMES = {"ndcg@10": "nDCG@10", "mrr@10": "MRR@10", "map@10": "MAP@10"}

_SIGNIFICANT = 0.05
WORSE = "WORSE"  # what a verdict begins with
_BY_QUERY_FEATURES = datasets.Features(
    {
        "query_id": datasets.Value("string"),
        "query": datasets.Value("string"),
        "query_type": datasets.Value("string"),
        "test_set": datasets.Value("string"),
        "first_stage_rank": datasets.Value("int64"),
        "right_passage": datasets.Value("string"),
        "systems": datasets.List(datasets.Value("string")),
        "ndcg@10": datasets.List(datasets.Value("float64")),
        "right_rank": datasets.List(datasets.Value("int64")),
        "first_is_right": datasets.List(datasets.Value("bool")),
        "first_passage": datasets.List(datasets.Value("string")),
    }
)
_TYPES_SHOWN = 10  # query types with a row of their own; the others share one
_SHOWN = 240  # characters of a text in Markdown
_RESAMPLES = 10_000
_FEWEST = 10  # queries from which on a bootstrap interval says something


def table(results: datasets.Dataset) -> str:
    """Return what :func:`lce_trainer.evaluation.compare.compare` found as aligned plain text."""
    cells = _cells(results)
    rule = ["-" * max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(aligned([cells[0], rule, *cells[1:]]))


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows of cells as lines, each column as wide as its longest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        ).rstrip()
        for row in rows
    ]


def markdown(results: datasets.Dataset) -> str:
    """Return what :func:`lce_trainer.evaluation.compare.compare` found as a Markdown table."""
    return _pipes(_cells(results))


def details(queries: datasets.Dataset, system: str, baseline: str, seed: int = 13) -> str:
    """Return the figures by kinds of queries, and the largest wins and losses with their texts, as Markdown.

    Args:
        queries: From :func:`by_query`.
        system: The system that is judged.
        baseline: What it is compared with.
        seed: Seeds the bootstrap.

    Raises:
        EvaluationError: One of the two is not among the systems.
    """
    lines = []
    for title, found in parts(queries, system, baseline, seed).items():
        lines += ["", f"### nDCG@10 by {title}", "", part_table(title, found, system, baseline)]
    kinds = zip(("wins", "losses"), wins_and_losses(queries, system, baseline), (baseline, system), strict=True)
    for kind, cases, worse in kinds:
        lines += ["", f"### Largest {kind} of {system} against {baseline}", ""] if cases else []
        for case in cases:
            ranks = f"rank {case['baseline_rank'] or 'none'} → {case['rank'] or 'none'}"
            lines.append(f"- {case['difference']:+.3f} **{_short(case['query'])}**")
            if case["right_passage"] is not None:
                lines.append(f"    - right, {ranks}: {_short(case['right_passage'])}")
            if case["first"] is not None:
                too = ", right too" if case["first_is_right"] else ""
                lines.append(f"    - {worse} put first{too}: {_short(case['first'])}")
    return "\n".join(lines[1:])


def part_table(title: str, found: Sequence["Part"], system: str, baseline: str) -> str:
    """Return the nDCG@10 of two systems by parts of the queries, from :func:`parts`, as a Markdown table."""
    rows = [[title, "queries", baseline, system, "difference [95 % CI]"]]
    for part in found:
        interval = "" if part.low is None else f" [{part.low:+.3f}, {part.high:+.3f}]"
        means = [f"{part.means[name]:.3f}" for name in (baseline, system)]
        rows.append([part.name, f"{part.queries:,}", *means, f"{part.difference:+.3f}{interval}"])
    return _pipes(rows)


def _pipes(rows: Sequence[Sequence[str]]) -> str:
    """Return rows, the first of them the head, as a Markdown table."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    lines.insert(1, "| --- |" + " ---: |" * (len(rows[0]) - 1))
    return "\n".join(lines)


def _short(text: str | None) -> str:
    """Return the start of a text on one line, without what Markdown would take for its own."""
    line = " ".join((text or "").split())
    line = line if len(line) <= _SHOWN else f"{line[:_SHOWN].rpartition(' ')[0] or line[:_SHOWN]} …"
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", line)


def _cells(results: datasets.Dataset) -> list[list[str]]:
    rows: list[dict[str, Any]] = results.to_list()
    by_system: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        by_system.setdefault(row["system"], {})[row["measure"]] = row
    cells = [["system"] + [title for measure in MEASURES for title in (f"{MEASURE_NAMES[measure]} [95 % CI]", "p")]]
    for system, by_measure in by_system.items():
        line = [system]
        for measure in MEASURES:
            row = by_measure[measure]
            line.append(f"{row['mean']:.3f} [{row['ci_low']:.3f}, {row['ci_high']:.3f}]")
            line.append("" if row["p_value"] is None else f"{row['p_value']:.4f}")
        cells.append(line)
    return cells


def verdict(results: datasets.Dataset, system: str, *, synthetic: bool = False, general: bool = False) -> str:
    """Return one line: whether a system ranks better than the baseline, by how much and how surely.

    Args:
        results: What :func:`lce_trainer.evaluation.compare.compare` found; the baseline has no difference.
        system: The system that is to be judged.
        synthetic: No person wrote the queries; the line says so, and that they prove nothing about people's.
        general: The queries are of general test sets; the line says so.
    """
    rows = [row for row in results.to_list() if row["measure"] == "ndcg@10"]
    row = next(row for row in rows if row["system"] == system)
    better = "BETTER" if row["difference"] > 0 else WORSE
    outcome = better if row["p_value"] < _SIGNIFICANT else "NO DIFFERENCE SHOWN"
    outcome += " on SYNTHETIC queries" if synthetic else " on GENERAL test sets" if general else ""
    caution = ", which is no proof for queries that people ask" if synthetic else ""
    return (
        f"{outcome}: {system} against {baseline_of(results)}, nDCG@10 {row['difference']:+.3f} "
        f"[{row['difference_low']:+.3f}, {row['difference_high']:+.3f}], p {row['p_value']:.4f}, "
        f"{row['queries']} queries{caution}"
    )


def baseline_of(results: datasets.Dataset) -> str:
    """Return the name of the system that the others are compared with, which has no difference."""
    return next(str(row["system"]) for row in results.to_list() if row["difference"] is None)


def by_query(
    systems: Mapping[str, Run],
    qrels: Qrels,
    queries: Sequence[tuple[str, str]],
    pools: Sequence[Sequence[tuple[str, str]]],
    *,
    first_stage: Run,
    shown: Sequence[str],
    types: Mapping[str, str | None] | None = None,
    sets: Mapping[str, str] | None = None,
    relevant_from: int | Mapping[str, int] = 1,
) -> datasets.Dataset:
    """Return how each system ranks each judged query.

    Args:
        systems: Run of each system by name.
        qrels: Human grades.
        queries: ``(query_id, query)``.
        pools: ``(doc_id, passage)`` of each, best first.
        first_stage: Scores of the first stage.
        shown: Systems whose first passage is kept as text.
        types: Type of each query, by query id.
        sets: Test set of each query, where there are several.
        relevant_from: Lowest grade of a right document, of all queries or by query id.

    Returns:
        One row a judged query: ``query_id``, ``query`` (null if it is not among ``queries``), ``query_type`` and
        ``test_set`` (null if not known), ``first_stage_rank`` of the first right document (from 1; null if the
        candidates hold none), ``right_passage``, the text of the highest of the highest grade (null likewise); and as
        lists in the order of ``systems``: ``ndcg@10``, ``right_rank``, where each has the document of
        ``right_passage``, ``first_is_right``, and ``first_passage``, null for systems that are not in ``shown``.
    """
    names = list(systems)
    values = {name: ranking_metrics(run, qrels)["ndcg@10"] for name, run in systems.items()}
    rows = []
    given = {query_id: (query, pool) for (query_id, query), pool in zip(queries, pools, strict=True)}
    for query_id, grades in qrels.items():
        if not grades:
            continue
        query, pool = given.get(query_id, (None, ()))
        texts: dict[str, str] = {}
        for doc_id, text in pool:
            texts.setdefault(doc_id, text)
        lowest = relevant_from if isinstance(relevant_from, int) else relevant_from[query_id]
        right = {doc_id for doc_id, grade in grades.items() if grade >= lowest}
        initial = ranking(query_id, first_stage.get(query_id, {}))
        found = [doc_id for doc_id in initial if doc_id in right]
        best = max(found, key=lambda doc_id: grades[doc_id], default=None)
        rankings = [ranking(query_id, systems[name].get(query_id, {})) for name in names]
        rows.append(
            {
                "query_id": query_id,
                "query": query,
                "query_type": (types or {}).get(query_id),
                "test_set": (sets or {}).get(query_id),
                "first_stage_rank": initial.index(found[0]) + 1 if found else None,
                "right_passage": None if best is None else texts.get(best),
                "systems": names,
                "ndcg@10": [values[name][query_id] for name in names],
                "right_rank": [ranked.index(best) + 1 if best in ranked else None for ranked in rankings],
                "first_is_right": [bool(ranked) and ranked[0] in right for ranked in rankings],
                "first_passage": [
                    texts.get(ranked[0]) if ranked and name in shown else None
                    for name, ranked in zip(names, rankings, strict=True)
                ],
            }
        )
    return datasets.Dataset.from_list(rows, features=_BY_QUERY_FEATURES)


@dataclass(frozen=True)
class Part:
    """Figures on the queries that have something in common.

    Attributes:
        name: What they have in common, e.g. ``"4 to 6 words"``.
        queries: How many they are.
        means: Mean nDCG@10 by system.
        difference: Of the system that is judged, less the baseline's.
        low: Lower end of the difference's bootstrap interval, 95 %; None below ten queries.
        high: Upper end.
    """

    name: str
    queries: int
    means: Mapping[str, float]
    difference: float
    low: float | None
    high: float | None


def parts(queries: datasets.Dataset, system: str, baseline: str, seed: int = 13) -> dict[str, list[Part]]:
    """Return the figures by test set, query length, query type and the first stage's rank of the first right passage.

    Args:
        queries: From :func:`by_query`.
        system: The system that is judged.
        baseline: What it is compared with.
        seed: Seeds the bootstrap.

    Returns:
        Parts by title. A title is missing where all queries are alike in it, or no type is known.

    Raises:
        EvaluationError: One of the two is not among the systems.
    """
    rows = queries.to_list()
    types = Counter(row["query_type"] for row in rows if row["query_type"] is not None)
    common = [name for name, _ in types.most_common(_TYPES_SHOWN)]

    def query_type(row: Mapping[str, Any]) -> tuple[int, str]:
        name = row["query_type"]
        if name is None:
            return _TYPES_SHOWN + 1, "no type"
        return (common.index(name), name) if name in common else (_TYPES_SHOWN, "other types")

    titles: dict[str, Callable[[Mapping[str, Any]], tuple[int, str]]] = {
        "test set": lambda row: (0, row.get("test_set") or "none"),  # a table of an earlier version has no such column
        "query length": lambda row: (
            (99, "not known") if row["query"] is None else _in_range(len(row["query"].split()), (3, 6, 10), " words")
        ),
        "query type": query_type,
        "rank of the first right passage in the first stage": lambda row: (
            (99, "not among the candidates")
            if row["first_stage_rank"] is None
            else _in_range(row["first_stage_rank"], (1, 3, 10))
        ),
    }
    found = {}
    for title, key in titles.items():
        members: dict[tuple[int, str], list[Mapping[str, Any]]] = {}
        for row in rows:
            members.setdefault(key(row), []).append(row)
        if len(members) > 1:
            found[title] = [
                _part(name, members[place, name], system, baseline, seed) for place, name in sorted(members)
            ]
    return found


def wins_and_losses(
    queries: datasets.Dataset, system: str, baseline: str, count: int = 10
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the queries on which a system gains most over the baseline, and those on which it loses most.

    Args:
        queries: From :func:`by_query`.
        system: The system that is judged.
        baseline: What it is compared with.
        count: How many of each at most.

    Returns:
        Wins, then losses, the largest first, each with ``query``, ``difference`` in nDCG@10, ``right_passage``,
        ``rank`` and ``baseline_rank`` of that passage, and ``first``: the passage that the one which did worse put
        first, with ``first_is_right``. Queries on which both do alike are in neither.

    Raises:
        EvaluationError: One of the two is not among the systems.
    """
    found = []
    for row in queries.to_list():
        ours, theirs = (_place(row, name) for name in (system, baseline))
        difference = row["ndcg@10"][ours] - row["ndcg@10"][theirs]
        worse = theirs if difference > 0 else ours
        found.append(
            {
                "query": row["query"],
                "difference": difference,
                "right_passage": row["right_passage"],
                "rank": row["right_rank"][ours],
                "baseline_rank": row["right_rank"][theirs],
                "first": row["first_passage"][worse],
                "first_is_right": row["first_is_right"][worse],
            }
        )
    # Both sorts are stable: equal ones stay in the order of the queries.
    wins = sorted((row for row in found if row["difference"] > 0), key=lambda row: -row["difference"])
    losses = sorted((row for row in found if row["difference"] < 0), key=lambda row: row["difference"])
    return wins[:count], losses[:count]


def _in_range(value: int, ends: Sequence[int], unit: str = "") -> tuple[int, str]:
    """Return the place and the name of the range, by the last value of each but the open one, that holds a value."""
    start = 1
    for place, end in enumerate(ends):
        if value <= end:
            return place, (f"{start}" if start == end else f"{start} to {end}") + unit
        start = end + 1
    return len(ends), f"{start} and more{unit}" if unit else f"{start} and later"


def _part(name: str, rows: Sequence[Mapping[str, Any]], system: str, baseline: str, seed: int) -> Part:
    values = np.array([row["ndcg@10"] for row in rows])  # (queries, systems)
    difference = values[:, _place(rows[0], system)] - values[:, _place(rows[0], baseline)]
    low = high = None
    if len(rows) >= _FEWEST:
        ends = _bootstrap(difference[:, None], seed, _RESAMPLES)
        low, high = (float(end[0]) for end in ends)
    means = dict(zip(rows[0]["systems"], values.mean(axis=0).tolist(), strict=True))
    return Part(name, len(rows), means, float(difference.mean()), low, high)


def _place(row: Mapping[str, Any], system: str) -> int:
    if system not in row["systems"]:
        raise EvaluationError(f"no system {system!r}, only {', '.join(row['systems'])}")
    return int(row["systems"].index(system))
