"""The ``lce-trainer`` command. Every error that a user can mend is one line, without a traceback."""

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from lce_trainer.errors import LCETrainerError

_STAGES = {
    "generate": "cut the corpus into passages and have the LLM write queries",
    "mine": "find each query's competing passages",
    "label": "have the LLM judge them into groups of positives and hard negatives",
    "train": "fine-tune the cross-encoder on the groups",
    "evaluate": "measure on human judgments, against BM25",
    "run": "all of the above, in order",
    "publish": "push the model and its groups to the Hub",
}
_ORDER = ("generate", "mine", "label", "train", "evaluate")
_EPILOG = """\
Any key of the recipe can be overridden: lce-trainer train recipe.yaml train.learning_rate=2e-5
A stage that was interrupted goes on where it was when the same command is run again.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("lce_trainer").setLevel(logging.DEBUG if arguments.verbose else logging.INFO)
    try:
        return _run(arguments)
    except LCETrainerError as error:
        if arguments.verbose:
            logging.getLogger(__name__).debug("where it happened", exc_info=True)
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: run the same command again to go on", file=sys.stderr)
        return 130


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
        if name == "publish":
            command.add_argument("--dry-run", action="store_true", help="list what would go, and send nothing")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    # transformers and torch take seconds to import: --help and a mistyped command must not wait for them.
    import datasets

    from lce_trainer import stages
    from lce_trainer.run import open_run

    datasets.disable_progress_bars()
    run = open_run(arguments.recipe, arguments.overrides)
    if arguments.command == "publish":
        print(stages.publish(run, dry_run=arguments.dry_run))
        return 0
    works: dict[str, Callable[[], str | None]] = {
        "generate": lambda: stages.generate(run),
        "mine": lambda: stages.mine(run),
        "label": lambda: stages.label(run),
        "train": lambda: stages.train(run),
        "evaluate": lambda: stages.evaluate(run),
    }
    chosen = _ORDER if arguments.command == "run" else (arguments.command,)
    begun = time.monotonic()
    for name in chosen:
        start = time.monotonic()
        text = works[name]()
        logging.getLogger("lce_trainer").info("%s took %s", name, _duration(time.monotonic() - start))
        if text is not None and _is_first_process():
            print(f"\n{text}")
    if arguments.command == "run" and _is_first_process():
        print(_what_next(run.root, time.monotonic() - begun))
    return 0


def _is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _what_next(root: Path, seconds: float) -> str:
    return f"""
Done in {_duration(seconds)}.
  model:    {root / "model"}
  dataset:  {root / "groups"}
  figures:  {root / "evaluation"}

Use it:
  from lce_trainer import Reranker
  reranker = Reranker.from_pretrained("{root / "model"}")
  print(reranker.rank("your query", ["a passage", "another passage"], top_k=1))
"""


if __name__ == "__main__":
    sys.exit(main())
