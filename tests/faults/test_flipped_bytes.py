"""A flipped byte anywhere in what a stage left: the stage that made it makes it again, one that reads it refuses it."""

import json
import random
import re
import shutil
from pathlib import Path

import pytest

from helpers.command import command
from helpers.tiny_recipe import ARTIFACTS, Finished, contents
from lce_trainer.artifacts import MANIFEST, read_manifest
from lce_trainer.errors import ArtifactError

FOUND, WHOLE = 10, 100
READ_BY = {
    "passages": "mine",
    "queries": "mine",
    "candidates": "label",
    "groups": "train",
    "model": "evaluate",
    "evaluation": None,
}


def read_files(root: Path) -> list[Path]:
    """Every file that a later stage, another run of the same stage or publishing reads."""
    return [
        file
        for name in ARTIFACTS
        for file in sorted((root / name).rglob("*"))
        if file.is_file() and (file.name == MANIFEST or file.name in read_manifest(file.parent).files)
    ]


def flip(file: Path, draw: random.Random) -> str:
    """Flip one bit of a file; returns where."""
    content = bytearray(file.read_bytes())
    place = draw.randrange(len(content))
    content[place] ^= 1 << draw.randrange(8)
    file.write_bytes(content)
    return f"byte {place} of {file}"


def rows(root: Path) -> dict[str, bytes]:
    """What was made: every file but a manifest, whose white space may hold the flip."""
    return {name: content for name, content in contents(root).items() if not name.endswith(MANIFEST)}


def check(draw: random.Random, finished: Finished, folder: Path) -> None:
    root = finished.copy(folder / "run", *ARTIFACTS)
    shutil.copy(finished.root / ".lock", root)
    file = draw.choice([file for file in read_files(root) if file.stat().st_size])
    where = flip(file, draw)
    recipe = (finished.recipe, f"run_dir={root}")
    reader = READ_BY[file.relative_to(root).parts[0]]
    harmless = file.name == MANIFEST and _reads_the_same(file, finished.root / file.relative_to(root))
    if reader is not None and not harmless:
        # The index is read by who mines anew.
        anew = ["mine.top_k=8"] if file.parent.name in ("bm25", "dense") else []
        status, printed = command(reader, *recipe, *anew, log=folder / "log")
        assert status == 2 and str(file) in printed and "Traceback" not in printed, (where, printed)
    names = ("publish.model_id=me/model", "publish.dataset_id=me/groups")
    status, printed = command("publish", *recipe, *names, "--dry-run", log=folder / "log")
    published = file.relative_to(root).parts[0] in ("groups", "model")
    assert "Traceback" not in printed and (harmless or not published or status == 2), (where, printed)
    status, printed = command("run", *recipe, log=folder / "log")
    assert status == 0, (where, printed)
    assert harmless or str(file) in printed, (where, printed)
    made, wanted = rows(root), rows(finished.root)
    assert [name for name in wanted if made.get(name) != wanted[name]] == [], where
    for name in ARTIFACTS:
        assert read_manifest(root / name) == read_manifest(finished.root / name), where
    shutil.rmtree(root)


def _reads_the_same(flipped: Path, whole: Path) -> bool:
    """Whether the flip changed nothing that is read, as in the white space of a manifest."""
    try:
        return bool(json.loads(flipped.read_bytes()) == json.loads(whole.read_bytes()))
    except ValueError:
        return False


def test_each_flipped_byte_is_found_and_named(finished, tmp_path):
    root = finished.copy(tmp_path / "run", *ARTIFACTS)
    files = [file for file in read_files(root) if file.stat().st_size]
    draw = random.Random(7)
    for file in draw.sample(files, FOUND):
        whole = file.read_bytes()
        where = flip(file, draw)
        if file.name != MANIFEST or not _reads_the_same(file, finished.root / file.relative_to(root)):
            with pytest.raises(ArtifactError, match=re.escape(str(file))):
                read_manifest(file.parent)
                pytest.fail(where)
        file.write_bytes(whole)


def test_what_a_flipped_byte_damaged_is_refused_or_made_again(finished, tmp_path):
    check(random.Random(2), finished, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_what_a_hundred_flipped_bytes_damaged_is_refused_or_made_again(finished, tmp_path):
    for draw in range(WHOLE):
        folder = tmp_path / str(draw)
        folder.mkdir()
        check(random.Random(draw), finished, folder)
