"""B-STaR's sweep over temperatures: one engine for all of them, against a new process with a new
engine for each, the original's way.

    python benchmarks/bstar_sweep.py [--engine torch|vllm] [--rounds 3]

Every process is this file again: it opens a saved policy and samples, at each of its temperatures,
so many answers of one length to so many prompts. A third figure is what a round of recipes/bstar
pays: its engine is open already and only takes new weights. On a CPU all ways must sample the same
tokens. CPU seconds stand beside the wall clock, since other processes on the machine disturb them
less. The sizes on a CPU are those of the recipe's default experiment. Left out: scoring, and
several GPUs (the original's shards, too, run one after another).
"""

import argparse
import asyncio
import hashlib
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

if not __package__:  # run as a file: the packages are one folder up
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import numpy as np
import torch

from benchmarks.report import alternate, in_subprocess, over, spread, wait_until_quiet, write_report
from posttrain.backend.config import BackendConfig
from posttrain.backend.sampling_client import SamplingClient
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.types import ModelInput, SamplingParams

TEMPERATURES = (0.5, 0.7, 0.9, 1.0, 1.1, 1.2)
FIRST_BYTE = 4  # the presets' special tokens come before it


@dataclass(frozen=True)
class Size:
    """At every temperature `samples` answers of `max_tokens` to each of `queries` prompts of
    `prompt_tokens`.
    """

    model_name: str
    queries: int
    samples: int
    prompt_tokens: int
    max_tokens: int
    max_num_seqs: int


CPU = Size("micro", 40, 16, 12, 40, 512)
GPU = Size("qwen2.5-0.5b-shape", 256, 64, 128, 256, 1024)


def sample(client: SamplingClient, size: Size, temperature: float) -> list[list[int]]:
    prompts = np.random.default_rng(0).integers(FIRST_BYTE, 260, (size.queries, size.prompt_tokens)).tolist()

    async def all_queries() -> list[list[int]]:
        params = [
            SamplingParams(size.max_tokens, seed=1000 * i, stop=[], temperature=temperature)
            for i in range(size.queries)
        ]
        asked = (
            client.sample_async(ModelInput.from_ints(p), size.samples, each)
            for p, each in zip(prompts, params, strict=True)
        )
        return [sequence.tokens for response in await asyncio.gather(*asked) for sequence in response.sequences]

    return asyncio.run(all_queries())


def one_process(engine: str, size: Size, policy: str, temperatures: Sequence[float]) -> dict[str, Any]:
    """What a process of either side does."""
    seconds: dict[str, float] = {}
    with ServiceClient(BackendConfig(engine=engine, max_num_seqs=size.max_num_seqs)) as service:  # type: ignore[arg-type]
        start = time.perf_counter()
        client = service.create_sampling_client(policy)
        seconds["open engine"] = time.perf_counter() - start
        start = time.perf_counter()
        sampled = {temperature: sample(client, size, temperature) for temperature in temperatures}
        seconds["sampling"] = time.perf_counter() - start
    tokens = sum(len(sequence) for sequences in sampled.values() for sequence in sequences)
    digests = {str(t): hashlib.sha256(json.dumps(sequences).encode()).hexdigest() for t, sequences in sampled.items()}
    return {"seconds": seconds, "tokens": tokens, "digests": digests}


def live_engine(engine: str, size: Size, policy: str) -> tuple[float, float]:
    """Wall-clock and CPU seconds of a sweep by a training client whose engine is open: the sync of
    new weights, and the sampling.
    """
    with ServiceClient(BackendConfig(engine=engine, max_num_seqs=size.max_num_seqs)) as service:  # type: ignore[arg-type]
        client = service.create_training_client_from_state(policy)
        # opens the engine; the first calls are slow
        sample(client.save_weights_and_get_sampling_client(), size, 1.0)
        client.load_state(policy).result()  # new weights, as after the training of a round
        start, cpu_start = time.perf_counter(), time.process_time()
        sampling_client = client.save_weights_and_get_sampling_client()
        for temperature in TEMPERATURES:
            sample(sampling_client, size, temperature)
        return time.perf_counter() - start, time.process_time() - cpu_start


def processes(engine: str, policy: str, groups: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Runs one process for each group of temperatures, one after another; wall-clock and CPU
    seconds of all, and what they report.
    """
    start, cpu_start = time.perf_counter(), _cpu_of_children()
    reports = [
        in_subprocess(__file__, "--engine", engine, "--policy", policy, "--sample", *map(str, group))
        for group in groups
    ]
    wall, cpu = time.perf_counter() - start, _cpu_of_children() - cpu_start
    digests = {t: digest for report in reports for t, digest in report["digests"].items()}
    parts: dict[str, float] = {
        name: sum(report["seconds"][name] for report in reports) for name in reports[0]["seconds"]
    }
    parts["start, imports, end"] = wall - sum(parts.values())
    return {
        "wall": wall,
        "cpu": cpu,
        "parts": parts,
        "tokens": sum(report["tokens"] for report in reports),
        "digests": digests,
    }


def _cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def compare(engine: str, size: Size, rounds: int) -> None:
    with tempfile.TemporaryDirectory(prefix="bstar-sweep-") as folder:
        with ServiceClient(BackendConfig(engine="torch"), folder) as service:
            policy = service.create_training_client(size.model_name).save_state("policy").result().path
        sides = {
            "one engine": lambda: processes(engine, policy, [TEMPERATURES]),
            "an engine per temperature": lambda: processes(engine, policy, [[t] for t in TEMPERATURES]),
        }
        load = wait_until_quiet()
        runs = alternate(sides, rounds)
        live = [live_engine(engine, size, policy) for _ in range(rounds)]
    ours, theirs = runs.values()
    if not torch.cuda.is_available() and len({json.dumps(run["digests"], sort_keys=True) for run in ours + theirs}) > 1:
        raise SystemExit("the two ways did not sample the same tokens")
    figures: dict[str, Any] = {}
    for name, side in runs.items():
        walls = [run["wall"] for run in side]
        figures |= {f"{name}: wall, s": statistics.median(walls), f"{name}: spread": spread(walls)}
        figures[f"{name}: CPU, s"] = statistics.median(run["cpu"] for run in side)
        figures |= {
            f"{name}: {part}, s": statistics.median(r["parts"][part] for r in side) for part in side[0]["parts"]
        }
    walls, cpus = zip(*live, strict=True)
    name = "open engine of a round"
    figures |= {f"{name}: wall, s": statistics.median(walls), f"{name}: spread": spread(walls)}
    figures |= {f"{name}: CPU, s": statistics.median(cpus), "tokens of a sweep": ours[0]["tokens"]}
    ratios = {
        f"an engine per temperature / {side}, {clock}": over([run[key] for run in theirs], seconds)
        for clock, key, of_engine in (("wall", "wall", walls), ("CPU", "cpu", cpus))
        for side, seconds in (("one engine", [run[key] for run in ours]), (name, of_engine))
    }
    settings = asdict(size) | {"engine": engine, "temperatures": list(TEMPERATURES), "rounds": rounds}
    write_report(f"bstar_sweep-{engine}", figures, settings, load, ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("torch", "vllm"), default="torch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--policy", help=argparse.SUPPRESS)
    parser.add_argument("--sample", type=float, nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    size = GPU if torch.cuda.is_available() else CPU
    if arguments.sample:
        print(json.dumps(one_process(arguments.engine, size, arguments.policy, arguments.sample)))
    else:
        compare(arguments.engine, size, arguments.rounds)


if __name__ == "__main__":
    main()
