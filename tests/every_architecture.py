"""A small random model of every causal language model that the installed transformers has, and of every
model with pictures or sound that contains one: the config class's defaults with narrow layers, one layer
of each kind, and in text models everything that is easily left out switched on (dropout, noise of
routers, softcaps, multipliers). Types for which that is not enough have a line in OWN.
"""

import re
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING

from posttrain.backend.architectures import bound_steps_as_configured
from posttrain.backend.text_models import text_model_of
from posttrain.backend.tokenizers import character_tokenizer
from tests.architectures import CONTEXT, VOCABULARY

_NAMES = {
    64: """hidden_size n_embd d_model emb_dim embedding_dim embedding_size input_embedding_size output_embedding_size
        word_embed_proj_dim lru_width attention_hidden_size backbone_hidden_size dim_model_base out_hidden_size
        text_hidden_size audio_hidden_size adapter_in_dim adapter_out_dim adapter_input_size codebook_dim""",
    96: """intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner dff dim_ff ffn_hidden_size
        feed_forward_size intermediate_size_mlp dense_intermediate_size d_inner""",
    48: """moe_intermediate_size moe_shared_expert_intermediate_size shared_expert_intermediate_size
        shared_intermediate_size expert_ffn_hidden_size""",
    4: """num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads
        encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads
        linear_num_value_heads linear_num_heads num_experts n_routed_experts num_local_experts moe_num_experts""",
    2: """num_experts_per_tok num_experts_per_token moe_topk moe_k moe_top_k num_key_value_heads linear_num_key_heads
        swa_num_key_value_heads num_query_groups n_group num_expert_group top_k_experts num_hidden_layers n_layer n_layers num_layers
        decoder_layers encoder_layers num_blocks num_decoder_layers num_encoder_layers""",
    16: """head_dim swa_head_dim linear_head_dim linear_key_head_dim linear_value_head_dim v_head_dim
        qk_nope_head_dim index_head_dim kv_channels dim_head d_head attention_head_size state_size mamba_d_state
        ssm_state_size mamba_d_head mamba_head_dim mamba_headdim sliding_window sliding_window_size
        attention_window_size window_size local_attention attention_chunk_size
        hidden_size_per_layer_input laurel_rank router_hidden_size chunk_size mamba_chunk_size block_size index_topk
        hc_lowrank""",
    8: "qk_rope_head_dim mamba_n_heads mamba_num_heads n_mamba_heads rotary_dim",
    24: "qk_head_dim",
    32: "kv_lora_rank q_lora_rank",
    VOCABULARY: "vocab_size decoder_vocab_size vocab_size_per_layer_input",
    CONTEXT: """max_position_embeddings n_positions n_ctx max_seq_len context_length max_target_positions
        max_source_positions model_max_length""",
    1: "first_k_dense_replace num_dense_layers topk_group",
}
SIZES = {name: size for size, names in _NAMES.items() for name in names.split()}
LAYERS = [
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "decoder_layers",
    "num_decoder_layers",
    "num_blocks",
]
TOKENS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}


def _layers(*kinds: str) -> dict[str, Any]:
    return {"layer_types": list(kinds), "num_hidden_layers": len(kinds)}


