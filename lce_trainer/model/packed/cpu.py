"""Dropout and linear layers that are faster on a CPU than PyTorch's own.

Dropout is drawn in bulk: PyTorch draws on one core, one number at a time, which on CPUs not made by Intel was a third
of a training step. Linear layers go by oneDNN where PyTorch has float32 products made by MKL, which on such CPUs is
slower; and where no gradient is needed, in any precision, bias and GELU are computed within the product.
"""

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from lce_trainer.compat import fused_linear, has_forward_hooks


class Replacement:
    """Stands on a module's instance for its class's ``forward``; can be copied and pickled with it."""

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module


def speed_up(model: nn.Module) -> None:
    """Give a model's modules their replacements, which on other devices do what the class does."""
    for module in model.modules():
        if type(module) is nn.Dropout:
            vars(module)["forward"] = BulkDropout(module)
        elif type(module) is nn.Linear:
            vars(module)["forward"] = FusedLinear(module)
        elif _is_linear_then_gelu(module):
            vars(module)["forward"] = FusedLinearGelu(module)


class BulkDropout(Replacement):
    """Replaces the forward of an ``nn.Dropout``."""

    def __call__(self, states: Tensor) -> Tensor:
        """Drop some of the states, of any shape."""
        p = float(self.module.p)
        if not self.module.training or not 0 < p < 1 or states.device.type != "cpu":
            return functional.dropout(states, p, self.module.training)
        dropped, part = draw_dropout(states.shape, p)
        kept: Tensor = states * (~dropped).to(states.dtype).div_(1 - part)
        return kept


class FusedLinear(Replacement):
    """Replaces the forward of an ``nn.Linear``."""

    def __call__(self, states: Tensor) -> Tensor:
        """Transform states of shape ``(..., inputs)``."""
        return linear(states, self.module.weight, self.module.bias)


class FusedLinearGelu(Replacement):
    """Replaces the forward of the first half of a feed-forward layer: a linear layer and GELU."""

    def __call__(self, states: Tensor) -> Tensor:
        """Transform states of shape ``(..., inputs)``."""
        dense = self.module.dense
        if not torch.is_grad_enabled() and is_plain(dense) and _goes_fused(states, dense.weight):
            return _fused(states, dense.weight, dense.bias, gelu=True)
        return functional.gelu(dense(states))


def is_plain(*layers: Any) -> bool:
    """Return whether these are linear layers that need not be called; DeepSpeed, for one, gathers weights in a call."""
    return all(
        type(layer) is nn.Linear
        and not has_forward_hooks(layer)
        and isinstance(layer.__dict__.get("forward"), (FusedLinear, type(None)))
        for layer in layers
    )


def linear(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``torch.nn.functional.linear``, faster on a CPU."""
    if not _goes_fused(states, weight):
        return functional.linear(states, weight, bias)
    if not torch.is_grad_enabled():
        return _fused(states, weight, bias)
    made: Tensor = _Linear.apply(states, weight, bias)  # type: ignore[no-untyped-call]
    return made


class _Linear(torch.autograd.Function):
    """A linear layer with a gradient; the gradient by the weights is as fast with MKL."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(states, weight)
        return _fused(states, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        states, weight = ctx.saved_tensors
        by_states, by_weight, by_bias = ctx.needs_input_grad
        rows = gradient.flatten(0, -2)
        return (
            _fused(gradient, weight.t(), None) if by_states else None,
            rows.t() @ states.flatten(0, -2) if by_weight else None,
            rows.sum(0) if by_bias else None,
        )


@torch.compiler.disable  # type: ignore[untyped-decorator]
def draw_dropout(shape: torch.Size, dropout: float) -> tuple[Tensor, float]:
    """Draw which numbers are dropped, True where dropped; and return the part that is expected to be.

    Drawn by numpy under a seed from torch's generator, so whoever sets that gets the same again.
    """
    level = round(dropout * 65536)  # of the 65536 that 16 bits hold
    seed = int(torch.randint(1 << 62, ()))
    numbers = np.random.SFC64(seed).random_raw(-(-shape.numel() // 4)).view(np.uint16)[: shape.numel()]
    return torch.from_numpy(numbers < level).view(shape), level / 65536


def _is_linear_then_gelu(module: Any) -> bool:
    """Return whether a module is the ``intermediate`` of BERT and its like."""
    if {name for name, _ in module.named_children()} != {"dense", "intermediate_act_fn"}:
        return False
    probe = torch.linspace(-3, 3, 61)
    activation = module.intermediate_act_fn
    return not list(activation.parameters()) and torch.equal(activation(probe), functional.gelu(probe))


def _goes_fused(states: Tensor, weight: Tensor) -> bool:
    return (
        (states.dtype == torch.float32 or not torch.is_grad_enabled())
        and states.device.type == weight.device.type == "cpu"
        and states.dtype == weight.dtype
        and type(weight) in (Tensor, nn.Parameter)  # and no shard of one
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and _fusing_works(weight.dtype)
    )


def _fused(states: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    """By the operation that ``torch.compile`` puts in for linear layers."""
    kind, algorithm = ("gelu", "none") if gelu else ("none", "")
    made: Tensor = fused_linear(states, weight, bias, kind, [], algorithm)
    return made


@cache
@torch.inference_mode()
def _fusing_works(dtype: torch.dtype) -> bool:
    """Return whether this PyTorch on this CPU has the operation, and computes it right."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16) or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    draw = torch.Generator().manual_seed(0)
    states, weight, bias = (torch.randn(shape, generator=draw).to(dtype) for shape in ((3, 5, 64), (48, 64), (48,)))
    rows = torch.randn((3, 5, 48), generator=draw).to(dtype)
    for given, matrix, some, gelu in (
        (states, weight, bias, False),
        (states, weight, None, False),
        (states, weight, bias, True),
        (rows, weight.t(), None, False),
    ):
        try:
            found = _fused(given, matrix, some, gelu).double()
        except (RuntimeError, AttributeError, TypeError):
            return False
        wanted = functional.linear(given.double(), matrix.double(), None if some is None else some.double())
        wanted = functional.gelu(wanted) if gelu else wanted
        if not float((found - wanted).norm() / wanted.norm()) <= 4 * torch.finfo(dtype).eps:
            return False
    return True
