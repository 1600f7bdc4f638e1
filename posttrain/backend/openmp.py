"""How many OpenMP threads compute, and the end of those of an idle Python thread. With more OpenMP
workers than cores, libgomp puts them to sleep after each loop, and waking them costs more than most
loops of a small model (two cores, an RL training pass of `tiny`: 0.10 s instead of 0.18 s).
"""

import ctypes
import os
from functools import cache
from pathlib import Path

import torch

# Weights below which one thread samples faster: a decoding step's loops are too short for two (two
# cores, an RL step of `tiny`: 0.61 s instead of 0.80 s by vLLM, 0.43 s instead of 0.60 s by torch).
ONE_THREAD = 10_000_000

# omp_pause_soft of OpenMP 5.0: the workers end, and restart with the next parallel loop
SOFT_PAUSE = 1


@cache
def _libgomp() -> ctypes.PyDLL | None:
    """torch's libgomp; None if it was built with another OpenMP, which stays unchanged."""
    files = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    library = ctypes.PyDLL(str(files[0])) if files else None
    return library if library is not None and hasattr(library, "omp_pause_resource") else None


def release_workers() -> None:
    """Ends the OpenMP workers of the calling thread."""
    if gomp := _libgomp():
        gomp.omp_pause_resource(SOFT_PAUSE, gomp.omp_get_initial_device())


def limit_threads(parameters: int) -> None:
    """The calling thread computes alone for a model this small, unless OMP_NUM_THREADS says
    otherwise."""
    if parameters < ONE_THREAD and "OMP_NUM_THREADS" not in os.environ and (gomp := _libgomp()):
        torch.get_num_threads()  # in its first call torch sets the thread's number itself
        gomp.omp_set_num_threads(1)