_SLIDING = _layers("sliding_attention", "full_attention")
_MROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [3, 3, 2]}
_HALF_MROPE = {**_MROPE, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}
_ZAMBA = {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4}
_ASSISTANT = {
    **TOKENS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "global_head_dim": 32,
    "sliding_window": 16,
    "vocab_size": VOCABULARY,
    **_SLIDING,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0,
    "max_position_embeddings": CONTEXT,
}
OWN: dict[str, dict[str, Any]] = {
    **{
        # of whose logits transformers' model with pictures leaves out the scale
        kind: {"text_config": {"model_type": "cohere2", **_ASSISTANT, "logit_scale": 1.0}}
        for kind in ("aya_vision", "cohere2_vision")
    },
    **{
        kind: {"rope_parameters": _MROPE}
        for kind in (
            "qwen2_vl_text",
            "qwen2_5_vl_text",
            "qwen2_5_omni_text",
            "qwen3_vl_text",
            "qwen3_vl_moe_text",
            "glm_ocr_text",
            "cosmos3_edge_text",
        )
    },
    "qwen3_omni_moe_text": {"rope_parameters": _MROPE, "head_dim": 16},
    **{kind: {"rope_parameters": _HALF_MROPE} for kind in ("glm4v_text", "glm4v_moe_text")},
    "apertus1p5": {"image_token_offset": 200, "audio_token_offset": 216},
    **dict.fromkeys(("apertus1p5_vision_tokenizer", "wavtokenizer_encoder"), {"codebook_size": 16}),
    # whose output layers have fewer rows than their embeddings
    "apertus1p5_text": {"vocab_size": VOCABULARY + 8, "output_vocab_size": VOCABULARY},
    **dict.fromkeys(
        ("inkling2_text", "inkling2_loop_text"), {"vocab_size": VOCABULARY + 8, "unpadded_vocab_size": VOCABULARY}
    ),
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        **_SLIDING,
        "num_key_value_heads": 2,
        "logit_scale": 0.7,
        "rope_parameters": {"sliding_attention": _MROPE, "full_attention": _MROPE},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "moe_jitter_eps": 0.1},
    },
    "deepseek_v4": {
        "o_groups": 2,
        "o_lora_rank": 16,
        "index_n_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
    },
    **{
        kind: {"bos_token_id": 2}
        for kind in ("cwm", "emu3", "emu3_text_model", "mllama_text_model", "modernbert-decoder")
    },
    "diffllama": {"attention_dropout": 0.0},
    "dory": {**_layers(*["sliding_attention", "full_attention"] * 2), "n_input_layers": 1, "n_output_layers": 1},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "falcon_h1": {
        "mamba_d_ssm": 128,
        "mamba_d_head": 16,
        "ssm_multipliers": [0.9, 0.8, 1.1, 1.2, 0.7],
        "mlp_multipliers": [0.8, 0.9],
    },
    "gemma3n_text": {
        **_layers(*["sliding_attention", "full_attention"] * 2),
        "num_kv_shared_layers": 2,
        "intermediate_size": [96] * 4,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    },
    "gemma4_text": {
        **_layers(*["sliding_attention", "full_attention"] * 2),
        "num_kv_shared_layers": 2,
        "global_head_dim": 32,
    },
    "gemma4_text+experts": {
        **_SLIDING,
        "global_head_dim": 32,
        "hidden_size_per_layer_input": 0,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 48,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
    },
    "gemma4_unified_text": {**_SLIDING, "global_head_dim": 32},
    "gemma4_assistant": {"text_config": {"model_type": "gemma4_text", **_ASSISTANT}, "num_centroids": 4},
    "gemma4_unified_assistant": {
        "text_config": {"model_type": "gemma4_unified_text", **_ASSISTANT},
        "num_centroids": 4,
    },
    "granitemoehybrid": {**_layers("linear_attention", "full_attention"), "shared_intermediate_size": 48},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "hy_v4_vl_text": {"rope_parameters": {**_MROPE, "mrope_section": [2, 1, 1]}},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_offset": 0},
    "lfm2": {**_layers("conv", "full_attention"), "block_auto_adjust_ff_dim": False, "full_attn_idxs": [1]},
    "lfm2_moe": {**_layers("conv", "full_attention"), "num_dense_layers": 1},
    "llama4_text": {
        **_layers("chunked_attention", "full_attention"),
        "moe_layers": [1],
        "no_rope_layers": [1, 0],
        "floor_scale": 8,
    },
    "longcat_flash": {"num_layers": 1, "num_hidden_layers": 2, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8, "n_groups": 2},
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"n_groups": 2},
    "nemotron3_5_transcribe_word_timestamp": {"blank_token_id": 0},
    "qwen4_exp_text": {
        **_layers("linear_attention", "full_attention"),  # as in checkpoints: versions differ in the latter's name
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
        "ple_layer_ids": [1],
        "ple_embed_dim": 64,
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": 50,
        "split_ngram_parts": 2,
        "make_ngram_vocab_size_divisible_by": 8,
    },
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": [16, 16],
        "axial_pos_embds_dim": [32, 32],
        "attn_layers": ["local", "lsh"],
        "local_attn_chunk_length": 16,
        "lsh_attn_chunk_length": 16,
    },
    "roc_bert": dict.fromkeys(("pronunciation_vocab_size", "shape_vocab_size"), VOCABULARY),
    "youtu": {"tie_word_embeddings": False},
    "zamba": {**_ZAMBA, "attention_head_dim": 32, "attention_hidden_size": 128},
    "zamba2": {
        **_ZAMBA,
        "hybrid_layer_ids": [1, 3],
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "mamba_headdim": 16,
        "num_query_groups": 4,
        "num_key_value_heads": 4,
    },
    "zaya": {**_layers("hybrid_sliding", "hybrid"), "num_experts_per_tok": 1, "sliding_window": 16},
}
# Types that are not made small, and why.
NOT_SHRUNK = {
    "qwen3_omni_moe": "its speech model's config has no defaults",
    "blt": "it reads patches of bytes that a second model cuts",
    **dict.fromkeys(
        ("musicgen", "musicgen_melody", "vision-encoder-decoder"), "its config needs those of two other models"
    ),
    "gemma3n": "it needs the package timm; where that is installed, it is right as the text model in it",
    **dict.fromkeys(("fast_vlm", "perception_lm"), "it needs the package timm"),
    "inkling_mm_model": "it needs the package scipy",
    **dict.fromkeys(("blip-2", "instructblip", "instructblipvideo"), "it reads no text without a picture"),
    **dict.fromkeys(("fun_asr_nano", "granite4_vision", "nemotron_h_omni"), "its parts depend on each other's widths"),
}


