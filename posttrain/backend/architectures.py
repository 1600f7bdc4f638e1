"""What a model's configuration and class say of its layers: which tokens they attend to, what is done to
their logits, how many experts a token has, where the decoder is, what its cache is called.
"""

import functools
import inspect
import math
from typing import Any

from transformers import Cache, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from posttrain.backend.logprobs import LogitTransform

# Model types without `layer_types`: all layers are causal attention over all earlier tokens, unless
# there is a window.
FULL_ATTENTION = """apertus arcee cohere ernie4_5 ernie4_5_moe falcon flex_olmo gemma glm glm4 glm4_moe gpt2 gpt_bigcode
    gpt_neox granite granitemoe granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hyperclovax jais2 jetmoe llama
    minimax_m2 ministral3 mistral mixtral nanochat nemotron olmo olmo2 olmoe persimmon phi phi3 phimoe qwen3_moe seed_oss
    solar_open stablelm starcoder2"""

# Of these tests/test_architectures.py or test_every_architecture.py has compared windows in rows of several sequences.
WINDOWED_ATTENTION = """afmoe cohere2 cohere2_moe cwm exaone4 exaone_moe gemma2 gemma3_text gemma4_text gemma4_unified_text
    gpt_oss granite_swa granitemoe_swa ministral mistral olmo3 phi3 qwen2 qwen3 smollm3 vaultgemma"""


def attention_windows(config: PretrainedConfig, max_length: int) -> dict[str, int | None] | None:
    """The window of each kind of layer, None = at least `max_length`; None if a layer is not causal
    attention. Only then can sequences share a row: chunks, recurrent and convolution layers count
    the columns between."""
    config = config.get_text_config()
    layer_types = getattr(config, "layer_types", None)
    kinds = set(layer_types or ["full_attention" if config.model_type in FULL_ATTENTION.split() else "unknown"])
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if not kinds <= {"full_attention", "sliding_attention"} or getattr(config, "attention_chunk_size", None):
        return None
    window = None if window is None or window >= max_length else window
    if window is not None and config.model_type not in WINDOWED_ATTENTION.split():
        return None
    return {kind: window if kind == "sliding_attention" or not layer_types else None for kind in kinds}


# Names of a context's length in configs, of which a config has one: GPT's, MPT's, Whisper's, Bloom's.
CONTEXTS = ("max_position_embeddings", "max_seq_len", "max_target_positions", "seq_length")


def context_limit(config: PretrainedConfig) -> tuple[int | None, str, str]:
    """Tokens of context, None if the config does not say; why it ends there; and what to do where the config has
    signs that it goes on.

    With LongRoPE (Phi 3 and 4, 128k) it ends where the rotations change: beyond, all positions depend on the longest
    row in the batch, and a sequence has several logprobs. Dual chunk attention (Qwen's with 1M) is not in
    transformers, and does nothing in the first chunk.
    """
    text: Any = config.get_text_config()
    limit = next((int(value) for name in CONTEXTS if (value := getattr(text, name, None))), None)
    ends: list[tuple[int, str]] = []
    reaches = [(getattr(text, "model_max_length", None) or 0, "model_max_length")]
    for rotations in rotations_of(text):
        kind, factor = rotations.get("rope_type"), rotations.get("factor") or 0
        original = rotations.get("original_max_position_embeddings") or getattr(
            text, "original_max_position_embeddings", None
        )
        if kind == "longrope" and original:
            ends.append((int(original), " with one set of rotations (LongRoPE changes them beyond)"))
        elif kind == "yarn" and factor and original:
            reach = int(factor * original)
            ends.append((reach, f" within its rotations (yarn, {factor:g} times {original})"))
            reaches.append((reach, f"yarn, {factor:g} times {original}"))
        elif kind == "linear" and factor and limit:
            reaches.append((int(factor * limit), f"linear scaling, {factor:g} times {limit}"))
    if chunks := getattr(text, "dual_chunk_attention_config", None):
        first = int(chunks["chunk_size"]) - int(chunks["local_size"])
        first = min(first, int(chunks.get("original_max_position_embeddings") or first))  # it scales scores beyond
        ends.append((first, " in its first chunk (transformers has no dual chunk attention)"))
    if window := getattr(text, "keep_window_size", None):
        ends.append((int(window), " that its layers do not choose from (Doge counts padding, too)"))
    end, why = min(ends, default=(limit, ""))
    if end is not None and (limit is None or end < limit):
        return end, why, ""
    reach, sign = max(reaches)
    further = (
        f". Its config.json also has {sign}: if that is its context, set max_position_embeddings={reach} there"
        if limit is not None and reach > limit
        else ""
    )
    return limit, "", further


def rotations_of(config: PretrainedConfig) -> list[dict[str, Any]]:
    """The parameters of rotary embeddings: one set, or one for each kind of layer."""
    found = getattr(config, "rope_parameters", None) or {}
    each_kind = [value for value in found.values() if isinstance(value, dict)]
    return each_kind or ([found] if found else [])


