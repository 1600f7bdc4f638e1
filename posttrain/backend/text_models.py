"""The text model inside a model that also reads pictures or sound (Gemma 3, Mistral Small 3, Qwen 3.5, InternVL,
Voxtral): its layers alone are opened, trained, sampled and saved, under the names of a text model. Its adapters
are saved under the names that they have in the whole model, on which other tools put them. Left out: pictures.
"""

import copy
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from posttrain.backend.errors import ModelError

# Beginnings of the names of configs in the configs of models with pictures or sound.
SENSES = ("vision", "audio", "vq")
# The attribute of a text model that says where the whole one has its layers.
PLACE = "place_in_whole"
# Where the whole model has the layers, in checkpoints of transformers 5 and of earlier versions, and the text model.
PLACES = {
    r"^(?:language_model|thinker)\.lm_head\.": "lm_head.",
    r"^(?:model\.)?(?:language_model|text_model)\.(?:model\.)?|^thinker\.model\.": "model.",
}
# Types whose layers read a prompt in both directions, which the text model's do not.
BOTH_WAYS = ("paligemma",)
# Text models that transformers has only inside the whole: with text alone each computes what another type does under
# these settings, whatever its own say. The positions of text are the same in all sections of its rotations.
SAME_AS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_vl_text": ("qwen2", {}),
    "qwen2_5_vl_text": ("qwen2", {}),
    "qwen2_5_omni_text": ("qwen2", {}),
    "qwen3_vl_text": ("qwen3", {}),
    "qwen3_vl_moe_text": ("qwen3_moe", {"norm_topk_prob": True}),
    "qwen3_omni_moe_text": ("qwen3_moe", {}),
    "glm4v_text": ("glm4", {"attention_bias": True}),
    "glm_ocr_text": ("glm4", {"attention_bias": False}),
    "glm4v_moe_text": ("glm4_moe", {"use_qk_norm": False}),
}
# Where the whole model has the text model's layers, if not in LANGUAGE_MODEL.
LANGUAGE_MODEL = "model.language_model."
ELSEWHERE = {
    **dict.fromkeys(("idefics2", "idefics3", "smolvlm"), "model.text_model."),
    **dict.fromkeys(("qwen2_5_omni", "qwen3_omni_moe"), "thinker.model."),
    **dict.fromkeys(("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"), "model."),
}


def text_model_of(config: PretrainedConfig) -> PretrainedConfig | None:
    """The config of the text model inside a model that also reads pictures or sound; None for other models."""
    try:
        inner: Any = config.get_text_config()
    except ValueError:  # of several
        return None
    if inner is config or inner.is_encoder_decoder or config.model_type in BOTH_WAYS:
        return None
    text: Any = _same_alone(inner) if inner.model_type in SAME_AS else copy.deepcopy(inner)
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return None
    if (ends := getattr(config, "eos_token_id", None)) is not None:  # the text model's may be its class's default
        text.eos_token_id = list(ends) if isinstance(ends, tuple) else ends
    if quantization := getattr(config, "quantization_config", None):
        text.quantization_config = quantization
    # An output layer in the files is used whatever this says.
    text.tie_word_embeddings = any(getattr(part, "tie_word_embeddings", False) for part in (config, text))
    opened: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(text)]
    text.architectures = [opened.__name__]
    return text


def _same_alone(inner: PretrainedConfig) -> PretrainedConfig:
    kind, unsaid = SAME_AS[inner.model_type]
    fields: dict[str, Any] = inner.to_dict() | unsaid
    whole_only = ("mrope_section", "mrope_interleaved", "type")  # the last says mrope in older files
    rotations = {name: value for name, value in fields["rope_parameters"].items() if name not in whole_only}
    fields["rope_parameters"] = {"partial_rotary_factor": 1.0, **rotations}
    fields["head_dim"] = fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"]
    return CONFIG_MAPPING[kind](**{name: fields[name] for name in fields if name != "model_type"})


def place_in(config: PretrainedConfig) -> str:
    return ELSEWHERE.get(config.model_type, LANGUAGE_MODEL)


def name_in_text_model(tensor: str) -> str:
    """Of a tensor of the whole model's."""
    for place, own in PLACES.items():
        tensor = re.sub(place, own, tensor)
    return tensor


@torch.no_grad()
def turn_experts(model: PreTrainedModel, folder: Path, mismatched: Collection[str]) -> list[str]:
    """Reads the experts that files have the other way round than the text model (Qwen 3-VL). Returns the rest of the
    tensors whose shapes differ."""
    live, rest = model.state_dict(), set(mismatched)
    for file in folder.glob("model*.safetensors") if rest else ():
        with safe_open(file, "pt") as saved:
            for name in saved.keys():  # noqa: SIM118
                if (own := name_in_text_model(name)) not in rest or live[own].ndim != 3:
                    continue
                turned = saved.get_tensor(name).transpose(1, 2)
                if turned.shape == live[own].shape:
                    live[own].copy_(turned)
                    rest.remove(own)
    return sorted(rest)


def check_text_only(model_name: str, config: PretrainedConfig) -> None:
    opened: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]  # a class of text models for some configs with pictures
    parts = getattr(opened.config_class, "sub_configs", {})
    if opened.__name__.endswith("ForConditionalGeneration") or any(name.startswith(SENSES) for name in parts):
        raise ModelError(
            f"{model_name!r} reads images or sound besides text ({config.model_type}), and transformers has its text "
            "model only as a part of it: it cannot be opened"
        )


def of_text_model(names: Collection[str], live: Collection[str]) -> list[str]:
    """Those of the `names` of tensors that are where the text model, which has the tensors `live`, has its own."""
    places = {_place(name) for name in live}
    return [name for name in names if _place(name) in places]


def _place(tensor: str) -> str:
    return ".".join(tensor.split(".")[:2])
