"""Roofline: how fast the training step's linear layers run, against a large product on this machine in the same run.

``python -m benchmarks.roofline`` profiles a few steps of our trainer and says where their seconds go. What the linear
layers compute is counted from their calls (2 x rows x inputs x outputs, and twice that again backward); what they take
is the profiler's time inside matrix products. The product is also run at the layers' own shapes, which are thin:
where that is far below a large square product's rate, the shapes are the limit and not the trainer.

A step is all of it: tokenizing, forward, backward, update, log. The products are timed after each step, so a ratio
is of two measurements a moment apart.
"""

import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import PrinterCallback, Trainer, TrainerCallback

from benchmarks import peers
from benchmarks.data import add_step_options, medquad_groups, prepare_checkpoint, step_lengths
from benchmarks.measure import (
    PRECISIONS,
    arguments,
    device,
    matmul_rate,
    median_ratio,
    save,
    seconds_of,
    spread,
    synchronize,
)

# Self time of an operation goes to the first class one of whose words is in its name.
CLASSES = {
    "linear layers": ("addmm", "aten::mm", "aten::linear", "mkldnn_linear", "linear_pointwise"),
    "attention": ("attention", "bmm", "softmax"),
    "norms and activations": ("layer_norm", "gelu", "tanh", "dropout", "aten::add", "aten::sum", "aten::mul"),
    "optimizer": ("adam", "norm", "foreach", "optimizer"),
    "embeddings and gathering": ("embedding", "index", "gather", "scatter", "cat", "masked"),
    "casts and copies": ("copy", "_to_copy", "clone", "zero", "fill", "empty"),
}


def model_flops(model: nn.Module, lengths: Sequence[int]) -> float:
    """What a forward pass must compute for pairs of these lengths, padding apart: products and attention.

    Two operations for each weight of a linear layer and each token, and in each layer ``4 * width * length**2`` for
    attention within a pair; the head once a pair. A training step is three times that.
    """
    head = 0
    body = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            is_head = any(part in name for part in ("pooler", "classifier", "head", "score", "pre_classifier"))
            head, body = (head + module.weight.numel(), body) if is_head else (head, body + module.weight.numel())
    config: Any = model.config
    tokens, squares = sum(lengths), sum(n * n for n in lengths)
    attention = 4 * config.num_hidden_layers * config.hidden_size * squares
    return float(2 * body * tokens + 2 * head * len(lengths) + attention)


@contextmanager
def counted_linear_flops(model: nn.Module) -> Iterator[list[float]]:
    """Forward operations of every linear layer's calls inside the context, as the list's only element."""
    total = [0.0]

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        total[0] += 2 * output.numel() * module.in_features

    hooks = [module.register_forward_hook(count) for module in model.modules() if isinstance(module, nn.Linear)]
    try:
        yield total
    finally:
        for hook in hooks:
            hook.remove()


class _Profiled(TrainerCallback):
    """Profiles every step but the first, from the end of one to the end of the next; and then times products."""

    def __init__(self, model: nn.Module, tokens: int, precision: str) -> None:
        self.parts: list[dict[str, float]] = []
        self.rates: dict[str, list[float]] = {"linear layers": [], "large product": [], "products alone": []}
        self._model, self._tokens, self._precision = model, tokens, precision
        self._linear = counted_linear_flops(model)
        self._counted = self._linear.__enter__()
        self._profiler: Any = None
        self._started = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        synchronize()
        if self._profiler is not None:
            whole = time.perf_counter() - self._started
            self._profiler.__exit__(None, None, None)
            self.parts.append(by_class(self._profiler, whole))
            self.rates["linear layers"].append(3 * self._counted[0] / self.parts[-1]["linear layers"])
            self.rates["large product"].append(matmul_rate(PRECISIONS[self._precision], times=3))
            self.rates["products alone"].append(rate_at_own_shapes(self._model, self._tokens, self._precision))
        self._counted[0] = 0.0
        if state.global_step < state.max_steps:
            kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device().type == "cuda")
            self._profiler = profile(activities=kinds).__enter__()
            self._started = time.perf_counter()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._linear.__exit__(None, None, None)


