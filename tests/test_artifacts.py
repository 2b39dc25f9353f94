import pytest
from datasets import Dataset

from lce_trainer.artifacts import MANIFEST, load_table, read_manifest, save_artifact, why_stale
from lce_trainer.errors import ArtifactError

TABLE = Dataset.from_dict({"text": ["red fish", "blue bird"]})


def save(path, **config):
    return save_artifact(path, {"train": TABLE}, kind="passages", config=config, inputs={}, counts={"passages": 2})


def test_a_table_comes_back_as_it_was(tmp_path):
    save(tmp_path / "a")
    assert load_table(tmp_path / "a", "passages").to_list() == TABLE.to_list()


def test_the_same_work_gives_the_same_bytes(tmp_path):
    first, second = save(tmp_path / "a", max_words=3), save(tmp_path / "b", max_words=3)
    assert first.digest == second.digest
    for name in ("train.parquet", MANIFEST):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_folder_without_a_manifest_is_unfinished(tmp_path):
    save(tmp_path / "a")
    (tmp_path / "a" / MANIFEST).unlink()
    with pytest.raises(ArtifactError, match="is unfinished"):
        load_table(tmp_path / "a", "passages")


def test_a_torn_file_is_found(tmp_path):
    save(tmp_path / "a")
    file = tmp_path / "a" / "train.parquet"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="bytes where its manifest says"):
        read_manifest(tmp_path / "a")


@pytest.mark.parametrize("text", ["", "{", '{"kind": "passages"}'])
def test_a_torn_manifest_is_found(tmp_path, text):
    save(tmp_path / "a")
    (tmp_path / "a" / MANIFEST).write_text(text)
    with pytest.raises(ArtifactError, match="is not a manifest"):
        read_manifest(tmp_path / "a")


def test_another_kind_is_refused(tmp_path):
    save(tmp_path / "a")
    with pytest.raises(ArtifactError, match="holds passages, not groups"):
        load_table(tmp_path / "a", "groups")


def test_only_a_change_that_shapes_it_makes_an_artifact_stale(tmp_path):
    save(tmp_path / "a", max_words=3, overlap=(1, 2))
    assert why_stale(tmp_path / "a", "passages", {"max_words": 3, "overlap": (1, 2)}, {}) is None
    assert "max_words" in why_stale(tmp_path / "a", "passages", {"max_words": 4, "overlap": (1, 2)}, {})
    assert "other inputs" in why_stale(tmp_path / "a", "passages", {"max_words": 3, "overlap": [1, 2]}, {"x": "1"})
    assert "does not exist" in why_stale(tmp_path / "b", "passages", {}, {})
