"""The trainer's tokens per second against the arithmetic the machine can do, the cost of a weight
sync, and the gap it leaves.

    python benchmarks/train_throughput.py [--rounds 5]

A step is forward_backward and optim_step on full sequences with every token trained on. MFU is the
model's arithmetic (6 per matrix weight and token, plus causal attention) over the machine's: on a
CPU the best of square fp32 products measured in the same run; on a GPU the nominal 989 TFLOPS of an
H100 or H200 in bf16, and the measured product beside it. Left out: recomputation, which is not
used.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

if not __package__:  # run as a file: the packages are one folder up
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import numpy as np
import torch

from benchmarks.report import spread, wait_until_quiet, write_report
from posttrain.backend.config import BackendConfig, compute_dtype, training_device
from posttrain.backend.sampling_client import SamplingClient
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.training_client import TrainingClient
from posttrain.backend.types import AdamParams, Datum, ModelInput, SamplingParams

NOMINAL_GPU_FLOPS = 989e12
MATMUL = 2048
SAMPLES, SAMPLE_TOKENS = 64, 32


@dataclass(frozen=True)
class Shape:
    model_name: str
    sequences: int
    length: int


CPU_SHAPES = [Shape("tiny", 512, 10), Shape("tiny", 64, 72), Shape("small", 32, 128)]
GPU_SHAPES = [Shape("qwen2.5-0.5b-shape", 16, 1024)]


def machine_flops(dtype: torch.dtype, size: int) -> float:
    """The best of ten square products."""
    a = torch.randn(size, size, device=training_device(), dtype=dtype)
    return 2 * size**3 / min(timed(lambda: a @ a) for _ in range(10))


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def flops_per_token(client: TrainingClient, length: int) -> float:
    """6 per weight that multiplies (a tied head does, a looked-up embedding does not) and 6 L H T
    for causal attention.
    """
    trainer: Any = client._trainer
    model, head = trainer.base, trainer._head()
    weights = head.numel() + sum(
        p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name and p is not head
    )
    config = client._trainer.hf_config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 6 * weights + 6 * config.num_hidden_layers * config.num_attention_heads * head_dim * length


def random_data(shape: Shape, vocabulary: int) -> list[Datum]:
    tokens_BT = np.random.default_rng(0).integers(4, vocabulary, (shape.sequences, shape.length + 1))
    weights = np.ones(shape.length, dtype=np.float32) / (shape.sequences * shape.length)
    return [
        Datum(ModelInput.from_ints(t[:-1].tolist()), {"target_tokens": t[1:], "weights": weights}) for t in tokens_BT
    ]


def step(client: TrainingClient, data: list[Datum]) -> None:
    client.forward_backward(data, "cross_entropy")
    client.optim_step(AdamParams(1e-4, eps=1e-8)).result()


def logprob_gap(client: TrainingClient, sampler: SamplingClient, vocabulary: int) -> tuple[float, float]:
    """Mean and largest |sampler - trainer| over sampled tokens."""
    prompts = np.random.default_rng(1).integers(4, vocabulary, (SAMPLES, 8)).tolist()
    params = SamplingParams(max_tokens=SAMPLE_TOKENS, temperature=1.0, stop=[], seed=0)
    answers = [sampler.sample(ModelInput.from_ints(prompt), 1, params) for prompt in prompts]
    sequences = [answer.result().sequences[0] for answer in answers]
    data = []
    for prompt, sequence in zip(prompts, sequences, strict=True):
        tokens = np.array([*prompt, *sequence.tokens])
        weights = np.concatenate([np.zeros(len(prompt) - 1), np.ones(len(sequence.tokens))])
        data.append(
            Datum(ModelInput.from_ints(tokens[:-1].tolist()), {"target_tokens": tokens[1:], "weights": weights})
        )
    outputs = client.forward(data, "cross_entropy").result().loss_fn_outputs
    trained = np.concatenate([output["logprobs"].array[-SAMPLE_TOKENS:] for output in outputs])
    gaps = np.abs(np.concatenate([sequence.logprobs for sequence in sequences]) - trained)
    return float(gaps.mean()), float(gaps.max())


def measure(
    shape: Shape, rounds: int, ceilings: dict[str, float]
) -> tuple[dict[str, float | str], dict[str, list[float]]]:
    name = f"{shape.model_name} {shape.sequences}x{shape.length}"
    config = BackendConfig(max_length=max(shape.length, 64))
    with ServiceClient(config) as service:
        client = service.create_training_client(shape.model_name)
        vocabulary = len(client.get_tokenizer())
        data = random_data(shape, vocabulary)
        for _ in range(2):
            step(client, data)
        seconds = [timed(lambda: step(client, data)) for _ in range(rounds)]
        # an engine's start would reset it
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        client.save_weights_and_get_sampling_client()
        syncs = []
        for _ in range(rounds):
            step(client, data)
            syncs.append(timed(client.save_weights_and_get_sampling_client))
        gap_mean, gap_max = logprob_gap(client, client.save_weights_and_get_sampling_client(), vocabulary)
        rates = [shape.sequences * shape.length / second for second in seconds]
        flops = flops_per_token(client, shape.length)
    figures: dict[str, float | str] = {
        f"{name}: tokens/s": statistics.median(rates),
        f"{name}: spread": spread(seconds),
        f"{name}: weight sync, s": statistics.median(syncs),
        f"{name}: |dlogp| mean": gap_mean,
        f"{name}: |dlogp| max": gap_max,
    }
    if torch.cuda.is_available():
        figures[f"{name}: peak GiB"] = peak / 2**30
    return figures, {
        f"{name}: MFU of {ceiling}": [rate * flops / most for rate in rates] for ceiling, most in ceilings.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    load = wait_until_quiet()
    cuda = torch.cuda.is_available()
    ceilings = {"measured matmul": machine_flops(compute_dtype(training_device()), 8 * 1024 if cuda else MATMUL)}
    figures: dict[str, float | str] = {"measured matmul, TFLOPS": ceilings["measured matmul"] / 1e12}
    if cuda:
        ceilings["989 TFLOPS"] = NOMINAL_GPU_FLOPS
    ratios: dict[str, list[float]] = {}
    for shape in GPU_SHAPES if cuda else CPU_SHAPES:
        shape_figures, shape_ratios = measure(shape, rounds, ceilings)
        figures |= shape_figures
        ratios |= shape_ratios
    write_report(
        "train_throughput", figures, {"rounds": rounds, "dtype": str(compute_dtype(training_device()))}, load, ratios
    )


if __name__ == "__main__":
    main()
