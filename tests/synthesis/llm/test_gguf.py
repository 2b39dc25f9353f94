"""GGUF files: a tiny Llama, written as llama.cpp keeps it, is the one that was written."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from helpers.paths import ROOT
from helpers.tiny_llm import QUERIES, build_model, build_tokenizer, prompts
from lce_trainer.errors import LLMError
from lce_trainer.synthesis.llm.local import TransformersLLM
from lce_trainer.synthesis.llm.protocol import LLMConfig


def write_gguf(path: Path, tokenizer: PreTrainedTokenizerFast, model: LlamaForCausalLM) -> None:
    """A Llama with its byte-level BPE as llama.cpp keeps them."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    tokens += [f"<unused{number}>" for number in range(config.vocab_size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if len(token) > 2 and token[0] + token[-1] == "<>" else 1 for token in tokens])
    writer.add_token_merges(
        [" ".join(pair) for pair in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]]
    )
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(True)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        module, _, suffix = name.rpartition(".")
        values = tensor.numpy()
        if (kind := module.rpartition(".")[2]) in heads:  # rotary halves are interleaved there
            halves = values.reshape(heads[kind], 2, -1, values.shape[1])
            values = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))
        writer.add_tensor(f"{names.get_name(module)}.{suffix}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_unpacked_once_and_never_half(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    file = tmp_path / "tiny.gguf"
    write_gguf(file, build_tokenizer(), build_model("llama"))
    llm = TransformersLLM(LLMConfig(model=str(file), dtype="float32"))
    build_model("llama").save_pretrained(tmp_path / "plain")
    build_tokenizer().save_pretrained(tmp_path / "plain")
    plain = TransformersLLM(LLMConfig(model=str(tmp_path / "plain"), dtype="float32"))

    with monkeypatch.context() as patched:
        patched.setattr("transformers.PreTrainedModel.save_pretrained", partial(fail, OSError("disk full")))
        with pytest.raises(
            LLMError, match=r"cannot write .*/home/lce_trainer \(disk full\).* make room, or set HF_HOME"
        ):
            llm.score(prompts(), QUERIES[:3])
    assert list((tmp_path / "home" / "lce_trainer").iterdir()) == []

    pairs = [prompts(), QUERIES[:3]]
    before = os.umask(0o027)
    try:
        llm.score(*pairs)
    finally:
        os.umask(before)
    assert re.fullmatch("tiny.gguf@[0-9a-f]{8}", llm.name)
    assert llm.score(*pairs) == pytest.approx(plain.score(*pairs), abs=1e-5)
    (folder,) = (tmp_path / "home" / "lce_trainer").iterdir()
    assert {oct(path.stat().st_mode & 0o777) for path in [folder, *folder.iterdir()]} == {"0o750", "0o640"}
    monkeypatch.setattr("transformers.modeling_utils.PreTrainedModel.save_pretrained", partial(fail, AssertionError()))
    again = TransformersLLM(LLMConfig(model=str(file), dtype="float32"))
    assert again.score(*pairs) == llm.score(*pairs)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_flipped_bit_in_an_unpacked_gguf_file_has_it_unpacked_again(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    file = tmp_path / "tiny.gguf"
    write_gguf(file, build_tokenizer(), build_model("llama"))
    config = LLMConfig(model=str(file), dtype="float32")
    scores = TransformersLLM(config).score(prompts(), QUERIES[:3])
    (folder,) = (tmp_path / "home" / "lce_trainer").iterdir()
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "manifest.json"} <= whole.keys()
    for name in sorted(whole):
        flip(folder / name)
        assert TransformersLLM(config).score(prompts(), QUERIES[:3]) == scores, name
        assert f"unpacked again: {folder / name}" in caplog.text, name
        caplog.clear()
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole


KILLED = """
import os, signal, sys
from lce_trainer.synthesis.llm.protocol import LLMConfig
from lce_trainer.synthesis.llm.weights import load_model

def die(event, arguments):  # when the weights are written, and the tokenizer is not
    if event == "open" and str(arguments[0]).endswith("manifest.json.part"):
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(die)
load_model(LLMConfig(model=sys.argv[1], dtype="float32"))
"""


def test_what_a_kill_leaves_of_an_unpacked_gguf_file_is_swept(tmp_path, monkeypatch):
    home, file = tmp_path / "home", tmp_path / "tiny.gguf"
    write_gguf(file, build_tokenizer(), build_model("llama"))
    command = [sys.executable, "-c", KILLED, str(file)]
    process = subprocess.run(command, env={**os.environ, "HF_HOME": str(home), "PYTHONPATH": str(ROOT)})
    assert process.returncode == -signal.SIGKILL
    (left,) = (home / "lce_trainer").iterdir()
    assert left.name.startswith(".") and (left / "model.safetensors").stat().st_size > 0
    # A container counts its processes anew: those two have the ids of processes that live, and started later.
    name, _, _ = left.name.rpartition(".")
    for number in (os.getpid(), os.getppid()):
        shutil.copytree(left, left.with_name(f"{name}.{number}"))
        os.utime(left.with_name(f"{name}.{number}"), (1, 1))
    at_work = left.with_name(f"{name}x.{os.getppid()}")
    shutil.copytree(left, at_work)
    os.utime(at_work)
    of_others = at_work.with_name(f".{left.name.split('.')[1]}.elsewhere.1")
    shutil.copytree(left, of_others)

    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(home))
    TransformersLLM(LLMConfig(model=str(file), dtype="float32")).score(prompts(), QUERIES[:3])
    kept = {path.name for path in (home / "lce_trainer").iterdir()}
    assert kept == {left.name.split(".")[1], at_work.name, of_others.name}


def fail(error: Exception, *args, **kwargs):
    raise error
