"""An export says what it changes in the ranking of the recipe's own dev queries."""

import pytest
import yaml

from lce_trainer.cli import main

pytest.importorskip("onnxscript", reason="of the export extra")
pytest.importorskip("onnxruntime", reason="of the export extra")


def recipe_in(finished, tmp_path, **evaluate):
    """The recipe, over a copy of what its run made."""
    finished.copy(tmp_path / "run", "passages", "model")
    settings = yaml.safe_load(finished.recipe.read_text())
    settings["run_dir"] = str(tmp_path / "run")
    settings["evaluate"] |= evaluate
    recipe = finished.recipe.with_name(f"{tmp_path.name}.yaml")
    recipe.write_text(yaml.safe_dump(settings))
    return recipe


def test_the_dev_queries_are_ranked_before_and_after(finished, tmp_path, capsys):
    recipe = recipe_in(finished, tmp_path)
    command = ["export", str(finished.root / "model"), "--to", "onnx", "--int8", "--output", str(tmp_path / "out")]
    assert main([*command, "--recipe", str(recipe)]) == 0
    printed = capsys.readouterr().out.partition("On the dev queries:")[2]
    assert "nDCG@10 [95 % CI]" in printed
    rows = {line.split()[0]: line.split()[1:4] for line in printed.splitlines() if line[:4] in ("torc", "onnx")}
    assert set(rows) == {"torch", "onnx", "onnx-int8"} and rows["torch"] == rows["onnx"]


def test_a_recipe_without_dev_queries_is_refused_before_anything_is_written(finished, tmp_path, capsys):
    recipe = recipe_in(finished, tmp_path, dev_queries=None)
    command = ["export", str(finished.root / "model"), "--to", "onnx", "--output", str(tmp_path / "out")]
    assert main([*command, "--recipe", str(recipe)]) == 2
    assert "set evaluate.dev_queries in the recipe" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
