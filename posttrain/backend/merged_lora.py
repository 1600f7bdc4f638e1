"""A LoRA adapter that computes with the sampler's weights: W + scaling * B A merged, then rounded
(backend.lora=merged). Rounding to bf16 drops updates below half a step of W; an unrounded adapter
would score with another policy than the sampler's. The gradient passes the rounding unchanged, as in
full bf16 training.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from torch.nn import functional as F

from posttrain.backend.ranks import whole


@dataclass(frozen=True)
class LayerUpdate:
    """An adapter's update of one layer: scaling * B A."""

    a_RI: torch.Tensor
    b_OR: torch.Tensor
    scaling: float
    transposed: bool  # in the layout of GPT-2's layers

    @classmethod
    def of(cls, layer: Any) -> "LayerUpdate":
        a, b = (whole(getattr(layer, name)["default"].weight) for name in ("lora_A", "lora_B"))
        return cls(a, b, layer.scaling["default"], layer.fan_in_fan_out)

    def copied(self) -> "LayerUpdate":
        return LayerUpdate(self.a_RI.clone(), self.b_OR.clone(), self.scaling, self.transposed)

    def delta(self) -> torch.Tensor:
        """As peft's get_delta_weight."""
        delta = self.b_OR @ self.a_RI
        return (delta.T if self.transposed else delta) * self.scaling


def base_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """A model's tensors without its adapter's, named as in a checkpoint. Of its buffers, each is an nn.Buffer."""
    return {
        name.replace(".base_layer.", "."): tensor.detach() if isinstance(tensor, nn.Parameter) else nn.Buffer(tensor)
        for name, tensor in model.state_dict(keep_vars=True).items()
        if ".lora_" not in name
    }


def layer_updates(model: nn.Module) -> dict[str, LayerUpdate]:
    """Of the adapted layers, by name."""
    return {name: LayerUpdate.of(module) for name, module in model.named_modules() if hasattr(module, "lora_A")}


@torch.no_grad()
def merged_weights(
    base: Mapping[str, torch.Tensor], updates: Mapping[str, LayerUpdate], dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors as in a checkpoint of the base, with the updates of its layers, one at a time."""
    for name, tensor in base.items():
        update = updates.get(name.removesuffix(".weight"))
        tensor = tensor if isinstance(tensor, nn.Buffer) else whole(tensor)
        yield name, in_dtype(tensor if update is None else tensor + update.delta(), dtype)


def in_dtype(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Weights. Buffers stay as they are: integers, such as the factors of a hash (Qwen 4), and the biases of routers
    (DeepSeek V3), which rounded would choose other experts."""
    return tensor if isinstance(tensor, nn.Buffer) or not tensor.is_floating_point() else tensor.to(dtype)


@dataclass(frozen=True)
class AdaptedWeights:
    """An adapted model's weights for a sampler: iterated, those of `merged_weights`. An engine with
    backend.lora=unmerged reads `base_weights` once and then `updates` alone, as long as `base` is
    the same object, which stands for tensors that nobody changes."""

    base: object
    tensors: Mapping[str, torch.Tensor]
    updates: Mapping[str, LayerUpdate]
    dtype: torch.dtype

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return merged_weights(self.tensors, self.updates, self.dtype)

    def base_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        return merged_weights(self.tensors, {}, self.dtype)


def compute_merged(model: nn.Module, dtype: torch.dtype) -> None:
    """Makes every adapted linear layer of a peft model compute with its merged weight in `dtype`."""
    for layer in model.modules():
        if isinstance(layer, LoraLinear):
            layer.forward = MethodType(_forward, layer)
            layer.merged_dtype = dtype  # type: ignore[assignment]


def _weight(layer: Any) -> torch.Tensor:
    """(O, I) merged weight, as the sampler has it."""
    # autocast would round B A before it is added
    with torch.no_grad(), torch.autocast(layer.lora_A["default"].weight.device.type, enabled=False):
        weight = (layer.base_layer.weight + layer.get_delta_weight("default")).to(layer.merged_dtype)
    return weight.T if layer.fan_in_fan_out else weight


def _forward(layer: Any, x: torch.Tensor) -> torch.Tensor:
    if layer.disable_adapters:
        return layer.base_layer(x)
    a_RI, b_OR = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    y: Any = _MergedLinear.apply(x.to(layer.merged_dtype), a_RI, b_OR, layer)
    bias = layer.base_layer.bias
    return y if bias is None else y + bias.to(y.dtype)


class _MergedLinear(torch.autograd.Function):
    """x W^T with W fixed; A and B get the gradients of scaling * B A inside W. The backward pass
    merges W again: kept, the merged weights of all layers would be a copy of the model."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, a_RI: torch.Tensor, b_OR: torch.Tensor, layer: Any):
        ctx.save_for_backward(x, a_RI, b_OR)
        ctx.layer = layer
        return F.linear(x, _weight(layer))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor):
        x, a_RI, b_OR = ctx.saved_tensors
        weight_OI, scaling = _weight(ctx.layer), ctx.layer.scaling["default"]
        (gradient,) = gradients
        x_NI, gradient_NO = x.flatten(0, -2), gradient.flatten(0, -2)
        a, b = a_RI.to(x.dtype), b_OR.to(x.dtype)
        gradient_a = scaling * (gradient_NO @ b).T @ x_NI
        gradient_b = scaling * gradient_NO.T @ (x_NI @ a.T)
        return gradient @ weight_OI, gradient_a.to(a_RI.dtype), gradient_b.to(b_OR.dtype), None
