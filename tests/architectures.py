"""Every model family the project names, as a random model of two layers with the family's true
structure.

Sizes are tiny, structure is not: windows are shorter than the test rows and alternate with full
attention where the family does so; softcaps, norms of queries and keys, biases, partial rotations,
experts, recurrent and convolution layers, attention sinks, scaled logits, tied and separate heads
are as in the published models. The weights are wide enough for a wrong mask or position to move
logprobs by nats.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

from posttrain.backend.tokenizers import character_tokenizer

WINDOW = 16  # of sliding attention: rows in the tests are two to four times as long
CONTEXT = 256
HIDDEN = 128
VOCABULARY = 260  # that of posttrain.backend.tokenizers.character_tokenizer

_TOKENS: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
SHAPE: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": HIDDEN,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    **_TOKENS,
}
_SHAPE = SHAPE | {"initializer_range": 1.5 * HIDDEN**-0.5}
_SLIDING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_HEAD_DIM: dict[str, Any] = {"head_dim": 32}  # of configs that read it without declaring it
_LFM_DIMS: dict[str, Any] = {
    "conv_dim": HIDDEN,
    "block_dim": HIDDEN,
}  # in the published configs; vLLM reads it, transformers does not
_QUARTER_ROPE = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.25}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 150_000.0,
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 64,
}


def _long_rope() -> dict[str, Any]:
    """Phi 4-mini turns three quarters of a head's dimensions, and stretches them beyond half of its
    context.
    """
    turned = HIDDEN // 4 * 3 // 4 // 2
    return {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "partial_rotary_factor": 0.75,
        "short_factor": [1.0 + 0.1 * i for i in range(turned)],
        "long_factor": [2.0 + i for i in range(turned)],
    }


FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "Llama 3": lambda: LlamaConfig(**_SHAPE, rope_parameters=_LLAMA3_ROPE, tie_word_embeddings=False),
    "Qwen 2.5": lambda: Qwen2Config(**_SHAPE, tie_word_embeddings=True),
    "Qwen 3": lambda: Qwen3Config(**_SHAPE, head_dim=64, tie_word_embeddings=False),
    "Qwen 3-MoE": lambda: Qwen3MoeConfig(
        **_SHAPE, **_HEAD_DIM, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, norm_topk_prob=True
    ),
    "Qwen 3.5": lambda: Qwen3_5TextConfig(
        **_SHAPE,
        head_dim=64,
        layer_types=["linear_attention", "full_attention"],
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        tie_word_embeddings=True,
    ),
    "Mistral": lambda: MistralConfig(**_SHAPE, head_dim=32, sliding_window=None),
    "Mistral, window": lambda: MistralConfig(**_SHAPE, head_dim=32, sliding_window=WINDOW),
    "Gemma 1": lambda: GemmaConfig(**_SHAPE, head_dim=64),
    "Gemma 2": lambda: Gemma2Config(
        **_SHAPE,
        **_SLIDING,
        head_dim=32,
        query_pre_attn_scalar=32,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=5.0,
    ),
    "Gemma 3": lambda: Gemma3TextConfig(**_SHAPE, **_SLIDING, head_dim=32, query_pre_attn_scalar=32),
    "Phi 3": lambda: Phi3Config(**_SHAPE, sliding_window=WINDOW),
    "Phi 4-mini": lambda: Phi3Config(
        **_SHAPE, rope_parameters=_long_rope(), original_max_position_embeddings=CONTEXT // 2, tie_word_embeddings=True
    ),
    "OLMo 2": lambda: Olmo2Config(**{**_SHAPE, "num_key_value_heads": 4}),
    "SmolLM 3": lambda: SmolLM3Config(**_SHAPE, no_rope_layers=[1, 0], use_sliding_window=False),
    "Pythia": lambda: GPTNeoXConfig(
        **_without("num_key_value_heads"), rope_parameters=_QUARTER_ROPE, tie_word_embeddings=False
    ),
    "GPT-2": lambda: GPT2Config(
        n_layer=2, n_embd=HIDDEN, n_head=4, n_positions=CONTEXT, initializer_range=1.5 * HIDDEN**-0.5, **_TOKENS
    ),
    "LFM 2": lambda: Lfm2Config(
        **_SHAPE, **_LFM_DIMS, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False
    ),
    "Granite": lambda: GraniteConfig(
        **_SHAPE, embedding_multiplier=12.0, residual_multiplier=0.22, attention_multiplier=0.0625, logits_scaling=4.0
    ),
    "gpt-oss": lambda: GptOssConfig(
        **_SHAPE, **_SLIDING, head_dim=32, num_local_experts=4, num_experts_per_tok=2, rope_parameters=_YARN_ROPE
    ),
    "Command R": lambda: CohereConfig(**_SHAPE, use_qk_norm=True, logit_scale=0.25),
    "Command R7B": lambda: Cohere2Config(**_SHAPE, **_SLIDING, **_HEAD_DIM, logit_scale=0.25),
}

# The reasons why families are refused by vLLM 0.32 on a CPU (tests/test_vllm_architectures.py), as
# they stand in the message.
NOT_WITH_VLLM = {
    "Qwen 3.5": "No module named 'torchvision'",
    "LFM 2": "its convolution layers give other logprobs from the second sampled token on",
    "gpt-oss": "it does not take 10 of its own weights",
    "Command R7B": "its window is one token longer than transformers'",
}

# The same for adapters beside the weights, backend.lora=unmerged.
NOT_UNMERGED = {
    "GPT-2": "does not support LoRA yet",
    "Qwen 3-MoE": "it has no kernels for experts beside adapters",
}


def _without(name: str) -> dict[str, Any]:
    return {key: value for key, value in _SHAPE.items() if key != name}


def save_random_model(family: str, folder: Path, seed: int = 0) -> Path:
    """A Hugging Face folder with the family's model and the presets' tokenizer. Norms, biases and
    sinks, too, are random.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(FAMILIES[family](), dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    character_tokenizer(CONTEXT).save_pretrained(folder)
    return folder
