"""What the command does with what it cannot use: one line, exit status 2, never a traceback."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import transformers
from datasets import Dataset

from helpers.tiny_recipe import write_recipe
from lce_trainer.artifacts import read_manifest
from lce_trainer.cli import main

COMMANDS = ("generate", "mine", "label", "train", "evaluate", "run", "publish")


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("given")
    write_recipe(folder)
    return folder


@pytest.fixture(autouse=True)
def own_logging():
    """The command quiets transformers for the whole process."""
    verbosity, level = transformers.logging.get_verbosity(), logging.getLogger("lce_trainer").level
    yield
    transformers.logging.set_verbosity(verbosity)
    transformers.logging.enable_progress_bar()
    logging.getLogger("lce_trainer").setLevel(level)


@pytest.fixture
def recipe(given: Path, tmp_path: Path) -> Path:
    """The tiny recipe, with files of its own and nothing made yet."""
    for file in given.glob("*.jsonl"):
        shutil.copy(file, tmp_path)
    text = (given / "recipe.yaml").read_text().replace(f"run_dir: {given}", f"run_dir: {tmp_path}")
    (tmp_path / "recipe.yaml").write_text(text)
    return tmp_path / "recipe.yaml"


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one line that a command which cannot be done leaves."""
    assert main(list(map(str, arguments))) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and captured.err.endswith(lines[0] + "\n"), captured.err
    assert "Traceback" not in captured.err + captured.out
    assert captured.out == ""
    return lines[0]


def dump(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_a_command_does_and_how_to_override(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: lce-trainer {command} ")
    for part in ("section.key=value", "train.learning_rate=2e-5", "the recipe, a YAML file", "--verbose"):
        assert part in printed


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = capsys.readouterr().out
    for command in COMMANDS:
        assert f"\n    {command} " in printed


def test_a_recipe_that_is_not_there(capsys, tmp_path):
    assert "no recipe at" in error_of(capsys, "run", tmp_path / "missing.yaml")
    assert str(tmp_path) in error_of(capsys, "run", tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("corpus: [", "is not YAML"),
        ("- a\n- b\n", "must hold sections"),
        ("corpse: {source: x}", "unknown key 'corpse'; did you mean 'corpus'?"),
        ("train: {learning_rat: 1}", "unknown key 'learning_rat' in train; did you mean 'learning_rate'?"),
        ("label: {judge: oracle}", "label.judge must be one of likelihood, verdict"),
        ("generate: {queries: many}", "generate.queries must be int, not 'many'"),
    ],
)
def test_a_recipe_that_cannot_be_read(text, message, capsys, tmp_path):
    (tmp_path / "recipe.yaml").write_text(text)
    assert message in error_of(capsys, "run", tmp_path / "recipe.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lerning_rate=1", "did you mean 'learning_rate'?"),
        ("nonsense=1", "unknown key 'nonsense'"),
        ("train.learning_rate", "write section.key=value"),
        ("train.learning_rate=fast", "learning_rate must be a number, not 'fast'"),
        ("train.lr_scheduler_type=bumpy", "bumpy"),
        ("train.optim=magic", "magic"),
        ("train.group_size=1", "group_size must be a whole number from 2 up"),
        ("train.max_length=14", "leave no room for a passage in max_length=14"),
        ("train.model=no/such-model", "no/such-model"),
        ("train.precision=int3", "train.precision must be one of"),
        ("evaluate.bi_encoder=package:no_such_package", "no_such_package"),
        ("evaluate.queries=none.jsonl", "none.jsonl"),
        ("evaluate.dev_queries=docs.jsonl", "docs.jsonl"),
        ("evaluate.candidates=none.parquet", "none.parquet"),
        ("evaluate.candidates=docs.jsonl", "evaluate.candidates needs evaluate.qrels"),
        ("generate.prompt=qwery", "no prompt 'qwery'"),
        ("label.prompt=mine.jinja", "mine.jinja"),
        ("corpus.source=none.jsonl", "no file or folder 'none.jsonl'"),
        ("corpus.source=null", "corpus: set either source"),
        ("corpus.text_column=body", "no column 'body'"),
        ("corpus.max_words=0", "max_words must be above 0"),
        ("llm.model=no/such-model", "cannot load 'no/such-model'"),
    ],
)
def test_a_mistake_anywhere_in_the_recipe_is_found_before_any_work(override, message, recipe, capsys):
    assert message in error_of(capsys, "run", recipe, override)
    assert not (recipe.parent / "run" / "queries" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it holds no documents"),
        (b'{"doc_id": "a", "text": ""}\n{"doc_id": "b", "text": " .. "}\n', "documents_empty 2"),
        (b'{"doc_id": "a", "said": "a moon"}\n', "there are: doc_id, said; name the one with the text"),
        (b"a moon\n", "line 1 is not JSON"),
        (b"\xff\xfe\x00\n", "documents_undecodable 1"),
    ],
)
def test_a_corpus_of_nothing(content, message, recipe, capsys):
    (recipe.parent / "docs.jsonl").write_bytes(content)
    assert message in error_of(capsys, "generate", recipe)


