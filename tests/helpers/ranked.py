"""What the processes of a launch do: stages of a recipe, each with its settings, whatever the one before raised.

``python ranked.py RECIPE '{"stage": "generate", "dry_run": true, "overrides": ["run_dir=…"]}' …``
"""

import json
import logging
import os
import sys
from pathlib import Path

from lce_trainer.pipeline import stages
from lce_trainer.pipeline.run import open_run

if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    logging.getLogger("lce_trainer").setLevel(logging.DEBUG)
    for text in sys.argv[2:]:
        job = json.loads(text)
        run = open_run(Path(sys.argv[1]), job["overrides"])
        name = f"process {os.environ['RANK']} {job['stage']}"
        try:
            with run.held():
                getattr(stages, job["stage"])(run, *([True] if job.get("dry_run") else []))
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        else:
            print(f"{name}: done", file=sys.stderr, flush=True)
