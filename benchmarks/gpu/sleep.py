"""Block `sleep`: backend.sleep_while_training: the memory that a sleeping engine of Qwen2.5-0.5B's shape
leaves to passes, the time to sleep and to wake, and |dlogp| after it woke for weights and for requests.

On a CPU, where vLLM sleeps without giving memory back, and the setting is refused: `tiny`.
"""

from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from benchmarks.gpu.checks import Record
from benchmarks.gpu.half_b_engine import LEARNING_RATE, Stopwatch
from benchmarks.gpu.small_engines import gap_bound, mean_gap, train_step
from benchmarks.gpu.timing import GIB
from posttrain.backend.config import BackendConfig, training_device
from posttrain.backend.service_client import ServiceClient

ON_GPU = training_device().type == "cuda"
MODEL, CACHE_GB = ("qwen2.5-0.5b-shape", 8.0) if ON_GPU else ("tiny", 0.25)
CONFIG = BackendConfig(
    engine="vllm",
    max_length=512,
    max_num_seqs=64,
    reproducible=False,
    sampler_memory_gb=CACHE_GB,
    sleep_while_training=True,
)
ROUNDS = 4
LEAST_FREED = 0.95  # of the KV cache; the weights come to it


def free_gib() -> float:
    return torch.cuda.mem_get_info()[0] / GIB if ON_GPU else 0.0


def measure(record: Record, service: ServiceClient) -> None:
    client = service.create_training_client(MODEL)
    train_step(client, 0, 1e-7)
    sampler = client.save_weights_and_get_sampling_client()
    thread: Any = client._engine
    vllm_engine, stopwatch = thread._engine._engine, Stopwatch()
    spent: list[dict[str, float]] = []
    freed, for_weights, for_requests = [], [], []
    with ExitStack() as stack:
        for name, owner, method in (
            ("sleep", vllm_engine, "sleep"),
            ("wake", vllm_engine, "wake_up"),
            ("sync of a sleeping engine", thread, "sync"),
        ):
            stack.enter_context(patch.object(owner, method, stopwatch.wrap(name, getattr(owner, method))))
        for step in range(ROUNDS):
            stopwatch.take()
            before = free_gib()
            thread.sleep()
            freed.append(free_gib() - before)
            train_step(client, step, LEARNING_RATE)
            record.holds("a training step leaves it asleep", thread._engine._asleep)
            sampler = client.save_weights_and_get_sampling_client()  # wakes it
            spent.append(stopwatch.take())
            for_weights.append(mean_gap(client, sampler))
            # the trainer's passes make it sleep: a prefix of the first gap is gone with the cache
            for_requests.append(mean_gap(client, sampler))
    record.figure("GiB freed", min(freed))
    record.holds("it frees the KV cache", not ON_GPU or min(freed) >= LEAST_FREED * CACHE_GB)
    for name in spent[0]:
        record.figure(f"{name}, ms", float(np.median([times[name] for times in spent])))
    record.at_most("|dlogp| after waking for weights, largest mean", max(for_weights), gap_bound())
    record.at_most("|dlogp| after waking for requests, largest mean", max(for_requests), gap_bound())


def main() -> None:
    record = Record()
    with ExitStack() as stack:
        if not ON_GPU:
            stack.enter_context(patch("posttrain.backend.engines.check_sleep", lambda config: None))
        measure(record, stack.enter_context(ServiceClient(CONFIG)))
    record.print()


if __name__ == "__main__":
    main()
