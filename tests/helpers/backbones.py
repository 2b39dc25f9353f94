"""A trainer, groups and pairs for every family of models."""

import random

import torch
from datasets import Dataset
from transformers import BertModel

from helpers.tiny import WORDS
from helpers.tiny_models import (
    lively,
    tiny_config,
    tiny_language_model,
    tiny_model,
    tiny_tokenizer,
    without_dropout,
)
from lce_trainer.training.arguments import LCETrainingArguments
from lce_trainer.training.trainer import LCETrainer

MAX_LENGTH = 112
MAX_QUERY_LENGTH = 16


def some_groups(n: int) -> Dataset:
    draw = random.Random(4)
    rows = []
    for i in range(n):
        labels = [[1.0, 0, 0], [1.0, 0], [2.0, 1.0, 0, 0]][i % 3]
        rows.append(
            {
                "query_id": f"q{i}",
                "query": " ".join(draw.choices(WORDS, k=draw.randint(1, 6))),
                "passages": [" ".join(draw.choices(WORDS, k=draw.randint(1, 60))) for _ in labels],
                "labels": labels,
            }
        )
    return Dataset.from_list(rows)


def make_trainer(family: str, folder, model=None, tokenizer="its own", train_dataset=None, **settings) -> LCETrainer:
    defaults = {
        "group_size": 4,
        "max_length": MAX_LENGTH,
        "max_query_length": MAX_QUERY_LENGTH,
        "num_train_epochs": 1,
        "optim": "sgd",
        "learning_rate": 0.01,
        "max_grad_norm": 0,  # clipping would hide a gradient of the wrong size
        "warmup_steps": 0,
        "per_device_train_batch_size": 6,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    more = {name: settings.pop(name) for name in ("peft_config", "callbacks", "eval_dataset") if name in settings}
    if tokenizer == "its own":
        tokenizer = tiny_tokenizer(family)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return LCETrainer(
        model=tiny_model(family) if model is None else model,
        args=LCETrainingArguments(str(folder), **{**defaults, **settings}),
        train_dataset=some_groups(6) if train_dataset is None else train_dataset,
        processing_class=tokenizer,
        **more,
    )


def pairs_of_all_lengths() -> list[tuple[str, str]]:
    """Most fit, some are cut."""
    draw = random.Random(7)
    return [
        (" ".join(draw.choices(WORDS, k=draw.randint(1, 8))), " ".join(draw.choices(WORDS, k=size)))
        for size in [0, 1, 5, 9, 20, 21, 22, 23, 24, 25, 40, 60, 100, 150]
    ]


WAYS = (
    {},
    {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 6},
    {"micro_batch_size": 5},
    {"micro_batch_size": 2},  # groups of 3 and 4 go through the score cache, those of 2 do not
)


def base_folder(family: str, folder):
    """A base without a head, as one would be found on the Hub."""
    if family == "bert":  # whose pooler is part of what a head reads, and often missing
        torch.manual_seed(0)
        config = tiny_config("bert", **without_dropout("bert"))
        lively(BertModel(config, add_pooling_layer=False)).save_pretrained(folder)
    elif family in ("qwen3", "llama"):
        tiny_language_model(family).save_pretrained(folder)
    else:
        tiny_model(family).base_model.save_pretrained(folder)
    tiny_tokenizer(family).save_pretrained(folder)
    return folder
