"""Work that ranks share, and ranks that must run the model equally often.

Where each rank holds a part of every layer (FSDP, DeepSpeed), a forward or backward pass is made by all ranks
together. A rank with less to do than the others then runs passes that add nothing.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, parse_flag_from_env
from torch import Tensor, nn

from lce_trainer.compat import gradients_held_back

logger = logging.getLogger(__name__)

T = TypeVar("T")


def passes_are_collective(accelerator: Accelerator) -> bool:
    """Return whether every pass through the model is a collective operation, made by all ranks together."""
    sharded = (DistributedType.FSDP, DistributedType.DEEPSPEED)
    return accelerator.num_processes > 1 and accelerator.distributed_type in sharded


def pass_overhead(accelerator: Accelerator, chosen: int | None) -> int:
    """Return the tokens of padding that are worth one more forward pass.

    Args:
        accelerator: Of this process.
        chosen: By the settings; None: what suits the device.
    """
    if passes_are_collective(accelerator):
        return 1 << 40  # one pass a chunk, so that every rank knows how many there are
    default = 256 if accelerator.device.type == "cpu" else 16384
    return default if chosen is None else chosen


def shard_by_layer(accelerator: Accelerator, model: nn.Module) -> None:
    """Have FSDP shard each transformer layer on its own, unless its config names what to shard.

    accelerate goes by ``_no_split_modules``, which several families do not have, and which in BERT's holds the
    embeddings, where accelerate shards the words' once more, and fails.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None and parse_flag_from_env("ACCELERATE_USE_FSDP"):
        logger.warning(
            "FSDP is configured, but accelerate shards models on GPUs only: every process holds the whole model"
        )
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    if plugin is not None and plugin.transformer_cls_names_to_wrap is None and lists:
        plugin.transformer_cls_names_to_wrap = [type(max(lists, key=len)[0]).__name__]


def max_over_ranks(accelerator: Accelerator, *counts: int) -> list[int]:
    """Return the maximum of each count over the ranks."""
    everyones: Tensor = accelerator.gather(torch.tensor([counts], device=accelerator.device))
    largest: list[int] = everyones.amax(dim=0).tolist()
    return largest


def until_all_ranks_end(accelerator: Accelerator, items: Iterator[T]) -> Iterator[T | None]:
    """Yield this rank's items, then None as long as another rank has some."""
    while any(max_over_ranks(accelerator, (item := next(items, None)) is not None)):
        yield item


@contextmanager
def gradient_accumulation(accelerator: Accelerator, model: nn.Module) -> Iterator[None]:
    """Run a backward pass that is not the last of its step: its gradients are added to those of the later ones."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        with gradients_held_back(accelerator.gradient_state):  # or DeepSpeed would make the optimizer's step
            yield
    elif passes_are_collective(accelerator):
        yield  # each pass shards its gradients: held back, they would be whole on every rank
    else:
        with accelerator.no_sync(model):
            yield
