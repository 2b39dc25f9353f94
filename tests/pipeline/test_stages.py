"""Whole runs of a tiny recipe: the real commands, a real language model, real training."""

import json
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from helpers.command import Moment, command
from helpers.tiny_recipe import ARTIFACTS, TOKEN, assert_same_run, contents, write_recipe
from lce_trainer import Reranker
from lce_trainer.artifacts import read_manifest


def times_asked(journal: Path) -> list[int]:
    """How often each question was answered, the most often first; what was used is counted again with each record."""
    lines = journal.read_text(encoding="utf-8").splitlines()
    keys = (key for line in lines for key in json.loads(line)["answers"] if not key.startswith("usage "))
    return [count for _, count in Counter(keys).most_common()]


def test_one_command_makes_every_artifact_and_prints_the_tables(finished):
    for name in ARTIFACTS:
        assert read_manifest(finished.root / name).kind == name
    for system in ("BM25", "encoder", "reranker"):
        assert f"\n{system} " in finished.printed
    assert str(finished.root / "model") in finished.printed
    assert "| reranker |" in (finished.root / "evaluation" / "in_domain.md").read_text()
    assert read_manifest(finished.root / "model").counts["steps"] == 20
    assert not list((finished.root / "checkpoints").iterdir())


def test_what_is_printed_is_for_the_user(finished):
    for noise in ("Traceback", "LOAD REPORT", "MISSING", "Loading weights", "[transformers]", "Warning:", "{'"):
        assert noise not in finished.log + finished.printed, noise
    for stage in ("generate", "mine", "label", "train", "evaluate"):
        assert f"{stage} took" in finished.log
    assert len(finished.log.replace("\r", "\n").splitlines()) < 100


def test_the_token_is_written_nowhere(finished):
    files = [file for file in finished.root.rglob("*") if file.is_file()]
    assert len(files) > 30
    assert not [file for file in files if TOKEN.encode() in file.read_bytes()]
    assert TOKEN not in finished.log + finished.printed


def test_what_is_published_beside_the_groups_names_no_path_of_this_machine(finished):
    assert str(finished.recipe.parent) not in (finished.root / "groups" / "manifest.json").read_text()


def test_every_loader_scores_the_model_alike(finished):
    folder = str(finished.root / "model")
    pairs = [("what is a fish", "the river falls on stone"), ("seed", "leaf root seed moon " * 20), ("why", "snow")]
    scores = Reranker.from_pretrained(folder).score(pairs)
    assert np.ptp(scores) > 0.01
    np.testing.assert_allclose(CrossEncoder(folder, device="cpu").predict(pairs), scores, atol=1e-5)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    batch = AutoTokenizer.from_pretrained(folder)(
        [query for query, _ in pairs],
        [passage for _, passage in pairs],
        truncation=True,
        padding=True,
        return_tensors="pt",
    )
    with torch.inference_mode():
        np.testing.assert_allclose(model(**batch).logits[:, 0].numpy(), scores, atol=1e-5)


def test_running_it_again_does_nothing_and_says_so(finished, tmp_path):
    def state():
        return {str(file): (file.stat().st_mtime_ns, file.stat().st_size) for file in finished.root.rglob("*")}

    before = state()
    status, printed = command("run", finished.recipe, log=tmp_path / "log")
    assert status == 0, printed
    assert state() == before
    for name in ARTIFACTS:
        assert f"INFO: {name}: already made" in printed
    assert "\nreranker + first stage " in printed


@pytest.mark.parametrize(
    ("override", "remade"),
    [
        ("evaluate.max_queries=6", {"evaluation"}),
        ("train.learning_rate=1e-3", {"model", "evaluation"}),
        ("label.negatives=3", {"groups", "model", "evaluation"}),
        pytest.param("mine.top_k=8", {"candidates", "groups", "model", "evaluation"}, marks=pytest.mark.slow),
        ("generate.temperature=1.0", {"queries", "candidates", "groups", "model", "evaluation"}),
        ("llm.batch_tokens=512", set()),
        pytest.param("seed=14", set(ARTIFACTS), marks=pytest.mark.slow),
    ],
)
def test_a_changed_setting_redoes_its_stage_and_what_follows_from_it(override, remade, finished, tmp_path):
    root = finished.copy(tmp_path / "run", *ARTIFACTS)
    before = {name: (root / name / "manifest.json").read_bytes() for name in ARTIFACTS}
    journals = {name: (root / name / "journal.jsonl").read_bytes() for name in ("queries", "groups")}
    status, printed = command("run", finished.recipe, f"run_dir={root}", override, log=tmp_path / "log")
    assert status == 0, printed
    assert {name for name in ARTIFACTS if f"INFO: {name}: already made" not in printed} == remade
    assert {name for name in ARTIFACTS if (root / name / "manifest.json").read_bytes() != before[name]} == remade
    for name, answers in journals.items():
        after = (root / name / "journal.jsonl").read_bytes()
        assert after.startswith(answers)
        assert max(times_asked(root / name / "journal.jsonl")) == 1
        if override.startswith(("label", "train", "evaluate")):
            assert after == answers


def test_an_edited_file_counts_as_a_changed_setting(tmp_path):
    recipe = write_recipe(tmp_path)
    arguments = ("run", recipe, "train.max_steps=1", "generate.queries=20")
    status, printed = command(*arguments, log=tmp_path / "log")
    assert status == 0, printed
    test = tmp_path / "test.jsonl"
    test.write_text("".join(test.read_text().splitlines(keepends=True)[:5]))
    assert "in domain, 5 queries" in command(*arguments, log=tmp_path / "log")[1]
    documents = tmp_path / "docs.jsonl"
    documents.write_text(documents.read_text() + json.dumps({"doc_id": "new", "text": "a new moon"}))
    assert "passages: 61 documents read" in command(*arguments, log=tmp_path / "log")[1]


