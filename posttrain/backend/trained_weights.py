"""What the optimizer steps: the trained weights, or fp32 copies of them (masters). Masters exist
for bf16 weights, whose gradients are then added up in fp32, and for all weights where the
optimizer is offloaded to the CPU. A scalar head is fp32 in passes, too, and has none.
"""

from collections.abc import Mapping
from functools import partial

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from posttrain.backend.config import BackendConfig
from posttrain.backend.lean_adamw import LeanAdamW

SCALAR_HEAD = "scalar_head"  # the name of a scalar model's


class TrainedWeights:
    """`named` are the passes' parameters, `stepped` the optimizer's, under the same names."""

    def __init__(
        self, named: Mapping[str, nn.Parameter], config: BackendConfig, seed: int, dtype: torch.dtype | None = None
    ):
        """fp32 weights become copies in `dtype` of their masters, where that is bf16."""
        self.named = dict(named)
        self.masters: dict[str, nn.Parameter] = {}
        self._gradients: dict[str, torch.Tensor] = {}
        for name, p in self.named.items():
            if name != SCALAR_HEAD and (config.offload_optimizer or dtype == torch.bfloat16):
                device = torch.device("cpu") if config.offload_optimizer else p.device
                self.masters[name] = nn.Parameter(p.detach().to(device=device, dtype=torch.float32, copy=True))
                p.data = p.data.to(dtype or p.dtype)
                # not with self, which has p: nobody would see that circle, and no weight of it would ever be freed
                p.register_post_accumulate_grad_hook(partial(_add_up, self._gradients, name))
        self.stepped = self.named | self.masters
        lean = config.moments == "8bit" or any(p.dtype == torch.bfloat16 for p in self.stepped.values())
        self.optimizer: torch.optim.Optimizer
        if lean:
            self.optimizer = LeanAdamW(self.stepped.values(), seed, config.moments == "8bit")
        else:
            self.optimizer = torch.optim.AdamW(self.stepped.values(), lr=0.0, fused=True)

    def hand_over_gradients(self) -> None:
        """To `stepped`; zeros where a weight has none: AdamW would skip it, and its moments would
        depend on the order of the data."""
        for name, p in self.stepped.items():
            if name in self.masters and name in self._gradients:
                p.grad = self._gradients.pop(name).to(p.device)
            elif p.grad is None:
                p.grad = torch.zeros_like(p)

    @torch.no_grad()
    def masters_to_weights(self) -> None:
        weights: list[torch.Tensor] = [self.named[name] for name in self.masters]
        masters: list[torch.Tensor] = [*self.masters.values()]
        if any(isinstance(weight, DTensor) for weight in weights):  # of ranks: they have no _foreach_copy_
            for weight, master in zip(weights, masters, strict=True):
                weight.copy_(master)
        elif weights:  # a GPU has nothing else to do than wait for hundreds of launches
            torch._foreach_copy_(weights, masters)  # pyright: ignore[reportPrivateImportUsage]

    def zero_grad(self) -> None:
        self._gradients.clear()
        self.optimizer.zero_grad(set_to_none=True)

    def exact(self, state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A model's tensors, with masters in place of the weights they are of."""
        if not self.masters:
            return dict(state_dict)
        masters = {self.named[name].data_ptr(): master.detach() for name, master in self.masters.items()}
        return {name: masters.get(tensor.data_ptr(), tensor) for name, tensor in state_dict.items()}


def _add_up(gradients: dict[str, torch.Tensor], name: str, p: torch.Tensor) -> None:
    if p.grad is None:  # of a micro-batch whose tokens are all clipped none arrives
        return
    before = gradients.get(name)
    gradients[name] = p.grad.float() if before is None else before.add_(p.grad)
    p.grad = None
