"""Checkpoints with quantised weights: those whose whole weights transformers computes are opened with them, in plain
layers; others are refused by name. Left out: computing with quantised weights.
"""

from typing import Any

from transformers import PretrainedConfig

from posttrain.backend.checkpoint_files import ADAPTER_CONFIG_FILE
from posttrain.backend.errors import ModelError

DEQUANTIZED = {"fp8", "mxfp4", "compressed-tensors"}


def ask_for_whole_weights(model_name: str, config: PretrainedConfig) -> None:
    """In the config, where its weights are quantised. ModelError where transformers cannot make whole ones."""
    for part in (config, config.get_text_config()):  # the last name is MLX's
        found: Any = getattr(part, "quantization_config", None) or getattr(part, "quantization", None)
        if not found:
            continue
        settings: dict[str, Any] = found if isinstance(found, dict) else found.to_dict()
        method = settings.get("quant_method", "of an unnamed method")
        method = str(getattr(method, "value", method))
        cache = " with a scheme for the cache" if settings.get("kv_cache_scheme") else ""
        if method not in DEQUANTIZED or cache:
            raise ModelError(
                f"{model_name!r} has quantised weights ({method}{cache}), which are neither trained nor sampled here: "
                "give the model that it was made from, or dequantise it and save it; for an adapter on it, set that "
                f"model as base_model_name_or_path in {ADAPTER_CONFIG_FILE}"
            )
        part.quantization_config = {**settings, "dequantize": True}  # a GPU would keep FP8, without its scales


def make_plain(model: Any) -> None:
    """Of whole weights alone. The layers of compressed-tensors go on to round what they are given as they did when
    their weights were quantised, and keep the scales."""
    rounding = [layer for layer in model.modules() if hasattr(layer, "quantization_scheme")]
    for layer in rounding:
        for name in [name for name in layer._parameters if name not in ("weight", "bias")]:
            delattr(layer, name)
        for name in [name for name in vars(layer) if name == "forward" or name.startswith("quantization_")]:
            delattr(layer, name)
    if rounding:
        model._weight_conversions = None  # it is saved as any other
