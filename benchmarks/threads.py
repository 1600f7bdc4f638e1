"""Seconds of a supervised step of `tiny` on two cores, by torch's threads and by the programs beside it.

    python benchmarks/threads.py [--rounds 3]

A step is forward_backward and optim_step on 128 rows of 24 tokens; a busy program is a loop in Python that
never waits, another run the same steps with as many threads. Left out: sampling, which takes one thread at
this size.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from itertools import islice

if not __package__:  # run as a file: the packages are one folder up
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from benchmarks.report import alternate, in_subprocess, wait_until_quiet, write_report
from benchmarks.train_throughput import Shape, random_data, step, timed
from posttrain.backend.service_client import ServiceClient

SHAPE = Shape("tiny", 128, 24)
THREADS = {"two threads: seconds of a step": 2, "one thread: seconds of a step": 1}
LOOP, RUN = ["-c", "while True: pass"], [__file__, "--endless"]
BESIDE = {"alone": [], "beside one busy program": [LOOP], "beside two": [LOOP, LOOP], "beside another run": [RUN]}
WARM_UP, STEPS = 5, 20
START_UP = 15  # seconds until another run takes steps


def seconds_of_steps() -> Iterator[float]:
    with ServiceClient() as service:
        client = service.create_training_client(SHAPE.model_name)
        data = random_data(SHAPE, len(client.get_tokenizer()))
        while True:
            yield timed(lambda: step(client, data))


@contextmanager
def running(commands: Sequence[list[str]], threads: int) -> Iterator[None]:
    env = os.environ | {"OMP_NUM_THREADS": str(threads)}
    programs = [subprocess.Popen([sys.executable, *command], env=env) for command in commands]
    try:
        time.sleep(START_UP if RUN in commands else 0)
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


def side(threads: int, beside: Sequence[list[str]]) -> float:
    with running(beside, threads):
        return in_subprocess(__file__, "--side", OMP_NUM_THREADS=str(threads))["seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", action="store_true", help="used by the script itself: the seconds of one process")
    parser.add_argument("--endless", action="store_true", help="used by the script itself: steps without end")
    options = parser.parse_args()
    if options.endless:
        deque(seconds_of_steps(), maxlen=0)
    if options.side:
        seconds = [*islice(seconds_of_steps(), WARM_UP + STEPS)]
        print(json.dumps({"seconds": statistics.median(seconds[WARM_UP:])}))
        return
    load = wait_until_quiet()
    cells = {
        f"{line} | {column}": partial(side, threads, commands)
        for line, commands in BESIDE.items()
        for column, threads in THREADS.items()
    }
    seconds = alternate(cells, options.rounds)
    write_report("threads", {}, asdict(SHAPE) | {"rounds": options.rounds}, load, seconds)


if __name__ == "__main__":
    main()
