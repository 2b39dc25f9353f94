"""Small groups, and a trainer of a tiny model over them."""

import random
from pathlib import Path

import torch
from datasets import Dataset
from transformers import BertForSequenceClassification, TrainerCallback

from helpers.tiny import WORDS, build_model, build_tokenizer
from lce_trainer.training.arguments import LCETrainingArguments
from lce_trainer.training.trainer import LCETrainer


def make_groups(n: int, seed: int = 0) -> Dataset:
    """Ragged groups of short texts, some with several positives, some graded, some with scores or all but one."""
    draw = random.Random(seed)
    rows = []
    for i in range(n):
        labels = [[1, 0, 0, 0], [1, 1, 0, 0, 0, 0], [3, 2, 0, 1], [1, 0]][i % 4]
        rows.append(
            {
                "query_id": f"q{i}",
                "query": f"{' '.join(draw.choices(WORDS, k=draw.randint(2, 5)))} {i}",
                "passages": [" ".join(draw.choices(WORDS, k=draw.randint(1, 30))) for _ in labels],
                "labels": [float(label) for label in labels],
                "scores": [draw.random() for _ in labels[i % 3 - 1 :]] + [None] * (i % 3 - 1) if i % 3 else None,
            }
        )
    return Dataset.from_list(rows)


def easy_groups(n: int) -> Dataset:
    """The passage with the word red is right, whatever the query."""
    draw = random.Random(1)
    texts = [["red " + draw.choice(WORDS[3:]), *draw.choices(WORDS[3:], k=3)] for _ in range(n)]
    return Dataset.from_dict(
        {"query": [f"what is {i}" for i in range(n)], "passages": texts, "labels": [[1.0, 0, 0, 0]] * n}
    )


def lively_model(dropout: float = 0.0) -> BertForSequenceClassification:
    """With weights so large that scores differ and gradients are felt."""
    model = build_model(dropout=dropout)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    return model


def make_trainer(folder: Path, groups: Dataset | None, dropout: float = 0.0, model=None, **settings) -> LCETrainer:
    more = {name: settings.pop(name) for name in ("eval_dataset", "callbacks", "compute_metrics") if name in settings}
    defaults = {
        "group_size": 4,
        "max_length": 48,
        "max_query_length": 10,
        "num_train_epochs": 1,
        "optim": "sgd",
        "learning_rate": 0.1,
        "warmup_steps": 0,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return LCETrainer(
        model=lively_model(dropout) if model is None else model,
        args=LCETrainingArguments(str(folder), **{**defaults, **settings}),
        train_dataset=groups,
        processing_class=build_tokenizer(),
        **more,
    )


class Ruin(TrainerCallback):
    """Spoil the model after its third step."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step >= 3:
            torch.nn.init.zeros_(model.classifier.weight)


def weights(trainer: LCETrainer) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in trainer.model.state_dict().items()}


def assert_same(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float) -> None:
    assert got.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


# Some groups have no scores from a teacher, some have them all but for one passage's.
DISTILLED = {"temperature": 0.6, "distillation_weight": 0.4, "distillation_temperature": 0.3, "max_grad_norm": 0}
