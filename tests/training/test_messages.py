"""What a user sees who has configured nothing, and one who has."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.paths import ROOT, TESTS

SCRIPT = """
import logging, sys
sys.path.insert(0, {tests!r})
from helpers.trainers import make_groups, make_trainer
{before}
trainer = make_trainer({out!r}, make_groups(8), per_device_train_batch_size=4{settings})
{between}
make_trainer({out!r}, make_groups(8))
trainer.train()
"""


def said(folder: Path, before: str = "", between: str = "", settings: str = "") -> list[str]:
    """Lines on stderr of a script that trains, and makes two trainers, without those of transformers."""
    code = SCRIPT.format(tests=str(TESTS), out=str(folder), before=before, between=between, settings=settings)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return [line for line in done.stderr.splitlines() if "[transformers]" not in line]


def count(lines: list[str], message: str) -> int:
    return sum(message in line for line in lines)


def test_the_forecast_is_seen_where_logging_is_not_configured(tmp_path):
    lines = said(tmp_path)
    assert count(lines, "[lce_trainer] 2 steps of 4 groups, about ") == 1
    assert count(lines, "[lce_trainer] memory: the weights' ") == 1


@pytest.mark.parametrize("place", ["before", "between"])
def test_what_is_configured_decides_and_nothing_comes_twice(place, tmp_path):
    lines = said(tmp_path, **{place: "logging.basicConfig(level='INFO', format='mine: %(message)s')"})
    assert count(lines, "mine: memory: the weights' ") == count(lines, "memory: the weights' ") == 1


@pytest.mark.parametrize(
    "quiet",
    [
        {"settings": ", log_level='warning'"},
        {"before": "logging.basicConfig()"},
        {"before": "logging.getLogger('lce_trainer').setLevel('WARNING')"},
        {"before": "import transformers; transformers.logging.set_verbosity_error()"},
    ],
)
def test_who_wants_it_quiet_gets_it_quiet(quiet, tmp_path):
    assert count(said(tmp_path, **quiet), "memory: the weights' ") == 0


def test_a_chosen_log_level_holds_where_logging_is_configured_too(tmp_path):
    lines = said(tmp_path, before="logging.basicConfig(format='mine: %(message)s')", settings=", log_level='info'")
    assert count(lines, "memory: the weights' ") == count(lines, "mine: memory: the weights' ") == 1
