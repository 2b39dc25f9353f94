"""The ``lce-trainer`` command. Every error that a user can mend is one line, without a traceback."""

import argparse
import logging
import os
import shutil
import signal
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import lce_trainer
from lce_trainer.errors import FirstProcessError, LCETrainerError

if TYPE_CHECKING:
    from lce_trainer.pipeline.run import Run

logger = logging.getLogger("lce_trainer.cli")  # as a script its __name__ is another

_STAGES = {
    "run": "run all stages below but publish, in order",
    "generate": "cut the corpus into passages and have the LLM write queries",
    "mine": "find each query's competing passages",
    "label": "have the LLM judge them: positives and hard negatives",
    "train": "fine-tune the cross-encoder on the groups",
    "evaluate": "measure the reranker against what else ranks, on human judgments or else on held-out documents",
    "publish": "push the model and its groups to the Hub",
}
_EPILOG = """\
Any key of the recipe can be overridden, and flags may stand anywhere:
  lce-trainer train recipe.yaml train.learning_rate=2e-5 -v generate.queries=100
A stage that was interrupted continues where it stopped when the same command is run again.
lce-trainer config lists every key of a recipe with its default.
"""
_FIRST_STEPS = """\
first steps:
  lce-trainer init docs/                 write recipe.yaml for the documents in docs/
  lce-trainer run recipe.yaml            from the documents to a reranker
  lce-trainer config generate            what can be set for a stage
  lce-trainer publish recipe.yaml publish.model_id=you/name --dry-run
"""
_RUN_EPILOG = """\
With --on the run is a job of Hugging Face, which is paid for. The recipe and the files that it names go to a private
dataset repo, the job's log is printed here, and the run folder comes back. Ctrl-C leaves the job running; the same
command again goes on with its log, and with a job that was interrupted from what it had finished.

  lce-trainer run recipe.yaml --on hf-jobs --flavor a10g-small --timeout 6h --dry-run
"""
_CONVERT_EPILOG = """\
A modular CrossEncoder of sentence-transformers, such as Ettin's, becomes the AutoModelForSequenceClassification that
computes the same scores; adapters are merged into their base. What cannot be converted exactly is refused. With
--modular a ModernBERT reranker is written as modules again, for who goes on with it in sentence-transformers.

examples:
  lce-trainer convert you/modular-reranker plain
  lce-trainer convert runs/mine/model modules --modular
"""
_EXPORT_EPILOG = """\
The file is onnx/model.onnx or openvino/openvino_model.xml beside config.json and the tokenizer: in the model's own
folder, or in that of --output. It is compared with the model on drawn pairs, and is not left there if a score differs
by 1e-4 or more.

examples:
  lce-trainer export runs/quickstart/model --to openvino --int8
  lce-trainer export you/reranker --to onnx --output onnx-model --recipe recipe.yaml
"""
_CHECK_EPILOG = """\
transformers, sentence-transformers, ONNX Runtime and OpenVINO, where they are installed, load the model and score drawn
pairs, which are compared with lce_trainer's own scores. text-embeddings-inference, vLLM and llama.cpp are not run: what
they read of a checkpoint is known by rules.

examples:
  lce-trainer check runs/quickstart/model
"""
_INIT_EPILOG = """\
examples:
  lce-trainer init docs/
  lce-trainer init tickets.csv corpus.text_column=body --output tickets.yaml
"""
_JUDGES_EPILOG = """\
Label 50 to 100 pairs: a file of rows of query, passage and label, above 0 where the passage answers the query. Without
--pairs they are made from evaluate.dev_queries: each query's passage, and others that the first stage brings.

examples:
  lce-trainer judges recipe.yaml --pairs labelled.csv
  lce-trainer judges recipe.yaml --judge verdict --judge reranker label.reranker=BAAI/bge-reranker-base
"""
_CALIBRATE_EPILOG = """\
The pairs are a file of rows of query, passage and label, above 0 where the passage answers the query, and none of them
may have been trained on. With a recipe, whose model is then calibrated, they may be left out: its dev queries are used,
or else the groups held out from training. The model then gives probabilities where they are wanted,
Reranker.rank(..., calibrated=True); its logits stay what they are.

examples:
  lce-trainer calibrate recipe.yaml --precision 0.8
  lce-trainer calibrate models/mine --pairs labelled.csv
  lce-trainer calibrate BAAI/bge-reranker-base --pairs labelled.csv --output models/calibrated
"""
_ATTACK_EPILOG = """\
The groups are what training takes: rows of query, passage and label, triplets, or groups; best judged by people.
With a recipe, whose model is then attacked, they may be left out: its dev queries are used, or else the groups held out
from training. Nothing is changed.

examples:
  lce-trainer attack recipe.yaml
  lce-trainer attack models/mine --groups labelled.csv --json attacks.json
  lce-trainer attack BAAI/bge-reranker-base --groups labelled.csv
"""
_CONFIG_EPILOG = """\
examples:
  lce-trainer config                     every section
  lce-trainer config train               a section, and those inside it
  lce-trainer config train.group_size    one key
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status."""
    arguments = _parse(argv)
    _configure_output(arguments.verbose)
    # A rank of several may be inside a collective operation, where Python's handlers wait: it ends at once, as ever.
    if threading.current_thread() is threading.main_thread() and "RANK" not in os.environ:
        signal.signal(signal.SIGTERM, _terminate)
    try:
        status = _run(arguments)
        _leave_ranks()
        return status
    except BrokenPipeError:  # the reader of a pipe, such as head, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except FirstProcessError:  # which says why, and whose status is that of the run
        return 0
    except (LCETrainerError, OSError) as error:
        logger.debug("where it happened", exc_info=True)
        message = str(error)
        if isinstance(error, OSError) and error.strerror:  # a full disk, a folder that may not be written
            message = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        print("interrupted: run the same command again to continue", file=sys.stderr)
        return 143 if isinstance(stopped, _Terminated) else 130


