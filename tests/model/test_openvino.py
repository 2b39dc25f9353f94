"""What is exported to OpenVINO scores as the model does, for whoever loads it."""

import contextlib
import io
import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from helpers.backbones import pairs_of_all_lengths
from helpers.snippets import run_code
from helpers.tiny_models import tiny_model, tiny_tokenizer
from lce_trainer.cli import main
from lce_trainer.errors import ConfigError, TrainingError
from lce_trainer.model.check import check_model
from lce_trainer.model.export import export_reranker
from lce_trainer.model.reranker import Reranker
from lce_trainer.model.saving import save_reranker

if not find_spec("openvino") or not find_spec("nncf"):  # which send telemetry when they are imported
    pytest.skip("of the openvino extra", allow_module_level=True)

MAX_LENGTH = 96
PAIRS = [pair for pair in pairs_of_all_lengths() if pair[1]]
FILES = [
    "openvino_model.bin",
    "openvino_model.xml",
    "openvino_model_qint8_quantized.bin",
    "openvino_model_qint8_quantized.xml",
]


class Exported(NamedTuple):
    folder: Path
    printed: str


def save_tiny(family: str, folder: Path) -> Path:
    save_reranker(tiny_model(family), tiny_tokenizer(family), MAX_LENGTH, folder)
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Exported:
    """A reranker with its OpenVINO files in its own folder, as the command writes them."""
    folder = save_tiny("bert", tmp_path_factory.mktemp("bert") / "model")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(["export", str(folder), "--to", "openvino", "--int8"]) == 0
    return Exported(folder, printed.getvalue())


def test_the_file_scores_as_the_model_in_batches_of_every_shape(exported):
    scores = Reranker.from_pretrained(exported.folder, device="cpu").score(PAIRS)
    reranker = Reranker.from_pretrained(exported.folder, backend="openvino")
    for tokens in (None, 1, 40, 300):
        np.testing.assert_allclose(reranker.score(PAIRS, batch_tokens=tokens), scores, rtol=0, atol=1e-4)
    assert scores.std() > 1e-2 and reranker.max_length == MAX_LENGTH
    assert reranker.score([]).shape == (0,)
    # OpenVINO would choose bfloat16 where the processor has it, and scores in it are further apart than that.
    half = Reranker.from_pretrained(exported.folder, device="cpu", dtype=torch.bfloat16).score(PAIRS)
    assert np.abs(half - scores).max() > 1e-3


@pytest.mark.parametrize("family", ["modernbert", "deberta-v2", "mpnet"])
def test_families_that_attend_each_in_its_own_way_are_traced_for_all_shapes(family, tmp_path):
    """The parity check of the export has other batches than these, which are longer than its example too."""
    save_tiny(family, tmp_path / "model")
    folder, forms = export_reranker(str(tmp_path / "model"), "openvino", tmp_path / "out")
    assert forms["openvino"].difference < 1e-4
    scores = Reranker.from_pretrained(tmp_path / "model", device="cpu").score(PAIRS)
    reranker = Reranker.from_pretrained(folder, backend="openvino")
    for tokens in (1, 300):
        np.testing.assert_allclose(reranker.score(PAIRS, batch_tokens=tokens), scores, rtol=0, atol=1e-4)