def test_a_passage_of_ten_megabytes_and_invalid_utf8_are_dropped_and_counted(recipe, capsys):
    with (recipe.parent / "docs.jsonl").open("ab") as file:
        file.write(json.dumps({"doc_id": "huge", "text": "fish" * 2_500_000}).encode() + b"\n")
        file.write(json.dumps({"doc_id": "long", "text": "red fish " * 1_100_000}).encode() + b"\n")
        file.write(b'{"doc_id": "broken", "text": "a \xff moon"}\n')
    assert main(["generate", str(recipe), "generate.queries=8"]) == 0
    counts = read_manifest(recipe.parent / "run" / "passages").counts
    assert counts["documents_read"] == 63
    assert counts["documents_undecodable"] == counts["words_too_long"] == counts["documents_empty"] == 1
    assert counts["documents"] == 61
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "first"),
    [("mine", "generate"), ("label", "mine"), ("train", "label"), ("evaluate", "generate"), ("publish", "train")],
)
def test_a_stage_before_its_time_names_the_stage_to_run_first(command, first, recipe, finished, capsys):
    root = recipe.parent / "run"
    before = {"mine": 0, "label": 2, "train": 3, "evaluate": 0, "publish": 0}[command]
    finished.copy(root, *("passages", "queries", "candidates")[:before])
    message = error_of(capsys, command, recipe)
    assert f"run lce-trainer {first} with this recipe first" in message
    assert str(root) in message


def test_an_unfinished_or_damaged_artifact_says_what_to_do(recipe, finished, capsys):
    root = finished.copy(recipe.parent / "run", "passages", "queries")
    (root / "queries" / "manifest.json").unlink()
    assert "queries is unfinished: run lce-trainer generate" in error_of(capsys, "mine", recipe)
    root = finished.copy(recipe.parent / "other", "passages", "queries")
    (root / "queries" / "train.parquet").write_bytes(b"PAR1")
    message = error_of(capsys, "mine", recipe, f"run_dir={root}")
    assert "has 4 bytes where its manifest says" in message and "delete" in message


def write_groups(path: Path, labels: list[list[float]]) -> Path:
    passages = [["a red fish", "the river", "snow falls"][: len(row)] for row in labels]
    queries = [f"what is {i}" for i in range(len(labels))]
    Dataset.from_dict({"query": queries, "passages": passages, "labels": labels}).to_parquet(path)
    return path


def test_groups_without_negatives_are_dropped_and_counted_or_one_line(recipe, capsys):
    without = write_groups(recipe.parent / "without.parquet", [[1.0], [1.0, 1.0], [0.0, 0.0]])
    settings = ("train.warm_start.pairs=0", "evaluate.dev_queries=null", "train.max_steps=2", "train.dev_fraction=0.5")
    message = error_of(capsys, "train", recipe, f"train.groups={without}", *settings)
    assert "groups is usable" in message
    some = write_groups(recipe.parent / "some.parquet", [[1.0], [1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0]] * 8)
    assert main(["train", str(recipe), f"train.groups={some}", *settings]) == 0
    counts = read_manifest(recipe.parent / "run" / "model").counts
    assert counts["groups_read"] == 16
    assert counts["groups"] < 16
    assert counts["groups"] + counts["groups_without_negative"] + counts["groups_without_positive"] == 16


