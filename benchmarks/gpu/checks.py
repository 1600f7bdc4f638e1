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

    @property
    def passed(self) -> bool:
        return self._record["passed"]

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
            self.error(name, error)

    def error(self, name: str, error: Exception) -> str:
        """The figure `name`, which does not hold. The cause is on the first line of CUDA's errors, and on a later one
        of a compiler's."""
        traceback.print_exception(error, file=sys.stderr)
        text = f"error: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        self.figure(name, text)
        self.holds(name, False)
        return text

    def print(self) -> None:
        print(json.dumps(self._record), flush=True)
