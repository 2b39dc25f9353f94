"""What the command does with what it cannot use: one line, exit status 2, never a traceback."""

import dataclasses
import fcntl
import json
import logging
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import transformers
from datasets import Dataset
from torch import distributed

from helpers.tiny_recipe import write_recipe
from lce_trainer.artifacts import read_manifest
from lce_trainer.cli import main
from lce_trainer.pipeline.config import Recipe, load_recipe
from lce_trainer.pipeline.reference import recipe_sections
from lce_trainer.pipeline.run import open_run
from lce_trainer.training.arguments import LCETrainingArguments

COMMANDS = ("generate", "mine", "label", "train", "evaluate", "run", "publish", "inspect", "judges")


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
        ("mine: {top_k: 5}\nlabel: {}\nmine: {}\n", "the key 'mine' stands twice, in line 1 and in 3"),
        ("mine: {top_k: 5, top_k: 6}", "the key 'top_k' stands twice, in line 1 and in 1"),
        ("corpus: !!python/object/apply:os.system ['exit 1']", "is not YAML"),
        ("corpus: !!python/name:os.system", "is not YAML"),
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
        ("mine.encoder=package:no_such_package", "no_such_package"),
        ("evaluate.queries=none.jsonl", "none.jsonl"),
        ("evaluate.dev_queries=docs.jsonl", "docs.jsonl"),
        ("evaluate.benchmark=[none/such/folder]", "evaluate.benchmark: no folder 'none/such/folder'"),
        ("evaluate.benchmark=[nano_beir]", "no dataset 'sentence-transformers/NanoBEIR-en'"),
        ("train.merge=auto", "has no head of its own, and a new one has nothing to be merged with"),
        ("train.merge=1.0", "train.merge must be above 0 and below 1, not 1"),
        ("generate.prompt=qwery", "no prompt 'qwery'"),
        ("label.prompt=mine.jinja", "mine.jinja"),
        ("corpus.source=none.jsonl", "no file or folder 'none.jsonl'"),
        ("corpus.source=null", "corpus: set either source"),
        ("corpus.text_column=body", "no column 'body'"),
        ("corpus.max_words=0", "max_words must be above 0"),
        ("llm.model=no/such-model", "cannot load 'no/such-model'"),
        ("mine.top_k=0", "mine.top_k must be 1 or more, not 0"),
        ("evaluate.top_k=-1", "evaluate.top_k must be 1 or more, not -1"),
        ("llm.batch_tokens=0", "llm.batch_tokens must be 1 or more"),
        ("seed=-1", "error: seed must be 0 or more, not -1"),
        ("label.drop_margin=.nan", "label.drop_margin must be a number, not nan"),
        ("train.per_device_train_batch_size=0", "per_device_train_batch_size must be a whole number from 1 up, not 0"),
        ("train.gradient_accumulation_steps=0", "gradient_accumulation_steps must be a whole number from 1 up"),
        ("train.learning_rate=-1", "learning_rate must be 0 or more, not -1"),
        ("train.learning_rate=.nan", "learning_rate must be a number, not nan"),
        ("train.seed=-3", "seed must be a whole number from 0 to 4294967295, not -3"),
        ("train.report_to=nobody", "report_to must be none, all or some of"),
        ("train.report_to=comet_ml", "report_to is comet_ml, which is not installed"),
        ("train.deepspeed=zero2.json", "DeepSpeed"),
        ("train.lora={r: 4, target_modules: [query, keys]}", "has no layer 'keys'; there are dense, key, query, value"),
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
        (b"\xc3\x28\n", "documents_undecodable 1"),
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
    message = error_of(capsys, command, recipe, *(["publish.model_id=user/fish"] if command == "publish" else []))
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
    settings = ("evaluate.dev_queries=null", "train.max_steps=2", "train.dev_fraction=0.5")
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
    settings = ("evaluate.dev_queries=null", f"train.dev_fraction={fraction}")
    assert "train.dev_fraction" in error_of(capsys, "train", recipe, f"train.groups={groups}", *settings)


def test_groups_that_are_not_there_or_are_none(recipe, capsys):
    settings = ("evaluate.dev_queries=null",)
    assert "no groups at" in error_of(capsys, "train", recipe, "train.groups=none.parquet", *settings)
    Dataset.from_dict({"text": ["a"] * 30}).to_parquet(recipe.parent / "texts.parquet")
    message = error_of(capsys, "train", recipe, f"train.groups={recipe.parent / 'texts.parquet'}", *settings)
    assert "cannot tell what these columns hold: text (string)" in message and "FlagEmbedding" in message


def test_groups_of_another_layout_beside_the_recipe_train_and_edited_ones_train_again(recipe):
    triplets = recipe.parent / "triplets.jsonl"
    rows = [{"anchor": f"what is {i}", "positive": "red fish", "negative": f"bird {i}"} for i in range(8)]
    triplets.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = ("evaluate.dev_queries=null", "train.max_steps=1", "train.dev_fraction=0.5")
    digests = []
    for end in ("", "", json.dumps({**rows[0], "negative": "river"}) + "\n"):
        with triplets.open("a") as file:
            file.write(end)
        assert main(["train", str(recipe), "train.groups=triplets.jsonl", *settings]) == 0
        digests.append(read_manifest(recipe.parent / "run" / "model").digest)
    assert digests[0] == digests[1] != digests[2]


