"""LCETrainer: ``transformers.Trainer`` that learns to rank from groups."""

import logging
import math
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerControl, set_seed
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction, HubStrategy, TrainOutput

from lce_trainer.compat import prepared_models
from lce_trainer.distributed import pass_overhead, shard_by_layer
from lce_trainer.errors import TrainingError
from lce_trainer.evaluation.metrics import mean_over_sets
from lce_trainer.model.adapters import add_adapters, check_mergeable, keep_trainable, merge_adapters
from lce_trainer.model.loading import configure_pairs, load_model, load_tokenizer
from lce_trainer.model.packed.packing import (
    batch_scores,
    disable_packing,
    enable_packing,
    packed_scores,
    packs,
    padded_scores,
)
from lce_trainer.model.pairs import EncodedPairs
from lce_trainer.model.saving import save_cross_encoder_files, save_reranker, set_scoring_config
from lce_trainer.model.scoring import score_pairs, tokens_at_once
from lce_trainer.training.arguments import LCETrainingArguments, configure_logging
from lce_trainer.training.checkpoints import (
    check_best,
    checkpoint_to_resume,
    final_state,
    save_at_step_ends,
    sealed_checkpoint,
    tensors_alone,
)
from lce_trainer.training.checks import (
    EvalDataset,
    by_name,
    check_arguments,
    check_eval,
    check_finite,
    check_model,
    usable_groups,
)
from lce_trainer.training.collator import Batch, GroupCollator, group_collator
from lce_trainer.training.evaluate import group_metrics, set_early_stopping_metric
from lce_trainer.training.forecast import Forecast, ForecastCallback, forecast_step
from lce_trainer.training.loss import group_losses
from lce_trainer.training.monitor import LearningMonitor, StepSums, curves
from lce_trainer.training.sampling import EpochCounter, GroupSampler, group_sampler
from lce_trainer.training.step import Pass, cut_step, run_step
from lce_trainer.training.streaming import StreamMonitor, is_stream, training_rows

logger = logging.getLogger(__name__)


