"""Why vLLM does not serve a model: in one line, with the alternative."""

from typing import Any

import torch
from pydantic import ValidationError
from transformers import PretrainedConfig

from posttrain.backend.errors import CookbookError, EngineError, ModelError

USE_TORCH = "backend.engine=torch samples with torch instead"


def computed_otherwise(hf_config: PretrainedConfig, max_length: int) -> str | None:
    """What vLLM 0.32 on a CPU takes without a word and computes otherwise than transformers; found
    by tests/test_vllm_architectures.py.
    """
    config: Any = hf_config.get_text_config()
    if getattr(config, "attn_logit_softcapping", None):
        return "its attention kernel caps scores otherwise than transformers"
    if "conv" in (getattr(config, "layer_types", None) or ()):
        return "its convolution layers give other logprobs from the second sampled token on"
    if config.model_type == "cohere2" and max_length > config.sliding_window:
        return (
            f"its window is one token longer than transformers'; with max_length={config.sliding_window} at "
            "most it is right"
        )
    return None


def refusal(error: Exception, hf_config: PretrainedConfig) -> CookbookError:
    """One line with vLLM's reason: of a validation error the message, of others the first line."""
    details = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
    if "failed to be inspected" in details and (cause := _import_error(hf_config)):
        error, details = cause, str(cause)
    reason = f"{details.strip().splitlines()[0] if details.strip() else ''} ({type(error).__name__})".rstrip(".")
    if isinstance(error, torch.OutOfMemoryError) or "memory" in details.lower() or "KV cache" in details:
        hint = "lower backend.max_num_seqs, backend.max_length or backend.sampler_memory_gb, or close engines that are not needed"
        return EngineError(f"there is too little memory for a vLLM engine: {reason}. {hint}")
    return ModelError(f"vLLM cannot serve this model: {reason}. {USE_TORCH}")


def _import_error(hf_config: PretrainedConfig) -> Exception | None:
    """Why vLLM's file for this architecture cannot be imported: vLLM tries it in a process of its
    own and keeps the reason.
    """
    from vllm.model_executor.models import ModelRegistry

    try:
        ModelRegistry.models[(hf_config.architectures or [""])[0]].load_model_cls()
    except Exception as error:
        return error
    return None