def shrunk(kind: str) -> PretrainedConfig:
    """`kind`: a model_type, or one with a variant, as in OWN."""
    cls = CONFIG_MAPPING[kind.partition("+")[0]]
    own = OWN.get(kind, {})
    given = {**_shrunk_fields(cls, text=own.get("text_config")), **own}
    known = given if "per_layer_config" not in given else {k: v for k, v in given.items() if k != "per_layer_config"}
    return cls(**known)


def _shrunk_fields(cls: Any, everything: bool = True, text: Any = None) -> dict[str, Any]:
    """`everything`: with what is easily left out switched on. `text`: the text model's config, where a class has no
    valid default of it."""
    parts = {"text_config": text} if text else {}
    found: dict[str, Any] = cls(**parts).to_dict()
    small = {**TOKENS, **{name: size for name, size in SIZES.items() if _is_size(found.get(name))}}
    declared = {name: str(kind) for c in cls.__mro__ for name, kind in getattr(c, "__annotations__", {}).items()}
    for name, value in found.items():
        if not everything or isinstance(value, bool | str):
            continue
        if re.search(r"(dropout|pdrop|layerdrop|dropout_prob)$", name) and isinstance(value, int | float):
            small[name] = 0.1 if "float" in declared.get(name, "float") else 0
        elif "jitter" in name and value is not None:
            small[name] = 0.1
        elif re.search(r"soft_?cap", name) and "rout" not in name:
            small[name] = 5.0
        elif re.search(r"multiplier|scaling$|_scale$", name) and value in (1.0, 0.0625):
            small[name] = 0.7
    if "head_dim" in {*declared, *small}:
        small["head_dim"] = 8 if "qk_rope_head_dim" in found else 16
    if "num_experts_per_tok" in found:
        small["num_experts_per_tok"] = 2
    if (heads := found.get("num_key_value_heads")) and heads == found.get("num_attention_heads"):
        small["num_key_value_heads"] = small["num_attention_heads"]
    small |= _one_layer_of_each_kind(found)
    for name in getattr(cls, "sub_configs", {}):
        if found.get(name):
            part = type(getattr(cls(**parts), name))
            small[name] = {**_shrunk_fields(part, False), **OWN.get(part.model_type, {}), "model_type": part.model_type}
            small[name].pop("per_layer_config", None)
    return small


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _one_layer_of_each_kind(found: dict[str, Any]) -> dict[str, Any]:
    """Lists with an entry for each layer, cut to the layers that differ, and their number."""
    number = next((found[name] for name in LAYERS if isinstance(found.get(name), int)), 0)
    lists = {
        name: value
        for name, value in found.items()
        if isinstance(value, list) and len(value) == number > 2 and not isinstance(value[0], list)
    }
    if not lists:
        return {}
    kinds = list(zip(*(map(str, value) for value in lists.values()), strict=True))
    chosen = sorted(kinds.index(kind) for kind in dict.fromkeys(kinds))
    chosen += [1] * (len(chosen) == 1)
    cut: dict[str, Any] = {name: [value[i] for i in chosen] for name, value in lists.items()}
    if "num_attention_heads_per_layer" in cut:
        cut["num_attention_heads_per_layer"] = [4] * len(chosen)
    return cut | {name: len(chosen) for name in LAYERS if name in found}


def random_model(kind: str) -> PreTrainedModel:
    """No weight is 0 or 1; logits are a nat or so wide."""
    config = shrunk(kind)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        has_more = text_model_of(config) is not None and type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING
        kind_of: Any = AutoModelForMultimodalLM if has_more else AutoModelForCausalLM
        model = kind_of.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
        bound_steps_as_configured(model)
        with torch.no_grad():
            for tensor in model.parameters():
                matrix = tensor.ndim >= 2 and min(tensor.shape) > 1
                noise = torch.randn_like(tensor)
                tensor.copy_(1.2 * tensor.shape[-1] ** -0.5 * noise if matrix else tensor + 0.3 * noise)
            saved = model.state_dict()
            for name, tensor in model.named_buffers():
                if name in saved and "bias" in name and tensor.is_floating_point():  # of routers
                    tensor.add_(0.1 * torch.randn_like(tensor))
    return model


def save(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    character_tokenizer(CONTEXT).save_pretrained(folder)
    return folder