class LCETrainer(Trainer):  # type: ignore[misc]
    """Fine-tune a cross-encoder on groups with the LCE loss.

    The loss of a step is the mean over all its groups, wherever they were run: however a step is
    cut into accumulated batches, ranks, micro-batches and forward passes, the gradient is the same.

    Example::

        trainer = LCETrainer(
            model="answerdotai/ModernBERT-base",
            args=LCETrainingArguments("out", num_train_epochs=1),
            train_dataset=load_groups("me/my-groups"),
        )
        trainer.train()
        trainer.save_model()
    """

    # compute_loss divides by the groups of the whole step itself; see also model_accepts_loss_kwargs below.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: str | Path | PreTrainedModel | None = None,
        args: LCETrainingArguments | None = None,
        data_collator: GroupCollator | None = None,
        train_dataset: datasets.Dataset | datasets.IterableDataset | None = None,
        eval_dataset: EvalDataset = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: Any = None,
        **kwargs: Any,
    ) -> None:
        """Check everything that can be checked before the first step.

        Args:
            model: A model with one label, a language model that answers yes or no, or the name of one
                (Hub id, folder, ``package:``); a base gets a new head, drawn from ``args.seed``.
            args: The settings.
            data_collator: Built from ``args`` if None; must agree with them otherwise.
            train_dataset: Groups; those that teach nothing are dropped and counted. A stream of them
                needs ``max_steps``, and is read in its order; see :mod:`lce_trainer.training.streaming`.
            eval_dataset: Groups, or several sets by name. Every passage of a group is ranked.
            processing_class: The tokenizer; the model's own if the model is given by name.
            peft_config: A ``peft.LoraConfig`` or its like, to train adapters; see :mod:`lce_trainer.model.adapters`.
            **kwargs: Those of ``transformers.Trainer``; what would have no effect is refused.

        Raises:
            TrainingError: Model, tokenizer and settings do not belong together, or no group is usable.
            ConfigError: A setting would be ignored.
            GroupsError: A dataset does not hold groups.
        """
        args = args or LCETrainingArguments("trainer_output")
        configure_logging(args)
        processing_class = check_arguments(args, data_collator, processing_class, kwargs)
        model, processing_class = prepare_model(model, processing_class, args, peft_config)
        self.counts: dict[str, int] = {}
        if train_dataset is not None:
            train_dataset, self.counts = usable_groups(train_dataset, args)
        for name, groups in by_name(eval_dataset).items():
            check_eval(groups, name, train_dataset)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator or group_collator(processing_class, args),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        self.model_accepts_loss_kwargs = True  # the same, before transformers 5.19
        save_at_step_ends(self.callback_handler.callbacks)
        check_model(self.accelerator.unwrap_model(self.model), processing_class, args)
        self.step_sums = StepSums()
        self.learning_monitor = LearningMonitor(lambda: self.step_sums.collect(self.accelerator))
        self.epochs = EpochCounter()
        self.stream_monitor = StreamMonitor()
        for callback in (self.learning_monitor, self.epochs, ForecastCallback(self.forecast), self.stream_monitor):
            self.add_callback(callback)
        if args.packing == "auto":
            enable_packing(self.model)
        else:
            disable_packing(self.model)  # that of an earlier trainer or Reranker
        compiled = self.accelerator.state.dynamo_plugin
        if compiled.dynamic is None:
            compiled.dynamic = True  # no two steps are of one shape
        self._bucket_overhead = pass_overhead(self.accelerator, args.bucket_overhead)
        shard_by_layer(self.accelerator, self.model)

    # ---- data

    def get_train_dataloader(self) -> DataLoader[Batch]:
        """Return the loader of batches, each row carrying its epoch; see :mod:`lce_trainer.training.sampling`."""
        if self.train_dataset is None:
            raise TrainingError("training needs a train_dataset of groups")
        loader: DataLoader[Batch] = self._get_dataloader(
            dataset=training_rows(
                self.train_dataset,
                self.processing_class,
                self._train_batch_size,
                self.args,
                by_name(self.eval_dataset).values(),
            ),
            description="Training",
            batch_size=self._train_batch_size,
            sampler_fn=self._get_train_sampler,
            is_training=True,
        )
        return loader

    def _get_train_sampler(self, train_dataset: Any = None) -> GroupSampler:
        return group_sampler(len(self.train_dataset), self._train_batch_size, self.args, lambda: self.epochs.now)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Return a loader that carries the groups to :meth:`evaluation_loop`, which makes its own batches of pairs."""
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]
        groups = self.eval_dataset if eval_dataset is None else eval_dataset
        if groups is None:
            raise TrainingError("evaluation needs an eval_dataset of groups")
        return DataLoader(groups, batch_size=self.args.eval_batch_size, collate_fn=list)

    def get_test_dataloader(self, test_dataset: datasets.Dataset) -> DataLoader[Any]:
        """Return what :meth:`get_eval_dataloader` does."""
        return self.get_eval_dataloader(test_dataset)

    def _prepare_inputs(self, inputs: Batch | Pass) -> Batch | Pass:
        """Leave a batch on the host, from where what the model reads goes to the device, and as it is.

        For DeepSpeed transformers would round labels and teacher's scores to half precision.
        """
        return inputs

    def floating_point_ops(self, inputs: Batch) -> int:
        """Estimate the operations of a step as transformers does, for the tokens that there are."""
        return 6 * int(inputs.pairs.lengths.sum()) * int(self.model.num_parameters(exclude_embeddings=True))

    def _track_num_input_tokens(self, inputs: Batch) -> None:
        """Count the tokens of all ranks; none of them is padding."""
        if self.args.include_num_input_tokens_seen != "no":
            tokens = torch.tensor(int(inputs.pairs.lengths.sum()), device=self.args.device)
            self.state.num_input_tokens_seen += int(self.accelerator.gather(tokens).sum())

    # ---- loss

    @property
    def _share(self) -> tuple[int, int]:
        """The number of this rank among those that share the pairs of each group, and how many they are."""
        return (self.args.process_index, self.args.world_size) if self.args.split_groups else (0, 1)

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> Tensor:
        """Count the groups in the whole optimizer step, over accumulated batches and ranks."""
        if is_stream(self.train_dataset):
            self.counts = self.stream_monitor.update(batch_samples, self.accelerator)
        groups = sum(len(batch.group_sizes) for batch in batch_samples)
        total: Tensor = self.accelerator.reduce(torch.tensor(float(groups), device=device), reduction="sum")
        return total / self._share[1]

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Run forward and backward, cut by ``micro_batch_size`` and ``split_groups``.

        See :mod:`lce_trainer.training.step`.
        """
        self.step_sums.start()
        if num_items_in_batch is None:
            num_items_in_batch = self._get_num_items_in_batch([inputs], self.args.device)
        model.train()
        step = super().training_step
        loss = run_step(
            self.accelerator,
            model,
            cut_step(inputs, self.args.micro_batch_size, *self._share, self.args.micro_batch_tokens),
            score=lambda pairs, is_counted: self._scores(model, pairs, is_counted),
            loss_of=lambda scores, batch: self._loss(scores, batch, num_items_in_batch)[0],
            backward=lambda one: step(model, one, num_items_in_batch),
            is_shared=self._share[1] > 1,
        )
        return loss / self._share[1]  # those that share groups have all computed the whole loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch | Pass,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return this batch's share of the step's loss: its groups' losses, over the groups of the step.

        Args:
            model: As wrapped for training.
            inputs: What :class:`GroupCollator` made, or one pass of a step that was cut.
            return_outputs: Also return the scores of a batch, shape ``(groups, width)``.
            num_items_in_batch: Groups of the step; those of this batch on all ranks if None.

        Raises:
            TrainingError: A loss is NaN or Inf; names the queries.
        """
        if isinstance(inputs, Pass):
            return inputs.loss(self._scores(model, inputs.pairs, inputs.is_counted))
        if num_items_in_batch is None:
            num_items_in_batch = self._get_num_items_in_batch([inputs], self.args.device)
        scores = self._scores(model, inputs.pairs, bool(len(inputs.group_sizes)))
        if len(inputs.group_sizes):
            loss, grid = self._loss(scores, inputs, num_items_in_batch)
        else:  # a batch that only has this rank run the model as often as the others
            loss, grid = scores.sum() * 0, scores.new_zeros(0, 0)
        return (loss, grid) if return_outputs else loss

    def _loss(self, scores: Tensor, batch: Batch, num_items_in_batch: Tensor | int) -> tuple[Tensor, Tensor]:
        """Return the loss of the pairs' scores, and the scores by group, shape ``(groups, width)``."""
        grid = batch.by_group(scores)
        mask, target = (part.to(grid.device, non_blocking=True) for part in (batch.mask, batch.target))
        teacher = batch.by_group(batch.teacher_scores, math.nan).to(grid.device, non_blocking=True)
        losses = self._group_losses(grid, target, mask, teacher)
        check_finite(losses.detach(), batch.query_ids, self.state.global_step + 1, self._get_learning_rate)
        with torch.no_grad():
            guessing = self._group_losses(torch.zeros_like(grid), target, mask, teacher)
            if not self._share[0]:  # of those that share groups one counts them
                self.step_sums.add_groups(grid.detach(), mask, target, losses.detach(), guessing)
                tokens, cut = int(batch.pairs.lengths.sum()), int(batch.is_cut.sum())
                self.step_sums.add_counts(pairs=len(batch.labels), tokens=tokens, cut_pairs=cut)
        # Ranks average their gradients, so a sum over ranks is wanted back.
        return losses.sum() * (self.accelerator.num_processes / num_items_in_batch), grid

    def _group_losses(self, grid: Tensor, target: Tensor, mask: Tensor, teacher: Tensor) -> Tensor:
        """Compute the loss of each group, shape ``(groups,)``."""
        args = self.args
        return group_losses(
            grid, target, mask, teacher, args.temperature, args.distillation_weight, args.distillation_temperature
        )

    def _scores(self, model: nn.Module, pairs: EncodedPairs, is_counted: bool = True) -> Tensor:
        """Compute the logit of each pair, shape ``(pairs,)``, in one graph."""
        device = self.args.device
        if packs(self.model):
            scores, tokens = packed_scores(model, pairs, self.model.config, device), int(pairs.lengths.sum())
        else:
            padding = (self._bucket_overhead, self.args.pad_to_multiple_of)
            scores, tokens = padded_scores(model, pairs, self.model, self.processing_class, device, *padding)
        if is_counted:
            self.step_sums.add_counts(padded_tokens=tokens)
        return scores

    # ---- logs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the curves of the groups since the last log."""
        if "loss" in logs:
            logs.update(curves(self.learning_monitor.collect(self.state.global_step)))
        super().log(logs, start_time)

    # ---- evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Return nDCG@10, MRR@10, MAP@10 and the loss, as ``eval_ndcg@10`` and so on.

        Several sets give ``eval_NAME_ndcg@10``, and ``eval_ndcg@10`` is then their plain mean.
        """
        sets = self.eval_dataset if eval_dataset is None else eval_dataset
        if not isinstance(sets, dict):
            alone: dict[str, float] = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
            return alone
        with self._evaluated_as_one():  # each set is logged by itself
            metrics: dict[str, float] = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if means := mean_over_sets(metrics, list(sets), metric_key_prefix):
            metrics |= means
            self.log(means)
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Score every passage of every group once, on some rank, and measure the rankings, the same on every rank."""
        started, args = time.perf_counter(), self.args
        groups: Any = dataloader.dataset
        model = self._model_to_evaluate()
        labels = [np.asarray(row, dtype=np.float64) for row in groups["labels"]]
        flat = score_pairs(
            lambda pairs: batch_scores(model, pairs, self.model, self.processing_class, args.device),
            self.processing_class,
            [(query, text) for query, texts in zip(groups["query"], groups["passages"], strict=True) for text in texts],
            args.max_length,
            tokens_at_once(args.eval_batch_tokens, args.device),
            self.accelerator,
            desc=description,
            leave=False,
            disable=args.disable_tqdm or not self.is_local_process_zero(),
        )
        scores = np.split(flat, np.cumsum([len(row) for row in labels])[:-1])
        query_ids = groups["query_id" if "query_id" in groups.column_names else "query"]
        metrics = group_metrics(scores, labels, args.temperature, query_ids)
        if self.compute_metrics is not None:
            metrics |= self.compute_metrics(EvalPrediction(predictions=scores, label_ids=labels))
        self.step_sums.exclude_time(time.perf_counter() - started)
        named = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(predictions=scores, label_ids=labels, metrics=named, num_samples=len(labels))

    def _model_to_evaluate(self) -> nn.Module:
        """Return the model as wrapped for evaluation."""
        model: nn.Module = self._wrap_model(self.model, training=False)
        if not prepared_models(self.accelerator) and model is self.model:  # evaluated before it was trained
            model = self.accelerator.prepare_model(model, evaluation_mode=True)
        if not self.is_in_train and (self.args.fp16_full_eval or self.args.bf16_full_eval):
            dtype = torch.float16 if self.args.fp16_full_eval else torch.bfloat16
            model = model.to(dtype=dtype, device=self.args.device)
        model.eval()
        return model

    @contextmanager
    def _evaluated_as_one(self) -> Iterator[None]:
        """Keep callbacks from taking each of several sets for an evaluation; ``on_evaluate`` is called once after it.

        Early stopping would count its patience once a set, and miss the mean over all of them.
        """
        handler = self.callback_handler
        handler.on_evaluate = lambda args, state, control, metrics: control
        try:
            yield
        finally:
            del handler.on_evaluate

    # ---- forecast

    def forecast(self) -> Forecast:
        """Estimate memory and time of a step; see :func:`lce_trainer.training.forecast.forecast_step`."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

        def score(pairs: EncodedPairs) -> Tensor:
            with self.accelerator.autocast():
                return self._scores(model, pairs, is_counted=False)

        is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        return forecast_step(model, self.args, self.data_collator, self.train_dataset, None if is_sharded else score)

    # ---- checkpoints

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, **kwargs: Any) -> TrainOutput:
        """Train, or go on training: to the same end, bit for bit on a CPU, wherever a run was interrupted.

        Args:
            resume_from_checkpoint: A checkpoint's folder, or True for the newest one under ``output_dir`` that
                verifies; those that do not are named in the log, and without any the run starts anew.
            **kwargs: Those of ``transformers.Trainer.train``.

        Raises:
            TrainingError: The checkpoint is missing or damaged, or training cannot go on.
        """
        set_early_stopping_metric(self.args, self.callback_handler.callbacks)
        needs_best = self.args.load_best_model_at_end
        checkpoint = checkpoint_to_resume(resume_from_checkpoint, Path(self.args.output_dir), needs_best)
        over = final_state(checkpoint, self.args, self.get_train_dataloader()) if checkpoint else None
        if checkpoint is None or over is None:
            return super().train(checkpoint and str(checkpoint), **kwargs)
        self.state = over
        if needs_best and over.best_global_step is not None:
            checkpoint = checkpoint.with_name(f"checkpoint-{over.best_global_step}")
            check_best(checkpoint)
        self._load_from_checkpoint(str(checkpoint))
        return TrainOutput(over.global_step, 0.0, {})

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with tensors_alone(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with tensors_alone(checkpoint):
            super()._load_rng_state(checkpoint)

    def _load_best_model(self) -> None:
        check_best(Path(self.state.best_model_checkpoint))
        super()._load_best_model()

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._prepare_push()
        self._to_push: str | None = None
        with sealed_checkpoint(self.args, self.state, Path(self._get_output_dir(trial))):
            super()._save_checkpoint(model, trial)
        if self._to_push is not None:
            super()._push_from_checkpoint(self._to_push)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Uploaded beside the training, so not before it is sealed: files come and go until then.
        self._to_push = checkpoint_folder

    # ---- saving

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write a plain checkpoint, under FSDP as well, whatever the checkpoints of the run look like."""
        if self._saves_itself(output_dir if _internal_call else None):
            self._save(output_dir, self._whole_weights())
        else:
            super().save_model(output_dir, _internal_call=True)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Write a plain checkpoint that every loader scores alike; settings as JSON, never as a pickle."""
        folder = Path(output_dir or self.args.output_dir)
        set_scoring_config(self.model, self.processing_class, self.args.max_length)
        super()._save(str(folder), state_dict)
        if self.args.should_save:
            save_cross_encoder_files(self.model, self.processing_class, folder)
            self.args.save_public(folder)

    def save_merged(self, output_dir: str | Path) -> None:
        """Write a plain checkpoint with the adapters merged into the model; the trainer's own keeps them.

        Raises:
            TrainingError: There are no adapters, or the base is quantized.
        """
        model = self.accelerator.unwrap_model(self.model)
        check_mergeable(model)
        weights = self._whole_weights()
        if self.is_world_process_zero():
            folder = Path(output_dir)
            save_reranker(merge_adapters(model, weights), self.processing_class, self.args.max_length, folder)
            self.args.save_public(folder)

    def _whole_weights(self) -> dict[str, Any] | None:
        """Gather the weights of a model of which each process holds a part; all processes must call this.

        Returns:
            On the first process the weights, on others nothing of use. None where each process holds the whole model.
        """
        if not self.is_fsdp_enabled and self.deepspeed is None:
            return None
        weights: dict[str, Any] = self.accelerator.get_state_dict(self.deepspeed or self.model)
        return weights

    def _saves_itself(self, output_dir: str | None) -> bool:
        """Return whether transformers would not write the model, or not as a plain checkpoint.

        Args:
            output_dir: Where transformers writes on its own; one named like a checkpoint is that of a run, any other
                folder is for everyone. None: where the user chooses.
        """
        if self.is_deepspeed_enabled:
            return bool(self.deepspeed is None)  # nothing was left to train
        return self._has_sharded_checkpoints and not re.fullmatch(r"checkpoint-\d+", Path(output_dir or "").name)

    @property
    def _has_sharded_checkpoints(self) -> bool:
        """Whether a run's checkpoints hold the model in parts, which nothing but a resumed run can read."""
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        return "FULL" not in str(getattr(plugin, "state_dict_type", "FULL"))

    def _prepare_push(self) -> None:
        """Put into the run's folder what transformers does not when it pushes a checkpoint in the middle of a run.

        That is the weights, where checkpoints are in parts, and what ``CrossEncoder`` cannot read from a config. All
        processes must call this.
        """
        args = self.args
        if not args.push_to_hub or args.hub_strategy == HubStrategy.END:
            return
        weights = self._whole_weights() if self._has_sharded_checkpoints else None
        push = getattr(self, "push_in_progress", None)
        if args.should_save and (args.hub_always_push or push is None or push.is_done()):  # or none is made now
            if weights is not None:
                self._save(args.output_dir, weights)
            save_cross_encoder_files(self.model, self.processing_class, Path(args.output_dir))


