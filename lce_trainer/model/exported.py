"""Rerankers in files that another runtime scores with on a CPU: where the files lie, and how they are loaded.

They lie where sentence-transformers' ``CrossEncoder(..., backend=...)`` looks for them, and text-embeddings-inference
for ONNX, beside the model's ``config.json`` and tokenizer. Inputs are named as the tokenizer names them, the output is
``logits``, and the number of pairs and of their tokens is free.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_outputs import SequenceClassifierOutput

from lce_trainer.compat import find_file
from lce_trainer.errors import ConfigError, TrainingError
from lce_trainer.model.loading import load_config
from lce_trainer.model.onnx import open_onnx
from lce_trainer.model.openvino import open_openvino
from lce_trainer.names import failed, resolve_model

FILES = {  # by backend, in the model's folder
    "onnx": "onnx/model.onnx",
    "onnx-int8": "onnx/model_qint8.onnx",
    "openvino": "openvino/openvino_model.xml",
    "openvino-int8": "openvino/openvino_model_qint8_quantized.xml",
}
INT8 = "-int8"  # ends a backend's name
INPUTS = ("input_ids", "attention_mask", "token_type_ids")


class Runtime(NamedTuple):
    """What scores with files of a kind.

    Attributes:
        name: Of the software.
        extra: The extra of this package that installs it.
        package: The Python package that scores.
        writers: Those that are needed to write a file besides.
    """

    name: str
    extra: str
    package: str
    writers: tuple[str, ...]


RUNTIMES = {
    "onnx": Runtime("ONNX Runtime", "export", "onnxruntime", ("onnx", "onnxscript")),
    "openvino": Runtime("OpenVINO", "openvino", "openvino", ("nncf",)),
}


def runtime_of(backend: str) -> Runtime:
    """Return what scores with a backend's file."""
    return RUNTIMES[backend.removesuffix(INT8)]


class ExportedModel(nn.Module):
    """A reranker in a file of another runtime, which is called as the model that it was exported from."""

    def __init__(self, name: str, backend: str, file: str | Path, config: PreTrainedConfig) -> None:
        """Open a file.

        Args:
            name: The model as its user names it, for messages.
            backend: A key of ``FILES``.
            file: The file, with its weights beside it where they are in a second one.
            config: The model's.

        Raises:
            ConfigError: The runtime is not installed.
            TrainingError: The file cannot be read, or is not one of a cross-encoder.
        """
        super().__init__()
        runtime = runtime_of(backend)
        require(runtime, runtime.package)
        self.config = config
        self.device = torch.device("cpu")
        try:
            opened = open_openvino(file) if runtime.package == "openvino" else open_onnx(file)
        except Exception as error:  # a damaged file fails in one of many ways
            raise failed(name, str(file), error, f"{runtime.name} model") from None
        self.inputs, outputs, self.run = opened
        if not {"input_ids", "attention_mask"} <= set(self.inputs) <= set(INPUTS) or "logits" not in outputs:
            raise TrainingError(
                f"{name}: {Path(file).name} has the inputs {', '.join(self.inputs)} and the outputs "
                f"{', '.join(outputs)}; a cross-encoder has some of {', '.join(INPUTS)}, and logits: export it again"
            )

    def forward(self, **inputs: Tensor) -> SequenceClassifierOutput:
        """Return the logits of padded pairs, shape ``(pairs, 1)``; token types are 0 where none are given."""
        fed = {name: inputs.get(name, torch.zeros_like(inputs["input_ids"])).numpy() for name in self.inputs}
        return SequenceClassifierOutput(logits=torch.from_numpy(self.run(fed)))

    def get_input_embeddings(self) -> nn.Embedding:
        """Return embeddings without values, of as many tokens as the model has."""
        return nn.Embedding(self.config.vocab_size, 1, device="meta")


def load_exported(name: str | Path, backend: str) -> ExportedModel:
    """Load a model that ``lce-trainer export`` has written.

    Args:
        name: Hub id, folder, or ``package:NAME/FOLDER``.
        backend: A key of ``FILES``.

    Raises:
        TrainingError: There is no such model, it has no such file, or is not a reranker with one label.
        ConfigError: The runtime or the package of a ``package:`` name is missing.
    """
    path, config = resolve_model(str(name)), load_config(name)
    if config.num_labels != 1:
        raise TrainingError(f"{name} classifies into {config.num_labels} labels; a reranker has one")
    format_, int8 = backend.removesuffix(INT8), " --int8" if backend.endswith(INT8) else ""
    how = f"write it with lce-trainer export {name} --to {format_}{int8}"
    file = find_file(path, FILES[backend])
    if file is None:
        raise TrainingError(f"{name} has no {FILES[backend]}: {how}")
    # A second file is downloaded with the first. That of ONNX is there for models above 1.5 GB alone.
    if find_file(path, weights_of(backend)) is None and format_ == "openvino":
        raise TrainingError(f"{name} has no {weights_of(backend)}, the weights of {FILES[backend]}: {how}")
    return ExportedModel(str(name), backend, file, config)


def weights_of(backend: str) -> str:
    """Return the second file of a backend, which holds the weights, in the model's folder."""
    file = FILES[backend]
    return f"{file.removesuffix('.xml')}.bin" if file.endswith(".xml") else f"{file}.data"


def require(runtime: Runtime, *packages: str) -> None:
    """Check that packages of a runtime are installed.

    Raises:
        ConfigError: One is not; names the extra.
    """
    for package in packages:
        if find_spec(package) is None:
            raise ConfigError(f"{runtime.name} needs the package {package}: pip install 'lce-trainer[{runtime.extra}]'")
