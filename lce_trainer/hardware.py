"""Which precision this machine multiplies fast."""

from typing import Any

import torch

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}


def best_device() -> torch.device:
    """The accelerator that is really there, else the CPU.

    ``torch.accelerator.current_accelerator()`` alone names ``cuda`` for every CUDA build of PyTorch, also on a
    machine without a GPU, where the first use of that device fails.
    """
    if torch.accelerator.is_available() and (device := torch.accelerator.current_accelerator()) is not None:
        return device
    return torch.device("cpu")


def multiplies_bfloat16() -> bool:
    """Whether bfloat16 products are the hardware's own; emulated, they are slower than float32."""
    device = best_device()
    if device.type == "cpu":
        known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # older torch cannot tell
        return bool(known.get("avx512_bf16") or known.get("amx_bf16"))
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def resolve_dtype(name: str) -> torch.dtype:
    """``"auto"`` is bfloat16 where the hardware multiplies it, else float32; other names are torch's own."""
    if name == "auto":
        return torch.bfloat16 if multiplies_bfloat16() else torch.float32
    return DTYPES[name]
