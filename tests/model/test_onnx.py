"""What is exported to ONNX scores as the model does, for whoever loads it."""

import contextlib
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from helpers.backbones import pairs_of_all_lengths
from helpers.snippets import run_code
from helpers.tiny_models import tiny_language_model, tiny_model, tiny_tokenizer
from lce_trainer.cli import main
from lce_trainer.errors import ConfigError, TrainingError
from lce_trainer.model.reranker import Reranker
from lce_trainer.model.saving import save_reranker, write_first_stage_weight

pytest.importorskip("onnxscript", reason="of the export extra")
pytest.importorskip("onnxruntime", reason="of the export extra")

MAX_LENGTH = 96
PAIRS = [pair for pair in pairs_of_all_lengths() if pair[1]]


class Exported(NamedTuple):
    folder: Path
    printed: str


def save_tiny(family: str, folder: Path) -> Path:
    save_reranker(tiny_model(family), tiny_tokenizer(family), MAX_LENGTH, folder)
    return folder


@pytest.fixture(scope="module", params=["modernbert", "xlm-roberta"])
def exported(request, tmp_path_factory) -> Exported:
    """A reranker with its ONNX file and the int8 one in its own folder, as the command writes them."""
    folder = save_tiny(request.param, tmp_path_factory.mktemp(request.param) / "model")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(["export", str(folder), "--to", "onnx", "--int8"]) == 0
    return Exported(folder, printed.getvalue())


def test_the_file_scores_as_the_model_in_batches_of_every_shape(exported):
    scores = Reranker.from_pretrained(exported.folder, device="cpu").score(PAIRS)
    reranker = Reranker.from_pretrained(exported.folder, backend="onnx")
    for tokens in (None, 1, 40, 300):
        np.testing.assert_allclose(reranker.score(PAIRS, batch_tokens=tokens), scores, rtol=0, atol=1e-4)
    assert scores.std() > 1e-2 and reranker.max_length == MAX_LENGTH
    assert reranker.score([]).shape == (0,)


def test_it_ranks_as_the_model_with_its_settings(exported, tmp_path):
    folder = shutil.copytree(exported.folder, tmp_path / "model")
    write_first_stage_weight(folder, 0.3)
    passages, first_stage = [passage for _, passage in PAIRS], list(range(len(PAIRS)))
    found = [
        Reranker.from_pretrained(folder, backend=backend, max_length=40).rank(
            "what is red", passages, 5, first_stage_scores=first_stage
        )
        for backend in ("torch", "onnx")
    ]
    assert [one.index for one in found[0]] == [one.index for one in found[1]]
    np.testing.assert_allclose(*([one.score for one in some] for some in found), rtol=0, atol=1e-4)


