"""AdamW's state in a safetensors file: `exp_avg:NAME`, `exp_avg_sq:NAME` and `step:NAME` of each
trained parameter, with scales for moments of 8 bits. A state with a missing, extra or misshapen
parameter is refused as a whole.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from posttrain.backend.checkpoint_files import REMEDY, tensor_shapes
from posttrain.backend.errors import CheckpointError
from posttrain.backend.lean_adamw import MOMENTS, LeanAdamW, Slots
from posttrain.backend.ranks import shard_like, whole_on_cpu


def slots(parameter: torch.Tensor, optimizer: torch.optim.Optimizer) -> Slots:
    """Shape and dtype of a parameter's state, by name."""
    moments: Slots = dict.fromkeys(MOMENTS, (tuple(parameter.shape), parameter.dtype))
    if isinstance(optimizer, LeanAdamW):
        moments = optimizer.slots(parameter)
    return {"step": ((), torch.float32), **moments}


def optimizer_tensors(
    parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, keep: bool
) -> dict[str, torch.Tensor]:
    """The whole tensors of the file; none before the first step, or without `keep`. A collective
    call of the ranks."""
    return {
        f"{slot}:{name}": whole_on_cpu(value, keep).contiguous()
        for name, parameter in parameters.items()
        for slot, value in optimizer.state.get(parameter, {}).items()
    }


def write_optimizer(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, file: Path) -> None:
    """Of one process."""
    save_file(optimizer_tensors(parameters, optimizer, keep=True), file)


def check_optimizer(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, file: Path) -> None:
    """CheckpointError unless the file has exactly the state of these parameters, or none."""
    saved = tensor_shapes(file)
    expected = {
        f"{slot}:{name}": shape
        for name, parameter in parameters.items()
        for slot, (shape, _) in slots(parameter, optimizer).items()
    }
    if not saved:
        return
    saved_8bit, live_8bit = (any("_scale:" in key for key in keys) for keys in (saved, expected))
    if saved_8bit != live_8bit:
        kind = "8bit" if saved_8bit else "float32"
        raise CheckpointError(f"{file} holds moments in {kind}: continue with backend.moments={kind}")
    remedy = "load the weights alone with load_checkpoint_path, or load_state, and the optimizer starts afresh"
    for names, says in (
        (expected.keys() - saved.keys(), "lacks"),
        (saved.keys() - expected.keys(), "has, and this run does not train,"),
    ):
        if names:
            raise CheckpointError(
                f"{file} {says} {_some(names)}: it belongs to another model or LoRA setting; {remedy}"
            )
    for name, shape in expected.items():
        if saved[name] != shape:
            raise CheckpointError(f"{file}: {name} has shape {saved[name]}, this run needs {shape}; {remedy}")


@torch.no_grad()
def load_optimizer(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, file: Path) -> None:
    """Replaces the optimizer's state, after check_optimizer; no change if that refuses. CheckpointError, with an empty
    state, for one that is not finite: it would show as a step that went too far, when the next checkpoint is saved."""
    check_optimizer(parameters, optimizer, file)
    optimizer.state.clear()
    with safe_open(file, "pt") as tensors:
        for key in tensors.keys():  # noqa: SIM118
            slot, name = key.split(":", 1)
            parameter = parameters[name]
            on_cpu = slot == "step" and isinstance(optimizer, LeanAdamW)  # AdamW's, fused, is on the device
            dtype = slots(parameter, optimizer)[slot][1]
            tensor = tensors.get_tensor(key).to("cpu" if on_cpu else parameter.device, dtype)
            if not torch.isfinite(tensor).all():
                optimizer.state.clear()
                raise CheckpointError(f"{file} is damaged, {key} is NaN or infinite: {REMEDY}")
            optimizer.state[parameter][slot] = shard_like(tensor, parameter)


def _some(names: set[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")
