"""What a comparison found, as text."""

from typing import Any

import datasets

from lce_trainer.evaluation.metrics import MEASURES

_SIGNIFICANT = 0.05
_NAMES = {"ndcg@10": "nDCG@10", "mrr@10": "MRR@10", "map@10": "MAP@10"}


def table(results: datasets.Dataset) -> str:
    """What :func:`lce_trainer.evaluation.compare.compare` found, as aligned plain text."""
    rows = _cells(results)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def markdown(results: datasets.Dataset) -> str:
    """What :func:`lce_trainer.evaluation.compare.compare` found, as a Markdown table."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in _cells(results)]
    rows.insert(1, ["---"] + ["---:"] * (len(rows[0]) - 1))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _cells(results: datasets.Dataset) -> list[list[str]]:
    rows: list[dict[str, Any]] = results.to_list()
    by_system: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        by_system.setdefault(row["system"], {})[row["measure"]] = row
    cells = [["system"] + [title for measure in MEASURES for title in (f"{_NAMES[measure]} [95 % CI]", "p")]]
    for system, by_measure in by_system.items():
        line = [system]
        for measure in MEASURES:
            row = by_measure[measure]
            line.append(f"{row['mean']:.3f} [{row['ci_low']:.3f}, {row['ci_high']:.3f}]")
            line.append("" if row["p_value"] is None else f"{row['p_value']:.4f}")
        cells.append(line)
    return cells


def verdict(results: datasets.Dataset, system: str) -> str:
    """Return one line: whether a system ranks better than the best of the others, by how much and how surely.

    Args:
        results: What :func:`lce_trainer.evaluation.compare.compare` found; the baseline has no difference.
        system: The system that is to be judged.
    """
    rows = [row for row in results.to_list() if row["measure"] == "ndcg@10"]
    baseline = next(row["system"] for row in rows if row["difference"] is None)
    row = next(row for row in rows if row["system"] == system)
    better = "BETTER" if row["difference"] > 0 else "WORSE"
    outcome = better if row["p_value"] < _SIGNIFICANT else "NO DIFFERENCE SHOWN"
    return (
        f"{outcome}: {system} against {baseline}, nDCG@10 {row['difference']:+.3f} "
        f"[{row['difference_low']:+.3f}, {row['difference_high']:+.3f}], p {row['p_value']:.4f}, "
        f"{row['queries']} queries"
    )
