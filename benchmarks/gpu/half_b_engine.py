"""Block `half_b_engine`: an engine of Qwen2.5-0.5B's shape with CUDA graphs: its noise and
logprobs, a sync in its parts, its copy beside vLLM's loaders and the card's memory, memory.

On a CPU: `tiny`, eager.
"""

import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from benchmarks.gpu.checks import Record
from benchmarks.gpu.small_engines import (
    check_noise,
    check_prompt_logprobs,
    check_stop_string,
    gap_bound,
    mean_gap,
    repeated,
    train_step,
)
from benchmarks.gpu.timing import milliseconds
from posttrain.backend.config import BackendConfig, training_device
from posttrain.backend.engine import Weights
from posttrain.backend.sampling_client import SamplingClient
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.training_client import TrainingClient
from posttrain.backend.vllm_copies import Copies
from posttrain.backend.vllm_engine import VllmEngine
from posttrain.backend.vllm_weights import CheckpointForm, load_all

ON_GPU = training_device().type == "cuda"
MODEL = "qwen2.5-0.5b-shape" if ON_GPU else "tiny"
CONFIG = BackendConfig(
    engine="vllm",
    max_length=1024 if ON_GPU else 512,
    max_num_seqs=256,
    reproducible=False,
    sampler_memory_gb=4 if ON_GPU else 0.25,
)
LEARNING_RATE = 1e-5 if ON_GPU else 1e-3
# Steps on one sequence, of seed 95 with the text UxIdq, which the model then continues: most rows of the 0.5B shape are
# no ids of its tokenizer, and what is sampled of them has no text.
TRAINED_STEPS, TRAINED_ON = 20, 95
SYNCS = 10


def memory(record: Record, when: str) -> float:
    """GiB of this process's tensors."""
    if not ON_GPU:
        return 0.0
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    tensors = torch.cuda.memory_allocated() / 2**30
    record.figure(f"GiB of the card in use {when}", (total - free) / 2**30)
    record.figure(f"GiB of tensors {when}", tensors)
    return tensors


def check_gaps(record: Record, when: str, client: TrainingClient, sampler: SamplingClient, gaps: list[float]) -> None:
    """Adds the mean |dlogp| at temperature 1 to `gaps`."""
    gap = 0.0
    for temperature in (0.7, 1.0):
        gap = mean_gap(client, sampler, temperature, prompts=8, samples=8, max_tokens=32)
        bound = gap_bound() / temperature  # logits, and their rounding, are divided by it
        record.at_most(f"{when}: |dlogp| at temperature {temperature}", gap, bound)
    gaps.append(gap)
    record.figure("largest mean gap at temperature 1, nats", max(gaps))


