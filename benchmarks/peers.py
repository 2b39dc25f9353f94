"""The trainers that are measured, each given the same checkpoint, groups and settings.

Where an objective has another name it is set so that the loss is LCE's:

- sentence-transformers' ``ListNetLoss`` is the cross-entropy with the softmax of the labels. With labels of 0 and
  1 that is a soft target; with 0 and 100 it is one-hot to the last bit of float32, and the loss is LCE.
- Its ``MultipleNegativesRankingLoss`` adds the other groups' passages as negatives. With one group a step there are
  none, and with the identity for an activation and a scale of 1 it is LCE.
- FlagEmbedding's loss is LCE. It cuts the query and the passage to lengths of their own before it cuts the pair;
  ``query_max_len=2`` with the rest for the passage cuts nothing that the others keep. Under transformers 5 it turns
  token ids back into text and tokenizes again, so a passage cut within a word may end in other tokens.
"""

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import SequentialSampler
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

from lce_trainer import LCETrainer, LCETrainingArguments
from lce_trainer.hardware import best_device
from lce_trainer.model.loading import load_model

ONE_HOT = 100.0  # exp(-100) is below float32's rounding beside 1
BUCKETS = (0, 64, 128, 192, 1 << 30)  # tokens; bounds of the plain length-bucketed loop


def settings(out: Path, *, steps: int, groups: int, bf16: bool = False, **chosen: Any) -> dict[str, Any]:
    """``TrainingArguments`` that all share: the groups in their order, AdamW, no dropout, every loss logged."""
    return {
        "output_dir": str(out),
        "max_steps": steps,
        "per_device_train_batch_size": groups,
        "train_sampling_strategy": "sequential",
        "learning_rate": 5e-5,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0,
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 13,
        "bf16": bf16,
        "use_cpu": best_device().type == "cpu",
        **chosen,
    }


