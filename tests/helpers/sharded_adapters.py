"""The trainer of adapters that several processes make alike."""

from pathlib import Path

from peft import LoraConfig

from helpers.backbones import make_trainer, some_groups
from lce_trainer.training.trainer import LCETrainer

RUN = {"optim": "adamw_torch", "learning_rate": 0.01, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 1}
RUN |= {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
# As if a higher loss were better: the first checkpoint is the best one, and is loaded at the end.
RUN |= {"metric_for_best_model": "loss", "greater_is_better": True}


def adapt(out: Path, batch: int) -> LCETrainer:
    return make_trainer(
        "qwen3", out, out.parent / "base", None, some_groups(12), peft_config=LoraConfig(r=4, lora_alpha=8),
        eval_dataset=some_groups(6), per_device_train_batch_size=batch, **RUN,
    )  # fmt: skip