def profile_steps(
    trainer: Trainer, tokens: int, precision: str
) -> tuple[list[dict[str, float]], dict[str, list[float]]]:
    """Train, profiling all steps but the first.

    Args:
        trainer: Ready to train.
        tokens: Of a step, for the products that are timed beside it.
        precision: Of those.

    Returns:
        Seconds of each class of operation, by step, with ``"whole step"`` and ``"not in operations"`` (Python,
        tokenizing, waiting); and FLOP/s of the linear layers, of a large product, and of the layers' products
        alone, by step.
    """
    profiled = _Profiled(trainer.model, tokens, precision)
    trainer.add_callback(profiled)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return profiled.parts, profiled.rates


def by_class(profiler: Any, whole: float) -> dict[str, float]:
    """Self seconds of each class of operation."""
    on_device = device().type == "cuda"
    found: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        spent = (event.self_device_time_total if on_device else event.self_cpu_time_total) / 1e6
        # On a GPU the kernels, which have names of their own, are accounted to the operations that start them.
        if spent and event.key.startswith(("aten::", "mkldnn::", "Optimizer", "_")):
            kind = next((kind for kind, words in CLASSES.items() if any(word in event.key for word in words)), "other")
            found[kind] += spent
    return {**found, "not in operations": max(whole - sum(found.values()), 0.0), "whole step": whole}


def rate_at_own_shapes(model: nn.Module, tokens: int, precision: str) -> float:
    """FLOP/s of the products of a linear layer's forward and backward at this many tokens, over all body layers."""
    dtype, work, spent = PRECISIONS[precision], 0.0, 0.0
    shapes = [m.weight.shape for m in model.modules() if isinstance(m, nn.Linear) and m.out_features > 1]
    for outputs, inputs in sorted({tuple(shape) for shape in shapes}):
        x = torch.randn(tokens, inputs, device=device()).to(dtype)
        weight = torch.randn(outputs, inputs, device=device()).to(dtype)
        y = x @ weight.T
        for product in (lambda x=x, w=weight: x @ w.T, lambda y=y, w=weight: y @ w, lambda y=y, x=x: y.T @ x):
            times = shapes.count(torch.Size((outputs, inputs)))
            work += times * 2 * tokens * inputs * outputs
            spent += times * min(seconds_of(product) for _ in range(4))
    return work / spent


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = arguments((__doc__ or "").split("\n")[0])
    add_step_options(parser)
    parser.add_argument("--steps", type=int, help="profiled steps; 6, or 3 in the short form")
    args = parser.parse_args(argv)
    steps = args.steps or (3 if args.short else 6)
    groups = medquad_groups(args.data, queries=args.batch * (steps + 1), size=args.group_size)
    results: dict[str, Any] = {}
    ratios: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as work:
        checkpoint = prepare_checkpoint(args.model, Path(work) / "model", max_length=args.max_length)
        steps_tokens = map(sum, step_lengths(checkpoint, groups, args.batch, args.max_length))
        tokens = int(statistics.median(steps_tokens))
        for precision in PRECISIONS:
            shared = peers.settings(Path(work), steps=steps + 1, groups=args.batch, bf16=precision == "bf16")
            trainer = peers.ours(checkpoint, groups, args.max_length, shared)
            seconds, rates = profile_steps(trainer, tokens, precision)
            parts = {kind: sum(s.get(kind, 0.0) for s in seconds) for kind in (*CLASSES, "other", "not in operations")}
            whole = sum(s["whole step"] for s in seconds)
            results[precision] = {
                "flops_per_second": {name: spread(values) for name, values in rates.items()},
                "parts_of_the_step": {kind: part / whole for kind, part in parts.items()},
            }
            linear, best, own = rates.values()
            what = f"{precision}: linear layers of the step over"
            ratios[f"{what} the machine's large matmul"] = median_ratio(linear, best)
            ratios[f"{what} the same products alone"] = median_ratio(linear, own)
            said = (f"{name} {statistics.median(values) / 1e9:.0f}" for name, values in rates.items())
            print(f"\n{precision}, GFLOP/s: {', '.join(said)}")
            for kind, part in results[precision]["parts_of_the_step"].items():
                print(f"  {kind:28s} {part:6.1%}")
    chosen = {name: getattr(args, name) for name in ("model", "batch", "group_size", "max_length")}
    save(args.out, "roofline", {**chosen, "steps": steps}, results, ratios)


if __name__ == "__main__":
    main()
