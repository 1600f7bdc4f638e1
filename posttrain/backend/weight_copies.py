"""Copies of a model's weights for sampling: of an adapter its tensors, beside the base's, which no
step changes; else all weights, on the CPU.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from posttrain.backend.merged_lora import base_weights, layer_updates, merged_weights
from posttrain.backend.weight_versions import WeightCopy, Weights


def copied_bytes(model: PreTrainedModel, dtype: torch.dtype) -> int:
    """Size of `copied_weights`."""
    if updates := layer_updates(model):
        return sum(update.a_RI.nbytes + update.b_OR.nbytes for update in updates.values())
    return sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize


@torch.no_grad()
def copied_weights(model: PreTrainedModel, dtype: torch.dtype, owner: object = None) -> WeightCopy:
    """The sampler's weights as they are now. `owner` owns the base's tensors."""
    base, size = base_weights(model), copied_bytes(model, dtype)
    if updates := layer_updates(model):
        copied = {name: update.copied() for name, update in updates.items()}
        return WeightCopy(lambda: merged_weights(base, copied, dtype), size, owner)
    copies: dict[tuple[int, ...], torch.Tensor] = {}  # a tied head is in state_dict twice
    for tensor in base.values():
        if (key := (tensor.data_ptr(), *tensor.shape)) not in copies:
            copies[key] = tensor.to("cpu", dtype, copy=True)
    frozen = {name: copies[tensor.data_ptr(), *tensor.shape] for name, tensor in base.items()}
    return WeightCopy(frozen.items, size)


@dataclass
class FrozenModel:
    """A model that nobody trains, as the source of a version. `owner` owns tensors it shares."""

    model: PreTrainedModel
    dtype: torch.dtype
    owner: object = None

    def sampler_weights(self) -> Weights:
        return self._merged()

    def _merged(self) -> Iterator[tuple[str, torch.Tensor]]:
        return merged_weights(base_weights(self.model), layer_updates(self.model), self.dtype)

    def copied_bytes(self) -> int:
        return copied_bytes(self.model, self.dtype)

    def copied_weights(self) -> WeightCopy:
        return copied_weights(self.model, self.dtype, self.owner)
