"""A block's record: named checks with a bound, and figures."""

import json
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from posttrain.backend.config import training_device


class Record:
    """Printed as one JSON line after each figure: of a block that is killed, first_light.py reads the
    last. `passed` is whether every check held; a check that does not hold does not end the block.
    """

    def __init__(self) -> None:
        device = training_device()
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        self._record: dict[str, Any] = {"passed": True, "device": name, "failed": []}

    def figure(self, name: str, value: Any) -> None:
        self._record[name] = float(f"{value:.4g}") if isinstance(value, float) else value
        print(json.dumps(self._record | {"passed": False, "error": "ended early"}), flush=True)

    def at_most(self, name: str, value: float, bound: float) -> None:
        self.figure(name, value)
        self.holds(f"{name} <= {bound:g}", value <= bound)

    def holds(self, name: str, condition: bool) -> None:
        if not condition:
            self._record["passed"] = False
            self._record["failed"].append(name)

    @contextmanager
    def going_on(self, name: str) -> Iterator[None]:
        """An error inside is the figure `name`, and fails the block; what comes after is measured all the same."""
        try:
            yield
        except Exception as error:  # whatever a kernel, a compiler or an engine raises
            traceback.print_exc(file=sys.stderr)
            lines = str(error).strip().splitlines() or [""]
            self.figure(name, f"error: {type(error).__name__}: {lines[-1][:200]}")
            self.holds(name, False)

    def print(self) -> None:
        print(json.dumps(self._record), flush=True)
