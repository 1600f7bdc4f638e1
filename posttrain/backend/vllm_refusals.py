"""One-line reasons why vLLM does not serve a model, with the alternative."""

from typing import Any

import torch
from packaging.version import Version
from pydantic import ValidationError
from transformers import PretrainedConfig

from posttrain.backend.architectures import experts_per_token
from posttrain.backend.errors import ConfigError, CookbookError, EngineError, ModelError

OLDEST_ON_CPU = Version("0.32.0")
USE_TORCH = "backend.engine=torch samples with torch instead"
UNMERGED = "backend.lora=unmerged keeps a copy for each of the two instead"
MERGE = "backend.lora=merged adds adapters to the weights instead"
LATENT = "it computes latent attention otherwise than transformers"
# Types that vLLM 0.32 on a CPU accepts, and what it computes otherwise.
ON_A_CPU = {
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "glm4_moe_lite": LATENT,
    "ernie4_5_moe": "it leaves out the bias of the router's choice",
    "hrm_text": "it computes the repeated layers otherwise than transformers",
    "mamba2": "it computes the state-space layers otherwise than transformers",
    "jetmoe": "it pairs the heads of its attention's experts with other keys",
}


def left_out(hf_config: PretrainedConfig) -> str | None:
    """What vLLM 0.32 leaves out of models that it accepts, on every device."""
    if hf_config.get_text_config().model_type == "gemma3n_text":
        return "without pictures it leaves out the embeddings of each layer"
    return None


def computed_otherwise(hf_config: PretrainedConfig, max_length: int, unmerged: bool = False) -> str | None:
    """Models that vLLM 0.32 on a CPU accepts and computes differently from transformers, or not at
    all, once it is opened (tests/test_vllm_architectures.py). `unmerged`: with adapters."""
    import vllm

    config: Any = hf_config.get_text_config()
    if Version(vllm.__version__) < OLDEST_ON_CPU:  # 0.24 does; its code for a GPU does not
        version = vllm.__version__
        return (
            f"vLLM {version} computes with old weights after a sync and drops seeds; ./install.sh installs a newer one"
        )
    if unmerged and experts_per_token(config):
        return f"it has no kernels for experts beside adapters; {MERGE}"
    if "conv" in (getattr(config, "layer_types", None) or ()):
        return "its convolution layers give other logprobs from the second sampled token on"
    if config.model_type in ("cohere2", "cohere2_moe") and max_length > config.sliding_window:
        return (
            f"its window is one token longer than transformers'; with max_length={config.sliding_window} at "
            "most it is right"
        )
    return ON_A_CPU.get(config.model_type)


def refusal(error: Exception, hf_config: PretrainedConfig) -> CookbookError:
    """One line with vLLM's reason: a validation error's message, else the first line."""
    details = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
    if "failed to be inspected" in details and (cause := _import_error(hf_config)):
        error, details = cause, str(cause)
    details = details.partition(" Supported architectures:")[0]  # a list of hundreds
    if "one instance per process" in details:  # of the allocator of memory that sleeps
        return ConfigError(
            "backend.sleep_while_training=true is for one vLLM engine in the process, and another is open: leave it "
            "out, or close the clients of the other first"
        )
    reason = f"{details.strip().splitlines()[0] if details.strip() else ''} ({type(error).__name__})".rstrip(".")
    if isinstance(error, torch.OutOfMemoryError) or "memory" in details.lower() or "KV cache" in details:
        hint = "lower backend.max_num_seqs, backend.max_length or backend.sampler_memory_gb, or close other engines"
        return EngineError(f"there is too little memory for a vLLM engine: {reason}. {hint}")
    remedy = f"{MERGE}, {USE_TORCH}" if "LoRA" in reason else USE_TORCH
    return ModelError(f"vLLM cannot serve this model: {reason}. {remedy}")


def _import_error(hf_config: PretrainedConfig) -> Exception | None:
    """The error on importing vLLM's file of this architecture; vLLM imports it in another process
    and hides the error."""
    from vllm.model_executor.models import ModelRegistry

    try:
        ModelRegistry.models[(hf_config.architectures or [""])[0]].load_model_cls()
    except Exception as error:
        return error
    return None
