"""Rerankers as ONNX files: write one, make its int8 form, and open it with ONNX Runtime.

The int8 weights have 7 bits: x86 processors without VNNI add two products of 8 bits in 16, which overflows with more,
see https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html. So one file scores alike everywhere.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel


def open_onnx(file: str | Path) -> tuple[list[str], list[str], Callable[[dict[str, np.ndarray]], np.ndarray]]:
    """Return the names of a file's inputs and outputs, and what computes the logits of a batch of inputs."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def run(inputs: dict[str, np.ndarray]) -> np.ndarray:
        logits: np.ndarray = session.run(["logits"], inputs)[0]
        return logits

    return [one.name for one in session.get_inputs()], [one.name for one in session.get_outputs()], run


def write_onnx(model: PreTrainedModel, example: dict[str, Tensor], file: Path) -> None:
    """Write a reranker as an ONNX file.

    Args:
        model: An encoder with a classification head, on the CPU, in float32 and not packed.
        example: Inputs of a batch, whose pairs differ in length.
        file: The file to write. Weights of 1.5 GB or more go to a second one, with ``.data`` behind its name.
    """
    free = {0: torch.export.Dim("pairs"), 1: torch.export.Dim("tokens")}
    with torch.no_grad():
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


def quantize_onnx(file: Path, target: Path) -> None:
    """Write the int8 form of a file: int8 weights, a scale for each channel; activations are rounded as they come."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        file,
        target,
        per_channel=True,
        reduce_range=True,
        weight_type=QuantType.QInt8,
        use_external_data_format=file.with_name(f"{file.name}.data").exists(),
    )


def _forget_origin(graph: Any) -> None:
    """Clear what the exporter says of each node: the lines of code it stems from, with paths of this machine."""
    for value in (*graph.inputs, *graph.initializers.values()):
        value.metadata_props.clear()
    for node in graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
