"""Weights for a vLLM engine, named as in a checkpoint, with every parameter accounted for. vLLM
reads checkpoints; transformers may hold another form (a layer's experts in one tensor). vLLM's
loaders skip unknown names silently, and parameters without weights keep dummy values.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import revert_weight_conversion

from posttrain.backend.engine import Weights
from posttrain.backend.vllm_copies import record
from posttrain.backend.vllm_lora import base_layers

TIED_HEAD = "lm_head.weight"


class CheckpointForm:
    """Converts a model's tensors to those of its checkpoints."""

    def __init__(self, hf_config: PretrainedConfig):
        with torch.device("meta"):
            self.model: Any = AutoModelForCausalLM.from_config(hf_config)
        self._is_converted = bool(get_model_conversion_mapping(self.model, add_legacy=False))
        # of tied embeddings: some of vLLM's models know only the output layer's other name
        self.with_head = True

    def __call__(self, weights: Weights) -> Weights:
        """One tensor at a time; all at once if the model's tensors differ from the checkpoint's."""
        weights = ((name, tensor) for name, tensor in weights if self.with_head or name != TIED_HEAD)
        return revert_weight_conversion(self.model, dict(weights)).items() if self._is_converted else weights

    def zeros(self, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and shapes of all weights."""
        for name, tensor in self.model.state_dict().items():
            yield name, torch.zeros(tensor.shape, dtype=dtype, device=device)

    def random(self, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
        """The same numbers in each call."""
        for seed, (name, tensor) in enumerate(self.model.state_dict().items()):
            generator = torch.Generator(device).manual_seed(seed)
            yield name, torch.randn(tensor.shape, generator=generator, dtype=dtype, device=device)


def has_only_attention(hf_config: PretrainedConfig) -> bool:
    """Whether no layer is recurrent or a convolution."""
    layer_types = getattr(hf_config.get_text_config(), "layer_types", None) or []
    return all(layer_type.endswith("attention") and layer_type != "linear_attention" for layer_type in layer_types)


# --- in each process of an engine, of which vLLM gives the worker ---------------------------------


def has_output_layer(worker: Any) -> bool:
    return hasattr(worker.get_model(), "lm_head")


def load_all(worker: Any, form: CheckpointForm, weights: Weights) -> None:
    """Replaces the weights. Those for several processes can be pickled."""
    vllm_model = worker.get_model()
    with base_layers(worker):
        # on a CPU linears are packed when loaded: only the full reload path may change them
        if _is_on_cpu(vllm_model):
            worker.reload_weights(weights_iterator=iter(form(weights)))
            _pack_experts(vllm_model)
        elif worker.recorded_copies:
            worker.recorded_copies(form(weights))
        else:
            vllm_model.load_weights(iter(form(weights)))


def places_of(worker: Any, shapes: Mapping[str, torch.Size]) -> dict[str, torch.Tensor]:
    """Where a GPU's engine holds a checkpoint's tensors as they are; {} where its loaders do more than copy."""
    return worker.recorded_copies.places(shapes) if worker.recorded_copies else {}


@torch.no_grad()
def parameters_left_out(worker: Any, form: CheckpointForm, dtype: torch.dtype) -> list[str]:
    """Loads weights into an engine with dummies; names the parameters that were not filled. On a GPU
    the worker keeps the copies that the loaders made, for syncs."""
    vllm_model = worker.get_model()
    device = next(vllm_model.parameters()).device
    with base_layers(worker):
        if _is_on_cpu(vllm_model):
            return _left_out_by_reload(vllm_model, form(form.zeros(dtype, device)), worker.vllm_config)
        names, worker.recorded_copies = record(vllm_model, lambda: form(form.random(dtype, device)))
        return names


def parameters_rounded(worker: Any, dtype: torch.dtype) -> list[str]:
    """Names of the parameters that vLLM holds in fewer bits than `dtype`."""
    parameters = worker.get_model().named_parameters()
    return [name for name, p in parameters if p.is_floating_point() and p.dtype.itemsize < dtype.itemsize]


def _left_out_by_reload(vllm_model: Any, weights: Weights, vllm_config: Any) -> list[str]:
    """On a CPU linears are packed after loading: only the reload counts a layer's elements."""
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    initialize_layerwise_reload(vllm_model)
    vllm_model.load_weights(iter(weights))
    names = []
    for layer_name, layer in vllm_model.named_modules():
        parameters = dict(layer.named_parameters(recurse=False))
        info = get_layerwise_info(layer)
        if info.can_load() and info.load_numel < sum(p.numel() for p in parameters.values()) - _padding(layer):
            given = {name for name, _ in info.loaded_weights}
            names += [f"{layer_name}.{name}" for name in parameters if name not in given] or [layer_name]
    finalize_layerwise_reload(vllm_model, vllm_config.model_config)
    return names


def _is_on_cpu(vllm_model: Any) -> bool:
    return next(vllm_model.parameters()).device.type == "cpu"


def _pack_experts(vllm_model: Any) -> None:
    """vLLM 0.32 on a CPU packs a mixture's experts on the first load, but not on a reload."""
    for layer in vllm_model.modules():
        kernel = getattr(getattr(layer, "quant_method", None), "moe_kernel", None)
        if kernel is not None:
            kernel.fused_experts.process_weights_after_loading(layer)


def _padding(layer: nn.Module) -> int:
    """Elements of a vocabulary matrix without a token."""
    rows = getattr(layer, "num_embeddings_padded", 0) - getattr(layer, "org_vocab_size", 0)
    return rows * getattr(layer, "embedding_dim", 0)
