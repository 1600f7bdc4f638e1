"""Block `memory`: the peak that posttrain.preflight predicts for training, syncs, sampling and a
checkpoint, and the peak measured in a process of its own: of the resident set on a CPU; on a GPU
of torch's allocator.

    python -m benchmarks.gpu.memory [model_name=tiny lora_rank=8 ...]
"""

import json
import resource
import subprocess
import sys
import tempfile

import chz
import numpy as np
import torch

from benchmarks.gpu.checks import Record
from benchmarks.gpu.train_step import random_data
from posttrain.backend import logprobs
from posttrain.backend.config import BackendConfig, training_device
from posttrain.backend.memory import GIB
from posttrain.backend.memory_plan import planned
from posttrain.backend.ranges import COUNT, WHOLE
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.types import AdamParams, LoraConfig, ModelInput, SamplingParams
from posttrain.tracking.command_line import run_command

PLANNED_WITHIN = 0.15


@chz.chz
class Config:
    """A predicted and a measured peak."""

    model_name: str = chz.field(default="qwen2.5-0.5b-shape", doc="the model")
    lora_rank: int = chz.field(default=0, validator=WHOLE, doc="rank of an adapter; 0 = all weights")
    rows: int = chz.field(default=4, validator=COUNT, doc="sequences of max_length tokens in a step")
    backend: BackendConfig = chz.field(
        default_factory=lambda: BackendConfig(max_length=512, micro_batch_tokens=1024, max_num_seqs=16),
        doc="the backend",
    )


def peak_gib() -> float:
    """A GPU's context and graphs, which torch does not count, are what is in use beyond torch's."""
    if training_device().type == "cuda":
        free, total = torch.cuda.mem_get_info()
        return (torch.cuda.max_memory_reserved() + total - free - torch.cuda.memory_reserved()) / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure(config: Config) -> None:
    lora = LoraConfig(config.lora_rank) if config.lora_rank else None
    run = planned(config.model_name, config.backend, lora, samples=True)
    logprobs.SPARE_BYTES = 2**60  # logits that are kept take what is free, which is not planned
    print(run.plan.table(), flush=True)
    length, peaks = config.backend.max_length or 512, {}
    with tempfile.TemporaryDirectory() as folder, ServiceClient(config.backend, folder) as service:
        client = service.create_training_client(config.model_name, lora)
        peaks["opened"] = peak_gib()
        data = random_data(config.rows, length - 1, run.size.vocabulary)
        prompt = ModelInput.from_ints(np.arange(4, 4 + length // 2).tolist())
        params = SamplingParams(max_tokens=16, stop=[])
        for step in range(2):
            client.forward_backward(data, "cross_entropy").result()
            client.optim_step(AdamParams(1e-5)).result()
            peaks[f"step {step}"] = peak_gib()
            sampler = client.save_weights_and_get_sampling_client()
            peaks[f"sync {step}"] = peak_gib()
            sampler.sample(prompt, config.backend.max_num_seqs, params).result()
            peaks[f"sampled {step}"] = peak_gib()
        client.save_state("checkpoint").result()
        peaks["checkpoint"] = peak_gib()
    found = {"predicted, GiB": run.plan.peak / GIB, "measured, GiB": peaks["checkpoint"], "peaks so far": peaks}
    print(json.dumps(found))


def main() -> None:
    record, cuda = Record(), training_device().type == "cuda"
    model = "qwen2.5-0.5b-shape" if cuda else "tiny"
    sizes = ["backend.micro_batch_tokens=16384", "rows=32", "backend.max_num_seqs=256"] if cuda else []
    for title, options in (("full", []), ("LoRA", ["lora_rank=32"])):
        command = [sys.executable, "-m", "benchmarks.gpu.memory", f"model_name={model}", *sizes, *options]
        lines = subprocess.run(command, capture_output=True, text=True).stdout.strip().splitlines()
        found = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {"measured, GiB": 0.0}
        record.figure(title, found)
        ratio = found["predicted, GiB"] / found["measured, GiB"] if found["measured, GiB"] else 0.0
        record.at_most(f"{title}: |predicted / measured - 1|", abs(ratio - 1), PLANNED_WITHIN)
    record.print()


if __name__ == "__main__":
    run_command(measure, Config) if len(sys.argv) > 1 else main()
