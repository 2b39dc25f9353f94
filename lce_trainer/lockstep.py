"""Ranks that share work, and those that must run the model equally often.

Where each rank holds a part of every layer (FSDP, DeepSpeed), a forward or backward pass is made by all ranks
together. A rank with less to do than the others then runs passes that add nothing.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, parse_flag_from_env
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from lce_trainer.reranker import scoring_batches

logger = logging.getLogger(__name__)

T = TypeVar("T")


def in_lockstep(accelerator: Accelerator) -> bool:
    """Whether every pass through the model is made by all ranks together."""
    sharded = (DistributedType.FSDP, DistributedType.DEEPSPEED)
    return accelerator.num_processes > 1 and accelerator.distributed_type in sharded


def shard_by_layer(accelerator: Accelerator, model: nn.Module) -> None:
    """Have FSDP share out each transformer layer on its own, unless its config names what to share out.

    accelerate goes by ``_no_split_modules``, which several families do not have, and which in BERT's holds the
    embeddings, where accelerate shares out the words' once more, and fails.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None and parse_flag_from_env("ACCELERATE_USE_FSDP"):
        logger.warning(
            "FSDP was asked for, but accelerate shares out models on GPUs only: every process holds it whole"
        )
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    if plugin is not None and plugin.transformer_cls_names_to_wrap is None and lists:
        plugin.transformer_cls_names_to_wrap = [type(max(lists, key=len)[0]).__name__]


def most(accelerator: Accelerator, *counts: int) -> list[int]:
    """Each count where it is largest among the ranks."""
    everyones: Tensor = accelerator.gather(torch.tensor([counts], device=accelerator.device))
    largest: list[int] = everyones.amax(dim=0).tolist()
    return largest


def with_the_others(accelerator: Accelerator, items: Iterator[T]) -> Iterator[T | None]:
    """This rank's items, then None as long as another rank has some."""
    while any(most(accelerator, (item := next(items, None)) is not None)):
        yield item


@contextmanager
def adding_up(accelerator: Accelerator, model: nn.Module) -> Iterator[None]:
    """A backward pass that is not the last of its step: its gradients are added to those to come."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        state, last = accelerator.gradient_state, accelerator.sync_gradients
        state._set_sync_gradients(False)  # or accelerate would have DeepSpeed take the optimizer's step
        try:
            yield
        finally:
            state._set_sync_gradients(last)
    elif in_lockstep(accelerator):
        yield  # each pass shares out its gradients: held back, they would be whole on every rank
    else:
        with accelerator.no_sync(model):
            yield


def score_share(
    accelerator: Accelerator,
    score: Callable[[dict[str, Tensor]], Tensor],
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    max_length: int,
    batch_tokens: int,
    **bar_settings: Any,
) -> np.ndarray:
    """Score every pair once, on some rank.

    Args:
        accelerator: Tells the ranks.
        score: Gives the logit of each row of a batch, shape ``(rows,)``.
        tokenizer: Of the model.
        pairs: Query and passage of each, the same on every rank.
        max_length: Tokens of a pair at most.
        batch_tokens: As :func:`lce_trainer.reranker.scoring_batches` takes it.
        **bar_settings: For the progress bar.

    Returns:
        Raw logits, float32, shape ``(pairs,)``, the same on every rank.
    """
    mine = np.arange(accelerator.process_index, len(pairs), accelerator.num_processes)
    scores = torch.zeros(len(pairs), device=accelerator.device)

    batches: Iterator[Any] = scoring_batches(tokenizer, [pairs[i] for i in mine], max_length, batch_tokens)
    together = in_lockstep(accelerator)
    if together:
        batches = with_the_others(accelerator, batches)
    # What FSDP gathers in inference mode it could not train with.
    with torch.no_grad() if together else torch.inference_mode(), tqdm(total=len(mine), **bar_settings) as bar:
        for batch in batches:
            if batch is None:
                score(next(scoring_batches(tokenizer, pairs[:1], max_length, batch_tokens))[1])
                continue
            rows, inputs = batch
            scores[torch.as_tensor(mine[rows], device=scores.device)] = score(inputs).float()
            bar.update(len(rows))
    # Every other rank holds zero for a pair, so the sum is exact.
    total: Tensor = accelerator.reduce(scores, reduction="sum")
    return total.cpu().numpy()
