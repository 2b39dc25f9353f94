import hashlib
import json
import os

import pytest
from datasets import Dataset

from lce_trainer import artifacts
from lce_trainer.artifacts import MANIFEST, load_table, read_manifest, save_artifact, why_stale
from lce_trainer.errors import ArtifactError

TABLE = Dataset.from_dict({"text": ["red fish", "blue bird"]})


def save(path, **config):
    return save_artifact(path, {"train": TABLE}, kind="passages", config=config, inputs={}, counts={"passages": 2})


def test_a_table_comes_back_as_it_was(tmp_path):
    save(tmp_path / "a")
    assert load_table(tmp_path / "a", "passages").to_list() == TABLE.to_list()


def test_a_process_that_unpacks_a_table_later_leaves_alone_what_a_faster_one_has_open(tmp_path, monkeypatch):
    save(tmp_path / "a")
    faster = []

    def write_manifest(*args, **kwargs):
        monkeypatch.undo()
        faster.append(load_table(tmp_path / "a", "passages"))
        (folder,) = (path for path in (tmp_path / "a" / ".cache").iterdir() if not path.name.startswith("."))
        faster.append(folder.stat().st_ino)
        return artifacts.write_manifest(*args, **kwargs)

    monkeypatch.setattr(artifacts, "write_manifest", write_manifest)
    assert load_table(tmp_path / "a", "passages").to_list() == TABLE.to_list()
    (folder,) = (tmp_path / "a" / ".cache").iterdir()
    assert folder.stat().st_ino == faster[1]
    assert faster[0].to_list() == TABLE.to_list()


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


def test_a_flipped_byte_is_found_in_a_table_and_in_the_manifest(tmp_path):
    save(tmp_path / "a")
    for name in ("train.parquet", MANIFEST):
        file = tmp_path / "a" / name
        whole = file.read_bytes()
        for place in range(0, len(whole), 7):
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            # A flip in the white space of a manifest changes nothing that is read.
            try:
                found = read_manifest(tmp_path / "a")
            except ArtifactError as error:
                assert str(file) in str(error)
                continue
            assert name == MANIFEST
            file.write_bytes(whole)
            assert found == read_manifest(tmp_path / "a")
        file.write_bytes(whole)


def test_a_file_is_read_whole_once(tmp_path, monkeypatch):
    read = []
    hashed = artifacts.file_sha256
    monkeypatch.setattr(artifacts, "file_sha256", lambda path: read.append(path.name) or hashed(path))
    save(tmp_path / "a")
    file = tmp_path / "a" / "train.parquet"
    os.utime(file, (1, 1))
    read.clear()
    for _ in range(3):
        read_manifest(tmp_path / "a")
    assert read == ["train.parquet"]
    file.write_bytes(file.read_bytes()[::-1])
    with pytest.raises(ArtifactError, match=r"train\.parquet is damaged"):
        read_manifest(tmp_path / "a")


def test_a_damaged_arrow_file_is_written_again(tmp_path):
    save(tmp_path / "a")
    load_table(tmp_path / "a", "passages")
    (arrow,) = (tmp_path / "a" / ".cache").rglob("*.arrow")
    whole = arrow.read_bytes()
    arrow.write_bytes(whole.replace(b"red fish", b"bed fish"))
    assert load_table(tmp_path / "a", "passages").to_list() == TABLE.to_list()
    assert arrow.read_bytes() == whole


def test_a_table_has_the_same_fingerprint_each_time_so_that_what_is_derived_from_it_is_reused(tmp_path):
    save(tmp_path / "a")
    assert load_table(tmp_path / "a", "passages")._fingerprint == load_table(tmp_path / "a", "passages")._fingerprint


@pytest.mark.parametrize("name", ["../other.txt", "/etc/hostname", "deep/../../other.txt"])
def test_a_manifest_cannot_name_files_outside_its_folder(name, tmp_path):
    save(tmp_path / "a")
    (tmp_path / "other.txt").write_text("secret")
    file = tmp_path / "a" / MANIFEST
    record = json.loads(file.read_text())
    record["files"][name] = {"bytes": 6, "sha256": hashlib.sha256(b"secret").hexdigest()}
    del record["sha256"]
    file.write_text(json.dumps(record))
    with pytest.raises(ArtifactError, match="lies outside its folder"):
        read_manifest(tmp_path / "a")
