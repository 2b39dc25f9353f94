"""Rerankers as OpenVINO files: write one, make its int8 form, and open it.

The int8 form is quantized with NNCF after training: the ranges of activations are those of a sample of pairs, and the
weights of embeddings and of the encoder's linear layers are int8 with a scale for each channel.

Scores are computed in float32, also where the processor has bfloat16, which OpenVINO would choose there: those of the
float form are the model's own then.
"""

import ctypes
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel


def open_openvino(
    file: str | Path, precision: str = "f32"
) -> tuple[list[str], list[str], Callable[[dict[str, np.ndarray]], np.ndarray]]:
    """Return the names of a file's inputs and outputs, and what computes the logits of a batch of inputs.

    Args:
        file: The ``.xml``, with the weights of the same name beside it.
        precision: ``f32`` or ``bf16``, of what is not int8.
    """
    with _without_telemetry():
        import openvino

    settings = {
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "ENABLE_CPU_PINNING": False,  # or the threads of several processes are bound to the same cores
    }
    with _own_signal_stack():
        model = openvino.Core().compile_model(str(file), "CPU", settings)
    alone = Lock()  # a compiled model works on one batch at a time, and refuses a second

    def run(inputs: dict[str, np.ndarray]) -> np.ndarray:
        with alone:
            logits: np.ndarray = model(inputs)["logits"]
        return logits

    inputs, outputs = ([one.get_any_name() for one in ports] for ports in (model.inputs, model.outputs))
    return inputs, outputs, run


def write_openvino(model: PreTrainedModel, example: dict[str, Tensor], file: Path) -> None:
    """Write a reranker as an OpenVINO file.

    Args:
        model: An encoder with a classification head, on the CPU, in float32 and not packed.
        example: Inputs of a batch, whose pairs differ in length.
        file: The ``.xml`` to write; the weights go to a ``.bin`` beside it, in float32.
    """
    with _without_telemetry(), torch.no_grad():
        import openvino

        converted = openvino.convert_model(model, example_input=example)
        openvino.save_model(converted, file, compress_to_fp16=False)


def quantize_openvino(
    file: Path, target: Path, sample: Sequence[dict[str, np.ndarray]], model: PreTrainedModel
) -> None:
    """Write the int8 form of a file.

    The head stays whole, from the pooler on: it is one row for each pair, so int8 gains nothing there, and what it
    rounds goes straight into the score. Without, the scores of a MiniLM reranker are three times as far off.

    Args:
        file: From :func:`write_openvino`.
        target: The ``.xml`` to write.
        sample: Inputs whose activations have the range that int8 is to cover.
        model: What the file was written from.
    """
    with _without_telemetry(), _own_signal_stack():
        import nncf
        import openvino

        head = [rf"__module\.(?!{model.base_model_prefix}\b).*", r"__module\.(.*\.)?pooler\..*"]
        quantized = nncf.quantize(
            openvino.Core().read_model(file),
            nncf.Dataset(sample),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(sample),
            ignored_scope=nncf.IgnoredScope(patterns=head, validate=False),
        )
        openvino.save_model(quantized, target, compress_to_fp16=False)


class _SignalStack(ctypes.Structure):
    """``stack_t`` of sigaltstack(2), which is laid out in this order on Linux."""

    _fields_ = (("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextmanager
def _own_signal_stack() -> Iterator[None]:
    """Have this thread keep the stack that its signals are handled on.

    Each plugin that OpenVINO loads sets one of its own, and when it goes it sets what it had found: with two of them,
    which may be the stack of one that is gone already. The next signal, such as that of Ctrl-C, is then a segmentation
    fault.
    """
    if sys.platform != "linux":
        yield
        return
    library, before = ctypes.CDLL(None), _SignalStack()
    library.sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        library.sigaltstack(ctypes.byref(before), None)


@contextmanager
def _without_telemetry() -> Iterator[None]:
    """Have OpenVINO and NNCF imported without the package that sends their telemetry.

    Both send events to Google Analytics, the first when they are imported, unless the user has opted out or that
    package is not there, see https://docs.openvino.ai/2026/about-openvino/additional-resources/telemetry.html.
    """
    name = "openvino_telemetry"
    if name in sys.modules:  # imported by the user's own program
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]