@pytest.mark.parametrize("fraction", ["0", "0.99", "1.5"])
def test_too_few_groups_to_choose_a_checkpoint_by(fraction, recipe, capsys):
    groups = write_groups(recipe.parent / "groups.parquet", [[1.0, 0.0]] * 3)
    settings = ("train.warm_start.pairs=0", "evaluate.dev_queries=null", f"train.dev_fraction={fraction}")
    assert "train.dev_fraction" in error_of(capsys, "train", recipe, f"train.groups={groups}", *settings)


def test_groups_that_are_not_there_or_are_none(recipe, capsys):
    settings = ("train.warm_start.pairs=0", "evaluate.dev_queries=null")
    assert "no groups at" in error_of(capsys, "train", recipe, "train.groups=none.parquet", *settings)
    Dataset.from_dict({"text": ["a"] * 30}).to_parquet(recipe.parent / "texts.parquet")
    message = error_of(capsys, "train", recipe, f"train.groups={recipe.parent / 'texts.parquet'}", *settings)
    assert "cannot tell what these columns hold: text (string)" in message and "FlagEmbedding" in message


def test_groups_of_another_layout_beside_the_recipe_train_and_edited_ones_train_again(recipe):
    triplets = recipe.parent / "triplets.jsonl"
    rows = [{"anchor": f"what is {i}", "positive": "red fish", "negative": f"bird {i}"} for i in range(8)]
    triplets.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = ("train.warm_start.pairs=0", "evaluate.dev_queries=null", "train.max_steps=1", "train.dev_fraction=0.5")
    digests = []
    for end in ("", "", json.dumps({**rows[0], "negative": "river"}) + "\n"):
        with triplets.open("a") as file:
            file.write(end)
        assert main(["train", str(recipe), "train.groups=triplets.jsonl", *settings]) == 0
        digests.append(read_manifest(recipe.parent / "run" / "model").digest)
    assert digests[0] == digests[1] != digests[2]


def test_a_recipe_without_judgments_is_run_but_cannot_be_evaluated(recipe, capsys):
    none = ("evaluate.queries=null", "evaluate.dev_queries=null")
    assert "nothing to evaluate on: set evaluate.queries" in error_of(capsys, "evaluate", recipe, *none)
    small = ("generate.queries=12", "train.warm_start.pairs=0", "train.max_steps=1")
    assert main(["run", str(recipe), *none, *small]) == 0
    printed = capsys.readouterr().out
    assert str(recipe.parent / "run" / "model") in printed and "figures" not in printed


def test_a_folder_that_cannot_be_written_is_one_line(recipe, capsys):
    inside = recipe.parent / "docs.jsonl" / "run"  # a file is no folder, not even for root
    for command in ("generate", "run"):
        message = error_of(capsys, command, recipe, f"run_dir={inside}")
        assert str(inside) in message and "Not a directory" in message


def test_processes_that_accelerate_did_not_start_are_missed(recipe, capsys, caplog, monkeypatch):
    """As ``accelerate launch --cpu --num_processes 2`` leaves the environment where there is no mpirun."""
    for name, value in {"MASTER_PORT": "29500", "ACCELERATE_MIXED_PRECISION": "no"}.items():
        monkeypatch.setenv(name, value)
    error_of(capsys, "mine", recipe)
    assert "started one process only" in caplog.text and "ddp_cpu.yaml" in caplog.text


def test_publishing_needs_the_names_of_the_repos(recipe, finished, capsys):
    root = finished.copy(recipe.parent / "run", "passages", "queries", "candidates", "groups", "model")
    assert "publish.model_id" in error_of(capsys, "publish", recipe, "--dry-run")
    assert root.is_dir()


def test_verbose_logs_where_it_happened(recipe, capsys, caplog):
    assert main(["mine", str(recipe), "--verbose"]) == 2
    assert "Traceback" in caplog.text
    assert "error: " in capsys.readouterr().err