RUNTIME_ALONE = """
import json, sys
sys.modules["openvino_telemetry"] = None
import numpy, openvino
from tokenizers import Tokenizer

folder, pad, length, pairs = json.load(sys.stdin)
tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
tokenizer.enable_truncation(max_length=length)
tokenizer.enable_padding(pad_id=pad)
settings = {"INFERENCE_PRECISION_HINT": "f32"}
model = openvino.Core().compile_model(f"{folder}/openvino/openvino_model.xml", "CPU", settings)
encoded = tokenizer.encode_batch(pairs)
names = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
fed = {one.get_any_name(): numpy.array([getattr(row, names[one.get_any_name()]) for row in encoded])
       for one in model.inputs}
print(json.dumps(model(fed)["logits"][:, 0].tolist()))
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""


def test_openvino_alone_gives_the_same_scores_from_a_process_of_its_own(exported):
    reranker = Reranker.from_pretrained(exported.folder, device="cpu")
    given = json.dumps([str(exported.folder), reranker.tokenizer.pad_token_id, MAX_LENGTH, PAIRS])
    ran = subprocess.run([sys.executable, "-c", RUNTIME_ALONE], input=given, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    np.testing.assert_allclose(json.loads(ran.stdout), reranker.score(PAIRS), rtol=0, atol=1e-4)


def test_a_reranker_in_a_process_of_its_own_gives_the_same_scores_and_sends_no_telemetry(exported, tmp_path):
    code = (
        "import gc, json, signal, sys\n"
        "from lce_trainer import Reranker\n"
        f"scores = Reranker.from_pretrained({str(exported.folder)!r}, backend='openvino').score({PAIRS!r})\n"
        "assert 'openvino' in sys.modules\n"
        "loaded = [name for name in sys.modules if name.startswith('openvino_telemetry')]\n"
        # Two of them, freed as they came: the stack that OpenVINO has signals handled on is not left behind.
        f"two = [Reranker.from_pretrained({str(exported.folder)!r}, backend='openvino') for _ in range(2)]\n"
        "del two[0]; del two[0]; gc.collect()\n"
        "signal.signal(signal.SIGUSR1, lambda *_: loaded.append('handled')); signal.raise_signal(signal.SIGUSR1)\n"
        "assert loaded.pop() == 'handled'\n"
        "print(json.dumps([scores.tolist(), loaded]))\n"
    )
    scores, loaded = json.loads(run_code(code, tmp_path).splitlines()[-1])
    wanted = Reranker.from_pretrained(exported.folder, device="cpu").score(PAIRS)
    np.testing.assert_allclose(scores, wanted, rtol=0, atol=1e-4)
    assert loaded == []
    assert "nncf" in sys.modules and "openvino_telemetry" not in sys.modules  # of this process, which has exported


def test_several_threads_may_score_with_one_reranker(exported):
    reranker = Reranker.from_pretrained(exported.folder, backend="openvino")
    wanted = reranker.score(PAIRS)
    with ThreadPoolExecutor(4) as pool:
        for scores in pool.map(lambda _: reranker.score(PAIRS, batch_tokens=100), range(16)):
            np.testing.assert_allclose(scores, wanted, rtol=0, atol=1e-5)


def test_int8_is_smaller_and_scores_alike(exported):
    scores = Reranker.from_pretrained(exported.folder, backend="openvino").score(PAIRS)
    rounded = Reranker.from_pretrained(exported.folder, backend="openvino-int8").score(PAIRS)
    assert 0 < np.abs(rounded - scores).max() < scores.std()
    assert np.corrcoef(rounded, scores)[0, 1] > 0.97  # 0.950 with an int8 head, 0.980 without
    sizes = [(exported.folder / "openvino" / name).stat().st_size for name in FILES if name.endswith(".bin")]
    assert sizes[1] < sizes[0] * 0.5


def test_the_command_prints_size_difference_and_speed_of_each_form(exported):
    rows = [line.split() for line in exported.printed.splitlines()]
    (torch_row,), (whole,), (int8,) = (
        [row for row in rows if row[:1] == [name]] for name in ("torch", "openvino", "openvino-int8")
    )
    assert float(whole[2]) < 1e-4 < float(int8[2])
    assert all(float(row[-1]) > 0 for row in (torch_row, whole, int8))
    assert "The ranges of int8 activations are calibrated on the drawn pairs." in exported.printed


def test_the_folder_holds_the_files_and_no_path_of_this_machine(exported):
    assert sorted(path.name for path in (exported.folder / "openvino").iterdir()) == FILES
    assert not [path for path in exported.folder.iterdir() if path.name.startswith(".")]
    for file in (exported.folder / "openvino").glob("*.xml"):
        content = file.read_text(encoding="utf-8")
        for path in (exported.folder.parent, Path(torch.__file__).parents[1], Path.cwd(), Path.home()):
            assert str(path) not in content, path


def test_another_folder_gets_config_and_tokenizer_and_int8_for_the_pairs_that_are_given(exported, tmp_path):
    given = [("red", "fish")] * 4
    out, _ = export_reranker(str(exported.folder), "openvino", tmp_path / "out", int8=True, sample=given)
    assert {path.name for path in out.iterdir()} == {
        *("config.json", "tokenizer.json", "tokenizer_config.json", "openvino")
    }
    wanted = Reranker.from_pretrained(exported.folder, device="cpu").score(PAIRS)
    found = Reranker.from_pretrained(out, backend="openvino").score(PAIRS)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)
    ranges = [
        Reranker.from_pretrained(folder, backend="openvino-int8").score(PAIRS) for folder in (exported.folder, out)
    ]
    assert not np.array_equal(*ranges)  # pairs alike have other ranges than pairs of all kinds
    (out / "openvino" / "openvino_model_qint8_quantized.xml").unlink()
    message = r"has no openvino/openvino_model_qint8.*: write it with .* --to openvino --int8"
    with pytest.raises(TrainingError, match=message):
        Reranker.from_pretrained(out, backend="openvino-int8")
    with pytest.raises(TrainingError, match="cannot be saved as a checkpoint"):
        Reranker.from_pretrained(out, backend="openvino").save_pretrained(tmp_path / "saved")


def test_sentence_transformers_finds_the_files(exported):
    """By its own rules; what it loads them with has no release for the transformers of today."""
    from sentence_transformers.backend.utils import backend_should_export

    for given in ({}, {"file_name": "openvino_model_qint8_quantized.xml"}):
        wanted = {"subfolder": "openvino", "file_name": "openvino_model.xml"} | given
        rules = ("openvino_model.xml", "openvino*.xml", "OpenVINO")
        assert backend_should_export(exported.folder, True, dict(given), *rules) == (False, wanted)


def test_a_file_that_scores_otherwise_is_not_left(tmp_path, monkeypatch, capsys):
    model = save_tiny("bert", tmp_path / "model")
    before = sorted(model.iterdir())
    monkeypatch.setattr("lce_trainer.model.export.LARGEST_DIFFERENCE", 0.0)
    assert main(["export", str(model), "--to", "openvino"]) == 2
    assert "was deleted" in capsys.readouterr().err
    assert sorted(model.iterdir()) == before


def test_an_openvino_file_is_compared_by_check_and_one_of_another_model_is_found_out(exported, tmp_path):
    found = {one.name: (one.outcome, one.detail) for one in check_model(str(exported.folder))}
    assert found["OpenVINO, openvino/openvino_model.xml"][0] == "same scores"
    outcome, detail = found["OpenVINO, openvino/openvino_model_qint8_quantized.xml"]
    assert outcome == "other scores" and "int8" in detail
    save_reranker(tiny_model("bert", seed=5), tiny_tokenizer("bert"), MAX_LENGTH, tmp_path / "other")
    shutil.copytree(exported.folder / "openvino", tmp_path / "other" / "openvino")
    found = {one.name: (one.outcome, one.detail) for one in check_model(str(tmp_path / "other"))}
    outcome, detail = found["OpenVINO, openvino/openvino_model.xml"]
    assert outcome == "other scores" and detail.startswith("largest difference ") and "int8" not in detail


def test_damaged_files_and_missing_ones_are_errors_of_one_line(exported, tmp_path):
    def broken(name: str, damage) -> str:
        folder = shutil.copytree(exported.folder, tmp_path / name)
        damage(folder / "openvino" / "openvino_model")
        with pytest.raises(TrainingError) as error:
            Reranker.from_pretrained(folder, backend="openvino")
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "no OpenVINO model at" in broken("xml", lambda file: file.with_suffix(".xml").write_text("<net cut sh"))
    assert "no OpenVINO model at" in broken("bin", lambda file: file.with_suffix(".bin").write_bytes(b"cut short"))
    assert "has no openvino/openvino_model.bin, the weights of" in broken(
        "gone", lambda file: file.with_suffix(".bin").unlink()
    )
    assert "--to openvino" in broken("both", lambda file: shutil.rmtree(file.parent))


def test_a_missing_package_is_named_with_its_extra(exported, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ConfigError, match=r"needs the package openvino: pip install 'lce-trainer\[openvino\]'"):
        Reranker.from_pretrained(exported.folder, backend="openvino")
    assert main(["export", str(exported.folder), "--to", "openvino", "--output", str(tmp_path / "out")]) == 2
    assert "lce-trainer[openvino]" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
