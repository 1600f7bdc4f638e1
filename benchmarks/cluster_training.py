"""Training in two processes with training in one: tokens per second and CPU-seconds of a step, shards
and whole weights, and the time to publish the weights.

    python benchmarks/cluster_training.py [--rounds 5] [--models tiny,small]

One thread in each process. The part of CPU time is the one to trust beside other work: one process's
CPU-seconds of a step over those of all ranks. Left out: GPUs, where nothing of this was run.
"""

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

if not __package__:  # run as a file: the packages are one folder up
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks.report import spread, wait_until_quiet, write_report
from benchmarks.train_throughput import Shape, random_data, step
from posttrain.backend.config import BackendConfig
from posttrain.backend.service_client import ServiceClient

SHAPES = [Shape("tiny", 256, 60), Shape("small", 64, 60)]
SIDES = {
    "one process": BackendConfig(engine="torch"),
    "2, shard": BackendConfig(engine="torch", trainer_processes=2),
    "2, replicate": BackendConfig(engine="torch", trainer_processes=2, trainer_sharding="replicate"),
}


@dataclass
class Side:
    """A run of steps. `pids`: of the processes that compute."""

    step: Callable[[], None]
    publish: Callable[[], object]
    pids: list[int] = field(default_factory=list)

    def __call__(self) -> tuple[float, float, float]:
        """Wall and CPU seconds of a step, and wall seconds of a publication."""
        wall, cpu = time.perf_counter(), sum(map(cpu_seconds, self.pids))
        self.step()
        wall, cpu = time.perf_counter() - wall, sum(map(cpu_seconds, self.pids)) - cpu
        start = time.perf_counter()
        self.publish()
        return wall, cpu, time.perf_counter() - start


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def ranks() -> set[int]:
    """Training processes that this process's Ray has started."""
    pids = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (folder / "cmdline").read_bytes().startswith(b"ray::TrainerRank"):
                pid = pid_of_rank = int(folder.name)
                while pid not in (1, os.getpid()):
                    pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
                if pid == os.getpid():
                    pids.add(pid_of_rank)
    return pids


@contextlib.contextmanager
def opened(shape: Shape, config: BackendConfig) -> Iterator[Side]:
    before = ranks()
    with tempfile.TemporaryDirectory() as folder, ServiceClient(config, folder) as service:
        client = service.create_training_client(shape.model_name)
        data = random_data(shape, client._trainer.vocabulary)
        pids = [os.getpid(), *(ranks() - before)]
        yield Side(lambda: step(client, data), lambda: list(client._trainer.sampler_weights()), pids)


def measure(shape: Shape, rounds: int) -> tuple[dict[str, float | str], dict[str, float]]:
    figures: dict[str, float | str] = {}
    results: dict[str, list[tuple[float, float, float]]] = {}
    for name, config in SIDES.items():  # one after the other: each rank takes 0.6 GiB
        with opened(shape, config) as side:
            side()
            results[name] = [side() for _ in range(rounds)]
    tokens, medians = shape.sequences * shape.length, {}
    for name, values in results.items():
        walls, cpus, publishes = zip(*values, strict=True)
        medians[name] = wall, cpu = statistics.median(walls), statistics.median(cpus)
        title = f"{shape.model_name}, {name}"
        figures[f"{title}, tokens/s"] = tokens / wall
        figures[f"{title}, spread of wall seconds"] = spread(walls)
        figures[f"{title}, CPU-seconds of a step"] = cpu
        figures[f"{title}, seconds to publish and read"] = statistics.median(publishes)
    one_wall, one_cpu = medians.pop("one process")
    ratios = {}
    for name, (wall, cpu) in medians.items():
        ratios[f"{shape.model_name}, {name}: tokens/s over twice one's"] = one_wall / wall / 2
        ratios[f"{shape.model_name}, {name}: one's CPU time over all"] = one_cpu / cpu
    return figures, ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", default="tiny,small")
    options, load = parser.parse_args(), wait_until_quiet()
    rounds, models = options.rounds, options.models.split(",")
    figures: dict[str, float | str] = {}
    ratios: dict[str, float] = {}
    for shape in [shape for shape in SHAPES if shape.model_name in models]:
        shape_figures, shape_ratios = measure(shape, rounds)
        figures |= shape_figures
        ratios |= shape_ratios
    write_report("cluster_training", figures, {"rounds": rounds, "threads per process": 1}, load, ratios)


if __name__ == "__main__":
    main()
