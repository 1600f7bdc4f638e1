"""Memory that models and engines need, known before they are opened."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from posttrain.backend.config import BackendConfig, compute_dtype
from posttrain.backend.errors import ModelError

GIB = 2**30
# Bytes per parameter: fp32 weights, gradients and two Adam moments; fp32 weights alone; a pass's
# copies; the engine's copy.
FULL_BYTES, LORA_BYTES, COPY_BYTES, ENGINE_BYTES = 16, 4, 2, 2
OVERHEAD_BYTES = 2 * GIB  # CUDA's context, adapters, the logits of a chunk, fragments


def check_fits(model_name: str, hf_config: PretrainedConfig, lora: bool, free: int) -> None:
    """ModelError if `free` bytes cannot hold trainer and engine weights. Activations are extra."""
    with torch.device("meta"):
        parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(hf_config).parameters())
    needed = parameters * ((LORA_BYTES if lora else FULL_BYTES) + COPY_BYTES + ENGINE_BYTES) + OVERHEAD_BYTES
    if needed > free:
        raise ModelError(
            f"{model_name!r} needs {needed / GIB:.1f} GiB to be trained and sampled, without activations and KV cache, "
            "and "
            f"{free / GIB:.1f} GiB of the GPU are free: {(needed - free) / GIB:.1f} too few. Take a smaller model"
            + ("" if lora else ", or LoRA (lora_rank)")
        )


def kv_cache_bytes(hf_config: PretrainedConfig, max_length: int, config: BackendConfig, device: torch.device) -> int:
    """For one engine: the configured size; else 1 GiB on a CPU, and on a GPU enough for
    `max_num_seqs` full sequences, within the share."""
    if config.sampler_memory_gb is not None:
        return int(config.sampler_memory_gb * GIB)
    if device.type != "cuda":
        return GIB
    itemsize = torch.finfo(compute_dtype(device, config)).bits // 8
    wanted = config.max_num_seqs * (max_length + 16) * kv_bytes_per_token(hf_config, itemsize)
    free, _ = torch.cuda.mem_get_info(device)
    return int(min(wanted, config.gpu_memory_utilization * free))


def kv_bytes_per_token(hf_config: PretrainedConfig, itemsize: int) -> int:
    """An upper bound if some layers have a window or no attention."""
    text: Any = hf_config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * heads * head_dim * itemsize
