"""The benchmarks run and compare what they say they compare; how fast anything is, is not tested."""

import json
import platform
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from benchmarks import feed, growth, infer, peers, scale, train
from benchmarks.data import RANDOM, RAW_SCORES, prepare_checkpoint
from benchmarks.loss_curves import LIMIT, OBJECTIVES, compare, largest_difference
from benchmarks.measure import save, slope
from benchmarks.roofline import counted_linear_flops, model_flops
from helpers.paths import ROOT, SHARED_DATA
from helpers.tiny import WORDS, build_model, build_tokenizer
from lce_trainer import LCETrainer

GROUP = 4
MAX_LENGTH = 32


def groups_of(n: int, size: int = GROUP) -> datasets.Dataset:
    """Groups of random words, of ragged lengths; some passages are longer than what a pair may have."""
    rng = np.random.default_rng(0)

    def text(low: int, high: int) -> str:
        return " ".join(rng.choice(WORDS, rng.integers(low, high)))

    return datasets.Dataset.from_dict(
        {
            "query_id": [f"q{i}" for i in range(n)],
            "query": [text(2, 6) for _ in range(n)],
            "passages": [[text(2, 40) for _ in range(size)] for _ in range(n)],
            "labels": [[1.0] + [0.0] * (size - 1)] * n,
        }
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    model, tokenizer = build_model(), build_tokenizer()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data *= 8  # else all scores are near 0, and any two losses alike
    model.config.sentence_transformers = dict(RAW_SCORES)
    tokenizer.model_max_length = MAX_LENGTH
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("loss", OBJECTIVES)
def test_our_loss_curve_is_that_of_sentence_transformers(loss, checkpoint, tmp_path):
    steps = 20
    groups = groups_of(OBJECTIVES[loss] * steps)
    losses = compare(checkpoint, groups, loss, steps, MAX_LENGTH, tmp_path, learning_rate=1e-3)
    assert [len(curve) for curve in losses.values()] == [steps, steps]
    assert np.std(losses["lce_trainer"]) > 100 * LIMIT
    assert largest_difference(losses) <= LIMIT


def test_trainers_that_take_turns_do_the_same_work(checkpoint):
    builds = {name: build for name, build in train.systems().items() if name != "FlagEmbedding"}
    options = {"batch": 2, "steps": 2, "warmup": 1, "max_length": MAX_LENGTH}
    timed = train.race(builds, checkpoint, groups_of(6), precision="fp32", **options)
    assert set(timed) == set(builds)
    for one in timed.values():
        assert len(one.seconds) == 2 and min(one.seconds) > 0 and len(one.losses) == 3


def test_a_trainer_that_does_other_work_is_not_compared(checkpoint, monkeypatch):
    monkeypatch.setattr(peers, "ONE_HOT", 1.0)  # soft labels: another loss
    builds = {train.OURS: peers.ours, "other": peers.sentence_transformers}
    options = {"batch": 2, "steps": 1, "warmup": 0, "max_length": MAX_LENGTH}
    with pytest.raises(SystemExit, match="other, fp32: a step's loss differs"):
        train.race(builds, checkpoint, groups_of(2), precision="fp32", **options)


def test_an_error_in_a_trainer_that_takes_turns_comes_up(checkpoint):
    def broken(*args):
        trainer = peers.plain(*args)
        trainer.scores = None
        return trainer

    options = {"batch": 2, "steps": 1, "warmup": 1, "max_length": MAX_LENGTH}
    with pytest.raises(TypeError, match="NoneType"):
        train.race({train.OURS: peers.ours, "broken": broken}, checkpoint, groups_of(4), precision="fp32", **options)


def test_systems_that_score_give_the_same_scores(checkpoint):
    found = infer.systems(checkpoint, "fp32", MAX_LENGTH, runtimes=False)
    found.pop("FlagEmbedding", None)
    pairs = [(row["query"], text) for row in groups_of(4) for text in row["passages"]]
    infer.choose_sizes(found, pairs)
    seconds = infer.race(found, [pairs, pairs[:5]], "fp32")
    assert {len(spent) for spent in seconds.values()} == {2}
    off = infer.System(lambda given, size: found[infer.OURS].score(given, size) + 0.01, [8], "pairs", chosen=8)
    with pytest.raises(SystemExit, match="off, fp32: a score differs"):
        infer.race({**found, "off": off}, [pairs], "fp32")


def test_each_feed_makes_the_pairs_that_the_model_takes(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    groups = groups_of(5)
    made = feed.feeds(checkpoint, groups, 2, MAX_LENGTH, tmp_path)
    assert [make() for make in made.values()] == [5 * GROUP] * 3
    assert len(list((tmp_path / "cache" / "lce_trainer").glob("token-ids-*.arrow"))) == 1
    found = feed.rates(made, rounds=2) | feed.taken(checkpoint, groups, 2, MAX_LENGTH, 1, "fp32", tmp_path)
    assert [len(values) for values in found.values()] == [2, 2, 2, 1, 1]
    assert min(min(values) for values in found.values()) > 0


@pytest.mark.parametrize("name", ["random:tiny", "random:modernbert-tiny"])
def test_the_formula_counts_what_the_linear_layers_and_attention_do(name, tmp_path, monkeypatch):
    kind, shape = RANDOM["random:modernbert-base"]
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    monkeypatch.setitem(RANDOM, "random:modernbert-tiny", (kind, {**shape, **small}))
    model = AutoModelForSequenceClassification.from_pretrained(prepare_checkpoint(name, tmp_path))
    with counted_linear_flops(model) as counted, torch.no_grad():
        model(input_ids=torch.ones(3, 10, dtype=torch.long), attention_mask=torch.ones(3, 10, dtype=torch.long))
    attention = 4 * 2 * 32 * 3 * 10**2
    assert counted[0] + attention == model_flops(model, [10, 10, 10])


needs_medquad = pytest.mark.skipif(not (SHARED_DATA / "medquad").is_dir(), reason="needs MedQuAD in ../shared/data")


@needs_medquad
def test_growth_runs_every_stage_at_every_size(monkeypatch):
    def here(kind, folder, size):
        growth.WORK[kind](folder, size)
        return dict.fromkeys(("seconds", "peak", "own", "before"), 1.0)

    monkeypatch.setattr(growth, "in_own_process", here)
    monkeypatch.setattr(growth, "SMALLEST", dict.fromkeys(growth.FULL, 1))
    monkeypatch.setattr(LCETrainer, "training_step", LCETrainer.training_step)  # to have it back
    found = growth.grow(SHARED_DATA / "medquad", list(growth.FULL), {**dict.fromkeys(growth.FULL, 1), "score": 2})
    assert {kind: list(rows) for kind, rows in found.items()} == {
        kind: [10, 100] if kind == "score" else [10] for kind in growth.FULL
    }


@needs_medquad
@pytest.mark.slow
def test_a_process_of_its_own_says_what_it_took(tmp_path):
    growth.write_texts(SHARED_DATA / "medquad", tmp_path)
    took = growth.in_own_process("score", tmp_path, 10)
    assert took["seconds"] > 0 and took["peak"] >= took["own"] >= took["before"] > 0
    with pytest.raises(SystemExit, match="score of 10 failed"):
        growth.in_own_process("score", tmp_path / "nothing", 10)


def test_a_slope_is_the_exponent():
    assert slope([10, 100, 1000], [3, 300, 30000]) == pytest.approx(2)


def test_results_name_the_machine_and_not_its_owner(tmp_path, capsys):
    save(tmp_path, "x", {"model": "m"}, {"a": [1 / 3]}, {"ours over theirs": 2.0})
    text = (tmp_path / "x.json").read_text()
    assert capsys.readouterr().out.split() == ["x", "ours", "over", "theirs", "2"]
    assert platform.node() not in text and str(Path.home()) not in text
    assert json.loads(text)["results"] == {"a": [0.33333]}


def test_a_picture_is_drawn_of_what_there_is(tmp_path):
    plot = pytest.importorskip("benchmarks.plot", reason="needs the bench extra")
    speed = {"median": 2.0, "q25": 1.0, "q75": 3.0}
    rows = {"lce_trainer": {"pairs_per_second": speed}, "other": {"pairs_per_second": speed}}
    save(tmp_path, "train", {}, {"fp32": {"trainers": rows}}, {})
    save(tmp_path, "growth", {}, {"mine": {10: {"seconds": 1.0, "own": 2.0}, 100: {"seconds": 2.0, "own": 2.0}}}, {})
    assert plot.draw(tmp_path).stat().st_size > 1000


def test_the_page_on_scale_holds_what_its_model_says(capsys):
    scale.main([])
    table = capsys.readouterr().out.strip()
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    assert table in page
    for stage in scale.STAGES.values():
        assert stage.source in page
    with pytest.raises(SystemExit):
        scale.main(["--rate", "thinking=3"])
    scale_of_two = scale.hours(scale.STAGES["judge"], 170 * 3600, 2)
    assert scale_of_two == pytest.approx(1 / (2 * scale.SHARE))
