"""A run that writes checkpoints, which a process of its own can be killed in."""

from pathlib import Path

from helpers.trainers import make_groups, make_trainer

RUN = {"num_train_epochs": 2, "per_device_train_batch_size": 4, "dropout": 0.1, "optim": "adamw_torch"}
RUN |= {"learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}


def run_to_the_end(folder: Path) -> None:
    """What is run, killed, and run again."""
    make_trainer(folder, make_groups(8), **RUN).train(resume_from_checkpoint=True)
