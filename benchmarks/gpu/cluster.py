"""Block `cluster`: two training processes with one, and a replica on a GPU of its own with the trainer.
Needs two GPUs; with one it says `not run`, on a CPU it runs there.

Two ranks cannot share a GPU (NCCL refuses it), so this has never run over NCCL.
"""

import tempfile
import time

import numpy as np
import torch

from benchmarks.gpu.checks import Record
from benchmarks.train_throughput import Shape, random_data
from posttrain.backend.config import BackendConfig, training_device
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.types import AdamParams, ModelInput

CUDA = training_device().type == "cuda"
SHAPE = Shape("qwen2.5-0.5b-shape", 16, 1024) if CUDA else Shape("micro", 16, 64)
# mean |difference| of logprobs, and relative difference of the gradient's norm: rounding of bf16, or of fp32
MOST_GAP, MOST_NORM_GAP = (0.05, 0.02) if CUDA else (1e-5, 1e-5)


def steps(record: Record, title: str, config: BackendConfig) -> tuple[np.ndarray, float]:
    """Logprobs before the first step, and its gradient's norm."""
    with tempfile.TemporaryDirectory() as folder, ServiceClient(config, folder) as service:
        start = time.perf_counter()
        client = service.create_training_client(SHAPE.model_name)
        record.figure(f"{title}: seconds to open", time.perf_counter() - start)
        data = random_data(SHAPE, client._trainer.vocabulary)
        outputs = client.forward_backward(data, "cross_entropy").result().loss_fn_outputs
        norm = client.optim_step(AdamParams(0.0)).result().metrics["grad_norm"]
        start = time.perf_counter()
        for _ in range(3):
            client.forward_backward(data, "cross_entropy")
            client.optim_step(AdamParams(0.0)).result()
        tokens = 3 * SHAPE.sequences * SHAPE.length
        record.figure(f"{title}: tokens/s", tokens / (time.perf_counter() - start))
        if config.sampler_replicas:
            start = time.perf_counter()
            sampler = client.save_weights_and_get_sampling_client()
            record.figure(f"{title}: seconds to start and sync", time.perf_counter() - start)
            tokens_T = [*data[0].model_input.to_ints()]
            sampled = sampler.compute_logprobs(ModelInput.from_ints(tokens_T)).result()[1:]
            gap = np.abs(np.array(sampled) - outputs[0]["logprobs"].array[: len(sampled)]).mean()
            record.at_most(f"{title}: mean logprob gap of sampler and trainer", float(gap), MOST_GAP)
        return np.concatenate([fields["logprobs"].array for fields in outputs]), norm


def main() -> None:
    record = Record()
    if CUDA and torch.cuda.device_count() < 2:
        record.figure("not run", f"needs 2 GPUs, and this machine has {torch.cuda.device_count()}")
        record.print()
        return
    engine = "vllm" if CUDA else "torch"
    logprobs, norm = steps(record, "one process, a replica", BackendConfig(engine=engine, sampler_replicas=1))
    for sharding in ("shard", "replicate"):
        config = BackendConfig(engine=engine, trainer_processes=2, trainer_sharding=sharding)
        theirs, their_norm = steps(record, f"2 ranks, {sharding}", config)
        record.at_most(f"{sharding}: mean logprob gap", float(np.abs(theirs - logprobs).mean()), MOST_GAP)
        record.at_most(f"{sharding}: gap of the gradient's norm", abs(their_norm / norm - 1), MOST_NORM_GAP)
    record.print()


if __name__ == "__main__":
    main()
