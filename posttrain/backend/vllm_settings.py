"""What a BackendConfig asks of vLLM: whether it samples, what it is refused with, and its arguments.
Nothing here imports vLLM.
"""

import copy
from typing import Any

import torch
from transformers import PretrainedConfig

from posttrain.backend.config import BackendConfig, compute_dtype, param_dtype, training_device
from posttrain.backend.errors import ConfigError
from posttrain.backend.extras import is_installed
from posttrain.backend.memory import kv_cache_bytes
from posttrain.backend.types import LoraConfig
from posttrain.backend.vllm_lora import lora_args, room_for, tokens_of_a_step
from posttrain.backend.vllm_refusals import MERGE
from posttrain.backend.vllm_weights import has_only_attention

LARGEST_GRAPH = 1024  # rows; each size that is captured takes start-up time and memory
GRAPH_STEP = 16  # between the largest sizes that vLLM captures; it leaves out a size between two of them


def vllm_is_installed() -> bool:
    """Without the import, which takes seconds."""
    return is_installed("vllm")


def samples_with_vllm(config: BackendConfig) -> bool:
    """auto: where it is installed, and backend.device is the device it takes."""
    on_its_device = training_device(config) == training_device()
    return config.engine == "vllm" or (config.engine == "auto" and vllm_is_installed() and on_its_device)


def check_sleep(config: BackendConfig) -> None:
    """ConfigError where backend.sleep_while_training cannot be had."""
    setting = "backend.sleep_while_training=true"
    if training_device(config).type != "cuda" or not samples_with_vllm(config):
        raise ConfigError(f"{setting} gives a GPU's memory back, and needs backend.engine=vllm on a GPU: leave it out")
    if config.sampler_replicas or config.share_engines:
        raise ConfigError(f"{setting} is for one engine in this process, not for replicas or shared engines")


def lora_room(config: BackendConfig, rank: int) -> int:
    """The rank that vLLM needs room for, to compute an adapter of `rank` beside the base's weights; 0 where it
    does not: merged ones, none (`rank` 0), another sampler. ConfigError if it has no such room."""
    return room_for(rank) if rank and config.lora != "merged" and samples_with_vllm(config) else 0


def check_unmerged(config: BackendConfig, lora: LoraConfig) -> None:
    """ConfigError for an adapter that backend.lora=unmerged or shared, where it is set, does not sample, as
    far as the settings tell."""
    setting, device = f"backend.lora={config.lora}", training_device(config)
    if config.lora == "shared":
        check_shared(config)
    if config.lora != "merged" and lora.train_unembed:
        raise ConfigError(f"{setting} is not for train_unembed: leave one of the two out")
    if lora_room(config, lora.rank) and device.type == "cuda" and compute_dtype(device, config) == torch.float32:
        raise ConfigError(f"{setting} on a GPU needs backend.dtype=bfloat16: vLLM has no kernels for float32. {MERGE}")


def check_shared(config: BackendConfig) -> None:
    """ConfigError where passes cannot read the sampler's weights."""
    setting, device = "backend.lora=shared", training_device(config)
    if samples_with_vllm(config) and device.type != "cuda":
        raise ConfigError(
            f"{setting}: on a CPU vLLM keeps its weights in another form than passes read. Set backend.engine=torch, or "
            "take backend.lora=unmerged"
        )
    if config.share_engines or config.sleep_while_training:
        other = "share_engines" if config.share_engines else "sleep_while_training"
        raise ConfigError(
            f"{setting} needs an engine whose weights stay where they are: leave backend.{other} out, or take "
            "backend.lora=unmerged"
        )
    if param_dtype(device, config) != compute_dtype(device, config):
        raise ConfigError(f"{setting} needs weights of one dtype: leave backend.param_dtype out")


def without_chunks(hf_config: PretrainedConfig) -> PretrainedConfig:
    """Without dual chunk attention, which vLLM has on some devices only: it does nothing in the first chunk, where
    the context ends (architectures.context_limit)."""
    if hasattr(hf_config, "dual_chunk_attention_config"):
        hf_config = copy.deepcopy(hf_config)
        delattr(hf_config, "dual_chunk_attention_config")
    return hf_config


def engine_args(
    hf_config: PretrainedConfig, max_length: int, config: BackendConfig, device: torch.device, lora_room: int = 0
) -> dict[str, Any]:
    """vLLM's EngineArgs for this device, without the model's folder and the seed."""
    eager = device.type == "cpu" if config.enforce_eager is None else config.enforce_eager
    args: dict[str, Any] = {
        "load_format": "dummy",
        "dtype": str(compute_dtype(device, config)).removeprefix("torch."),
        "kv_cache_memory_bytes": kv_cache_bytes(hf_config, max_length, config, device),
        "max_model_len": max_length,
        "max_num_seqs": config.max_num_seqs,
        # vLLM's own 2048 would read 1,024 prompts of 128 tokens in 64 steps
        "max_num_batched_tokens": max(max_length, 8192),
        # logprobs of the sampling distribution: tempered, cut by top-k and top-p
        "logprobs_mode": "processed_logprobs",
        "max_logprobs": -1,
        "enforce_eager": eager,
        "disable_log_stats": True,
    }
    if (tuned := getattr(hf_config.get_text_config(), "attn_temperature_tuning", None)) is not None:
        # Llama 4's, which vLLM would switch by max_model_len alone: on above 32,768
        args["override_generation_config"] = {"attn_temperature_tuning": bool(tuned)}
    if lora_room:
        args |= lora_args(lora_room)
    if config.tensor_parallel > 1:
        args |= {"tensor_parallel_size": config.tensor_parallel, "distributed_executor_backend": "mp"}
    if device.type == "cpu":
        # For a prompt read in two parts vLLM would rewind a seeded request's generator, which it
        # cannot on a CPU.
        args["enable_chunked_prefill"] = False
        if lora_room:
            args["max_num_batched_tokens"] = tokens_of_a_step(max_length, config)
        # Recurrent and convolution layers keep prefix states only where prompts are read in parts.
        args |= {} if has_only_attention(hf_config) else {"enable_prefix_caching": False}
        return args
    args |= {"enable_sleep_mode": True} if config.sleep_while_training else {}
    # other kernels keep a mixture's experts in an order of their own, which a sync would not write
    args["moe_backend"] = "triton"
    # vLLM requires this much free memory; the KV cache's bytes are given
    args["gpu_memory_utilization"] = 0.01
    if not eager:  # vLLM's own end at 512 rows, and more rows run without a graph
        rows = -(-config.max_num_seqs // GRAPH_STEP) * GRAPH_STEP
        args["max_cudagraph_capture_size"] = min(rows, LARGEST_GRAPH)
    return args