RUNTIME_ALONE = """
import json, sys
import numpy, onnxruntime
from tokenizers import Tokenizer

folder, pad, length, pairs = json.load(sys.stdin)
tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
tokenizer.enable_truncation(max_length=length)
tokenizer.enable_padding(pad_id=pad)
session = onnxruntime.InferenceSession(f"{folder}/onnx/model.onnx", providers=["CPUExecutionProvider"])
encoded = tokenizer.encode_batch(pairs)
inputs = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
fed = {one.name: numpy.array([getattr(row, inputs[one.name]) for row in encoded]) for one in session.get_inputs()}
print(json.dumps(session.run(["logits"], fed)[0][:, 0].tolist()))
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""


def test_onnx_runtime_alone_gives_the_same_scores_from_a_process_of_its_own(exported):
    reranker = Reranker.from_pretrained(exported.folder, device="cpu")
    given = json.dumps([str(exported.folder), reranker.tokenizer.pad_token_id, MAX_LENGTH, PAIRS])
    ran = subprocess.run([sys.executable, "-c", RUNTIME_ALONE], input=given, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    np.testing.assert_allclose(json.loads(ran.stdout), reranker.score(PAIRS), rtol=0, atol=1e-4)


def test_a_reranker_in_a_process_of_its_own_gives_the_same_scores(exported, tmp_path):
    code = (
        "from lce_trainer import Reranker\nimport json\n"
        f"scores = Reranker.from_pretrained({str(exported.folder)!r}, backend='onnx').score({PAIRS!r})\n"
        "print(json.dumps(scores.tolist()))\n"
    )
    scores = json.loads(run_code(code, tmp_path).splitlines()[-1])
    wanted = Reranker.from_pretrained(exported.folder, device="cpu").score(PAIRS)
    np.testing.assert_allclose(scores, wanted, rtol=0, atol=1e-4)


def test_int8_is_smaller_and_scores_alike(exported):
    scores = Reranker.from_pretrained(exported.folder, backend="onnx").score(PAIRS)
    rounded = Reranker.from_pretrained(exported.folder, backend="onnx-int8").score(PAIRS)
    assert 0 < np.abs(rounded - scores).max() < scores.std()
    assert np.corrcoef(rounded, scores)[0, 1] > 0.98
    sizes = [(exported.folder / "onnx" / name).stat().st_size for name in ("model.onnx", "model_qint8.onnx")]
    assert sizes[1] < sizes[0] * 0.7


def test_the_command_prints_size_difference_and_speed_of_each_form(exported):
    rows = [line.split() for line in exported.printed.splitlines()]
    (torch_row,), (onnx,), (int8,) = (
        [row for row in rows if row[:1] == [name]] for name in ("torch", "onnx", "onnx-int8")
    )
    assert float(onnx[2]) < 1e-4 < float(int8[2])
    assert all(float(row[-1]) > 0 for row in (torch_row, onnx, int8))


def test_the_folder_holds_the_files_and_no_path_of_this_machine(exported):
    assert sorted(path.name for path in (exported.folder / "onnx").iterdir()) == ["model.onnx", "model_qint8.onnx"]
    assert not [path for path in exported.folder.iterdir() if path.name.startswith(".")]
    for file in (exported.folder / "onnx").iterdir():
        content = file.read_bytes()
        assert b'File "' not in content and str(Path(torch.__file__).parents[1]).encode() not in content


def test_another_folder_gets_config_and_tokenizer_and_no_weights_besides(tmp_path):
    model, out = save_tiny("bert", tmp_path / "model"), tmp_path / "out"
    assert main(["export", str(model), "--to", "onnx", "--output", str(out)]) == 0
    assert {path.name for path in out.iterdir()} == {"config.json", "tokenizer.json", "tokenizer_config.json", "onnx"}
    wanted = Reranker.from_pretrained(model, device="cpu").score(PAIRS)
    np.testing.assert_allclose(Reranker.from_pretrained(out, backend="onnx").score(PAIRS), wanted, rtol=0, atol=1e-4)
    with pytest.raises(TrainingError, match=r"has no onnx/model_qint8.onnx: write it with .* --to onnx --int8"):
        Reranker.from_pretrained(out, backend="onnx-int8")
    with pytest.raises(TrainingError, match="cannot be saved as a checkpoint"):
        Reranker.from_pretrained(out, backend="onnx").save_pretrained(tmp_path / "saved")


def test_a_file_that_scores_otherwise_is_not_left(tmp_path, monkeypatch, capsys):
    model = save_tiny("bert", tmp_path / "model")
    before = sorted(model.iterdir())
    monkeypatch.setattr("lce_trainer.model.export.LARGEST_DIFFERENCE", 0.0)
    assert main(["export", str(model), "--to", "onnx"]) == 2
    assert "was deleted" in capsys.readouterr().err
    assert sorted(model.iterdir()) == before


def test_a_decoder_is_refused_and_leaves_nothing(tmp_path, capsys):
    for number, model in enumerate((tiny_model("qwen3"), tiny_language_model("qwen3"))):
        folder, tokenizer = tmp_path / str(number), tiny_tokenizer("qwen3")
        if number:
            model.config.sentence_transformers = {"answer_ids": [5, 6]}
        save_reranker(model, tokenizer, MAX_LENGTH, folder)
        before = sorted(folder.iterdir())
        assert main(["export", str(folder), "--to", "onnx"]) == 2
        assert "is a decoder" in capsys.readouterr().err
        assert sorted(folder.iterdir()) == before


def test_nothing_is_overwritten(tmp_path, capsys):
    model = save_tiny("bert", tmp_path / "model")
    (model / "onnx").mkdir()
    assert main(["export", str(model), "--to", "onnx"]) == 2
    assert "is there already: delete it" in capsys.readouterr().err
    assert main(["export", str(model), "--to", "onnx", "--output", str(model)]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert main(["export", "you/model", "--to", "onnx"]) == 2
    assert "name a folder to write with --output" in capsys.readouterr().err


def test_what_the_backend_cannot_do_is_an_error(tmp_path):
    model = save_tiny("bert", tmp_path / "model")
    with pytest.raises(
        ConfigError, match="backend must be one of torch, onnx, onnx-int8, openvino, openvino-int8, not 'tf'"
    ):
        Reranker.from_pretrained(model, backend="tf")
    for chosen in ({"dtype": "bfloat16"}, {"device": "cuda"}, {"yes_no": True}):
        with pytest.raises(ConfigError, match=f"{next(iter(chosen))}=.* cannot be chosen with backend='onnx'"):
            Reranker.from_pretrained(model, backend="onnx", **chosen)
    with pytest.raises(TrainingError, match="write it with lce-trainer export"):
        Reranker.from_pretrained(model, backend="onnx", device="cpu")
    (model / "onnx").mkdir()
    (model / "onnx" / "model.onnx").write_bytes(b"cut short")
    with pytest.raises(TrainingError, match="no ONNX Runtime model at"):
        Reranker.from_pretrained(model, backend="onnx")


def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch, capsys):
    model = save_tiny("bert", tmp_path / "model")
    (model / "onnx").mkdir()
    (model / "onnx" / "model.onnx").touch()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ConfigError, match=r"needs the package onnxruntime: pip install 'lce-trainer\[export\]'"):
        Reranker.from_pretrained(model, backend="onnx")
    assert main(["export", str(model), "--to", "onnx", "--output", str(tmp_path / "out")]) == 2
    assert "lce-trainer[export]" in capsys.readouterr().err
