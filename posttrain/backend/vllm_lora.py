"""Adapters that vLLM computes beside the base's weights (backend.lora=unmerged): one in an engine at a
time, under one id, replaced in place. It is handed over as a peft folder in shared memory, so vLLM,
which scales B where it lies, never has the trainer's tensors. Left out: adapters on experts and on
the output layer; several at once.
"""

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import ConfigError, ModelError
from posttrain.backend.lora_layers import ATTENTION_LAYERS, MLP_LAYERS
from posttrain.backend.merged_lora import LayerUpdate
from posttrain.backend.vllm_refusals import MERGE, USE_TORCH

# Ranks that vLLM has room for; an adapter of another takes the next larger.
RANKS = (8, 16, 32, 64, 128, 256, 512)
ADAPTER = ("policy", 1)  # its name and id, also of all that follow it
SHARED_MEMORY = Path("/dev/shm")


def lora_args(room: int) -> dict[str, Any]:
    """vLLM's EngineArgs for an adapter of up to this rank, one of RANKS."""
    # experts, which get no adapter, then keep vLLM's own kernels
    layers = sorted({name.rpartition(".")[2] for name in (*ATTENTION_LAYERS, *MLP_LAYERS)})
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": room, "lora_target_modules": layers}


def room_for(rank: int) -> int:
    """ConfigError where vLLM has none."""
    if rank > RANKS[-1]:
        raise ConfigError(f"backend.lora=unmerged is for ranks up to {RANKS[-1]} in vLLM, not for {rank}: {MERGE}")
    return next(room for room in RANKS if room >= rank)


def tokens_of_a_step(max_length: int, config: BackendConfig) -> int:
    """The most that vLLM reads at once on a CPU, where it makes a copy of A, or of B, for each token."""
    return max(max_length, config.max_num_seqs, 1024)


def serve_adapter(engine: Any, updates: Mapping[str, LayerUpdate], dtype: torch.dtype) -> Any:
    """Replaces the engine's adapter. Returns the LoRARequest that each request to the engine carries. ModelError
    where vLLM leaves a layer's update out, which it does without a word."""
    from vllm.lora.request import LoRARequest

    with tempfile.TemporaryDirectory(dir=SHARED_MEMORY if SHARED_MEMORY.is_dir() else None) as folder:
        first_rows = write_adapter(Path(folder), updates, dtype)
        # Without load_inplace the adapter that was there under this id would stay.
        engine.add_lora(LoRARequest(*ADAPTER, folder, load_inplace=True))
    (left_out,) = engine.collective_rpc(updates_left_out, args=(first_rows,))
    if left_out:
        some = ", ".join(left_out[:3]) + (", ..." if len(left_out) > 3 else "")
        raise ModelError(f"vLLM leaves out the adapters of {len(left_out)} layers ({some}). {MERGE}, {USE_TORCH}")
    return LoRARequest(*ADAPTER, "/loaded-before")  # never read: the adapter is there, or vLLM fails


def write_adapter(folder: Path, updates: Mapping[str, LayerUpdate], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """As peft writes it, with the scaling in B. Returns the first row of each layer's A."""
    tensors: dict[str, torch.Tensor] = {}
    for name, update in updates.items():
        for part, tensor in (("A", update.a_RI), ("B", update.scaling * update.b_OR)):
            tensors[f"base_model.model.{name}.lora_{part}.weight"] = tensor.detach().to("cpu", dtype).contiguous()
    rank = max(update.a_RI.shape[0] for update in updates.values())
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": sorted(updates)}
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return {name: tensors[f"base_model.model.{name}.lora_A.weight"][0] for name in updates}


# --- in each process of an engine, of which vLLM gives the worker ---------------------------------


def updates_left_out(worker: Any, first_rows: Mapping[str, torch.Tensor]) -> list[str]:
    """The layers whose A is in none of vLLM's, which have other names."""
    held = {
        _bytes(slots[0, 0, 0])  # of (slot, 1, rank, input)
        for layer in worker.get_model().modules()
        if isinstance(stacked := getattr(layer, "lora_a_stacked", None), tuple)
        for slots in stacked
    }
    return [name for name, row in first_rows.items() if _bytes(row) not in held]


def _bytes(row: torch.Tensor) -> bytes:
    return row.float().cpu().numpy().tobytes()


@contextmanager
def base_layers(worker: Any) -> Iterator[None]:
    """The model without vLLM's layers for adapters around its own, as loaders and checkpoints name
    them."""
    vllm_model = worker.get_model()
    if not hasattr(vllm_model, "lora_manager"):
        yield
        return
    from vllm.lora.layers import BaseLayerWithLoRA

    adapted = [
        (parent, name, layer)
        for parent in vllm_model.modules()
        for name, layer in parent.named_children()
        if isinstance(layer, BaseLayerWithLoRA)
    ]
    for parent, name, layer in adapted:
        setattr(parent, name, layer.base_layer)
    try:
        yield
    finally:
        for parent, name, layer in adapted:
            setattr(parent, name, layer)
