"""Base models under adapters: the weights are in memory once, however many adapters train on them.
Each adapter has modules of its own around the shared tensors, so passes need not wait for each
other, and nothing distinguishes them from those of an adapter alone. Models trained in full share
nothing.
"""

import copy
import threading
import weakref
from pathlib import Path

import torch
from transformers import PreTrainedModel

from posttrain.backend.models import load_model

Key = tuple[object, ...]


class BaseModels:
    """Holds weak references: a base model ends with its last adapter."""

    def __init__(self) -> None:
        self._opened: weakref.WeakValueDictionary[Key, PreTrainedModel] = weakref.WeakValueDictionary()
        self._lock = threading.Lock()

    def view(
        self, model_name: str, seed: int, device: torch.device, dtype: torch.dtype
    ) -> tuple[PreTrainedModel, PreTrainedModel]:
        """A model of its own around the shared tensors, and their owner, to be kept with it."""
        with self._lock:
            key = (model_name, seed, str(device), dtype, *_files(model_name))
            owner = self._opened.get(key)
            if owner is None:
                owner = self._opened[key] = load_model(model_name, seed, device, dtype).requires_grad_(False)
        shared = {id(parameter): parameter for parameter in owner.parameters()}
        return copy.deepcopy(owner, shared), owner


def _files(model_name: str) -> list[tuple[str, int, int]]:
    """Of a folder: what changes when it is written anew."""
    return [
        (file.name, file.stat().st_mtime_ns, file.stat().st_size)
        for file in sorted(Path(model_name).expanduser().glob("*"))
        if file.suffix in (".json", ".safetensors", ".bin")
    ]
