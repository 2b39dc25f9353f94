"""Every name of another library that this package uses and that library does not promise to keep.

Those are names with a leading underscore, hooks of transformers' ``Trainer`` that :class:`lce_trainer.LCETrainer`
overrides or calls, functions that are replaced on an instance, and internals with a public spelling. ``NAMES`` lists
all of them with the reason; ``tests/test_compat.py`` has one test for each, so an upgrade that renames one fails there
first, by a line that says what is gone and where it was used. Outside this module a private name of another library is
read through the functions below alone, or, where a subclass overrides it, stands in ``NAMES``.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Name:
    """A name of another library.

    Attributes:
        path: Module, class and attribute, with dots.
        used_in: The module of this package that uses it.
        reason: What it is used for, and why nothing public does.
        parameters: The parameters that are passed to it, or that an override of it takes; None if it is no function.
    """

    path: str
    used_in: str
    reason: str
    parameters: tuple[str, ...] | None = None


NAMES = (
    # ---- torch
    Name("torch.nn.Module._forward_hooks", "model.packed.cpu", "a layer with hooks must be called, not bypassed"),
    Name("torch.nn.Module._forward_pre_hooks", "model.packed.cpu", "DeepSpeed gathers a layer's weights in one"),
    Name(
        "torch.ops.mkldnn._linear_pointwise",
        "model.packed.cpu",
        "the fused linear layer of oneDNN, which only torch.compile reaches otherwise",
        ("X", "W", "B", "attr", "scalars", "algorithm"),
    ),
    Name(
        "torch.ops.aten._flash_attention_forward",
        "model.packed.attention",
        "torch.nn.attention.varlen, its public form, has no dropout",
        (
            *("query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal"),
            *("return_debug_mask", "scale", "window_size_left", "window_size_right"),
        ),
    ),
    # ---- transformers: models
    Name(
        "transformers.PreTrainedConfig._attn_implementation",
        "model.packed.packing",
        "set_attn_implementation has no counterpart that reads what is set",
    ),
    Name(
        "transformers.integrations.sdpa_attention.sdpa_attention_forward",
        "model.packed.attention",
        "the attention of input that is not packed stays transformers' own",
        ("module", "query", "key", "value", "attention_mask", "dropout", "scaling"),
    ),
    Name(
        "transformers.masking_utils.sdpa_mask",
        "model.packed.packing",
        "the mask of input that is not packed stays transformers' own",
        ("batch_size", "q_length", "kv_length", "attention_mask"),
    ),
    Name(
        "transformers.models.modernbert.modeling_modernbert.apply_rotary_pos_emb",
        "model.families",
        "ModernBERT's last layer is computed for one token a pair",
        ("q", "k", "cos", "sin", "unsqueeze_dim"),
    ),
    Name(
        "transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
        "model.families",
        "nothing else says whether a family without a record is a decoder",
    ),
    Name(
        "transformers.models.auto.modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES",
        "model.families",
        "encoders such as BERT stand in the list of decoders too",
    ),
    Name(
        "transformers.utils.hub.cached_files._raise_exceptions_for_missing_entries",
        "compat",
        "a file that a checkpoint may lack is looked up without an error",
    ),
    Name(
        "transformers.utils.hub.cached_files._raise_exceptions_for_connection_errors",
        "compat",
        "without a network the cache alone answers",
    ),
    Name(
        "transformers.integrations.deepspeed._hf_deepspeed_config_weak_ref",
        "compat",
        "under ZeRO-3 a model is made whole: the switch can be unset by a public function, and not set again",
    ),
    Name("transformers.cache_utils.DynamicLayer", "synthesis.llm.decode", "a cache with room for the tokens to come"),
    Name("transformers.cache_utils.DynamicSlidingWindowLayer", "synthesis.llm.tree", "windows are left to the masks"),
    # ---- transformers: Trainer
    Name("transformers.TrainingArguments._n_gpu", "training.checks", "nn.DataParallel would split a packed row"),
    Name(
        "transformers.Trainer.loss_is_scaled_for_ga",
        "training.trainer",
        "the loss is divided by the groups of the whole step already",
    ),
    Name(
        "transformers.Trainer.model_accepts_loss_kwargs",
        "training.trainer",
        "the same, before transformers 5.19",
    ),
    Name(
        "transformers.Trainer._get_dataloader",
        "training.trainer",
        "the training loader with transformers' own worker and prefetch settings",
        ("dataset", "description", "batch_size", "sampler_fn", "is_training"),
    ),
    Name("transformers.Trainer._train_batch_size", "training.trainer", "the batch size after auto_find_batch_size"),
    Name(
        "transformers.Trainer._get_train_sampler",
        "training.trainer",
        "overridden: groups come in the order of their epoch",
        ("train_dataset",),
    ),
    Name(
        "transformers.Trainer._prepare_inputs",
        "training.trainer",
        "overridden: a batch stays on the host, and under DeepSpeed its scores are not rounded to half precision",
        ("inputs",),
    ),
    Name(
        "transformers.Trainer._track_num_input_tokens",
        "training.trainer",
        "overridden: a batch is no dict of padded tensors",
        ("inputs",),
    ),
    Name(
        "transformers.Trainer._get_num_items_in_batch",
        "training.trainer",
        "overridden: a step's loss is divided by its groups, not by its tokens",
        ("batch_samples", "device"),
    ),
    Name("transformers.Trainer._get_learning_rate", "training.trainer", "an error names the learning rate", ()),
    Name(
        "transformers.Trainer._load_from_checkpoint",
        "training.trainer",
        "a run that was over is loaded, and not trained on",
        ("resume_from_checkpoint",),
    ),
    Name("transformers.Trainer._get_output_dir", "training.trainer", "a checkpoint's folder is sealed", ("trial",)),
    Name(
        "transformers.Trainer._save_checkpoint",
        "training.trainer",
        "overridden: a checkpoint is sealed when it is complete, before older ones are deleted",
        ("model", "trial"),
    ),
    Name(
        "transformers.Trainer._push_from_checkpoint",
        "training.trainer",
        "overridden: a checkpoint is pushed when it is sealed, with its manifest",
        ("checkpoint_folder",),
    ),
    Name(
        "transformers.Trainer._save",
        "training.trainer",
        "overridden: what is saved scores alike in every loader, and settings are JSON, not a pickle",
        ("output_dir", "state_dict"),
    ),
    Name(
        "transformers.Trainer._load_best_model",
        "training.trainer",
        "overridden: a best checkpoint that is gone is an error, where transformers keeps the last step's weights",
        (),
    ),
    Name(
        "transformers.Trainer._load_optimizer_and_scheduler",
        "training.trainer",
        "overridden: a pickle of more than tensors is an error of one line",
        ("checkpoint",),
    ),
    Name(
        "transformers.Trainer._load_rng_state",
        "training.trainer",
        "overridden, as _load_optimizer_and_scheduler",
        ("checkpoint",),
    ),
    Name(
        "transformers.Trainer._wrap_model",
        "training.trainer",
        "evaluation prepares the model as transformers' own does",
        ("model", "training"),
    ),
    Name(
        "transformers.Trainer.save_model",
        "training.trainer",
        "overridden: _internal_call tells a checkpoint of the run from a model saved by its user",
        ("output_dir", "_internal_call"),
    ),
    Name(
        "transformers.Trainer.push_in_progress",
        "training.trainer",
        "a checkpoint is not pushed while the one before it is",
    ),
    Name(
        "transformers.trainer_callback.CallbackHandler.on_evaluate",
        "training.trainer",
        "replaced while several sets are evaluated, so that callbacks count one evaluation",
        ("args", "state", "control", "metrics"),
    ),
    Name(
        "transformers.trainer_jit_checkpoint.JITCheckpointCallback.on_step_begin",
        "training.checkpoints",
        "replaced: a checkpoint on SIGTERM waits for the end of its step",
        ("args", "state", "control"),
    ),
    Name(
        "transformers.trainer_jit_checkpoint.JITCheckpointCallback.on_pre_optimizer_step",
        "training.checkpoints",
        "replaced, as on_step_begin",
        ("args", "state", "control"),
    ),
    # ---- accelerate
    Name(
        "accelerate.state.GradientState._set_sync_gradients",
        "distributed",
        "under DeepSpeed accelerate would take the optimizer's step with each backward pass",
        ("sync_gradients",),
    ),
    Name("accelerate.Accelerator._models", "training.trainer", "a model that is evaluated first is not yet prepared"),
    Name(
        "accelerate.utils.FullyShardedDataParallelPlugin.transformer_cls_names_to_wrap",
        "distributed",
        "set after the plugin was made, when the model's layers are known",
    ),
    Name(
        "accelerate.utils.TorchDynamoPlugin.dynamic",
        "training.trainer",
        "set after the plugin was made: no two steps have one shape",
    ),
    # ---- datasets
    Name("datasets.Dataset._indices", "groups.schema", "a selection of rows stays one, and copies no text"),
    Name("datasets.Dataset._fingerprint", "groups.schema", "checked rows get a new one without hashing every byte"),
    # ---- bitsandbytes
    Name(
        "bitsandbytes.nn.Linear4bit.support_avx512bf16_for_cpu",
        "model.adapters",
        "a layer laid out for inference on a CPU gives no gradient any more",
    ),
)


def has_forward_hooks(layer: Any) -> bool:
    """Return whether a ``torch.nn.Module`` has hooks that run only if the layer is called."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks)


