"""Block `train_step`: tokens/s and peak memory of a step of 16 x 1,024 tokens of the 0.5B shape, and
its time by class of kernel: uncompiled, which surely gives a figure, then the fastest settings.
"""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch._dynamo

from benchmarks.gpu.checks import Record
from benchmarks.gpu.timing import GIB, attempt, peak_gib, seconds
from posttrain.backend import logprobs
from posttrain.backend.config import BackendConfig, training_device
from posttrain.backend.trainer import Trainer
from posttrain.backend.types import AdamParams, Datum, ModelInput
from posttrain.tracking.step_profile import is_kernel

HEAD = "block: head"
CLASSES = {  # parts of kernels' names, the first class that fits
    "attention": ("flash", "fmha", "sdpa", "attention"),
    "GEMM": ("gemm", "nvjet", "cutlass", "cublas", "splitk"),
    "optimizer, norm": ("multi_tensor", "fusedadam", "lpnorm"),
    "copies, casts": ("copy", "memcpy", "memset", "catarray"),
}
Step = Callable[[], object]


def random_data(rows: int, length: int, vocabulary: int) -> list[Datum]:
    tokens_BT = np.random.default_rng(0).integers(4, vocabulary, (rows, length + 1))
    weights = np.full(length, 1 / (rows * length), dtype=np.float32)
    return [
        Datum(ModelInput.from_ints(t[:-1].tolist()), {"target_tokens": t[1:], "weights": weights}) for t in tokens_BT
    ]


def train_step(trainer: Trainer, data: list[Datum]) -> None:
    trainer.run(data, "cross_entropy")
    trainer.optim_step(AdamParams(1e-5))


def speed(step: Step, tokens: int, steps: int = 9, keep_logits: bool = False) -> dict[str, float]:
    """Of the median step, after two that compile and allocate. `keep_logits`: in memory that is free, as runs do; the
    others measure what is needed."""
    with patch.object(logprobs, "SPARE_BYTES", logprobs.SPARE_BYTES if keep_logits else 2**60):
        first = seconds(step)
        step()
        taken = sorted(seconds(step) for _ in range(steps))
    median = statistics.median(taken)
    return {
        "tokens/s": tokens / median,
        "ms": 1e3 * median,
        "fastest, ms": 1e3 * taken[0],
        "slowest, ms": 1e3 * taken[-1],
        "first step, s": first,
        "GiB": peak_gib(),
        "GiB with what torch keeps": torch.cuda.max_memory_reserved() / GIB if torch.cuda.is_available() else 0.0,
    }


def kernel_class(name: str, in_head: bool) -> str:
    lower = name.lower()
    found = next((kind for kind, parts in CLASSES.items() if any(part in lower for part in parts)), "element-wise")
    return f"{'head' if in_head else 'body'} {found}" if found in ("GEMM", "element-wise") else found


def by_class(kernels: list[tuple[str, float, float]], heads: list[tuple[float, float]]) -> dict[str, float]:
    """Milliseconds of each class, from names, starts and ends in microseconds; `heads`: when the
    GPU worked for the head.
    """
    found: dict[str, float] = {}
    busy, reached = 0.0, 0.0
    for name, start, end in sorted(kernels, key=lambda kernel: kernel[1]):
        kind = kernel_class(name, any(a <= start < b for a, b in heads))
        found[kind] = found.get(kind, 0.0) + (end - start) / 1e3
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    span = reached - min(start for _, start, _ in kernels)
    return found | {"launches": float(len(kernels)), "idle share": 1 - busy / span, "span, ms": span / 1e3}


def marked(function: Callable[..., Any]) -> staticmethod:
    def run(*arguments: Any) -> Any:
        with torch.profiler.record_function(HEAD):
            return function(*arguments)

    return staticmethod(run)


def profiled(step: Step) -> dict[str, Any]:
    head = logprobs._TargetLogprobs
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with patch.object(head, "forward", marked(head.forward)), patch.object(head, "backward", marked(head.backward)):
        step()
        with torch.profiler.profile(activities=activities) as profile:
            step()
            torch.cuda.synchronize()
    events = profile.events() or []
    heads = [(e.time_range.start, e.time_range.end) for e in events if e.device_type.name == "CUDA" and e.name == HEAD]
    kernels = [(e.name, e.time_range.start, e.time_range.end) for e in events if is_kernel(e)]
    longest: dict[str, float] = {}
    for name, start, end in kernels:
        longest[name[:80]] = longest.get(name[:80], 0.0) + (end - start) / 1e3
    top = {name: round(ms, 2) for name, ms in sorted(longest.items(), key=lambda item: -item[1])[:12]}
    return {**by_class(kernels, heads), "head's ranges found": len(heads), "longest, ms": top}


def bf16(**settings: Any) -> BackendConfig:
    """With fp32 copies, as on a GPU by default; on a CPU, too."""
    return BackendConfig(dtype="bfloat16", param_dtype="bfloat16", **settings)


VARIANTS = {
    "bf16 weights": bf16(),
    "compiled": bf16(compile=True),
    "compiled, micro-batches of 8192": bf16(compile=True, micro_batch_tokens=8192),
    "compiled, micro-batches of 8192, 8-bit moments": bf16(compile=True, micro_batch_tokens=8192, moments="8bit"),
    "compiled, micro-batches of 8192, logits kept": bf16(compile=True, micro_batch_tokens=8192),
    "fp32 weights": BackendConfig(param_dtype="float32"),
}
PROFILED = ("compiled", "bf16 weights")
BUDGETS = (30, 20)  # GiB


def main() -> None:
    record, cuda = Record(), training_device().type == "cuda"
    torch._dynamo.config.recompile_limit = 64
    name, rows, length = ("qwen2.5-0.5b-shape", 16, 1024) if cuda else ("tiny", 4, 64)
    opened: list[Trainer] = []
    speeds: list[dict[str, float]] = []

    def ours() -> None:
        train_step(opened[0], data)

    def measured(keep_logits: bool) -> dict[str, float]:
        return speed(ours, rows * length, keep_logits=keep_logits)

    for title, config in VARIANTS.items():
        opened.clear()
        attempt(record, f"{title}: open, s", lambda c=config: seconds(lambda: opened.append(Trainer(name, c))))
        if not opened:
            continue
        data = random_data(rows, length, opened[0].vocabulary)
        if isinstance(found := attempt(record, title, partial(measured, "kept" in title)), dict):
            speeds.append(found)
        for most in BUDGETS:
            within = [found["tokens/s"] for found in speeds if found["GiB"] <= most]
            record.figure(f"tokens/s within {most} GiB", max(within, default=None))
        if cuda and title in PROFILED:
            attempt(record, f"{title}: profile", lambda: profiled(ours))
    record.print()


if __name__ == "__main__":
    main()