GENERATE = [
    Moment("open", "passages/bm25/vocab.index.json"),
    Moment("os.rename", "passages/manifest.json"),
    Moment("os.rename", "passages/dense/manifest.json"),
    Moment("journal", "queries"),
    Moment("os.rename", "queries/train.parquet"),
]
LABEL = [
    Moment("os.rename", "candidates/manifest.json"),
    Moment("journal", "groups"),
    Moment("journal", "groups", 3),
    Moment("journal", "groups", 2),
    Moment("os.rename", "groups/manifest.json"),
]
TRAIN = [
    Moment("os.mkdir", "checkpoint-4"),
    Moment("os.mkdir", "checkpoint-8"),
    Moment("open", "checkpoint-12/trainer_state.json"),
    Moment("os.rename", "checkpoint-20/manifest.json"),
    Moment("open", "run/model/training_args.json"),
    Moment("shutil.rmtree", "checkpoints/model"),
    Moment("open", "evaluation/in_domain.md"),
]


@pytest.mark.parametrize(
    ("made", "moments"),
    [
        pytest.param((), GENERATE, id="generate"),
        pytest.param(ARTIFACTS[:2], LABEL, id="label"),
        pytest.param(ARTIFACTS[:4], TRAIN, id="train"),
    ],
)
def test_a_killed_run_goes_on_to_the_same_bytes_and_asks_nothing_twice(made, moments, finished, tmp_path):
    root = finished.copy(tmp_path / "run", *made)
    arguments = ("run", finished.recipe, f"run_dir={root}")
    for moment in moments:
        status, printed = command(*arguments, log=tmp_path / "log", die=moment)
        assert status == -signal.SIGKILL, (moment, printed)
    status, printed = command(*arguments, log=tmp_path / "log")
    assert status == 0, printed
    assert_same_run(root, contents(finished.root))
    for name in ("queries", "groups"):
        assert max(times_asked(root / name / "journal.jsonl")) == 1


def test_a_run_killed_around_its_early_stop_stops_where_it_would_have(finished, tmp_path):
    """Nothing is ever found on this dev set, so patience runs out at the third evaluation of five."""
    documents = [json.loads(line) for line in (finished.recipe.parent / "docs.jsonl").read_text().splitlines()]
    without = next(row["doc_id"] for row in documents if "moon" not in row["text"])
    lost = {"query_id": "lost", "query": "moon", "doc_ids": [without]}
    (tmp_path / "lost.jsonl").write_text(json.dumps(lost))
    settings = ("train.early_stopping_patience=2", "mine.first_stage=bm25")
    settings += (f"evaluate.dev_queries={tmp_path / 'lost.jsonl'}",)
    for name in ("whole", "killed"):
        finished.copy(tmp_path / name, *ARTIFACTS[:4])
    arguments = ("train", finished.recipe, *settings)
    status, printed = command(*arguments, f"run_dir={tmp_path / 'whole'}", log=tmp_path / "log")
    assert status == 0, printed
    assert read_manifest(tmp_path / "whole" / "model").counts["steps"] == 12
    for moment in (Moment("os.mkdir", "checkpoint-12"), Moment("open", "killed/model/training_args.json")):
        status, printed = command(*arguments, f"run_dir={tmp_path / 'killed'}", log=tmp_path / "log", die=moment)
        assert status == -signal.SIGKILL, (moment, printed)
    status, printed = command(*arguments, f"run_dir={tmp_path / 'killed'}", log=tmp_path / "log")
    assert status == 0, printed
    assert_same_run(tmp_path / "killed", contents(tmp_path / "whole"))


@pytest.mark.parametrize(
    ("override", "moment"),
    [
        ("corpus.max_documents=40", Moment("open", "passages/bm25/vocab.index.json")),
        ("train.learning_rate=1e-3", Moment("open", "run/model/training_args.json")),
    ],
)
def test_what_was_killed_under_other_settings_does_not_pass_for_finished(override, moment, finished, tmp_path):
    root = finished.copy(tmp_path / "run", *ARTIFACTS)
    arguments = ("run", finished.recipe, f"run_dir={root}")
    status, printed = command(*arguments, override, log=tmp_path / "log", die=moment)
    assert status == -signal.SIGKILL, printed
    status, printed = command(*arguments, log=tmp_path / "log")
    assert status == 0, printed
    assert_same_run(root, contents(finished.root))


def test_adapters_on_a_decoder_become_a_plain_model_that_every_loader_scores_alike(finished, tmp_path):
    recipe = write_recipe(tmp_path)
    finished.copy(tmp_path / "run", "passages", "queries", "candidates", "groups")
    changed = [f"train.model={tmp_path}/llm", "train.lora.r=4", "train.max_length=80"]
    for again in (False, True):
        status, printed = command("train", recipe, *changed, "train.max_steps=6", log=tmp_path / "log")
        assert status == 0, printed
        assert ("model: already made" in printed) == again
    folder = tmp_path / "run" / "model"
    assert read_manifest(folder).config["lora"]["r"] == 4
    assert not list(folder.glob("adapter*"))
    pairs = [("what is a fish", "the river falls on stone"), ("seed", "leaf root seed moon " * 20), ("why", "snow")]
    scores = Reranker.from_pretrained(folder).score(pairs)
    assert np.ptp(scores) > 1e-4
    np.testing.assert_allclose(CrossEncoder(str(folder), device="cpu").predict(pairs), scores, atol=1e-5)