def ours(checkpoint: Path, groups: datasets.Dataset, max_length: int, shared: dict[str, Any], **chosen: Any) -> Trainer:
    """LCETrainer, as it comes."""
    chosen = {"group_size": _size(groups), "max_length": max_length, "max_query_length": max_length // 4, **chosen}
    args = LCETrainingArguments(**shared, **chosen)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    return LCETrainer(model=load_model(checkpoint), args=args, train_dataset=groups, processing_class=tokenizer)


def ours_compiled(checkpoint: Path, groups: datasets.Dataset, max_length: int, shared: dict[str, Any]) -> Trainer:
    """The same as ``torch_compile`` makes it, which would compile every trainer of this process."""
    trainer = ours(checkpoint, groups, max_length, shared)
    trainer.model.compile(dynamic=True)
    return trainer


def sentence_transformers(
    checkpoint: Path,
    groups: datasets.Dataset,
    max_length: int,
    shared: dict[str, Any],
    *,
    loss: str = "ListNetLoss",
    mini_batch: int | None = None,
) -> Trainer:
    """sentence-transformers' ``CrossEncoderTrainer``.

    Args:
        checkpoint: Folder.
        groups: Of equal size, the positive first.
        max_length: Tokens of a pair.
        shared: From :func:`settings`.
        loss: ``ListNetLoss`` or, for one group a step, ``MultipleNegativesRankingLoss``.
        mini_batch: Pairs of one forward pass under ``ListNetLoss``; None is its default, as many as groups a step,
            and -1 all.
    """
    from sentence_transformers.base.sampler import DefaultBatchSampler
    from sentence_transformers.cross_encoder import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments
    from sentence_transformers.cross_encoder import losses as known

    def in_order(dataset: datasets.Dataset, **kwargs: Any) -> DefaultBatchSampler:
        return DefaultBatchSampler(SequentialSampler(dataset), **kwargs)

    model = CrossEncoder(str(checkpoint), num_labels=1, max_length=max_length)
    identity = torch.nn.Identity()
    if loss == "ListNetLoss":
        labels = [[ONE_HOT * label for label in row] for row in groups["labels"]]
        rows = {"query": groups["query"], "docs": groups["passages"], "labels": labels}
        objective: torch.nn.Module = known.ListNetLoss(model, activation_fn=identity, mini_batch_size=mini_batch)
    else:
        columns = zip(*groups["passages"], strict=True)
        rows = {"query": groups["query"], **{f"passage_{i}": list(column) for i, column in enumerate(columns)}}
        objective = known.MultipleNegativesRankingLoss(model, num_negatives=None, scale=1.0, activation_fn=identity)
    args = CrossEncoderTrainingArguments(**{**shared, "batch_sampler": in_order})
    return CrossEncoderTrainer(model, args, train_dataset=datasets.Dataset.from_dict(rows), loss=objective)


def flag_embedding(checkpoint: Path, groups: datasets.Dataset, max_length: int, shared: dict[str, Any]) -> Trainer:
    """FlagEmbedding's reranker trainer, put together as its runner does."""
    from FlagEmbedding.abc.finetune.reranker import AbsRerankerCollator, AbsRerankerTrainDataset
    from FlagEmbedding.abc.finetune.reranker.AbsArguments import AbsRerankerDataArguments, AbsRerankerTrainingArguments
    from FlagEmbedding.finetune.reranker.encoder_only.base import CrossEncoderModel, EncoderOnlyRerankerTrainer

    out = Path(shared["output_dir"])
    out.mkdir(parents=True, exist_ok=True)
    lines = [
        {"query": query, "pos": texts[:1], "neg": texts[1:]}
        for query, texts in zip(groups["query"], groups["passages"], strict=True)
    ]
    file = out / "groups.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    limits = {"query_max_len": 2, "passage_max_len": max_length - 2}
    data = AbsRerankerDataArguments(
        train_data=[str(file)], cache_path=str(out / "cache"), train_group_size=_size(groups), **limits
    )
    args = AbsRerankerTrainingArguments(**shared, remove_unused_columns=False)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    base = AutoModelForSequenceClassification.from_pretrained(checkpoint)
    return EncoderOnlyRerankerTrainer(
        model=CrossEncoderModel(base, tokenizer=tokenizer, train_batch_size=args.per_device_train_batch_size),
        args=args,
        train_dataset=AbsRerankerTrainDataset(args=data, tokenizer=tokenizer),
        data_collator=AbsRerankerCollator(tokenizer=tokenizer, padding=True, return_tensors="pt", **limits),
        processing_class=tokenizer,
    )


def plain(checkpoint: Path, groups: datasets.Dataset, max_length: int, shared: dict[str, Any]) -> Trainer:
    """``transformers.Trainer`` with a cross-entropy over groups: every pair padded to the step's longest."""
    return _plain(PlainTrainer, checkpoint, groups, max_length, shared)


def bucketed(checkpoint: Path, groups: datasets.Dataset, max_length: int, shared: dict[str, Any]) -> Trainer:
    """The same with the step's pairs in four forward passes by length, each padded to its own longest."""
    return _plain(BucketedTrainer, checkpoint, groups, max_length, shared)


def _plain(
    kind: type[Trainer], checkpoint: Path, groups: datasets.Dataset, max_length: int, shared: dict[str, Any]
) -> Trainer:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)

    def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        queries = [row["query"] for row in rows for _ in row["passages"]]
        passages = [text for row in rows for text in row["passages"]]
        encoded = tokenizer(
            queries, passages, truncation="only_second", max_length=max_length, padding=True, return_tensors="pt"
        )
        return {**encoded, "groups": torch.tensor(len(rows))}

    args = TrainingArguments(**shared, remove_unused_columns=False)
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint)
    return kind(model=model, args=args, train_dataset=groups, data_collator=collate, processing_class=tokenizer)


class PlainTrainer(Trainer):
    """What one writes in an afternoon."""

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any) -> Any:
        groups = int(inputs.pop("groups"))
        scores = self.scores(model, inputs).view(groups, -1).float()
        loss = functional.cross_entropy(scores, torch.zeros(groups, dtype=torch.long, device=scores.device))
        return (loss, scores) if return_outputs else loss

    def scores(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        """Logits, shape ``(pairs,)``."""
        return model(**inputs).logits[:, 0]


class BucketedTrainer(PlainTrainer):
    """Sorted by length, cut at fixed lengths."""

    def scores(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        lengths = inputs["attention_mask"].sum(dim=1)
        logits = torch.empty(len(lengths), device=lengths.device)
        for low, high in pairwise(BUCKETS):
            rows = ((lengths > low) & (lengths <= high)).nonzero()[:, 0]
            if len(rows):
                width = int(lengths[rows].max())
                part = model(**{name: tensor[rows, :width] for name, tensor in inputs.items()}).logits[:, 0]
                logits = logits.index_put((rows,), part.float())
        return logits


def _size(groups: datasets.Dataset) -> int:
    return len(groups[0]["passages"])
