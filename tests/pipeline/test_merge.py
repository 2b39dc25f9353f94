"""Trained weights are merged with the base's: exactly, by the rule that the card states, and again after a crash."""

import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

from helpers.command import Moment, command
from helpers.general import write_nano
from helpers.tiny_recipe import contents
from lce_trainer.artifacts import read_manifest
from lce_trainer.cli import main
from lce_trainer.evaluation.compare import mean_ndcg, rerank
from lce_trainer.model.merging import interpolate
from lce_trainer.model.reranker import Reranker
from lce_trainer.pipeline.evaluate import GENERAL, _in_domain
from lce_trainer.pipeline.facts import repos
from lce_trainer.pipeline.general import read_general
from lce_trainer.pipeline.merge import GRID
from lce_trainer.pipeline.run import open_run

GROUPS = ("passages", "queries", "candidates", "groups")


def weights(folder: Path) -> dict:
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def nano(tmp_path_factory) -> Path:
    return write_nano(tmp_path_factory.mktemp("nano") / "nano", "NanoNQ", "NanoFEVER")


@pytest.fixture(scope="module")
def settings(tiny_reranker, nano) -> list[str]:
    """A base that ranks, trained long enough that its rankings change."""
    return [
        f"train.model={tiny_reranker}",
        "train.max_steps=6",
        f"evaluate.benchmark=[{nano}]",
        "evaluate.precision=float32",
    ]


@pytest.fixture(scope="module")
def trained(finished, settings, tmp_path_factory) -> Path:
    """The model that is trained with nothing merged."""
    root = finished.copy(tmp_path_factory.mktemp("trained") / "run", *GROUPS)
    assert main(["train", str(finished.recipe), f"run_dir={root}", *settings]) == 0
    return root


@pytest.fixture(scope="module")
def merged(finished, settings, tmp_path_factory) -> Path:
    """The same, with the share of the trained weights chosen."""
    root = finished.copy(tmp_path_factory.mktemp("merged") / "run", *GROUPS)
    assert main(["train", str(finished.recipe), f"run_dir={root}", *settings, "train.merge=auto"]) == 0
    return root


def test_a_share_of_the_trained_weights_is_kept_exactly(finished, settings, trained, tiny_reranker, tmp_path):
    root = finished.copy(tmp_path / "run", *GROUPS)
    assert main(["train", str(finished.recipe), f"run_dir={root}", *settings, "train.merge=0.3"]) == 0
    wanted = interpolate(weights(tiny_reranker), weights(trained / "model"), 0.3)
    found = weights(root / "model")
    assert found.keys() == wanted.keys() and all(found[name].equal(wanted[name]) for name in wanted)
    model = read_manifest(root / "model")
    assert model.facts["merge"] == {"share": 0.3} and model.config["merge"] == 0.3
    plain = contents(trained / "model")
    apart = {"model.safetensors", "manifest.json", "config.json"}  # the first stage's weight beside others
    assert {name: data for name, data in contents(root / "model").items() if name not in apart} == {
        name: data for name, data in plain.items() if name not in apart
    }


def test_the_share_with_the_highest_sum_on_dev_and_general_sets_is_kept(
    finished, settings, trained, merged, tiny_reranker, tmp_path
):
    run = open_run(finished.recipe, [f"run_dir={merged}", *settings, "train.merge=auto"])
    found = run.manifest("model").facts["merge"]
    dev, general = _in_domain(run, "dev.jsonl", None)[0], read_general(run)
    sums = []
    for one in found["grid"]:
        reranker = Reranker.from_pretrained(trained / "model")
        model = reranker.model
        model.load_state_dict(interpolate(weights(tiny_reranker), weights(trained / "model"), one["share"]))
        reranker = Reranker(model, reranker.tokenizer)
        ours = mean_ndcg(rerank(dev.queries, dev.pools, reranker.score), dev.qrels)
        theirs = rerank(general.judged.queries, general.judged.pools, reranker.score)
        over_sets = mean_ndcg(theirs, general.judged.qrels, general.sets)
        assert one["dev"]["mean"] == pytest.approx(ours) and one["general"]["mean"] == pytest.approx(over_sets)
        assert all(one[name]["low"] <= one[name]["mean"] <= one[name]["high"] for name in ("dev", "general"))
        sums.append(ours + over_sets)
    assert [one["share"] for one in found["grid"]] == list(GRID)
    assert sums[GRID.index(found["share"])] == pytest.approx(max(sums))
    wanted = interpolate(weights(tiny_reranker), weights(trained / "model"), found["share"])
    assert all(value.equal(wanted[name]) for name, value in weights(merged / "model").items())
    assert run.manifest("model").inputs["general"] == run.manifest("general").digest