def test_a_recipe_without_judgments_and_held_out_documents_is_run_but_cannot_be_evaluated(recipe, capsys):
    none = ("evaluate.queries=null", "evaluate.dev_queries=null", "evaluate.synthetic.documents=0")
    assert "nothing to evaluate on: set evaluate.queries" in error_of(capsys, "evaluate", recipe, *none)
    small = ("generate.queries=12", "train.max_steps=1")
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


@pytest.mark.parametrize(
    "order",
    [
        "{r} mine.top_k=3 seed=4 -v --dry-run",
        "-v --dry-run {r} mine.top_k=3 seed=4",
        "{r} -v mine.top_k=3 --dry-run seed=4",
        "--dry-run {r} mine.top_k=3 -v seed=4",
        "{r} mine.top_k=9 -v mine.top_k=3 --dry-run seed=4",
    ],
)
def test_flags_and_overrides_stand_in_any_order(order, recipe, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "lce_trainer.pipeline.stages.publish", lambda run, dry_run, **_: seen.append((run.recipe, dry_run))
    )
    assert main(["publish", *order.format(r=recipe).split()]) == 0
    ((read, dry_run),) = seen
    assert (read.mine.top_k, read.seed, dry_run) == (3, 4, True)
    assert logging.getLogger("lce_trainer").level == logging.DEBUG


@pytest.mark.parametrize("words", ["mine {r} --dry-run", "run {r} seed=4 --sed=5", "config train mine", "mine {r} -x"])
def test_what_the_command_does_not_know_is_refused_with_its_usage(words, recipe, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(words.format(r=recipe).split())
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"usage: lce-trainer {words.split()[0]} ") and "unrecognized arguments" in printed


def test_the_version_is_that_of_the_package(capsys):
    import lce_trainer

    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"lce-trainer {lce_trainer.__version__}\n"


def test_config_prints_every_key_with_its_default_and_a_help(capsys):
    assert main(["config"]) == 0
    printed = capsys.readouterr().out
    for key in (key for section in recipe_sections() for key in section.keys):
        assert key.help and (key.inherited or key.help.endswith(".")), key.name
    for line in (
        "  seed: int = 13",
        "  label.judge: likelihood | verdict | grade | pairwise | reranker | encoder = likelihood",
        "  train.lora.r: int = 0",
        "  train.group_size: int = 8",
        "  train.learning_rate: float = 2e-5",
        "  train.num_train_epochs: float = 3",
        "  train.eval_strategy: 'no' | steps | epoch = steps",
        "  train.early_stopping_patience: int | null = 3",
    ):
        assert line in printed.splitlines(), line
    for item in dataclasses.fields(LCETrainingArguments):
        assert not item.init or f"\n  train.{item.name}: " in printed, item.name


def test_every_key_that_is_printed_is_one_that_a_recipe_takes_at_that_default(tmp_path):
    """All defaults written into one recipe change nothing."""
    keys = [key for section in recipe_sections() for key in section.keys]
    texts = {"the recipe's seed", "by train.precision", "checkpoints, in run_dir"}
    (tmp_path / "empty.yaml").write_text("")
    overrides = [f"{key.name}={key.default}" for key in keys if key.default not in texts]
    training_keys = [item.name for item in dataclasses.fields(LCETrainingArguments) if item.init]
    default = load_recipe(tmp_path / "empty.yaml", (), training_keys)
    read = load_recipe(tmp_path / "empty.yaml", overrides, training_keys)
    read.train.arguments = {}
    assert read == default
    sections = {
        item.name for item in dataclasses.fields(Recipe) if dataclasses.is_dataclass(getattr(default, item.name))
    }
    assert sections <= {section.name for section in recipe_sections()}


