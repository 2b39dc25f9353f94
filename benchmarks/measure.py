"""Clocks, memory, the machine, and where results go: what every benchmark here shares."""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers

from lce_trainer.hardware import best_device as device

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
_LIBRARIES = ("lce-trainer", "torch", "transformers", "datasets", "sentence-transformers", "FlagEmbedding", "bm25s")


def synchronize() -> None:
    """Wait for the accelerator, so that a clock read next shows work done and not work queued."""
    if device().type != "cpu":
        torch.accelerator.synchronize()


def seconds_of(work: Any) -> float:
    """Run it once and time it."""
    synchronize()
    started = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - started


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = np.percentile(values, [25, 50, 75]).tolist()
    return {"median": middle, "q25": low, "q75": high, "n": len(values)}


def matmul_rate(dtype: torch.dtype, size: int = 2048, times: int = 5) -> float:
    """FLOP/s of one large square product on this machine; the best of several, which nothing disturbed."""
    size = size if device().type == "cpu" else 4 * size
    left, right = (torch.randn(size, size, device=device()).to(dtype) for _ in range(2))
    left @ right
    return 2 * size**3 / min(seconds_of(lambda: left @ right) for _ in range(times))


def memory() -> dict[str, int]:
    """Bytes this process holds: its highest resident set so far, and what of it now is its own.

    Pages of memory-mapped files are resident too, but the system takes them back when it needs them.
    Linux only; elsewhere the dict is empty.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return {}
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return {name: int(fields[key].split()[0]) * 1024 for name, key in (("peak", "VmHWM"), ("own", "RssAnon"))}


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Exponent p of ``values ~ sizes**p``, by least squares of the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(np.maximum(values, 1e-9)), 1)[0])


def machine() -> dict[str, Any]:
    """What ran this, without its name or whose it is."""
    cpu = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        models = [line for line in information.read_text().splitlines() if line.startswith("model name")]
        cpu = models[0].split(":", 1)[1].strip() if models else cpu
    known = getattr(torch.cpu, "get_capabilities", dict)()
    found: dict[str, Any] = {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "features": sorted(name for name in ("avx512_f", "avx512_bf16", "amx_bf16") if known.get(name)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: found for name in _LIBRARIES if (found := _version(name))},
    }
    if device().type == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def quiet() -> None:
    """Leave the screen to the figures."""
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def arguments(description: str) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    quiet()
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder for the results")
    parser.add_argument("--short", action="store_true", help="fewer and smaller measurements")
    return parser


def save(out: Path, name: str, settings: dict[str, Any], results: dict[str, Any], ratios: dict[str, float]) -> None:
    """Write ``NAME.json``, and print its ratios one a line.

    Args:
        out: Folder of the results.
        name: Of the benchmark.
        settings: What was measured, and how.
        results: Figures, as nested dicts and lists.
        ratios: What to read first: a line of text and its figure.
    """
    out.mkdir(parents=True, exist_ok=True)
    whole = {"machine": machine(), "settings": settings, "ratios": ratios, "results": results}
    (out / f"{name}.json").write_text(json.dumps(_rounded(whole), indent=1) + "\n", encoding="utf-8")
    for line in ratio_lines(name, ratios):
        print(line, flush=True)


def ratio_lines(name: str, ratios: dict[str, float]) -> list[str]:
    """One line a ratio."""
    return [f"{name:12s} {what:76s} {value:8.3g}" for what, value in ratios.items()]


def _rounded(value: Any) -> Any:
    """Five digits are more than any clock here gives."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Median of the ratios of measurements taken side by side."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))
