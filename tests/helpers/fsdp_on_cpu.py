"""Run a script with FSDP on CPU processes, for which accelerate's launcher and config have no way.

accelerate chooses FSDP only where it has found GPUs; torch itself shards on a CPU just as well. So once the
processes have found each other, accelerate is told that they are GPU processes. Nothing else is changed.
"""

import runpy
import sys
from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

_init = AcceleratorState.__init__


def _init_as_if_on_gpus(self: AcceleratorState, *args: Any, **kwargs: Any) -> None:
    if not AcceleratorState._shared_state and PartialState._shared_state:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    _init(self, *args, **kwargs)


AcceleratorState.__init__ = _init_as_if_on_gpus

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
