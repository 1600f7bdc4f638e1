"""Threads that are idle hold no OpenMP workers; the sampler of a small model has none."""

import os
import subprocess
import sys

from tests.conftest import ROOT

COUNTED = """
import os, time
import torch
from posttrain.backend.futures import InOrder
from posttrain.backend.openmp import release_workers

def threads(expected):
    deadline = time.monotonic() + 600  # a worker that was told to end is listed a little longer
    while (found := len(os.listdir("/proc/self/task"))) != expected and time.monotonic() < deadline:
        time.sleep(0.01)
    return found

idle = len(os.listdir("/proc/self/task"))
x = torch.ones(1000, 1000)
def compute():
    return float((x * x).sum()), threads(idle + 2)

release_workers()  # of the main thread, which has just made x
threads(idle)
thread = InOrder("training")
first, second = thread.submit(compute).result(), thread.submit(compute).result()
print(idle, first, second, threads(idle + 1))
"""


# Trap: idle threads whose OpenMP workers slow the one that computes.
def test_workers_are_given_back_after_each_call() -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "2", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", COUNTED], env=environment, capture_output=True, text=True, check=True)
    idle = int(done.stdout.split()[0])
    busy = (1e6, idle + 2)  # with the thread of the calls, and one worker of its own
    assert done.stdout.split(maxsplit=1)[1].strip() == f"{busy} {busy} {idle + 1}"


LIMITED = """
from concurrent.futures import ThreadPoolExecutor
import torch
from posttrain.backend.openmp import limit_threads

def threads(parameters):
    limit_threads(parameters)
    return torch.get_num_threads()

torch.set_num_threads(2)  # as on a machine of two cores
for parameters in (10**6, 10**9):
    with ThreadPoolExecutor(1) as engine:
        print(engine.submit(threads, parameters).result(), torch.get_num_threads())
"""


def test_a_small_model_is_sampled_by_one_thread_unless_the_user_says_otherwise() -> None:
    for said, expected in [({}, ["1 2", "2 2"]), ({"OMP_NUM_THREADS": "2"}, ["2 2", "2 2"])]:
        environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        environment |= {"PYTHONPATH": str(ROOT)} | said
        done = subprocess.run(
            [sys.executable, "-c", LIMITED], env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout.splitlines() == expected


# the last: vLLM has this process's children load libgomp before Python
IN_THE_WAY = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "LD_PRELOAD")


# Trap: a second program on the machine, for which threads that spin leave no core.
def test_threads_that_wait_leave_their_core_to_other_programs() -> None:
    said = {name: value for name, value in os.environ.items() if name not in IN_THE_WAY}
    for environment, expected in [({}, "1000"), ({"OMP_WAIT_POLICY": "active"}, "30000000000")]:
        shown = said | environment | {"OMP_DISPLAY_ENV": "verbose", "PYTHONPATH": str(ROOT)}
        code = "import posttrain.backend, torch"
        done = subprocess.run([sys.executable, "-c", code], env=shown, capture_output=True, text=True, check=True)
        assert f"GOMP_SPINCOUNT = '{expected}'" in done.stderr, done.stderr
