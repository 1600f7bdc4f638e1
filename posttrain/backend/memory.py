"""The KV caches of engines, in bytes; memory that is free but not given back."""

import ctypes
import os
import sys
from pathlib import Path

import torch
from transformers import PretrainedConfig

from posttrain.backend.config import BackendConfig, compute_dtype
from posttrain.backend.fake_models import cached_bytes

GIB = 2**30


def kv_cache_bytes(
    hf_config: PretrainedConfig, max_length: int, config: BackendConfig, device: torch.device, vllm: bool = True
) -> int:
    """For one engine: the configured size; else 1 GiB on a CPU, 2 if torch samples, and on a GPU enough
    for `max_num_seqs` full sequences, within the share, which replicas on the trainer's GPU divide."""
    if config.sampler_memory_gb is not None:
        return int(config.sampler_memory_gb * GIB)
    if device.type != "cuda":
        return GIB if vllm else 2 * GIB  # torch keeps room for all that a sequence may become
    itemsize = torch.finfo(compute_dtype(device, config)).bits // 8
    wanted = config.max_num_seqs * sequence_bytes(hf_config, max_length + 16, itemsize, vllm)
    free = free_on_gpu(device)
    engines = config.sampler_replicas if config.replicas_share_gpu else 1
    return int(min(wanted, config.gpu_memory_utilization * free / engines))


def sequence_bytes(hf_config: PretrainedConfig, tokens: int, itemsize: int, vllm: bool = False) -> int:
    """Of a sequence in a sampler's cache; an upper bound if some layers have a window. vLLM keeps a second state, of a
    prefix, and the attention's blocks beside states have their size, of which the last may be almost empty."""
    states, per_token = cached_bytes(hf_config, itemsize)
    return states * (3 if vllm else 1) + tokens * per_token


def free_on_gpu(device: torch.device) -> int:
    """Bytes that this process may still take: also what its passes have freed, which torch keeps for later
    ones. The memory of CUDA graphs is taken for freed, too: 1 to 2 GiB."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if torch.cuda.is_available() and torch.cuda.get_device_properties(device).is_integrated:
        # in the CPU's memory (DGX Spark, Jetson) CUDA takes what the system has of files for used
        return free_on_cpu() + kept
    return torch.cuda.mem_get_info(device)[0] + kept


def free_on_cpu() -> int:
    """What this process may still take of the machine, within its control group."""
    free = [1024 * _number_after("MemAvailable:", Path("/proc/meminfo"))]
    for folder, limit, used in (
        ("/sys/fs/cgroup", "memory.max", "memory.current"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        text = [_read(Path(folder) / name) for name in (limit, used)]
        if all(part.strip().isdigit() for part in text):
            reclaimable = _number_after("\ninactive_file", Path(folder) / "memory.stat")
            free.append(int(text[0]) - int(text[1]) + reclaimable)
    # macOS has neither file: half of the machine's memory
    return max(0, min((n for n in free if n), default=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2))


def _number_after(key: str, file: Path) -> int:
    rest = f"\n{_read(file)}".partition(key)[2].split()
    return int(rest[0]) if rest else 0


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""


def return_free_memory() -> None:
    """To the system, on a CPU: glibc keeps what a pass freed, which an engine would then lack."""
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
