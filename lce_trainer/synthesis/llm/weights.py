"""Load a causal language model and its tokenizer; a GGUF file is converted once and kept."""

import copy
import hashlib
import importlib.metadata
import logging
import os
import secrets
import shutil
import socket
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from huggingface_hub import constants
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lce_trainer.artifacts import file_sha256, read_manifest, write_manifest
from lce_trainer.errors import ArtifactError, LLMError
from lce_trainer.hardware import DTYPES, best_device, resolve_dtype
from lce_trainer.names import load_checkpoint, load_tokenizer_files, resolve_model
from lce_trainer.synthesis.llm.protocol import LLMConfig

logger = logging.getLogger(__name__)

_CLOCK_ERROR = 2.0  # seconds by which a process can seem to have started later than it did


def load_model(config: LLMConfig) -> tuple[Any, Any]:
    """The model, ready to answer on the accelerator if there is one, and its tokenizer.

    Args:
        config: Names a Hub id, a folder, a ``.gguf`` file, or ``package:NAME``.

    Raises:
        ConfigError: ``package:NAME`` is not installed.
        LLMError: There is no such model, it is damaged, it is not a causal one, or there is no such dtype.
    """
    name = resolve_model(config.model)
    device = best_device()
    if config.dtype not in ("auto", *DTYPES):
        raise LLMError(f"llm.dtype must be one of auto, {', '.join(DTYPES)}, not {config.dtype!r}")
    dtype = resolve_dtype(config.dtype)
    try:
        path = str(_converted(Path(name).expanduser(), dtype)) if name.lower().endswith(".gguf") else name
        logger.info("loading %s in %s on %s", config.model, str(dtype).removeprefix("torch."), device)
        tokenizer = load_tokenizer_files(config.model, path)
        model, _ = load_checkpoint(AutoModelForCausalLM, config.model, path, dtype=dtype)
        model = model.to(device).eval().requires_grad_(False)
    # What a broken or foreign checkpoint raises has no common base: OSError, ValueError, KeyError, SafetensorError, …
    except Exception as error:
        if isinstance(error, LLMError):
            raise
        raise _cannot_load(config.model, error) from error
    # A checkpoint's own sampling settings would silently mix with ours.
    end = getattr(model.generation_config, "eos_token_id", None)
    end = tokenizer.eos_token_id if end is None else end
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = (end[0] if isinstance(end, list) else end) or 0
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=pad)
    # Given the strided slice of last positions, torch's matmul copies the whole vocabulary matrix once a row.
    model.get_output_embeddings().register_forward_pre_hook(
        lambda _, args: (args[0].clone(memory_format=torch.contiguous_format), *args[1:])
    )
    return model, tokenizer


def load_tokenizer(config: LLMConfig) -> Any:
    """Return the tokenizer alone, which knows whether the model has a chat template.

    Raises:
        ConfigError: ``package:NAME`` is not installed.
        LLMError: There is no such model, or its tokenizer cannot be loaded.
    """
    name = resolve_model(config.model)
    try:
        gguf = name.lower().endswith(".gguf")
        path = str(_converted(Path(name).expanduser(), resolve_dtype(config.dtype))) if gguf else name
        return load_tokenizer_files(config.model, path)
    except Exception as error:  # as in load_model
        if isinstance(error, LLMError):
            raise
        raise _cannot_load(config.model, error) from error


def _cannot_load(model: str, error: Exception) -> LLMError:
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return LLMError(
        f"cannot load {model!r} as a causal language model: {reason}; "
        "llm.model takes a Hub id, a folder, a .gguf file, or package:NAME"
    )


def _converted(gguf: Path, dtype: torch.dtype) -> Path:
    """The folder of a GGUF file's weights as safetensors in ``dtype``, made the first time it is asked for.

    ``transformers`` unpacks a GGUF file at every load, which takes most of a minute for a model that
    then loads from safetensors in a second.
    """
    if not gguf.is_file():
        raise LLMError(f"no GGUF file at {gguf}")
    what = f"{file_sha256(gguf)} {dtype} transformers {importlib.metadata.version('transformers')}"
    cache = Path(constants.HF_HOME) / "lce_trainer"
    folder = cache / hashlib.sha256(what.encode()).hexdigest()[:16]
    _sweep(cache)
    try:
        read_manifest(folder, "unpacked")
        return folder
    except ArtifactError as error:
        if folder.is_dir():
            logger.warning("unpacked again: %s", error)
            shutil.rmtree(folder, ignore_errors=True)
    logger.info("unpacking %s into %s; this takes a minute, once", gguf.name, folder)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        part = cache / f".{folder.name}.{secrets.token_hex(4)}.{socket.gethostname()}.{os.getpid()}"
        part.mkdir()  # tempfile's folders are for their owner alone; this one is for who may use HF_HOME
    except OSError as error:
        raise _cannot_write(cache, error) from None
    try:
        # From 5.23 on weights can stay packed where a kernel for them is installed; those cannot be saved.
        unpacked = transformers.GgufConfig(dequantize=True) if hasattr(transformers, "GgufConfig") else None
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=dtype, quantization_config=unpacked
        )
        settings = copy.deepcopy(model.config)
        if hasattr(settings, "quantization_config"):
            del settings.quantization_config
        with torch.device("meta"):
            plain = AutoModelForCausalLM.from_config(settings, dtype=dtype)
        plain.load_state_dict(model.state_dict(), assign=True)
        plain.tie_weights()
        plain.generation_config = model.generation_config
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        try:
            plain.save_pretrained(part)
            tokenizer.save_pretrained(part)
            for file in part.iterdir():  # safetensors writes for the owner alone
                file.chmod(part.stat().st_mode & 0o666)
            names = [file.name for file in part.iterdir()]
            write_manifest(part, names, kind="unpacked", config={}, inputs={}, counts={})
            part.rename(folder)
        except (OSError, SafetensorError) as error:
            try:
                read_manifest(folder, "unpacked")  # another process was faster
            except ArtifactError:
                raise _cannot_write(cache, error) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def _cannot_write(cache: Path, error: Exception) -> LLMError:
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())
    return LLMError(
        f"cannot write {cache} ({reason}), where unpacked GGUF files are kept: make room, or set HF_HOME to a folder "
        "that you can write"
    )


def _sweep(cache: Path) -> None:
    """Delete what processes of this machine that were killed while they unpacked have left."""
    for part in cache.glob(f".*.{socket.gethostname()}.*"):
        pid = part.name.rpartition(".")[2]
        if pid.isdigit() and not _is_at_work(int(pid), part):
            shutil.rmtree(part, ignore_errors=True)


def _is_at_work(pid: int, part: Path) -> bool:
    """Return whether the process that made a folder lives: containers count anew, so its id alone is not enough."""
    try:
        return bool(psutil.Process(pid).create_time() < part.stat().st_mtime + _CLOCK_ERROR)
    except psutil.NoSuchProcess:
        return False
    except (psutil.Error, OSError):
        return True
