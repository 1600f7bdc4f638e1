"""The text model inside a model that also reads pictures or sound (Gemma 3, Mistral Small 3, Qwen 3.5, InternVL,
Voxtral): its layers alone are opened, trained, sampled and saved, under the names of a text model. Its adapters
are saved under the names that they have in the whole model, on which other tools put them. Left out: pictures.
"""

import copy
import re
from collections.abc import Collection
from typing import Any

from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from posttrain.backend.errors import ModelError

# Beginnings of the names of configs in the configs of models with pictures or sound.
SENSES = ("vision", "audio", "vq")
# The attribute of a text model that says where the whole one has its layers.
PLACE = "place_in_whole"
# Where the whole model has the layers, in checkpoints of transformers 5 and of earlier versions, and the text model.
PLACES = {
    r"^language_model\.lm_head\.": "lm_head.",
    r"^(?:model\.)?(?:language_model|text_model)\.(?:model\.)?": "model.",
}
# Types whose layers read a prompt in both directions, which the text model's do not.
BOTH_WAYS = ("paligemma",)
# Types that call the place text_model.
TEXT_MODEL = ("idefics2", "idefics3", "smolvlm")


def text_model_of(config: PretrainedConfig) -> PretrainedConfig | None:
    """The config of the text model inside a model that also reads pictures or sound; None for other models."""
    try:
        inner: Any = config.get_text_config()
    except ValueError:  # of several
        return None
    if inner is config or inner.is_encoder_decoder or config.model_type in BOTH_WAYS:
        return None
    if type(inner) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return None
    text: Any = copy.deepcopy(inner)
    if (ends := getattr(config, "eos_token_id", None)) is not None:  # the text model's may be its class's default
        text.eos_token_id = list(ends) if isinstance(ends, tuple) else ends
    if quantization := getattr(config, "quantization_config", None):
        text.quantization_config = quantization
    # An output layer in the files is used whatever this says.
    text.tie_word_embeddings = any(getattr(part, "tie_word_embeddings", False) for part in (config, text))
    opened: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(text)]
    text.architectures = [opened.__name__]
    return text


def place_in(config: PretrainedConfig) -> str:
    """Where the whole model of a config has the text model's layers."""
    return "model.text_model." if config.model_type in TEXT_MODEL else "model.language_model."


def name_in_text_model(tensor: str) -> str:
    """Of a tensor of the whole model's."""
    for place, own in PLACES.items():
        tensor = re.sub(place, own, tensor)
    return tensor


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