def prepare_model(
    model: str | Path | PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
    args: LCETrainingArguments,
    peft_config: Any = None,
) -> tuple[PreTrainedModel | None, PreTrainedTokenizerBase]:
    """Return a model and tokenizer that belong together, to be trained.

    Args:
        model: A model, or the name of one; None if it is made later.
        tokenizer: The model's own if None and the model is named.
        args: Of the training; a new head and adapters are drawn from its seed.
        peft_config: Adapters to train, see :func:`lce_trainer.model.adapters.add_adapters`.

    Raises:
        TrainingError: They do not belong together, or there is no such model.
        ConfigError: The package of a ``package:`` name is missing.
    """
    if isinstance(model, (str, Path)):
        tokenizer = tokenizer or load_tokenizer(model)
        set_seed(args.seed)
        model = load_model(model, yes_no=args.yes_no)
    if tokenizer is None:
        raise TrainingError("pass the tokenizer as processing_class, or the model by its name")
    if model is not None:
        configure_pairs(model, tokenizer, args.special_tokens_in_texts)
        config: Any = getattr(model, "config", None)
        for key in ("calibration", "first_stage_weight"):
            if getattr(config, key, None) is not None:
                logger.info("the %s of the model is dropped: it was chosen for the scores of other weights", key)
                delattr(config, key)
        keep_trainable(model)
        if peft_config is not None:
            set_seed(args.seed)
            model = add_adapters(model, peft_config, args.bf16 or args.fp16)
    return model, tokenizer
