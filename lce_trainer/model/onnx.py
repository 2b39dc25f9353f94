"""Rerankers as ONNX files: write one, make its int8 form, and score with it by ONNX Runtime on a CPU.

The files lie where sentence-transformers' ``CrossEncoder(..., backend="onnx")`` and text-embeddings-inference find
them: ``onnx/model.onnx`` beside the model's ``config.json`` and tokenizer, and ``onnx/model_qint8.onnx`` for int8.
Inputs are named as the tokenizer names them, and the number of pairs and of their tokens is free.

The int8 weights have 7 bits: x86 processors without VNNI add two products of 8 bits in 16, which overflows with more,
see https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html. So one file scores alike everywhere.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import SequenceClassifierOutput

from lce_trainer.compat import find_file
from lce_trainer.errors import ConfigError, TrainingError
from lce_trainer.model.families import family_of
from lce_trainer.model.loading import load_config
from lce_trainer.model.pairs import pad_pairs
from lce_trainer.model.scoring import scoring_batches
from lce_trainer.model.yes_no import is_language_model
from lce_trainer.names import failed, resolve_model

FILES = {"onnx": "onnx/model.onnx", "onnx-int8": "onnx/model_qint8.onnx"}  # by backend, in the model's folder

_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_EXAMPLES = (("a b", "c d e"), ("f", "g"), ("h i j", "k"))


class OnnxModel(nn.Module):
    """A reranker in an ONNX file, which is called as the model that it was exported from."""

    def __init__(self, name: str, file: str | Path, config: PreTrainedConfig) -> None:
        """Open a file.

        Args:
            name: The model as its user names it, for messages.
            file: The ONNX file.
            config: The model's.

        Raises:
            ConfigError: ONNX Runtime is not installed.
            TrainingError: The file cannot be read, or is not one of a cross-encoder.
        """
        require("onnxruntime")
        import onnxruntime

        super().__init__()
        self.config = config
        self.device = torch.device("cpu")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            self.session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # a damaged file fails in one of many ways
            raise failed(name, str(file), error, "ONNX model") from None
        self.inputs = [one.name for one in self.session.get_inputs()]
        outputs = [one.name for one in self.session.get_outputs()]
        if not {"input_ids", "attention_mask"} <= set(self.inputs) <= set(_INPUTS) or "logits" not in outputs:
            raise TrainingError(
                f"{name}: {Path(file).name} has the inputs {', '.join(self.inputs)} and the outputs "
                f"{', '.join(outputs)}; a cross-encoder has some of {', '.join(_INPUTS)}, and logits: export it again"
            )

    def forward(self, **inputs: Tensor) -> SequenceClassifierOutput:
        """Return the logits of padded pairs, shape ``(pairs, 1)``; token types are 0 where none are given."""
        fed = {name: inputs.get(name, torch.zeros_like(inputs["input_ids"])).numpy() for name in self.inputs}
        return SequenceClassifierOutput(logits=torch.from_numpy(self.session.run(["logits"], fed)[0]))

    def get_input_embeddings(self) -> nn.Embedding:
        """Return embeddings without values, of as many tokens as the model has."""
        return nn.Embedding(self.config.vocab_size, 1, device="meta")


def load_onnx(name: str | Path, backend: str) -> OnnxModel:
    """Load what :func:`write_onnx` wrote.

    Args:
        name: Hub id, folder, or ``package:NAME/FOLDER``.
        backend: A key of ``FILES``.

    Raises:
        TrainingError: There is no such model, it has no such file, or is not a reranker with one label.
        ConfigError: ONNX Runtime or the package of a ``package:`` name is missing.
    """
    path, config = resolve_model(str(name)), load_config(name)
    if config.num_labels != 1:
        raise TrainingError(f"{name} classifies into {config.num_labels} labels; a reranker has one")
    file = find_file(path, FILES[backend])
    if file is None:
        int8 = " --int8" if backend == "onnx-int8" else ""
        raise TrainingError(f"{name} has no {FILES[backend]}: write it with lce-trainer export {name} --to onnx{int8}")
    find_file(path, f"{FILES[backend]}.data")  # the weights of a model above 1.5 GB, which are downloaded with it
    return OnnxModel(str(name), file, config)


def write_onnx(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, file: Path) -> None:
    """Write a reranker as an ONNX file.

    Args:
        name: The model as its user names it, for messages.
        model: An encoder with a classification head, on the CPU, in float32 and not packed.
        tokenizer: The model's.
        file: The file to write. Weights of 1.5 GB or more go to a second one, with ``.data`` behind its name.

    Raises:
        ConfigError: The export extra is not installed.
        TrainingError: The model is a decoder, or cannot be exported.
    """
    if is_language_model(model) or family_of(model.config).is_decoder:
        raise TrainingError(
            f"{name} is a decoder ({type(model).__name__}), and only encoders are exported to ONNX: serve a decoder "
            "with vLLM, which loads the checkpoint as it is"
        )
    require("onnx", "onnxscript")
    _, pairs = next(scoring_batches(tokenizer, _EXAMPLES, 64, 1000))
    batch = pad_pairs(tokenizer, pairs)
    example = {key: batch[key] for key in _INPUTS if key in batch}
    free = {0: torch.export.Dim("pairs"), 1: torch.export.Dim("tokens")}
    try:
        with _quietly(), torch.no_grad():
            program = torch.onnx.export(
                model,
                (),
                kwargs=example,
                input_names=list(example),
                output_names=["logits"],
                dynamic_shapes=dict.fromkeys(example, free),
                dynamo=True,
                verbose=False,
            )
            assert program is not None
            _forget_origin(program.model.graph)
            program.save(file)
    except Exception as error:  # whatever the exporter stumbles over in a model's code
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise TrainingError(f"{name}: torch.onnx cannot export {type(model).__name__}: {reason}") from error


def quantize(file: Path, target: Path) -> None:
    """Write the int8 form of an ONNX file: int8 weights, a scale for each channel; activations as they come."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _quietly():
        quantize_dynamic(
            file,
            target,
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=file.with_name(f"{file.name}.data").exists(),
        )


def require(*packages: str) -> None:
    """Raise a ConfigError which names the extra, if one of its packages is not installed."""
    for package in packages:
        if find_spec(package) is None:
            raise ConfigError(f"ONNX needs the package {package}: pip install 'lce-trainer[export]'")


def _forget_origin(graph: Any) -> None:
    """Clear what the exporter says of each node: the lines of code it stems from, with paths of this machine."""
    for value in (*graph.inputs, *graph.initializers.values()):
        value.metadata_props.clear()
    for node in graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep warnings that are of no use to who exports, such as that torchvision is not installed."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
