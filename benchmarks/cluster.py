"""Several processes against one, on the same work in the same run, with a thread for each process.

    python benchmarks/cluster.py [--engine torch] [--model tiny] [--rounds 3]

Training: 2 ranks, sharded and replicated, against the trainer in this process. Sampling: 2 replicas
against 1. The price of the process border: a lone request, and the processor time of a token, in
this process and in a replica. A weight sync: writing the files, loading them, and a copy of the
same bytes. A step with training and sampling at once against the longer of the two. Processor time
is of this process and all below it. Left out: GPUs, NCCL, several nodes.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
if not __package__:  # run as a file: the packages are one folder up
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import numpy as np
import torch

from benchmarks.report import wait_until_quiet, write_report
from posttrain.backend.cluster import Cluster
from posttrain.backend.config import BackendConfig
from posttrain.backend.models import PRESETS, new_model
from posttrain.backend.sampler_pool import SamplerPool
from posttrain.backend.sampling_client import SamplingClient
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.tokenizers import load_tokenizer
from posttrain.backend.training_client import TrainingClient
from posttrain.backend.types import AdamParams, Datum, ModelInput, SamplingParams
from posttrain.tracking.timeline import Timeline

PROMPTS, SAMPLES, NEW_TOKENS = 64, 8, 32
SEQUENCES, LENGTH = 128, 128  # 16k tokens of a training step
LONE = 40  # requests, one at a time
LARGE = "2 ranks, 2 replicas, 0.2 GB"
TICKS = os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="torch", choices=("torch", "vllm"))
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    common = {"engine": given.engine, "sampler_memory_gb": 0.25}
    layouts = {
        "1 process": BackendConfig(**common),
        "1 replica": BackendConfig(**common, sampler_replicas=1),
        "2 replicas": BackendConfig(**common, sampler_replicas=2),
        "2 ranks, shard": BackendConfig(**common, trainer_processes=2),
        "2 ranks, replicate": BackendConfig(**common, trainer_processes=2, trainer_sharding="replicate"),
    }
    load, figures = wait_until_quiet(), {}
    with tempfile.TemporaryDirectory() as folder:
        ray = Cluster(layouts["2 replicas"], Path(folder))  # kept, so that Ray starts once
        for layout, backend in layouts.items():
            with ServiceClient(backend, folder) as service:
                figures |= measured(layout, service.create_training_client(given.model), given.rounds)
        backend = BackendConfig(**common, trainer_processes=2, sampler_replicas=2)
        with ServiceClient(backend, folder) as service:
            client = service.create_training_client(large_model(Path(folder) / "large"))
            client.save_weights_and_get_sampling_client(follow=True)
            figures |= {f"{LARGE}: {name}": value for name, value in syncs(client, given.rounds).items()}
        ray.close()
    per_step = {name: figures[f"{name}: training tokens/s"] for name in layouts if name != "2 replicas"}
    cpu = {name: figures[f"{name}: training, CPU s of a step"] for name in per_step}
    token = "sampling, CPU us of a token"
    ratios = {
        **{
            f"training efficiency, {name}": per_step[name] / per_step["1 process"] / 2 for name in cpu if "rank" in name
        },
        **{f"1 process / {name}, CPU s of a step": cpu["1 process"] / cpu[name] for name in cpu if "rank" in name},
        "sampling efficiency, 2 replicas": figures["2 replicas: sampled tokens/s"]
        / figures["1 replica: sampled tokens/s"]
        / 2,
        "1 replica / 2 replicas, CPU of a token": figures[f"1 replica: {token}"] / figures[f"2 replicas: {token}"],
        "1 replica / 1 process, CPU of a token": figures[f"1 replica: {token}"] / figures[f"1 process: {token}"],
        "sync / copy of the bytes": figures["2 replicas: sync, s"] / figures["2 replicas: copy of the bytes, s"],
        f"sync / copy of the bytes, {LARGE}": figures[f"{LARGE}: sync, s"] / figures[f"{LARGE}: copy of the bytes, s"],
        "asynchronous step / max(sample, train)": figures["1 replica: step of both, s"]
        / max(figures["1 replica: sampling, s"], figures["1 replica: training step, s"]),
    }
    settings = vars(given) | {"sampled": f"{PROMPTS} x {SAMPLES} x {NEW_TOKENS}", "trained": f"{SEQUENCES} x {LENGTH}"}
    write_report("cluster", figures, settings, load, ratios)


def measured(layout: str, client: TrainingClient, rounds: int) -> dict[str, float]:
    figures: dict[str, float] = {}
    if layout != "2 replicas":
        train(client)
        seconds, cpu = timed(lambda: train(client), rounds)
        figures |= {"training step, s": seconds, "training tokens/s": SEQUENCES * LENGTH / seconds}
        figures["training, CPU s of a step"] = cpu
    if "rank" not in layout:
        sampler = client.save_weights_and_get_sampling_client(follow=True)
        sample(sampler)
        tokens = PROMPTS * SAMPLES * NEW_TOKENS
        seconds, cpu = timed(lambda: sample(sampler), rounds)
        figures |= {"sampling, s": seconds, "sampled tokens/s": tokens / seconds}
        figures["sampling, CPU us of a token"] = cpu / tokens * 1e6
        lone = [timed(lambda: sample(sampler, 1, 1, 1), 1)[0] for _ in range(LONE)]
        figures["a lone request of a token, ms"] = median(lone) * 1e3
        figures |= syncs(client, rounds)
    if layout == "1 replica":
        figures["step of both, s"] = timed(lambda: sample(sampler, meanwhile=lambda: train(client)), rounds)[0]
    return {f"{layout}: {name}": value for name, value in figures.items()}


def large_model(folder: Path) -> str:
    """51M random weights: bytes, not calls, are the cost of a sync."""
    settings: dict[str, Any] = PRESETS["tiny"].to_dict() | {"num_hidden_layers": 4, "layer_types": None, "head_dim": 64}
    settings |= {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 8}
    hf_config = type(PRESETS["tiny"])(**settings)
    new_model(hf_config).save_pretrained(folder)
    load_tokenizer("tiny").save_pretrained(folder)
    return str(folder)


def syncs(client: TrainingClient, rounds: int) -> dict[str, float]:
    figures: dict[str, list[float]] = {}
    for _ in range(rounds):
        client.optim_step(AdamParams(0.0)).result()
        before = time.perf_counter()
        seconds, _ = timed(lambda: client.save_weights_and_get_sampling_client(follow=True), 1)
        figures.setdefault("sync, s", []).append(seconds)
        if isinstance(pool := client._engine, SamplerPool) and pool._weights:
            seconds_of = Timeline(pool._spans).of_processes(before, time.perf_counter())
            for name in ("publish", "load", "pause"):
                figures.setdefault(f"sync: {name}, s", []).append(seconds_of[f"time/sync_{name}"])
            size = sum(file.stat().st_size for file in pool._weights.folder.iterdir())
            source = torch.ones(size, dtype=torch.uint8)
            figures.setdefault("copy of the bytes, s", []).append(timed(source.clone, 1)[0])
    return {name: median(values) for name, values in figures.items()}


def timed(run: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Medians of seconds and of processor seconds."""
    seconds, cpu = [], []
    for _ in range(rounds):
        began, spent = time.perf_counter(), cpu_seconds()
        run()
        seconds.append(time.perf_counter() - began)
        cpu.append(cpu_seconds() - spent)
    return median(seconds), median(cpu)