def _leave_ranks() -> None:
    """Leave the other ranks of ``accelerate launch`` in good order.

    gloo's threads would else live until the interpreter ends, and one that frees a tensor then aborts the process,
    whose work was done (pytorch/pytorch#179291).
    """
    if "RANK" in os.environ:
        import gc

        from torch import distributed

        gc.collect()  # a wrapped model holds the process group
        if distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a run as an interrupt by the keyboard does."""


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise _Terminated


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse a command line on which flags and overrides may stand in any order.

    ``argparse`` takes the overrides up to the first flag behind the recipe, and leaves those after it over.
    """
    arguments, rest = parser().parse_known_args(argv)
    flags = [word for word in rest if word.startswith("-") or not hasattr(arguments, "overrides")]
    if flags:
        arguments.parser.error(f"unrecognized arguments: {' '.join(flags)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command and of its subcommands, for help and documentation too."""
    command_line = argparse.ArgumentParser(
        prog="lce-trainer",
        description="From a pile of documents to a published reranker, with no human label.",
        epilog=_FIRST_STEPS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command_line.add_argument("--version", action="version", version=f"lce-trainer {lce_trainer.__version__}")
    commands = command_line.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, what: str, epilog: str) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=what,
            description=what[0].upper() + what[1:] + ".",
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument("-v", "--verbose", action="store_true", help="log more, tracebacks and libraries included")
        command.set_defaults(parser=command)
        return command

    init = add("init", "write a commented recipe for your documents", _INIT_EPILOG)
    init.add_argument("corpus", help="a folder of .txt or .md, a file of rows, a Hub dataset id, or a Python script")
    init.add_argument("-o", "--output", type=Path, default=Path("recipe.yaml"), help="the file to write (recipe.yaml)")
    init.add_argument("overrides", nargs="*", metavar="section.key=value", help="values to write into the recipe")
    config = add("config", "list the keys of a recipe with type, default and help", _CONFIG_EPILOG)
    config.add_argument("section", nargs="?", help="a section such as train.lora, or a key such as mine.top_k")
    inspect = "show groups: the query, its positives and its negatives with their soft labels"
    for name, what in {**_STAGES, "inspect": inspect}.items():
        command = add(name, what, f"{_EPILOG}\n{_RUN_EPILOG}" if name == "run" else _EPILOG)
        command.add_argument("recipe", type=Path, help="the recipe, a YAML file")
        command.add_argument("overrides", nargs="*", metavar="section.key=value", help="overrides of the recipe")
        if name == "inspect":
            command.add_argument("--groups", type=int, default=3, metavar="N", help="how many, drawn by the seed (3)")
            continue
        command.add_argument(
            "--no-wait", action="store_true", help="fail if another command works in the run folder, do not wait for it"
        )
        if name == "run":
            _add_job_arguments(command)
        if name in ("generate", "label"):
            command.add_argument("--dry-run", action="store_true", help="answer a sample and print what the rest costs")
        if name == "publish":
            command.add_argument("--dry-run", action="store_true", help="list what would be sent, and send nothing")
            command.add_argument("--anyway", action="store_true", help="publish a model that was measured to be WORSE")
            command.add_argument("--create-pr", action="store_true", help="open pull requests, and commit nothing")
            command.add_argument(
                "--space", metavar="REPO", help="publish a Space too, a search box that shows the model"
            )
            command.add_argument("--revision", metavar="BRANCH", help="publish to a branch, and not to main")
            command.add_argument(
                "--include-passages", action="store_true", help="publish the corpus' passages without a licence too"
            )
    judges = add("judges", "compare judges on pairs that people have labelled", f"{_JUDGES_EPILOG}\n{_EPILOG}")
    judges.add_argument("recipe", type=Path, help="the recipe, a YAML file")
    judges.add_argument("overrides", nargs="*", metavar="section.key=value", help="overrides of the recipe")
    judges.add_argument("--pairs", metavar="FILE", help="labelled pairs, a file of rows of query, passage and label")
    judges.add_argument(
        "--judge",
        action="append",
        default=[],
        metavar="NAME",
        help="verdict, grade, likelihood, pairwise, reranker (label.reranker) or encoder (mine.encoder); repeat it for "
        "several (all that can be had)",
    )
    judges.add_argument("--limit", type=int, default=100, metavar="N", help="pairs at most, drawn by the seed (100)")
    judges.add_argument(
        "--no-wait", action="store_true", help="fail if another command works in the run folder, do not wait for it"
    )
    convert = add("convert", "write a reranker as a plain checkpoint, without training", _CONVERT_EPILOG)
    convert.add_argument("source", help="a Hub id or folder: a modular CrossEncoder, or adapters with their base")
    convert.add_argument("folder", type=Path, help="the folder to write, new or empty")
    convert.add_argument(
        "--modular", action="store_true", help="write a modular CrossEncoder of sentence-transformers (ModernBERT)"
    )
    check = add("check", "try what loads a model, and whether it then scores the same", _CHECK_EPILOG)
    check.add_argument("model", help="Hub id or folder of a reranker")
    export = add(
        "export", "write a reranker for ONNX Runtime or OpenVINO, and measure what that changes", _EXPORT_EPILOG
    )
    export.add_argument("model", help="a Hub id or folder of a reranker")
    export.add_argument("--to", choices=["onnx", "openvino"], required=True, help="the format to write")
    export.add_argument(
        "--int8", action="store_true", help="write an int8 form besides: dynamic for ONNX, calibrated for OpenVINO"
    )
    export.add_argument(
        "--output", type=Path, metavar="DIR", help="the folder to write, new or empty (the model's own)"
    )
    export.add_argument(
        "--recipe",
        type=Path,
        help="compare the rankings on this recipe's evaluate.dev_queries too, and calibrate int8 on its groups",
    )
    calibrate = add("calibrate", "make probabilities of a reranker's scores, by labelled pairs", _CALIBRATE_EPILOG)
    calibrate.add_argument("model", help="a folder or Hub id, or a recipe (.yaml) whose model is calibrated")
    calibrate.add_argument("overrides", nargs="*", metavar="section.key=value", help="overrides of the recipe")
    calibrate.add_argument("--pairs", metavar="FILE", help="labelled pairs, a file of rows of query, passage and label")
    calibrate.add_argument(
        "--precision", type=float, metavar="P", help="find the cut-off above which this share of passages answers"
    )
    calibrate.add_argument(
        "--output", type=Path, metavar="FOLDER", help="write a copy of the model, and change nothing"
    )
    calibrate.add_argument(
        "--no-wait", action="store_true", help="fail if another command works in the run folder, do not wait for it"
    )
    attack = add("attack", "measure what authors of passages could add to rank higher", _ATTACK_EPILOG)
    attack.add_argument("model", help="a folder or Hub id, or a recipe (.yaml) whose model is attacked")
    attack.add_argument("overrides", nargs="*", metavar="section.key=value", help="overrides of the recipe")
    attack.add_argument("--groups", metavar="FILE", help="judged groups or pairs, a file, a folder or a Hub dataset id")
    attack.add_argument("--queries", type=int, default=200, metavar="N", help="queries at most, drawn by a seed (200)")
    attack.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON too")
    attack.add_argument(
        "--special-tokens", action="store_true", help="let special tokens in passages keep their meaning, to compare"
    )
    attack.add_argument(
        "--no-wait", action="store_true", help="fail if another command works in the run folder, do not wait for it"
    )
    return command_line


def _add_job_arguments(command: argparse.ArgumentParser) -> None:
    job = command.add_argument_group("on another machine")
    job.add_argument("--on", choices=["hf-jobs"], help="where: Hugging Face Jobs")
    job.add_argument("--flavor", metavar="NAME", help="the machine, such as cpu-upgrade, t4-small or a10g-small")
    job.add_argument("--timeout", metavar="TIME", help="after which the job is ended, such as 90m (6h)")
    job.add_argument("--image", metavar="IMAGE", help="Docker image with python3 and pip (python:3.12)")
    job.add_argument(
        "--secret",
        action="append",
        default=[],
        metavar="NAME",
        help="environment variable whose value the job gets as a secret; repeat it for several (HF_TOKEN always goes)",
    )
    job.add_argument(
        "--run-repo", metavar="USER/NAME", help="private dataset repo of the run folder (named after run_dir)"
    )
    job.add_argument(
        "--include",
        action="append",
        default=[],
        metavar="PATH",
        help="a file or folder that goes up too, such as what corpus.script reads; repeat it for several",
    )
    job.add_argument(
        "--package", metavar="REQUIREMENT", help="what pip installs lce-trainer by (a wheel of what is installed here)"
    )
    job.add_argument("--dry-run", action="store_true", help="print what would be submitted, and contact nobody")


def _configure_output(verbose: bool) -> None:
    """Log this package's messages to standard error, from one process; those of libraries only with ``--verbose``."""
    logging.basicConfig(level=logging.WARNING if verbose else logging.ERROR, format="%(levelname)s: %(message)s")
    level = logging.DEBUG if verbose else logging.INFO
    logging.getLogger("lce_trainer").setLevel(level if _is_first_process() else logging.ERROR)
    if not verbose:
        warnings.simplefilter("ignore")
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # tqdm reads these when it is imported. What is quick needs no bar, and a file or a CI log, which keeps every
    # state of a bar, gets few lines.
    on_terminal = sys.stderr.isatty()
    os.environ.setdefault("TQDM_DELAY", "1" if on_terminal else "20")
    os.environ.setdefault("TQDM_MININTERVAL", "0.1" if on_terminal else "60")
    if not _is_first_process():
        os.environ["TQDM_DISABLE"] = "1"


def _run(arguments: argparse.Namespace) -> int:
    # transformers and torch take seconds to import: --help and a mistyped command must not wait for them.
    import datasets
    import huggingface_hub.utils
    import transformers
    from tqdm.contrib.logging import logging_redirect_tqdm

    transformers.logging.set_verbosity_error()  # a new head is "MISSING" to it, a long prompt an "indexing error"
    if not arguments.verbose:
        huggingface_hub.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    datasets.disable_progress_bars()
    with logging_redirect_tqdm():
        if arguments.command == "config":
            print(_describe(arguments.section))
            return 0
        if arguments.command == "init":
            print(_init(arguments.corpus, arguments.output, arguments.overrides))
            return 0
        if arguments.command == "convert":
            print(_convert(arguments.source, arguments.folder, arguments.modular))
            return 0
        if arguments.command == "check":
            print(_check(arguments.model))
            return 0
        if arguments.command == "export":
            print(_export(arguments))
            return 0
        if arguments.command == "calibrate":
            _calibrate(arguments)
            return 0
        if arguments.command == "attack":
            _attack(arguments)
            return 0
        from lce_trainer.artifacts import writing
        from lce_trainer.pipeline.run import open_run

        run = open_run(arguments.recipe, arguments.overrides)
        if arguments.command == "inspect":
            print(_inspect(run, arguments.groups))
            return 0
        if arguments.command == "run" and _is_remote(arguments):
            _run_remotely(arguments, run)
            return 0
        with writing(run.root), run.held(wait=not arguments.no_wait):
            if arguments.command == "judges":
                run.lead(lambda: print(_judges(run, arguments)))
                return 0
            return _run_stages(arguments, run)


def _is_remote(arguments: argparse.Namespace) -> bool:
    """Whether a run is for another machine; a flag that is for those alone needs --on."""
    from lce_trainer.errors import ConfigError

    if arguments.on is not None:
        if "RANK" in os.environ:
            raise ConfigError("--on submits one job: start the command without accelerate launch or torchrun")
        return True
    names = ("flavor", "timeout", "image", "secret", "run_repo", "include", "package", "dry_run")
    if given := [name for name in names if getattr(arguments, name)]:
        raise ConfigError(f"--{given[0].replace('_', '-')} is for a run on another machine: add --on hf-jobs")
    return False


def _run_remotely(arguments: argparse.Namespace, run: "Run") -> None:
    """Run a recipe as a job, and print what goes up, the job's log and what came back."""
    from lce_trainer.artifacts import writing
    from lce_trainer.errors import ConfigError
    from lce_trainer.hub.jobs import JobSettings, run_remotely
    from lce_trainer.pipeline.remote import prepare_job

    if arguments.flavor is None:
        raise ConfigError("--on hf-jobs needs --flavor, the machine that is paid for, such as a10g-small")
    chosen = {name: getattr(arguments, name) for name in ("timeout", "image", "run_repo", "package")}
    settings = JobSettings(
        arguments.flavor,
        secrets=tuple(arguments.secret),
        **{name: value for name, value in chosen.items() if value is not None},
    )
    submission = prepare_job(run, arguments.recipe, arguments.overrides, settings, arguments.include)
    print(submission.describe(), flush=True)
    if arguments.dry_run:
        return
    with writing(run.root), run.held(wait=not arguments.no_wait):
        print(f"\n{run_remotely(submission, lambda line: print(line, flush=True))}")


def _inspect(run: "Run", count: int) -> str:
    """Return groups of a run, cut to the width of the terminal."""
    from lce_trainer.pipeline.report import describe_groups, sample_groups

    return describe_groups(sample_groups(run, count), max(shutil.get_terminal_size((100, 24)).columns, 40))


def _judges(run: "Run", arguments: argparse.Namespace) -> str:
    """Compare judges and return the tables."""
    from lce_trainer.pipeline.judges import RESULT, compare_judges, describe_judges

    found = compare_judges(run, arguments.pairs, arguments.judge, arguments.limit)
    return f"{describe_judges(found)}\n\nJSON: {run.root / RESULT}"


def _describe(wanted: str | None) -> str:
    """Return the keys of a section, wrapped to the width of the terminal."""
    from lce_trainer.pipeline.reference import find_keys

    width = min(max(shutil.get_terminal_size((100, 24)).columns, 40), 120)
    lines: list[str] = []
    for section in find_keys(wanted):
        if section.name:
            lines += [*textwrap.wrap(f"{section.name}: {section.help}", width), ""]
        inherited = False
        for key in section.keys:
            if key.inherited and not inherited:
                lines += [*textwrap.wrap(f"{section.name}: of transformers.TrainingArguments", width), ""]
                inherited = True
            lines += [f"  {key.name}: {key.type} = {key.default}"]
            lines += textwrap.wrap(key.help, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
        lines += [""]
    return "\n".join(lines).rstrip()


def _init(corpus: str, output: Path, overrides: Sequence[str]) -> str:
    """Write a recipe for a corpus and return what to do next."""
    from lce_trainer.errors import ConfigError
    from lce_trainer.pipeline.draft import draft_recipe

    if output.exists():
        raise ConfigError(f"{output} is there already: name another file with --output, or delete it")
    text = draft_recipe(corpus, overrides)
    output.write_text(text, encoding="utf-8")
    return (
        f"{text.splitlines()[0].removeprefix('# ')}\nWrote {output}. Read it, then run it:\n  lce-trainer run {output}"
    )


def _convert(source: str, folder: Path, modular: bool) -> str:
    """Write a reranker as a plain checkpoint, or as modules, and return what was written."""
    from lce_trainer.errors import ConfigError
    from lce_trainer.model.reranker import Reranker

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is not empty: name a new folder, so that nothing is overwritten")
    reranker = Reranker.from_pretrained(source, device="cpu", packing="none")
    reranker.save_pretrained(folder, modular=modular)
    what = "modular CrossEncoder" if modular else f"plain {type(reranker.model).__name__}"
    return f"Wrote {folder}, a {what} that scores as {source} does."


def _check(name: str) -> str:
    """Return what each loader makes of a model."""
    from lce_trainer.model.check import check_model, describe_loaders

    return describe_loaders(name, check_model(name))


def _export(arguments: argparse.Namespace) -> str:
    """Write a reranker for another runtime and return what that changes."""
    from lce_trainer.model.export import describe_export, export_reranker

    name, to, output, int8 = arguments.model, arguments.to, arguments.output, arguments.int8
    if arguments.recipe is None:
        folder, exported = export_reranker(name, to, output, int8=int8)
        return f"Wrote {folder / to}.\n\n{describe_export(exported)}"
    from lce_trainer.artifacts import writing
    from lce_trainer.evaluation.report import table
    from lce_trainer.pipeline.evaluate import compare_on_dev, dev_queries_of
    from lce_trainer.pipeline.report import sample_pairs
    from lce_trainer.pipeline.run import open_run
    from lce_trainer.pipeline.stages import read_corpus

    run = open_run(arguments.recipe)
    dev_queries_of(run)
    with writing(run.root), run.held():
        read_corpus(run)
        sample, what = sample_pairs(run) if int8 and to == "openvino" else (None, "")
        folder, exported = export_reranker(name, to, output, int8=int8, sample=sample)
        compared = compare_on_dev(run, {backend: one.reranker for backend, one in exported.items()})
    return f"Wrote {folder / to}.\n\n{describe_export(exported, what)}\n\nOn the dev queries:\n{table(compared)}"


def _of_model_or_recipe(
    arguments: argparse.Namespace,
    of_model: Callable[[str], dict[str, Any]],
    of_run: Callable[["Run"], dict[str, Any]],
    report: Callable[[dict[str, Any]], None],
) -> None:
    """Report on a model, or on that of a recipe, whose run folder is held meanwhile."""
    from lce_trainer.artifacts import writing
    from lce_trainer.errors import ConfigError
    from lce_trainer.pipeline.run import open_run

    if Path(arguments.model).suffix in (".yaml", ".yml"):
        run = open_run(Path(arguments.model), arguments.overrides)
        with writing(run.root), run.held(wait=not arguments.no_wait):
            run.lead(lambda: report(of_run(run)))
        return
    if arguments.overrides:
        raise ConfigError(f"{arguments.overrides[0]} overrides a recipe, and {arguments.model} is none")
    report(of_model(arguments.model))


def _calibrate(arguments: argparse.Namespace) -> None:
    """Calibrate a model, or that of a recipe, and print the figures."""
    from lce_trainer.pipeline.calibrate import calibrate_model, calibrate_run, describe_calibration

    def report(found: dict[str, Any]) -> None:
        page = "" if found["page"] is None else f"\n\nreport: {found['page']}"
        print(f"{describe_calibration(found)}{page}")

    chosen = arguments.pairs, arguments.precision, arguments.output
    _of_model_or_recipe(
        arguments, lambda model: calibrate_model(model, *chosen), lambda run: calibrate_run(run, *chosen), report
    )


def _attack(arguments: argparse.Namespace) -> None:
    """Attack a model, or that of a recipe, and print the figures."""
    from lce_trainer.pipeline.attack import attack_model, attack_run, describe_attacks, write_attacks

    def report(found: dict[str, Any]) -> None:
        if arguments.json is not None:
            write_attacks(found, arguments.json)
        print(describe_attacks(found))

    chosen = arguments.groups, arguments.queries, arguments.special_tokens
    _of_model_or_recipe(
        arguments, lambda model: attack_model(model, *chosen), lambda run: attack_run(run, *chosen), report
    )


def _run_stages(arguments: argparse.Namespace, run: "Run") -> int:
    from lce_trainer.pipeline import stages
    from lce_trainer.pipeline.report import write_report
    from lce_trainer.synthesis.cost import QuoteReadyError

    if arguments.command == "publish":
        run.recipe.publish.space_id = arguments.space or run.recipe.publish.space_id
        published = stages.publish(
            run,
            dry_run=arguments.dry_run,
            include_passages=arguments.include_passages,
            revision=arguments.revision,
            create_pr=arguments.create_pr,
            anyway=arguments.anyway,
        )
        print(published)
        return 0
    dry_run = arguments.command in ("generate", "label") and arguments.dry_run
    works: dict[str, Callable[[], str | None]] = {
        "generate": lambda: stages.generate(run, dry_run),
        "mine": lambda: stages.mine(run),
        "label": lambda: stages.label(run, dry_run),
        "train": lambda: stages.train(run),
        "evaluate": lambda: stages.evaluate(run),
    }
    chosen: tuple[str, ...] = (arguments.command,)
    if arguments.command == "run":
        stages.check(run)
        chosen = stages.stages_of(run)
        if "generate" not in chosen and _is_first_process():
            logger.info("generate, mine and label are left out: training takes the groups of train.groups")
    if {"MASTER_PORT", "ACCELERATE_MIXED_PRECISION"} <= os.environ.keys() and "RANK" not in os.environ:
        logger.warning(
            "accelerate launch has started one process only: for more on a CPU it needs mpirun, or a config "
            "like recipes/accelerate_configs/ddp_cpu.yaml"
        )
    begun = time.monotonic()
    for name in chosen:
        start = time.monotonic()
        try:
            text = works[name]()
        except QuoteReadyError as quote:  # the end of a dry run
            text = str(quote)
        logger.info("%s took %s", name, _duration(time.monotonic() - start))
        if text is not None and _is_first_process():
            print(f"\n{text}")
    page = None
    if arguments.command in ("run", "evaluate") and _is_first_process():
        page = write_report(run)
    if arguments.command == "evaluate" and page is not None:
        print(f"\nreport: {page}")
    if arguments.command == "run" and _is_first_process():
        if "evaluate" not in stages.stages_of(run):
            logger.info(
                "evaluate was left out: the recipe names no human judgments (evaluate.queries), and holds no "
                "documents out (evaluate.synthetic)"
            )
        print(_what_next(run.root, time.monotonic() - begun))
    return 0


def _is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _what_next(root: Path, seconds: float) -> str:
    from lce_trainer.pipeline.report import PAGE

    kinds = {"model": "model", "dataset": "groups", "figures": "evaluation", "report": PAGE}
    made = "\n".join(f"  {what + ':':9} {root / name}" for what, name in kinds.items() if (root / name).exists())
    return f"""
Done in {_duration(seconds)}.
{made}

Use it:
  from lce_trainer import Reranker
  reranker = Reranker.from_pretrained("{root / "model"}")
  print(reranker.rank("your query", ["a passage", "another passage"], top_k=1))
"""


if __name__ == "__main__":
    sys.exit(main())