def fused_linear(*arguments: Any) -> Any:
    """Call oneDNN's linear layer with a fused activation; see ``torch.ops.mkldnn._linear_pointwise``."""
    import torch

    return torch.ops.mkldnn._linear_pointwise(*arguments)


def flash_attention_forward(*arguments: Any, **named: Any) -> Any:
    """Call flash attention over variable lengths; see ``torch.ops.aten._flash_attention_forward``."""
    import torch

    return torch.ops.aten._flash_attention_forward(*arguments, **named)


def attention_implementation(config: Any) -> str | None:
    """Return the name of the attention function that a ``PreTrainedConfig`` has set."""
    name: str | None = config._attn_implementation
    return name


def find_file(path: str, name: str) -> str | None:
    """Return the local path of one file of a Hub id or folder, downloaded if need be; None if there is no such file.

    Raises:
        OSError: There is no such repository or folder.
    """
    from transformers.utils import cached_file

    found: str | None = cached_file(
        path, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
    )
    return found


@contextmanager
def without_sharding() -> Iterator[None]:
    """Make whole models in this process, under DeepSpeed as well, which shards them when training starts.

    Once its arguments ask for ZeRO-3, transformers would shard each weight as it is loaded: such a model cannot be
    inspected, and would be saved under the names that checkpoints of years ago had.
    """
    from transformers.integrations import deepspeed

    reference = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = reference


@contextmanager
def gradients_held_back(state: Any) -> Iterator[None]:
    """Have accelerate take a backward pass for one that is not the last of its step.

    Args:
        state: The accelerator's ``gradient_state``.
    """
    last = state.sync_gradients
    state._set_sync_gradients(False)
    try:
        yield
    finally:
        state._set_sync_gradients(last)


def prepared_models(accelerator: Any) -> list[Any]:
    """Return the models that an ``Accelerator`` has prepared."""
    models: list[Any] = accelerator._models
    return models


def use_one_gpu(args: Any) -> None:
    """Keep ``TrainingArguments`` from having the ``Trainer`` wrap the model in ``nn.DataParallel``."""
    args._n_gpu = 1


def row_selection(dataset: Any) -> Any:
    """Return the ``pyarrow.Table`` of the rows that a ``datasets.Dataset`` selects; None if it is all of them."""
    return dataset._indices


def fingerprint(dataset: Any) -> str:
    """Return the fingerprint of a ``datasets.Dataset``, which names its content for caches."""
    name: str = dataset._fingerprint
    return name
