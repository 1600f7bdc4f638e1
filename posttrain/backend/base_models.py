"""Base models under adapters: the weights are in memory once, however many adapters train on them.
Each adapter has modules of its own around the shared tensors, so nothing distinguishes its passes
from those of an adapter alone. Passes take turns, so that one pass's activations are in memory.
Models trained in full share nothing.
"""

import copy
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from posttrain.backend.device_lock import computing
from posttrain.backend.memory import return_free_memory
from posttrain.backend.models import load_model, model_folder

Key = tuple[object, ...]
SAMPLED_VALUES = 1024  # of a tensor that is compared


class Turn:
    """A lock. Whoever takes it in another thread than the last gives to the system what that one
    freed: glibc would keep a whole pass's activations for each thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: int | None = None

    def __enter__(self) -> None:
        self._lock.acquire()
        thread = threading.get_ident()
        if self._thread not in (None, thread):
            return_free_memory()
        self._thread = thread

    def __exit__(self, *exc: object) -> None:
        self._lock.release()


@dataclass(eq=False)
class SharedBase:
    """Owns the tensors. Passes over them hold `turn`."""

    model: PreTrainedModel
    turn: Turn = field(default_factory=Turn)
    is_aside: bool = False  # an engine opens that is to hold the tensors

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Leaves its GPU, and comes back unless the engine holds it then (`move_into`)."""
        parameters = list(self.model.parameters())
        device = parameters[0].device
        with self.turn:
            try:
                self.is_aside = True
                _move(parameters, torch.device("cpu"))
                if device.type == "cuda":
                    torch.cuda.empty_cache()
                yield
            finally:
                self.is_aside = False
                _move(parameters, device)

    def move_into(self, places: Mapping[str, torch.Tensor]) -> int:
        """The parameters become these tensors, where they have the same shape, dtype and values (of which
        some are compared). Returns how many weights are held there."""
        moved = 0
        for name, parameter in self.model.named_parameters():
            place = places.get(name)
            if place is not None and (place.shape, place.dtype) == (parameter.shape, parameter.dtype):
                step = max(1, place.numel() // SAMPLED_VALUES)
                some, own = (tensor.detach().flatten()[::step].cpu() for tensor in (place, parameter))
                if torch.equal(some, own):
                    parameter.data = place
                    moved += place.numel()
        return moved


@computing()
def _move(parameters: Iterable[torch.nn.Parameter], device: torch.device) -> None:
    for parameter in parameters:
        parameter.data = parameter.data.to(device)


class BaseModels:
    """Holds weak references: a base model ends with its last adapter."""

    def __init__(self) -> None:
        self._opened: weakref.WeakValueDictionary[Key, SharedBase] = weakref.WeakValueDictionary()
        self._lock = threading.Lock()

    def view(
        self, model_name: str, seed: int, device: torch.device, dtype: torch.dtype
    ) -> tuple[PreTrainedModel, SharedBase]:
        """A model of its own around the shared tensors, and their owner, to be kept with it."""
        with self._lock:
            key = (model_name, seed, str(device), dtype, *_files(model_name))
            owner = self._opened.get(key)
            if owner is None:
                owner = SharedBase(load_model(model_name, seed, device, dtype).requires_grad_(False))
                self._opened[key] = owner
        shared = {id(parameter): parameter for parameter in owner.model.parameters()}
        return copy.deepcopy(owner.model, shared), owner


def _files(model_name: str) -> list[tuple[str, int, int]]:
    """Of a folder: what changes when it is written anew."""
    return [
        (file.name, file.stat().st_mtime_ns, file.stat().st_size)
        for file in sorted(model_folder(model_name).glob("*"))
        if file.suffix in (".json", ".safetensors", ".bin")
    ]
