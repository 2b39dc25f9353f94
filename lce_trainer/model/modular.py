"""Modular CrossEncoders of sentence-transformers as plain checkpoints.

From its release 5.4 on sentence-transformers saves rerankers such as Ettin's as ``Transformer``, ``Pooling``,
``Dense``, ``LayerNorm`` and ``Dense``, each in its own folder, with a base model in the first. Where transformers'
classification head of the family computes the same function, the weights of the modules become those of that head:
the first ``Dense`` with its activation, the norm, and the classifier. If the head's norm has no bias, the norm's bias
goes through the classifier's weight into the classifier's bias, which is exact but for rounding. The way back,
:func:`save_modular`, is sentence-transformers' own.
"""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lce_trainer.compat import find_file
from lce_trainer.errors import ConfigError, TrainingError
from lce_trainer.model.crossencoder import read_json
from lce_trainer.model.families import family_of
from lce_trainer.model.saving import set_scoring_config
from lce_trainer.names import failed

_KINDS = ["Transformer", "Pooling", "Dense", "LayerNorm", "Dense"]
# Modules of PyTorch, and what transformers calls the same function.
_ACTIVATIONS = {
    "torch.nn.modules.activation.GELU": "gelu",
    "torch.nn.modules.activation.ReLU": "relu",
    "torch.nn.modules.activation.SiLU": "silu",
    "torch.nn.modules.activation.Tanh": "tanh",
    "torch.nn.modules.activation.Sigmoid": "sigmoid",
    "torch.nn.modules.linear.Identity": "linear",
}
_EPSILON = 1e-5  # of sentence-transformers' LayerNorm, which has no setting for it


@dataclass(frozen=True)
class ModularHead:
    """The modules after the base model of a modular CrossEncoder.

    Attributes:
        name: The model as its user names it, for messages.
        kinds: The classes of all modules, in order, the base model's first.
        configs: The ``config.json`` of each module but the base model.
        weights: The weights of each module but the base model; empty for one that has none.
    """

    name: str
    kinds: list[str]
    configs: list[dict[str, Any]]
    weights: list[dict[str, Tensor]]


def read_modular_head(name: str, path: str) -> ModularHead | None:
    """Read the modules of a modular CrossEncoder.

    Args:
        name: The model as its user names it, for messages.
        path: A Hub id or folder.

    Returns:
        The modules; None if this is a plain checkpoint, a language model that answers yes or no, or a bi-encoder.

    Raises:
        TrainingError: A module's files are missing or damaged.
    """
    modules = read_json(path, "modules.json")
    if not isinstance(modules, list):
        return None
    kinds = [str(module.get("type")).rpartition(".")[2] for module in modules]
    if set(kinds[1:]) <= {"LogitScore"}:
        return None
    configs = [read_json(path, f"{module.get('path')}/config.json") or {} for module in modules[1:]]
    settings = read_json(path, "config_sentence_transformers.json") or {}
    scores = any(config.get("module_output_name") == "scores" for config in configs)
    if settings.get("model_type") != "CrossEncoder" and not scores:
        return None  # a bi-encoder is a base for a new head
    prompt = (settings.get("prompts") or {}).get(settings.get("default_prompt_name"))
    if prompt:
        raise TrainingError(f"{name} puts the prompt {prompt!r} before its texts, which a plain checkpoint cannot say")
    weights = []
    for kind, module in zip(kinds[1:], modules[1:], strict=True):
        file = f"{module.get('path')}/model.safetensors"
        found = find_file(path, file) if kind in ("Dense", "LayerNorm") else None
        if kind in ("Dense", "LayerNorm") and found is None:
            raise TrainingError(f"{name}: {file} is missing, so the head has no weights; download the whole model")
        try:
            weights.append(load_file(found) if found else {})
        except Exception as error:  # SafetensorError has no base class of its own
            raise failed(f"{name}/{file}", path, error) from None
    return ModularHead(name, kinds, configs, weights)


def configure_head(config: PreTrainedConfig, head: ModularHead) -> None:
    """Set in a base model's config what makes its family's classification head compute what the modules do.

    Raises:
        TrainingError: It cannot; the message says which part has no counterpart.
    """
    config.classifier_pooling, config.classifier_activation, config.classifier_bias = _checked(config, head)


def set_head(model: PreTrainedModel, head: ModularHead) -> set[str]:
    """Copy the modules' weights into a model whose config :func:`configure_head` has set.

    Returns:
        The names of the weights that were set.

    Raises:
        TrainingError: A weight is missing or has another shape.
    """
    width = model.config.hidden_size
    dense, norm, classifier = 1, 2, 3  # places among the modules after the base model
    weight = _weight(head, classifier, "linear.weight", (1, width))
    shift = _weight(head, norm, "norm.bias", (width,))
    bias = torch.zeros(1, dtype=torch.float64)
    if head.configs[classifier].get("bias", True):
        bias += _weight(head, classifier, "linear.bias", (1,))
    new = {
        "head.dense.weight": _weight(head, dense, "linear.weight", (width, width)),
        "head.norm.weight": _weight(head, norm, "norm.weight", (width,)),
        "classifier.weight": weight,
    }
    if model.config.classifier_bias:
        new["head.dense.bias"] = _weight(head, dense, "linear.bias", (width,))
    if model.config.norm_bias:
        new["head.norm.bias"] = shift
    else:
        bias += weight.double() @ shift.double()
    new["classifier.bias"] = bias
    with torch.no_grad():
        for key, value in new.items():
            model.get_parameter(key).copy_(value)
    return set(new)


