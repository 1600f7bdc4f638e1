"""The local engine: torch trains, vLLM samples. Knows tokens and tensors; nothing of chat, environments or rewards.

A script written for Tinker ports by its import: `import backend as tinker`, then tinker.ServiceClient(), tinker.types.Datum and so on.
"""

import os
from importlib import import_module
from typing import Any

os.environ.setdefault(
    "TORCH_CPP_LOG_LEVEL", "ERROR"
)  # read when torch loads; vLLM's thread binding would print a warning at every start


def __getattr__(name: str) -> Any:
    """ServiceClient, the clients and the types, loaded when first asked for: the command lines must not wait for torch to parse."""
    if name in ("types", "errors"):
        return import_module(f"backend.{name}")
    if name in ("ServiceClient", "TrainingClient", "SamplingClient"):
        module = {"ServiceClient": "service_client", "TrainingClient": "training_client", "SamplingClient": "sampling_client"}[
            name
        ]
        return getattr(import_module(f"backend.{module}"), name)
    if not name.startswith("_") and hasattr(types := import_module("backend.types"), name):
        return getattr(types, name)
    raise AttributeError(f"module 'backend' has no attribute {name!r}")
