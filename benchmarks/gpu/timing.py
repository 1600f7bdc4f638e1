"""What the blocks that measure have in common: a time, a peak, and a figure whose failure does not
end the block.
"""

import gc
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.checks import Record
from posttrain.backend.config import training_device
from posttrain.backend.errors import OutOfMemoryError

GIB = 2**30


def milliseconds(run: Callable[[], object], repeats: int = 5) -> float:
    """The best of several runs, the first two of which (compilation, allocation) are not
    counted.
    """
    if training_device().type != "cuda":
        times = []
        for _ in range(2 + repeats):
            start = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - start))
        return min(times[2:])
    times = []
    for _ in range(2 + repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return min(times[2:])


def seconds(run: Callable[[], object]) -> float:
    """Wall clock of one run, with what it left to the GPU."""
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def forget() -> None:
    """Frees what nothing refers to, and starts the peak anew."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib() -> float:
    return torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else 0.0


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Norm of the difference over the norm."""
    found, exact = found.detach().double(), exact.detach().double()
    return float((found - exact).norm() / exact.norm())


def attempt(record: Record, name: str, measure: Callable[[], Any]) -> Any:
    """The figure `name`, told at once on stderr. An error is the figure; it fails the block unless
    it is a lack of memory. Returns the figure.
    """
    forget()
    start = time.perf_counter()
    try:
        value = measure()
    except (torch.OutOfMemoryError, OutOfMemoryError):  # the second, of a trainer's pass or step
        value = f"does not fit: out of memory at {peak_gib():.1f} GiB"
    except Exception as error:  # whatever a kernel or a compiler raises: the other figures are still wanted
        return record.error(name, error)
    value = {key: rounded(part) for key, part in value.items()} if isinstance(value, dict) else value
    record.figure(name, value)
    print(f"{name}: {value} [{time.perf_counter() - start:.1f} s]", file=sys.stderr, flush=True)
    return value


def rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value