class Stopwatch:
    """Milliseconds spent in wrapped methods since the last `take`."""

    def __init__(self) -> None:
        self._spent: dict[str, float] = {}

    def wrap(self, name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return run(*args, **kwargs)
            finally:
                self._spent[name] = self._spent.get(name, 0.0) + 1e3 * (time.perf_counter() - start)

        return timed

    def take(self) -> dict[str, float]:
        spent, self._spent = self._spent, {}
        return spent


def sync_parts(record: Record, client: TrainingClient) -> None:
    """The check that weights are finite, the fused copy (or the loaders' loop; both cast, too), waiting for it, the
    prefix cache, and what is left: threads and guards.

    Each reset has one short answer's blocks to forget, and walks all blocks of the cache.
    """
    thread: Any = client._engine
    assert isinstance(thread._engine, VllmEngine)
    vllm_engine, stopwatch, parts = thread._engine._engine, Stopwatch(), []
    with ExitStack() as stack:
        for name, owner, method in (
            ("weight loaders' loop", vllm_engine, "collective_rpc"),
            ("prefix cache reset", vllm_engine, "reset_prefix_cache"),
            ("load in all", thread._engine, "load_weights"),
            ("check of finite weights", client._trainer, "check_finite"),
            ("in all", client, "save_weights_and_get_sampling_client"),
        ):
            stack.enter_context(patch.object(owner, method, stopwatch.wrap(name, getattr(owner, method))))
        stack.enter_context(patch.object(Copies, "__call__", stopwatch.wrap("fused copy", Copies.__call__)))
        if ON_GPU:
            synchronize = stopwatch.wrap("waiting for the stream", torch.cuda.Stream.synchronize)
            stack.enter_context(patch.object(torch.cuda.Stream, "synchronize", synchronize))
        for step in range(SYNCS):
            train_step(client, step, LEARNING_RATE)
            stopwatch.take()
            client.save_weights_and_get_sampling_client().close()
            parts.append(stopwatch.take())
    record.holds("syncs are one fused copy", not ON_GPU or "fused copy" in parts[0])
    for name in parts[0]:
        record.figure(f"sync: {name}, ms", float(np.median([part.get(name, 0.0) for part in parts])))


def loads(worker: Any, form: CheckpointForm, weights: Callable[[], Weights]) -> dict[str, float]:
    """Of one load into the engine: ms of the recorded copies and of vLLM's loaders, and the GB that the
    copies read and write. On a CPU there is one way to load."""
    copies = getattr(worker, "recorded_copies", None)
    found = {"ms": milliseconds(lambda: load_all(worker, form, weights()))}
    if copies:
        read_and_written = 0
        for name, tensor in form(weights()):
            for copy in copies._of.get(name, []):
                read_and_written += copy.source(tensor).nbytes + copy.target.nbytes
        found["GB"] = read_and_written / 1e9
        worker.recorded_copies = None
        found["by vLLM's loaders, ms"] = milliseconds(lambda: load_all(worker, form, weights()))
        worker.recorded_copies = copies
    return found


def check_loads(record: Record, client: TrainingClient) -> None:
    """Without the prefix cache and the threads of a sync."""
    engine: Any = client._engine
    engine = engine._engine
    trainer: Any = client._trainer
    found = engine._in_processes(loads, engine._checkpoint_form, trainer.sampled.sampler_weights)[0]
    for name, value in found.items():
        record.figure(f"load: {name}", value)
    if "GB" in found:
        record.figure("load: GB/s", 1e3 * found["GB"] / found["ms"])
        record.figure("copies of this card, GB/s", copy_speed())


def check_stop_string_of_trained(record: Record, client: TrainingClient) -> SamplingClient:
    """Of the sampler with the weights after TRAINED_STEPS, which is returned."""
    for _ in range(TRAINED_STEPS):
        train_step(client, TRAINED_ON, max(LEARNING_RATE, 1e-4))
    sampler = client.save_weights_and_get_sampling_client()
    check_stop_string(record, MODEL, sampler, repeated(TRAINED_ON, 3))
    return sampler


def copy_speed() -> float:
    """Of 1 GiB, read and written."""
    a = torch.empty(2**29, dtype=torch.bfloat16, device=training_device())
    b = torch.empty_like(a)
    return 2 * a.nbytes / 1e6 / milliseconds(lambda: b.copy_(a))


def main() -> None:
    record, gaps = Record(), list[float]()
    record.figure("model", MODEL)
    with ServiceClient(CONFIG) as service:
        client = service.create_training_client(MODEL)
        # the optimizer's moments and a pass's buffers exist when memory is read
        train_step(client, 0, 1e-7)
        before = memory(record, "before the engine")
        if ON_GPU:
            record.figure("trainer's peak of a small step, GiB", torch.cuda.max_memory_allocated() / 2**30)
        start = time.perf_counter()
        sampler = client.save_weights_and_get_sampling_client()
        record.figure("start, s", time.perf_counter() - start)
        memory(record, "beside the engine")
        # the figures of the aims first
        with record.going_on("gaps"):
            check_gaps(record, "at first", client, sampler, gaps)
            for step in range(3):
                train_step(client, step, LEARNING_RATE)
                sampler = client.save_weights_and_get_sampling_client()
                check_gaps(record, f"after step {step + 1}", client, sampler, gaps)
        with record.going_on("syncs"):
            sync_parts(record, client)
        sampler = client.save_weights_and_get_sampling_client()
        with record.going_on("noise"):
            check_noise(record, MODEL, sampler)
        with record.going_on("prompts"):
            check_prompt_logprobs(record, MODEL, client, sampler)
        with record.going_on("loads"):
            check_loads(record, client)
        with record.going_on("a trained model"):
            sampler = check_stop_string_of_trained(record, client)
            check_gaps(record, "of the trained model", client, sampler, gaps)
        memory(record, "before closing")
    record.at_most("GiB of tensors that closing left", memory(record, "after closing") - before, 0.1)
    del client  # held until here: the trainer's tensors are in both sums
    record.print()


if __name__ == "__main__":
    main()