def cpu_seconds() -> float:
    """Of this process and all below it."""
    processes: dict[int, tuple[int, float]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        processes[int(folder.name)] = int(fields[1]), (int(fields[11]) + int(fields[12])) / TICKS
    family = {os.getpid()}
    while more := {pid for pid, (parent, _) in processes.items() if parent in family} - family:
        family |= more
    return sum(processes[pid][1] for pid in family)


def train(client: TrainingClient, sequences: int = SEQUENCES) -> None:
    rng = np.random.default_rng(0)
    data = []
    for _ in range(sequences):
        tokens = rng.integers(4, 260, LENGTH + 1)
        ones = np.ones(LENGTH, np.float32)
        inputs = {"target_tokens": tokens[1:], "logprobs": -5.5 * ones, "advantages": ones, "mask": ones}
        data.append(Datum(ModelInput.from_ints(tokens[:-1].tolist()), inputs))
    client.forward_backward(data, "importance_sampling")
    client.optim_step(AdamParams(0.0)).result()


def sample(
    sampler: SamplingClient,
    prompts: int = PROMPTS,
    samples: int = SAMPLES,
    new_tokens: int = NEW_TOKENS,
    meanwhile: Callable[[], object] = lambda: None,
) -> None:
    params = SamplingParams(max_tokens=new_tokens, seed=0, stop=[])
    answers = [sampler.sample(ModelInput.from_ints([1, 4 + i, 7, 9]), samples, params) for i in range(prompts)]
    meanwhile()
    for answer in answers:
        answer.result()


if __name__ == "__main__":
    main()