def scale_queries_in_vllm(config: Any) -> None:
    """Ministral 3 scales its queries by their position. vLLM reads that under another name, without which it leaves
    the scale out, from position `original_max_position_embeddings` on."""
    rotations: dict[str, Any] = next(iter(rotations_of(config)), {})
    if beta := rotations.get("llama_4_scaling_beta"):
        original = rotations["original_max_position_embeddings"]
        config.llama_4_scaling = {"original_max_position_embeddings": original, "beta": beta}


def attends_to_all(config: PretrainedConfig, max_length: int) -> bool:
    """Whether all layers are causal attention over up to `max_length` earlier tokens."""
    windows = attention_windows(config, max_length)
    return windows is not None and set(windows.values()) == {None}


def heads_of_layers(config: PretrainedConfig) -> list[tuple[int, int, int]]:
    """Query heads, heads of keys and values, and their width, of each layer: Gemma 4's differ. An upper bound for
    a layer without attention, and 1 head where there are none (Mamba)."""
    text: Any = config.get_text_config()
    found = []
    for layer in getattr(text, "per_layer_config", None) or [text] * text.num_hidden_layers:
        heads = getattr(layer, "num_attention_heads", None) or 1
        dim = getattr(layer, "head_dim", None) or layer.hidden_size // heads
        found.append((heads, getattr(layer, "num_key_value_heads", None) or heads, dim))
    return found


def kernel_of_attention(config: PretrainedConfig) -> str | None:
    """For transformers' attn_implementation. Its default, SDPA, leaves out a softcap of the scores
    (Gemma 2) without a word."""
    return "eager" if getattr(config.get_text_config(), "attn_logit_softcapping", None) else None


def heads_that_keep_scores(config: PretrainedConfig) -> int:
    """Query heads, over all layers, whose kernel keeps the scores of all pairs of tokens for the backward pass: none
    with SDPA."""
    text = config.get_text_config()
    known = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(text), None)
    keeps = kernel_of_attention(config) == "eager" or not getattr(known, "_supports_sdpa", True)
    return sum(heads for heads, _, _ in heads_of_layers(text)) if keeps and hasattr(text, "num_attention_heads") else 0


def bound_steps_as_configured(model: PreTrainedModel) -> None:
    """Those of state-space layers. transformers bounds Nemotron-H's and Zamba 2's from below by `time_step_min`, which
    is of how weights are drawn: in passes of several tokens, and not of one. Their authors' code and vLLM do not."""
    low, high = getattr(model.config.get_text_config(), "time_step_limit", None) or (0.0, math.inf)
    layer: Any
    for layer in model.modules():
        if hasattr(layer, "time_step_limit"):
            layer.time_step_limit = (float(low), float(high))


# Names in configs of what is done to logits: they are multiplied, divided, and capped.
LOGIT_FACTORS = ("logit_scale", "lm_head_multiplier")
LOGIT_DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
LOGIT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def logit_transform(config: PretrainedConfig) -> LogitTransform:
    """Scale and softcap of the logits (Granite, Cohere, Gemma 2), all that `Trainer` accepts."""
    config = config.get_text_config()
    factors, divisors, caps = (
        [value for name in names if (value := getattr(config, name, None))]
        for names in (LOGIT_FACTORS, LOGIT_DIVISORS, LOGIT_CAPS)
    )
    if config.model_type == "hyperclovax":  # which multiplies by what Granite divides by
        factors, divisors = factors + divisors, []
    return LogitTransform(math.prod(factors, start=1.0) / math.prod(divisors), caps[0] if caps else None)


def vocabulary_of(model: PreTrainedModel) -> int:
    """Number of token ids a model reads and writes. Its tokenizer may have fewer if the vocabulary was padded; the
    output layer of Apertus 1.5 and Inkling 2 has fewer than the embedding."""
    layers: Any = (model.get_input_embeddings(), model.get_output_embeddings())
    return min(int(layer.weight.shape[0]) for layer in layers if layer is not None)


def experts_per_token(config: PretrainedConfig) -> int:
    """Experts that a token is sent to; 0 without experts."""
    names = ("num_experts_per_tok", "top_k_experts", "moe_topk", "num_experts_per_token", "moe_k")
    text = config.get_text_config()
    return next((int(number) for name in names if (number := getattr(text, name, None))), 0)


def decoder_of(model: PreTrainedModel) -> Any:
    """The layers below the output layer. transformers gives for Llama 4 the whole model instead, and for
    ModernBERT the output layer."""
    decoder: Any = model.get_decoder()
    return model.model if decoder is model or decoder is model.get_output_embeddings() else decoder


def with_cache(model: Any, cache: Cache) -> dict[str, Any]:
    """The arguments of a forward pass that reads and extends `cache`."""
    return {_cache_argument(type(model)): cache, "use_cache": True}


@functools.cache
def _cache_argument(kind: type) -> str:
    """Mamba's has a name of its own, and transformers 5.24 has renamed the others'."""
    arguments = inspect.signature(kind.forward).parameters  # type: ignore[attr-defined]
    return next((name for name in ("cache", "cache_params") if name in arguments), "past_key_values")
