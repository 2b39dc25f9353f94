"""Charts of a run: as numbers for its report, and as pictures for its cards."""

import json
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pyarrow.parquet as pq

_TEMPLATE = "pictures.svg.jinja"
_BINS = 24
_LONGEST = 34  # characters of a system's name in a picture; the card's table has all of it


class Axis:
    """An axis from one round number to another; places on it are percent of its length."""

    def __init__(self, low: float, high: float, least: float = -math.inf, most: float = math.inf) -> None:
        span = max(high - low, 1e-9)
        step = 10.0 ** math.floor(math.log10(span / 3))
        step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 5)
        self.low = max(math.floor(low / step + 1e-9) * step, least)
        self.high = min(math.ceil(high / step - 1e-9) * step, most)
        if self.high <= self.low:
            self.low, self.high = self.low - step, self.high + step
        digits = max(0, -math.floor(math.log10(step) + 1e-9))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        self.ticks = [(f"{i * step:,.{digits}f}", self.at(i * step)) for i in range(first, last + 1)]

    def at(self, value: float) -> float:
        """Return the place of a value, in percent."""
        return round(100 * (value - self.low) / (self.high - self.low), 2)


def learning_curves(path: Path) -> list[dict[str, Any]]:
    """Return the charts of a training: dev nDCG@10, and the loss beside that of guessing.

    Args:
        path: The state of the trainer that the run has logged; there are no charts where it is missing.
    """
    if not path.is_file():
        return []
    state = json.loads(path.read_text(encoding="utf-8"))
    log = state["log_history"]
    wanted = (
        ("nDCG@10 on the dev queries", {"eval_ndcg@10": "dev nDCG@10"}),
        ("Training loss", {"loss": "loss", "loss_if_guessing": "loss of guessing"}),
    )
    steps = [entry["step"] for entry in log]
    charts = []
    for title, keys in wanted:
        lines = {
            label: [(entry["step"], entry[key]) for entry in log if isinstance(entry.get(key), (int, float))]
            for key, label in keys.items()
        }
        lines = {
            label: [(step, value) for step, value in points if math.isfinite(value)] for label, points in lines.items()
        }
        values = [value for points in lines.values() for _, value in points]
        if not values:
            continue
        x, y = Axis(0, max(steps)), Axis(min(values), max(values))
        best = state.get("best_global_step") if "eval_ndcg@10" in keys else None
        charts.append(
            {
                "title": title,
                "x": x,
                "y": y,
                "chosen": best,
                "lines": [
                    (
                        label,
                        [(x.at(step), round(100 - y.at(value), 2), step, value) for step, value in points],
                    )
                    for label, points in lines.items()
                    if points
                ],
            }
        )
    return charts


def reliability_charts(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return a calibration with its charts: of each bin of pairs the mean probability, and the share that is relevant.

    Args:
        found: What :func:`lce_trainer.evaluation.calibration.calibrate` found.
    """
    charts = []
    for title, figures in (("Sigmoid of the logit", found["before"]), ("Calibrated", found["after"])):
        bins = figures["bins"]
        axis = Axis(0.0, max(max(one["predicted"], one["observed"]) for one in bins), least=0.0, most=1.0)
        points = [(axis.at(one["predicted"]), round(100 - axis.at(one["observed"]), 2), one) for one in bins]
        charts.append({"title": title, "axis": axis, "points": points, **figures})
    return {**found, "charts": charts}


def score_histograms(path: Path) -> list[dict[str, Any]]:
    """Return what judge, encoder, BM25 and teacher gave source passages and other candidates, in bins.

    Args:
        path: The table of judged pairs; there are no charts where it is missing.
    """
    if not path.is_file():
        return []
    judged = pq.read_table(path)
    is_source = judged["is_source"].to_numpy()
    charts = []
    for column, title in (
        ("judge_score", "Score of the judge"),
        ("cosine", "Cosine of the encoder"),
        ("bm25", "Score of BM25"),
        ("teacher_score", "Teacher: the soft label, in standard deviations of the query's candidates"),
    ):
        if column not in judged.column_names:
            continue
        values = judged[column].to_numpy().astype(np.float64)
        known = np.isfinite(values)
        if not known.any():
            continue
        low, high = np.percentile(values[known], [0.5, 99.5])
        axis = Axis(float(low), float(high))
        edges = np.linspace(axis.low, axis.high, _BINS + 1)
        kinds = []
        for name, mine in (("source passages", is_source), ("other candidates", ~is_source)):
            inside = np.clip(values[mine & known], axis.low, axis.high)  # what lies beyond counts in the last bin
            if len(inside):
                share = np.histogram(inside, edges)[0] / len(inside)
                kinds.append((name, len(inside), float(np.median(inside)), share))
        top = max(float(share.max()) for *_, share in kinds)
        charts.append(
            {
                "title": title,
                "axis": axis,
                "unknown": int((~known).sum()),
                "kinds": [
                    (name, count, median, axis.at(median), [round(100 * float(value) / top, 2) for value in share])
                    for name, count, median, share in kinds
                ],
                "places": [(axis.at(a), round(axis.at(b) - axis.at(a), 2)) for a, b in pairwise(edges.tolist())],
            }
        )
    return charts


def draw_comparison(rows: Sequence[Mapping[str, Any]], names: Mapping[str, str], system: str) -> str:
    """Return a comparison's nDCG@10 with its intervals as SVG.

    Args:
        rows: What :func:`lce_trainer.evaluation.compare.compare` found, as dicts.
        names: What each system is called in the picture.
        system: The one to stand out.
    """
    rows = [row for row in rows if row["measure"] == "ndcg@10"]
    axis = Axis(min(row["ci_low"] for row in rows), max(row["ci_high"] for row in rows), least=0.0, most=1.0)
    lines = [{**row, "name": _shortened(names[row["system"]]), "shipped": row["system"] == system} for row in rows]
    baseline = next(row["mean"] for row in rows if row["difference"] is None)
    return _draw("comparison", rows=lines, axis=axis, baseline=axis.at(baseline), queries=rows[0]["queries"])


def draw_curve(chart: Mapping[str, Any]) -> str:
    """Return one chart of :func:`learning_curves` as SVG."""
    return _draw("curve", chart=chart)


def draw_histograms(charts: Sequence[Mapping[str, Any]]) -> str:
    """Return the charts of :func:`score_histograms`, one below the other, as SVG."""
    return _draw("histograms", charts=charts)


def templates() -> jinja2.Environment:
    """Return the environment of the templates in this folder, in which the texts of a corpus are data."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _draw(kind: str, **values: Any) -> str:
    macro = getattr(templates().get_template(_TEMPLATE).module, kind)
    return str(macro(**values)).strip() + "\n"


def _shortened(name: str) -> str:
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"
