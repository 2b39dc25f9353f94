"""An export says what it changes in the ranking of the recipe's own dev queries."""

import re
import shutil
from importlib.util import find_spec

import pytest
import yaml

from lce_trainer.cli import main
from lce_trainer.evaluation.judged import read_queries
from lce_trainer.pipeline.evaluate import dev_queries_of
from lce_trainer.pipeline.report import sample_pairs
from lce_trainer.pipeline.run import open_run

EXTRAS = {"onnx": ("export", "onnxscript"), "openvino": ("openvino", "nncf")}


def recipe_in(finished, tmp_path, **evaluate):
    """The recipe, over a copy of what its run made."""
    finished.copy(tmp_path / "run", "passages", "groups", "model")
    settings = yaml.safe_load(finished.recipe.read_text())
    settings["run_dir"] = str(tmp_path / "run")
    settings["evaluate"] |= evaluate
    recipe = finished.recipe.with_name(f"{tmp_path.name}.yaml")
    recipe.write_text(yaml.safe_dump(settings))
    return recipe


@pytest.mark.parametrize("runtime", EXTRAS)
def test_the_dev_queries_are_ranked_before_and_after(runtime, finished, tmp_path, capsys):
    extra, package = EXTRAS[runtime]
    if not find_spec(package):
        pytest.skip(f"of the {extra} extra")
    recipe = recipe_in(finished, tmp_path)
    command = ["export", str(finished.root / "model"), "--to", runtime, "--int8", "--output", str(tmp_path / "out")]
    assert main([*command, "--recipe", str(recipe)]) == 0
    forms, _, printed = capsys.readouterr().out.partition("On the dev queries:")
    assert "nDCG@10 [95 % CI]" in printed
    found = {line.split()[0]: line.split()[1:4] for line in printed.splitlines() if line[:4] in ("torc", runtime[:4])}
    assert set(found) == {"torch", runtime, f"{runtime}-int8"} and found["torch"] == found[runtime]
    assert re.search(r"calibrated on [1-9]\d* pairs of the groups\." if runtime == "openvino" else "are dynamic", forms)


def test_without_groups_int8_is_calibrated_on_the_dev_queries(finished, tmp_path):
    run = open_run(recipe_in(finished, tmp_path))
    groups, what = sample_pairs(run)
    assert what == f"{len(groups)} pairs of the groups"
    assert {query for query, _ in groups} <= set(run.table("groups")["query"])
    shutil.rmtree(run.root / "groups")
    pairs, what = sample_pairs(run)
    assert what == f"{len(pairs)} pairs of dev queries"
    assert {query for query, _ in pairs} == {one.query for one in read_queries(run.find(dev_queries_of(run)))}


def test_a_recipe_without_dev_queries_is_refused_before_anything_is_written(finished, tmp_path, capsys):
    recipe = recipe_in(finished, tmp_path, dev_queries=None)
    command = ["export", str(finished.root / "model"), "--to", "onnx", "--output", str(tmp_path / "out")]
    assert main([*command, "--recipe", str(recipe)]) == 2
    assert "set evaluate.dev_queries in the recipe" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
