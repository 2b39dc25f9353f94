"""The ``lce-trainer`` command. Every error that a user can mend is one line, without a traceback."""

import argparse
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from lce_trainer.errors import LCETrainerError

if TYPE_CHECKING:
    from lce_trainer.pipeline.run import Run

logger = logging.getLogger("lce_trainer.cli")  # as a script its __name__ is another

_STAGES = {
    "generate": "cut the corpus into passages and have the LLM write queries",
    "mine": "find each query's competing passages",
    "label": "have the LLM judge them into groups of positives and hard negatives",
    "train": "fine-tune the cross-encoder on the groups",
    "evaluate": "measure on human judgments, against BM25",
    "run": "all of the above, in order",
    "publish": "push the model and its groups to the Hub",
}
_EPILOG = """\
Any key of the recipe can be overridden: lce-trainer train recipe.yaml train.learning_rate=2e-5
A stage that was interrupted goes on where it was when the same command is run again.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    arguments = _parser().parse_args(argv)
    _speak(arguments.verbose)
    # A rank of several may be inside a collective operation, where Python's handlers wait: it ends at once, as ever.
    if threading.current_thread() is threading.main_thread() and "RANK" not in os.environ:
        signal.signal(signal.SIGTERM, _terminate)
    try:
        return _run(arguments)
    except (LCETrainerError, OSError) as error:
        logger.debug("where it happened", exc_info=True)
        message = str(error)
        if isinstance(error, OSError) and error.strerror:  # a full disk, a folder that may not be written
            message = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        print("interrupted: run the same command again to go on", file=sys.stderr)
        return 143 if isinstance(stopped, _Terminated) else 130


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a run as an interrupt by the keyboard does."""


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise _Terminated


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lce-trainer",
        description="From a pile of documents to a published reranker, with no human label.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, help_text in _STAGES.items():
        command = commands.add_parser(
            name,
            help=help_text,
            description=help_text[0].upper() + help_text[1:] + ".",
            epilog=_EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument("recipe", type=Path, help="the recipe, a YAML file")
        command.add_argument("overrides", nargs="*", metavar="section.key=value", help="overrides of the recipe")
        command.add_argument("-v", "--verbose", action="store_true", help="log more, tracebacks included")
        command.add_argument(
            "--no-wait", action="store_true", help="fail if another command works in the run folder, do not wait for it"
        )
        if name == "publish":
            command.add_argument("--dry-run", action="store_true", help="list what would go, and send nothing")
            command.add_argument(
                "--include-passages", action="store_true", help="publish the corpus' passages without a licence too"
            )
    return parser


def _speak(verbose: bool) -> None:
    """Log what matters to standard error, from one process; what is quick needs no progress bar."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    level = logging.DEBUG if verbose else logging.INFO
    logging.getLogger("lce_trainer").setLevel(level if _is_first_process() else logging.ERROR)
    if not verbose:
        warnings.simplefilter("ignore", FutureWarning)  # of libraries, to each other
    # tqdm reads these when it is imported. A file or a CI log gets few lines: it keeps every state of a bar.
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

    from lce_trainer.pipeline.run import open_run

    transformers.logging.set_verbosity_error()  # a new head is "MISSING" to it, a long prompt an "indexing error"
    transformers.logging.disable_progress_bar()
    huggingface_hub.utils.enable_progress_bars()  # type: ignore[attr-defined]  # the line before takes those of downloads along
    datasets.disable_progress_bars()
    run = open_run(arguments.recipe, arguments.overrides)
    with logging_redirect_tqdm(), run.held(wait=not arguments.no_wait):
        return _run_stages(arguments, run)


def _run_stages(arguments: argparse.Namespace, run: "Run") -> int:
    from lce_trainer.pipeline import stages

    if arguments.command == "publish":
        print(stages.publish(run, dry_run=arguments.dry_run, include_passages=arguments.include_passages))
        return 0
    works: dict[str, Callable[[], str | None]] = {
        "generate": lambda: stages.generate(run),
        "mine": lambda: stages.mine(run),
        "label": lambda: stages.label(run),
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
        text = works[name]()
        logger.info("%s took %s", name, _duration(time.monotonic() - start))
        if text is not None and _is_first_process():
            print(f"\n{text}")
    if arguments.command == "run" and _is_first_process():
        if not stages.is_judged(run):
            logger.info("evaluate was left out: the recipe names no human judgments (evaluate.queries)")
        print(_what_next(run.root, time.monotonic() - begun))
    return 0


def _is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _what_next(root: Path, seconds: float) -> str:
    kinds = {"model": "model", "dataset": "groups", "figures": "evaluation"}
    made = "\n".join(f"  {what + ':':9} {root / name}" for what, name in kinds.items() if (root / name).is_dir())
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
