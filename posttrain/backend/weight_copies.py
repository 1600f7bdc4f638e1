"""A model's weights as a sampler reads them, and copies of them: of an adapter its tensors, beside the
base's, which no step changes; else all weights, on the CPU.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from posttrain.backend.device_lock import computing
from posttrain.backend.merged_lora import (
    AdaptedWeights,
    LayerUpdate,
    base_weights,
    in_dtype,
    layer_updates,
    merged_weights,
)
from posttrain.backend.weight_versions import WeightCopy, Weights


@dataclass
class SampledModel:
    """The source of versions: of a policy in training, or of a model that nobody trains. `owner`
    owns tensors it shares."""

    model: PreTrainedModel
    dtype: torch.dtype
    owner: object = None

    def sampler_weights(self) -> Weights:
        """Names and tensors as in a checkpoint, adapters merged, in the sampler's dtype, one at a
        time. From state_dict, as a tied lm_head must be included: vLLM on a CPU packs a copy of it.
        """
        base, updates = base_weights(self.model), layer_updates(self.model)
        return self._adapted(base, updates) if updates else merged_weights(base, {}, self.dtype)

    def _adapted(self, base: Mapping[str, torch.Tensor], updates: Mapping[str, LayerUpdate]) -> AdaptedWeights:
        return AdaptedWeights(self.owner or self.model, base, updates, self.dtype)

    def copied_bytes(self) -> int:
        """Size of `copied_weights`."""
        if updates := layer_updates(self.model):
            return sum(update.a_RI.nbytes + update.b_OR.nbytes for update in updates.values())
        return sum(parameter.numel() for parameter in self.model.parameters()) * self.dtype.itemsize

    @computing()
    @torch.no_grad()
    def copied_weights(self) -> WeightCopy:
        """The sampler's weights as they are now."""
        base, size, dtype = base_weights(self.model), self.copied_bytes(), self.dtype
        if updates := layer_updates(self.model):
            copied = self._adapted(base, {name: update.copied() for name, update in updates.items()})
            return WeightCopy(lambda: copied, size, self.owner)
        copies: dict[tuple[int, ...], torch.Tensor] = {}  # a tied head is in state_dict twice
        for tensor in base.values():
            if (key := (tensor.data_ptr(), *tensor.shape)) not in copies:
                copies[key] = in_dtype(tensor, dtype).to("cpu", copy=True)
        frozen = {name: copies[tensor.data_ptr(), *tensor.shape] for name, tensor in base.items()}
        return WeightCopy(frozen.items, size)
