"""Which precision this machine multiplies fast."""

import torch


def multiplies_bfloat16() -> bool:
    """Whether matrices of bfloat16 run on the hardware's own instructions, not on emulation."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if torch.accelerator.is_available():
        return False
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def resolve_dtype(name: str) -> torch.dtype:
    """``"auto"`` is bfloat16 where the hardware multiplies it, else float32; other names are torch's own."""
    if name == "auto":
        return torch.bfloat16 if multiplies_bfloat16() else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
