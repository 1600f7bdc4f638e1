"""Seconds of a supervised step of `tiny` on two cores, by torch's threads and by the programs beside it.

    python benchmarks/threads.py [--rounds 3]

A step is forward_backward and optim_step on 128 rows of 24 tokens; a program beside it is a loop in Python
that never waits. Left out: sampling, which takes one thread at this size.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial

if not __package__:  # run as a file: the packages are one folder up
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from benchmarks.report import alternate, in_subprocess, wait_until_quiet, write_report
from benchmarks.train_throughput import Shape, random_data, step, timed
from posttrain.backend.service_client import ServiceClient

SHAPE = Shape("tiny", 128, 24)
THREADS = {"two threads: seconds of a step": 2, "one thread: seconds of a step": 1}
BESIDE = {"alone": 0, "beside one busy program": 1, "beside two": 2}
WARM_UP, STEPS = 5, 20


def median_step() -> float:
    with ServiceClient() as service:
        client = service.create_training_client(SHAPE.model_name)
        data = random_data(SHAPE, len(client.get_tokenizer()))
        seconds = [timed(lambda: step(client, data)) for _ in range(WARM_UP + STEPS)]
    return statistics.median(seconds[WARM_UP:])


@contextmanager
def busy_programs(count: int) -> Iterator[None]:
    programs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


def side(threads: int, beside: int) -> float:
    with busy_programs(beside):
        return in_subprocess(__file__, "--side", OMP_NUM_THREADS=str(threads))["seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", action="store_true", help="used by the script itself: the seconds of one process")
    options = parser.parse_args()
    if options.side:
        print(json.dumps({"seconds": median_step()}))
        return
    load = wait_until_quiet()
    cells = {
        f"{line} | {column}": partial(side, threads, beside)
        for line, beside in BESIDE.items()
        for column, threads in THREADS.items()
    }
    seconds = alternate(cells, options.rounds)
    write_report("threads", {}, asdict(SHAPE) | {"rounds": options.rounds}, load, seconds)


if __name__ == "__main__":
    main()
