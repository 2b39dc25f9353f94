"""Scripts that two processes run together on the CPU, as ``torchrun`` starts them."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from helpers.paths import ROOT, TESTS

TORCHRUN = ("--standalone", "--nproc-per-node=2", str(TESTS / "helpers" / "rank.py"))


def run_on_two_ranks(
    script: Path, environment: Mapping[str, str] | None = None, timeout: int = 280
) -> subprocess.CompletedProcess[str]:
    """Run a script on two ranks and return what they printed, after both ended with exit status 0.

    Args:
        script: Its path.
        environment: Variables beside those of this process.
        timeout: In seconds.
    """
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *TORCHRUN, str(script)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    # torchrun's own summary, at the end, does not say why a rank died.
    assert done.returncode == 0, done.stderr[-12000:]
    return done
