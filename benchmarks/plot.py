"""One picture of a folder of results: ``python -m benchmarks.plot FOLDER`` writes ``FOLDER/benchmarks.png``."""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

BLUE, GREY = "#2b6cb0", "#a0aec0"


def draw(folder: Path) -> Path:
    """Speeds as bars, ours in colour; growth as lines over the size. What has no results is left out."""
    found = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))}
    speeds = {
        f"{what}, {precision}": rows.get("trainers", rows)
        for name, what in (("train", "training"), ("infer", "inference"))
        for precision, rows in found.get(name, {}).get("results", {}).items()
    }
    growth: dict[str, Any] = found.get("growth", {}).get("results", {})
    panels = len(speeds) + 2 * bool(growth)
    columns = 2
    figure, grid = plt.subplots(
        -(-panels // columns), columns, figsize=(12, 3.2 * -(-panels // columns)), squeeze=False
    )
    axes = iter(grid.flat)
    for title, rows in speeds.items():
        _bars(next(axes), title, rows)
    if growth:
        for quantity, label, unit in (("seconds", "seconds", 1), ("own", "GiB of its own", 2**30)):
            _lines(next(axes), growth, quantity, label, unit)
    for left in axes:
        left.axis("off")
    figure.tight_layout()
    path = folder / "benchmarks.png"
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
    return path


def _bars(axis: Any, title: str, rows: dict[str, Any]) -> None:
    names = list(rows)[::-1]
    speeds = [rows[name]["pairs_per_second"] for name in names]
    middle = [speed["median"] for speed in speeds]
    reach = [[m - s["q25"] for m, s in zip(middle, speeds, strict=True)]]
    reach.append([s["q75"] - m for m, s in zip(middle, speeds, strict=True)])
    colours = [BLUE if name.startswith("lce_trainer") else GREY for name in names]
    axis.barh(names, middle, xerr=reach, color=colours, error_kw={"lw": 0.8})
    axis.set_title(f"{title}: pairs a second", fontsize=10)
    axis.tick_params(labelsize=8)


def _lines(axis: Any, growth: dict[str, Any], quantity: str, label: str, unit: float) -> None:
    for kind, rows in growth.items():
        sizes = [int(size) for size in rows]
        axis.plot(sizes, [row[quantity] / unit for row in rows.values()], marker="o", ms=3, lw=1.2, label=kind)
    axis.set_xscale("log")
    axis.set_yscale("log" if quantity == "seconds" else "linear")
    axis.set_xlabel("passages, groups or pairs", fontsize=8)
    axis.set_title(f"growth: {label}", fontsize=10)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


if __name__ == "__main__":
    print(draw(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/bench")))