@pytest.mark.parametrize(
    ("wanted", "first", "absent"),
    [
        ("mine", "mine: ", "label."),
        ("train.lora", "train.lora: ", "train.group_size"),
        ("train.group_size", "train: ", "train.max_length:"),
    ],
)
def test_config_prints_a_section_or_one_key(wanted, first, absent, capsys):
    assert main(["config", wanted]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(first) and f"\n  {wanted}" in printed and absent not in printed


@pytest.mark.parametrize(
    ("wanted", "message"), [("tran", "did you mean 'train'?"), ("group_size", "did you mean 'train.group_size'?")]
)
def test_config_names_the_nearest_section_or_key(wanted, message, capsys):
    assert message in error_of(capsys, "config", wanted)


def test_init_writes_a_recipe_that_reads_and_runs(recipe, capsys, monkeypatch):
    folder = recipe.parent
    monkeypatch.chdir(folder)
    assert main(["init", "docs.jsonl", "-o", "new.yaml", "run_dir=new", "generate.roundtrip_k=0"]) == 0
    assert "lce-trainer run new.yaml" in capsys.readouterr().out
    text = (folder / "new.yaml").read_text()
    assert text.startswith("# A reranker for docs.jsonl: 60 documents, 60 passages")
    drafted = open_run(folder / "new.yaml").recipe
    assert (drafted.corpus.source, drafted.run_dir, drafted.generate.roundtrip_k) == ("docs.jsonl", "new", 0)
    assert drafted.generate.queries == 60 and drafted.mine.retrievers == ("bm25", "dense")
    assert drafted.train.arguments["max_length"] == 96  # 25 words and a query
    tiny = open_run(recipe).recipe
    assert main(["mine", "new.yaml"]) == 2
    small = ("generate.queries=12", "generate.min_words=1", "generate.max_new_tokens=6", "llm.dtype=float32")
    assert (
        main(["generate", "new.yaml", f"llm.model={tiny.llm.model}", f"mine.encoder={tiny.mine.encoder}", *small]) == 0
    )
    assert len(open_run(folder / "new.yaml").table("queries")) > 0


def test_every_commented_line_of_a_draft_is_a_key_that_reads(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "moon.md").write_text('# The "moon"\n\nThe moon shines: it is far. It has craters.\n')
    assert main(["init", "docs"]) == 0
    lines = (tmp_path / "recipe.yaml").read_text().splitlines()
    # Other comments are prose: no word with a colon behind it begins them.
    key = re.compile(r"\s*# (\w+:( |$)|  )")
    active = [line.replace("# ", "", 1) if key.match(line) else line for line in lines]
    assert len([line for line in lines if key.match(line)]) >= 6
    (tmp_path / "all.yaml").write_text("\n".join(active))
    read = open_run(tmp_path / "all.yaml").recipe
    assert read.generate.examples[0]["passage"].startswith('The "moon" The moon shines')
    assert read.evaluate.queries == "test.jsonl" and read.publish.model_id == "you/your-reranker"


def test_init_reads_columns_as_it_is_asked_and_overwrites_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    dump(tmp_path / "tickets.jsonl", {"key": "a", "said": "a moon shines"}, {"key": "b", "said": "a river flows"})
    assert "key, said" in error_of(capsys, "init", "tickets.jsonl")
    assert not (tmp_path / "recipe.yaml").exists()
    assert "did you mean 'text_column'?" in error_of(capsys, "init", "tickets.jsonl", "corpus.text_colum=said")
    assert main(["init", "tickets.jsonl", "corpus.text_column=said", "-v", "train.max_steps=5"]) == 0
    read = open_run(tmp_path / "recipe.yaml").recipe
    assert (read.corpus.text_column, read.train.arguments["max_steps"]) == ("said", 5)
    capsys.readouterr()
    assert "is there already" in error_of(capsys, "init", "tickets.jsonl", "corpus.text_column=said")
    (tmp_path / "mine.py").write_text("def documents():\n    yield {'text': 'a moon shines'}\n")
    assert main(["init", "mine.py", "-o", "script.yaml"]) == 0
    assert open_run(tmp_path / "script.yaml").recipe.corpus.script == "mine.py"


NOISY = """
import logging, sys, warnings
import lce_trainer.cli as cli
def run_stages(arguments, run):
    logging.getLogger("somebody.else").warning("a library speaks to its makers")
    warnings.warn("so does this one", UserWarning)
    logging.getLogger("lce_trainer.pipeline").warning("this is for you")
    raise OSError("nothing here")
cli._run_stages = run_stages
sys.exit(cli.main(sys.argv[1:]))
"""


def test_warnings_of_libraries_are_hidden_unless_verbose(recipe):
    def printed(*words: str) -> str:
        done = subprocess.run([sys.executable, "-c", NOISY, "run", str(recipe), *words], capture_output=True, text=True)
        assert done.returncode == 2
        return done.stderr

    assert printed() == "WARNING: this is for you\nerror: nothing here\n"
    verbose = printed("-v")
    assert "speaks to its makers" in verbose and "so does this one" in verbose


def test_a_bar_moves_while_a_model_loads(recipe):
    """On a terminal, where bars that take over a second are drawn; here every one of them is."""
    main_end, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    words = ["generate", str(recipe), "generate.queries=4"]
    process = subprocess.Popen(
        [sys.executable, "-m", "lce_trainer.cli", *words],
        stdout=subprocess.DEVNULL,
        stderr=end,
        env={**os.environ, "TQDM_DELAY": "0", "TQDM_MININTERVAL": "0"},
    )
    os.close(end)
    printed = b""
    while True:
        try:
            printed += os.read(main_end, 65536)
        except OSError:  # Linux reports the end of a terminal as an error
            break
    assert process.wait() == 0, printed
    states = [state for state in printed.decode().split("\r") if "Loading weights" in state]
    assert len(states) > 2 and any("100%" in state for state in states)
    assert b"kernels" not in printed


def test_a_rank_that_has_done_its_work_leaves_the_others(monkeypatch, capsys):
    """Or gloo's threads live until the interpreter ends, and may abort it then."""
    monkeypatch.setenv("RANK", "0")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        assert main(["config", "mine"]) == 0
        assert not distributed.is_initialized()
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
