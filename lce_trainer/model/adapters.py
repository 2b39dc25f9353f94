"""LoRA and its kind: adapters of PEFT on a frozen model, the classification head trained as a whole.

The folder of a trained adapter holds the adapter, the head and the tokenizer, and names its base.
:class:`lce_trainer.Reranker` loads it merged, and a merged model is a plain checkpoint.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from lce_trainer.compat import find_file, without_sharding
from lce_trainer.errors import TrainingError
from lce_trainer.model.families import head_modules
from lce_trainer.model.yes_no import is_language_model
from lce_trainer.names import failed


@dataclass
class LoRAConfig:
    """Low-rank adapters and the head are trained in place of all weights; the model is written merged.

    They need the ``peft`` extra, and a ``learning_rate`` about ten times that of training all weights.
    """

    r: int = field(default=0, metadata={"help": "Rank of the adapters; 0 trains all weights."})
    alpha: int = field(default=32, metadata={"help": "Scale of the adapters, divided by their rank."})
    dropout: float = field(default=0.05, metadata={"help": "Dropout on what the adapters read."})
    target_modules: list[str] | None = field(
        default=None, metadata={"help": "Names of the layers adapted; every linear one if null."}
    )


def add_adapters(model: PreTrainedModel, peft_config: Any, mixed_precision: bool) -> Any:
    """Return a model with adapters to train; all its other weights are frozen, but the classification head's.

    The base is neither cast nor moved, so it may be quantized; what is trained is float32.

    Args:
        model: A reranker.
        peft_config: A ``peft.PeftConfig``. Where it leaves open what is adapted, that is every linear
            layer but the head's.
        mixed_precision: Whether training runs under autocast.

    Raises:
        TrainingError: PEFT is not installed, the model has adapters already, or a base in half
            precision would meet a head in float32 without autocast.
    """
    peft = import_peft()
    if isinstance(model, peft.PeftModel):
        raise TrainingError("the model has adapters already: pass it without peft_config to train them")
    if not isinstance(peft_config, peft.PeftConfig):
        raise TrainingError(f"peft_config must be a peft.PeftConfig, like LoraConfig, not {type(peft_config).__name__}")
    config = copy.deepcopy(peft_config)
    if config.task_type is None:
        config.task_type = peft.TaskType.CAUSAL_LM if is_language_model(model) else peft.TaskType.SEQ_CLS
    if hasattr(config, "target_modules") and config.target_modules is None:
        config.target_modules = "all-linear"
    if hasattr(config, "modules_to_save") and not is_language_model(model):
        config.modules_to_save = sorted({*(config.modules_to_save or []), *head_modules(model)})
    try:
        adapted = peft.get_peft_model(model, config)
    except ValueError as error:  # no layer has such a name
        raise TrainingError(f"target_modules: {' '.join(str(error).split())}") from None
    for parameter in adapted.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            if not mixed_precision:
                kind = str(parameter.dtype).removeprefix("torch.")
                raise TrainingError(
                    f"the model is in {kind} and what is trained in float32: set bf16=True, or load it in float32"
                )
            parameter.data = parameter.data.float()
    return adapted


def keep_trainable(model: Any) -> None:
    """Keep gradients flowing through a base that bitsandbytes has quantized, whatever is done between two steps.

    A 4-bit layer that is evaluated on a CPU with AVX512-BF16 is laid out for inference, for good, by an operator that
    gives no gradient back: the adapters below it would stop to learn, and torch would only warn.

    Raises:
        TrainingError: That has happened to the model already.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
                raise TrainingError(
                    "the quantized model has been used on the CPU, after which bitsandbytes lets no gradient through: "
                    "load it anew, and score with it after its training"
                )
            module.support_avx512bf16_for_cpu = False


def lora(config: LoRAConfig) -> Any:
    """Return the ``peft.LoraConfig`` of a recipe; None if it trains all weights.

    Raises:
        TrainingError: PEFT is not installed.
    """
    if not config.r:
        return None
    return import_peft().LoraConfig(
        r=config.r, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=config.target_modules
    )


def check_mergeable(model: Any) -> None:
    """Check that a model has adapters that can be merged into it.

    Raises:
        TrainingError: The model has none, or its base is quantized.
    """
    if not hasattr(model, "merge_and_unload"):
        raise TrainingError("the model has no adapters to merge: save it with save_model()")
    if getattr(model.get_base_model(), "is_quantized", False):
        raise TrainingError(
            "adapters are not merged into a quantized base: save them with save_model(), and then load them onto the "
            "base as it was published, with Reranker.from_pretrained(folder).save_pretrained(another_folder)"
        )


def merge_adapters(model: Any, weights: Mapping[str, Tensor] | None = None) -> Any:
    """Return a copy of a model with its adapters merged into it: a plain model.

    Args:
        model: With adapters.
        weights: All of its weights, where this process holds a part of them only.

    Raises:
        TrainingError: The model has no adapters, or its base is quantized.
    """
    check_mergeable(model)
    if weights is None:
        return copy.deepcopy(model).merge_and_unload()
    base = model.get_base_model()
    (first, config), *others = model.peft_config.items()
    # One process draws the weights that are replaced, the others do not.
    with torch.random.fork_rng(devices=[]), without_sharding():
        whole = import_peft().get_peft_model(type(base)(copy.deepcopy(base.config)), copy.deepcopy(config), first)
        for name, config in others:
            whole.add_adapter(name, copy.deepcopy(config))
    whole.load_state_dict(weights, assign=True)
    whole.get_base_model().tie_weights()
    whole.set_adapter(model.active_adapter)
    return whole.merge_and_unload(safe_merge=True)  # in place it would change weights that may be the model's own


def load_merged(base: PreTrainedModel, name: str, path: str, new: Sequence[str]) -> PreTrainedModel:
    """Merge the adapters of a folder or Hub id into their base.

    Args:
        base: The model that the adapters were trained on.
        name: The adapters as their user names them, for messages.
        path: A Hub id or folder.
        new: The names of the base's weights that its own checkpoint lacks: the adapters must bring them.

    Raises:
        TrainingError: PEFT is not installed, or the adapters lack weights or cannot be read.
    """
    peft = import_peft()
    file = "adapter_model.safetensors"
    if (found := find_file(path, file)) is None:
        raise TrainingError(
            f"{name} has no {file}, so the adapters have no weights; a pickle (adapter_model.bin) is not read, because "
            "it can run code: save it again with a recent peft"
        )
    adapted: Any = None
    try:
        with safe_open(found, framework="pt") as opened:
            saved = set(opened.keys())
        missing = sorted({f"base_model.model.{key}" for key in new} - saved)
        if not missing:
            adapted = peft.PeftModel.from_pretrained(base, path)
            missing = sorted(set(peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)) - saved)
    except Exception as error:  # damaged files fail in whichever way their library fails
        missing = [str(key) for key in error.args if str(key).startswith("base_model.")]
        if not isinstance(error, KeyError) or not missing:  # else PEFT looked for a weight of modules_to_save
            raise failed(name, path, error) from None
    if missing:
        raise TrainingError(
            f"{name}: the adapters lack weights, such as {', '.join(missing[:3])}, which would be random: "
            "train with peft_config, or list the head in modules_to_save, so that it is saved with the adapters"
        )
    merged: PreTrainedModel = adapted.merge_and_unload()
    return merged


def import_peft() -> Any:
    """Import the PEFT library.

    Raises:
        TrainingError: It is not installed.
    """
    try:
        import peft
    except ImportError:
        raise TrainingError("adapters need PEFT: pip install 'lce-trainer[peft]'") from None
    return peft