def test_card_report_and_evaluation_say_what_was_merged(finished, settings, merged):
    chosen = [f"run_dir={merged}", *settings, "train.merge=auto", "publish.model_id=user/fish"]
    assert main(["evaluate", str(finished.recipe), *chosen]) == 0
    run = open_run(finished.recipe, chosen)
    found = run.manifest("model").facts["merge"]
    (repo,) = repos(run)
    card, page = repo.files["README.md"].decode(), (merged / "report.html").read_text()
    assert f"After training {found['share']:g} of the trained weights and {1 - found['share']:g} of the base" in card
    assert f"Kept is {found['rule']}." in card and f"| **{found['share']:g}** | " in card
    assert "with 0.25 of the trained weights" in page
    for one in found["grid"]:
        assert f"{one['general']['mean']:.3f} [{one['general']['low']:.3f}" in card
    assert "was chosen on these sets too" in run.manifest("evaluation").facts["notes"][GENERAL]


def test_training_killed_while_it_merges_goes_on_to_the_same_bytes(finished, settings, merged, tmp_path):
    root = finished.copy(tmp_path / "run", *GROUPS)
    arguments = ("train", finished.recipe, f"run_dir={root}", *settings, "train.merge=auto")
    for moment in (Moment("open", "run/model/config.json"), Moment("os.rename", "model/manifest.json")):
        status, printed = command(*arguments, log=tmp_path / "log", die=moment)
        assert status == -signal.SIGKILL, (moment, printed)
    status, printed = command(*arguments, log=tmp_path / "log")
    assert status == 0, printed
    assert contents(root / "model") == contents(merged / "model")
    status, printed = command(*arguments, log=tmp_path / "log")
    assert status == 0 and "INFO: model: already made" in printed, printed


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["train.merge=auto"], "has no head of its own, and a new one has nothing to be merged with"),
        (["train.merge=0.5"], "has no head of its own, and a new one has nothing to be merged with"),
        (
            ["train.merge=auto", "train.model={reranker}"],
            "train.merge=auto chooses by general test sets beside the dev",
        ),
        (["train.merge=1.5"], "train.merge must be above 0 and below 1, not 1.5"),
        (["train.merge=some"], "train.merge must be float or one of auto, none, not 'some'"),
    ],
)
def test_what_cannot_be_merged_is_refused_before_any_work(changed, message, finished, tiny_reranker, tmp_path, capsys):
    root = finished.copy(tmp_path / "run", *GROUPS)
    chosen = [one.format(reranker=tiny_reranker) for one in changed]
    for verb in ("train", "run"):
        assert main([verb, str(finished.recipe), f"run_dir={root}", *chosen]) == 2
        assert message in capsys.readouterr().err
    assert not (root / "model").exists() and not (root / "checkpoints").exists()


def test_adapters_are_merged_into_the_model_first(finished, settings, tiny_reranker, tmp_path):
    pytest.importorskip("peft")
    found = {}
    for name, more in (("whole", []), ("half", ["train.merge=0.5"])):
        root = finished.copy(tmp_path / name, *GROUPS)
        lora = ["train.lora.r=2", "train.max_steps=2", *more]
        assert main(["train", str(finished.recipe), f"run_dir={root}", *settings, *lora]) == 0
        found[name] = weights(root / "model")
    wanted = interpolate(weights(tiny_reranker), found["whole"], 0.5)
    assert found["half"].keys() == wanted.keys()
    assert all(value.equal(wanted[name]) for name, value in found["half"].items())
    assert any(not value.equal(found["whole"][name]) for name, value in wanted.items())


def test_without_human_dev_queries_the_groups_held_out_choose(finished, settings, tmp_path):
    root = finished.copy(tmp_path / "run", *GROUPS)
    chosen = [*settings, "train.merge=auto", "evaluate.dev_queries=null", "train.dev_fraction=0.2"]
    assert main(["train", str(finished.recipe), f"run_dir={root}", *chosen]) == 0
    grid = read_manifest(root / "model").facts["merge"]["grid"]
    assert len(grid) == len(GRID) and all(0 <= one["dev"]["mean"] <= 1 for one in grid)
