"""Dropout on a CPU, drawn in bulk.

torch draws on one core, one number at a time: on CPUs not made by Intel, attention's was a fifth of a
training step, and the rest's a tenth.
"""

import numpy as np
import torch
from torch import Tensor, nn


@torch.compiler.disable  # type: ignore[untyped-decorator]
def drawn(shape: torch.Size, dropout: float) -> tuple[Tensor, float]:
    """What dropout drops, True where dropped, and the part of it that is expected.

    Drawn by numpy under a seed from torch's generator, so whoever sets that gets the same again.
    """
    level = round(dropout * 65536)  # of the 65536 that 16 bits hold
    seed = int(torch.randint(1 << 62, ()))
    numbers = np.random.SFC64(seed).random_raw(-(-shape.numel() // 4)).view(np.uint16)[: shape.numel()]
    return torch.from_numpy(numbers < level).view(shape), level / 65536


class BulkDropout:
    """The forward of a dropout module, drawn in bulk where its input is on a CPU. Can be copied and pickled."""

    def __init__(self, module: nn.Dropout) -> None:
        self.module = module

    def __call__(self, states: Tensor) -> Tensor:
        """What the module makes of states of any shape."""
        module = self.module
        if not module.training or not 0 < module.p < 1 or module.inplace or states.device.type != "cpu":
            whole: Tensor = type(module).forward(module, states)
            return whole
        dropped, part = drawn(states.shape, module.p)
        kept: Tensor = states * (~dropped).to(states.dtype).div_(1 - part)
        return kept


def draw_in_bulk(model: nn.Module) -> None:
    """Have all of a model's dropout modules draw in bulk."""
    for module in model.modules():
        if type(module) is nn.Dropout:
            vars(module)["forward"] = BulkDropout(module)
