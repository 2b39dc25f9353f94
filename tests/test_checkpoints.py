import logging

import pytest

from lce_trainer.artifacts import MANIFEST
from lce_trainer.checkpoints import newest_checkpoint, seal


def checkpoint(folder, step, sealed=True):
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    (path / "model.safetensors").write_bytes(b"weights" * 10)
    (path / "optimizer.pt").write_bytes(b"moments" * 10)
    if sealed:
        seal(path)
    return path


def test_the_newest_is_by_number_not_by_name(tmp_path):
    checkpoint(tmp_path, 9)
    newest = checkpoint(tmp_path, 10)
    assert newest_checkpoint(tmp_path) == newest


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: (path / MANIFEST).unlink(),
        lambda path: (path / MANIFEST).write_text("{"),
        lambda path: (path / "optimizer.pt").unlink(),
        lambda path: (path / "optimizer.pt").write_bytes(b"moments"),
        lambda path: (path / "optimizer.pt").write_bytes(b"momentz" * 10),
    ],
)
def test_a_damaged_checkpoint_is_skipped_and_named(tmp_path, caplog, damage):
    whole, damaged = checkpoint(tmp_path, 1), checkpoint(tmp_path, 2)
    damage(damaged)
    with caplog.at_level(logging.WARNING):
        assert newest_checkpoint(tmp_path) == whole
    assert "checkpoint-2" in caplog.text


def test_nothing_to_go_on_from(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    assert newest_checkpoint(tmp_path / "nothing") is None
    checkpoint(tmp_path, 3, sealed=False)
    assert newest_checkpoint(tmp_path) is None