def save_modular(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int, folder: Path) -> None:
    """Write a reranker as a modular CrossEncoder, by sentence-transformers' own classes; it gives raw logits.

    Args:
        model: A plain classifier whose head the modules can say.
        tokenizer: The model's.
        max_length: Tokens of a pair that it reads at most.
        folder: Made if it is missing.

    Raises:
        TrainingError: The head is built otherwise.
        ConfigError: sentence-transformers is not installed.
    """
    config = model.config
    if not family_of(config).has_normed_head:
        raise TrainingError(
            f"a {config.model_type} model is not saved as modules: its head is no dense layer, norm and classifier "
            "over a pooled token, as ModernBERT's is; save it plain"
        )
    known = {name: kind for kind, name in _ACTIVATIONS.items()}
    if config.classifier_activation not in known or config.norm_eps != _EPSILON:
        raise TrainingError(
            f"the head's activation {config.classifier_activation} or the {config.norm_eps} that its norm adds to the "
            f"variance cannot be said in modules ({', '.join(known)}; {_EPSILON}): save it plain"
        )
    try:
        from sentence_transformers import CrossEncoder
        from sentence_transformers.base.modules import Dense, Transformer
        from sentence_transformers.sentence_transformer.modules import LayerNorm, Pooling
    except ImportError:
        raise ConfigError("modules are written by sentence-transformers: pip install 'lce-trainer[dense]'") from None
    set_scoring_config(model, tokenizer, max_length)
    with TemporaryDirectory() as base:
        model.base_model.save_pretrained(base)
        tokenizer.save_pretrained(base)
        transformer = Transformer(base, model_kwargs={"dtype": model.dtype})
    width = config.hidden_size
    activation = getattr(torch.nn, known[config.classifier_activation].rpartition(".")[2])()
    dense = Dense(width, width, bias=config.classifier_bias, activation_function=activation)
    norm = LayerNorm(width)
    classifier = Dense(width, 1, activation_function=torch.nn.Identity(), module_output_name="scores")
    dense.linear.load_state_dict(model.head.dense.state_dict())
    norm.norm.load_state_dict(model.head.norm.state_dict(), strict=config.norm_bias)  # without one it is 0
    classifier.linear.load_state_dict(model.classifier.state_dict())
    modules = [transformer, Pooling(width, config.classifier_pooling), dense, norm, classifier]
    CrossEncoder(modules=[module.to(model.dtype) for module in modules], device="cpu").save_pretrained(
        str(folder), create_model_card=False
    )


def _weight(head: ModularHead, place: int, key: str, shape: tuple[int, ...]) -> Tensor:
    """Return a weight of one of the modules after the base model.

    Raises:
        TrainingError: It is missing or has another shape.
    """
    what = f"{head.name}: {key} of its module {place + 1}, {head.kinds[place + 1]},"
    found = head.weights[place].get(key)
    if found is None:
        raise TrainingError(f"{what} is missing, which would be random: download the model again")
    if tuple(found.shape) != shape:
        raise TrainingError(f"{what} has the shape {tuple(found.shape)}, and the base model takes {shape}")
    return found


def _checked(config: PreTrainedConfig, head: ModularHead) -> tuple[str, str, bool]:
    """Return pooling, activation and whether the first layer has a bias, of modules that are a plain head.

    Raises:
        TrainingError: They are not.
    """
    if not family_of(config).has_normed_head:
        raise _refused(head, f"transformers' head of a {config.model_type} model is built otherwise")
    if head.kinds != _KINDS:
        raise _refused(head, f"a plain head is {', '.join(_KINDS)}")
    pooling, dense, _, classifier = head.configs
    modes = [key for key, value in pooling.items() if key.startswith("pooling_mode_") and value is True]
    mode = pooling.get("pooling_mode") or "+".join(mode.removeprefix("pooling_mode_") for mode in modes)
    mode = {"cls_token": "cls", "mean_tokens": "mean"}.get(str(mode), str(mode))
    activation = str(dense.get("activation_function"))
    last = str(classifier.get("activation_function"))
    if mode not in ("cls", "mean"):
        raise _refused(head, f"it pools tokens by {mode!r}, and a plain head by cls or mean")
    if activation not in _ACTIVATIONS:
        raise _refused(head, f"its activation {activation} has no counterpart in transformers")
    if _ACTIVATIONS.get(last) != "linear":
        raise _refused(head, f"it puts {last} on the score, and a plain head gives the raw logit")
    if classifier.get("out_features") != 1:
        raise _refused(head, f"it gives {classifier.get('out_features')} scores, and a reranker one")
    if dense.get("use_residual") or classifier.get("use_residual"):
        raise _refused(head, "it has a residual connection, and a plain head none")
    for module in (dense, classifier):
        read = module.get("module_input_name", "sentence_embedding")
        if read != "sentence_embedding":
            raise _refused(head, f"a Dense module reads {read!r}, not what is before it")
    if dense.get("module_output_name", "sentence_embedding") != "sentence_embedding":
        raise _refused(
            head, f"its first Dense module writes {dense['module_output_name']!r}, which the norm never reads"
        )
    if config.norm_eps != _EPSILON:
        raise _refused(head, f"its norm adds {_EPSILON} to the variance, and the model's others {config.norm_eps}")
    return mode, _ACTIVATIONS[activation], bool(dense.get("bias", True))


def _refused(head: ModularHead, reason: str) -> TrainingError:
    return TrainingError(
        f"{head.name} is a CrossEncoder of the modules {', '.join(head.kinds)}, which no plain checkpoint is: "
        f"{reason}; a base model or a reranker of the architecture ForSequenceClassification can be used"
    )
