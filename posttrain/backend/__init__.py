"""The local engine: torch trains, vLLM samples; tokens and tensors only. A script for Tinker ports
by its import: `import posttrain.backend as tinker`.
"""

import os
from importlib import import_module
from typing import Any

# read when torch loads; vLLM's thread binding would print a warning at every start
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
# read when torch loads: for how long libgomp's threads spin while they wait for one another. By its own
# rule they keep a core from other programs for milliseconds a loop: two runs of `tiny` on two cores took
# 0.13 to 1.7 s a step, 0.08 s with this number; alone 0.03 s with both
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

_MODULE_OF = {
    "ServiceClient": "service_client",
    "TrainingClient": "training_client",
    "SamplingClient": "sampling_client",
    "APIFuture": "futures",
    "RestClient": "rest_client",
}


def __getattr__(name: str) -> Any:
    """Clients, types and errors, loaded on first use: command lines do not wait for torch."""
    if name in ("types", "errors"):
        return import_module(f"posttrain.backend.{name}")
    if not name.startswith("_"):
        for file in [_MODULE_OF[name]] if name in _MODULE_OF else ["errors", "types"]:
            if hasattr(module := import_module(f"posttrain.backend.{file}"), name):
                return getattr(module, name)
    raise AttributeError(f"module 'posttrain.backend' has no attribute {name!r}")
