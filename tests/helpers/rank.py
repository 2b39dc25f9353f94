"""Run a script as one rank of several on the CPU, also with FSDP, for which accelerate's launcher has no way there.

accelerate chooses FSDP only where it has found GPUs; torch itself shards on a CPU just as well. So once the
processes have found each other, accelerate is told that they are GPU processes. Nothing else is changed.
"""

import logging
import os
import runpy
import sys
from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, parse_flag_from_env

_init = AcceleratorState.__init__


def _init_as_if_on_gpus(self: AcceleratorState, *args: Any, **kwargs: Any) -> None:
    if not AcceleratorState._shared_state and PartialState._shared_state:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    _init(self, *args, **kwargs)


if parse_flag_from_env("ACCELERATE_USE_FSDP"):
    AcceleratorState.__init__ = _init_as_if_on_gpus

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as ended:
        if ended.code:
            raise
    # A model that is wrapped or sharded keeps gloo's threads alive when its process group is destroyed, and a thread
    # that frees a tensor while the interpreter ends aborts the process (pytorch/pytorch#179291).
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
