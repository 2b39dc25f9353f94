"""What the processes of a sharded run share with the test that starts them."""

import torch
from torch.distributed.tensor import DTensor

from helpers.trainers import weights

KINDS = {
    "fsdp2": {"FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"},
    "fsdp2 with sharded checkpoints": {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"},
    "zero2": {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "zero3": {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true"},
}
FSDP = {"ACCELERATE_USE_CPU": "true", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
FSDP |= {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
# accelerate leaves DeepSpeed aside where it is told to use the CPU; there is nothing else here to be used.
ZERO = {"ACCELERATE_USE_CPU": "false", "ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}
WAYS = {
    "batches": {"per_device_train_batch_size": 4},
    "micro-batches": {"per_device_train_batch_size": 4, "micro_batch_size": 5},
    "score cache": {"per_device_train_batch_size": 4, "micro_batch_size": 3},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "micro_batch_size": 3},
    "shared groups": {"per_device_train_batch_size": 8, "split_groups": True, "micro_batch_size": 3},
    "padded": {"per_device_train_batch_size": 4, "packing": "none"},
    "by name": {"per_device_train_batch_size": 4, "model": "base"},
    "evaluated before": {"per_device_train_batch_size": 4},
}
RUN = {"per_device_train_batch_size": 3, "optim": "adamw_torch", "learning_rate": 0.005, "eval_strategy": "steps"}
RUN |= {"eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True}
# As if a higher loss were better: the first checkpoint is the best one, and patience runs out at the third.
RUN |= {"dropout": 0.1, "num_train_epochs": 3, "metric_for_best_model": "loss", "greater_is_better": True}


def end_of(trainer) -> dict[str, torch.Tensor] | None:
    """The whole weights, put together again; on the first rank."""
    if trainer.is_deepspeed_enabled and trainer.deepspeed is None:  # never shared out
        return weights(trainer)
    whole = trainer.accelerator.get_state_dict(trainer.deepspeed or trainer.model)
    return whole and {name: tensor.clone() for name, tensor in whole.items()}


def is_shared_out(trainer) -> bool:
    if trainer.is_deepspeed_enabled:
        return trainer.deepspeed.zero_optimization_stage() >= 2
    return trainer.accelerator.is_fsdp2 and all(isinstance(p, DTensor) for p in trainer.model.parameters())
