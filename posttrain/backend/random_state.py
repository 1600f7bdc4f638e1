"""The backend draws random numbers without changing the program's global generators."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


@contextmanager
def drawn_from(seed: int) -> Iterator[None]:
    """Weights made inside depend on `seed` alone (on the CPU, where all of them are made)."""
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would reseed every GPU too, and nothing would undo that
        torch.default_generator.manual_seed(seed)
        yield


@contextmanager
def global_generators_kept() -> Iterator[None]:
    """Those of Python's `random`, of numpy and of torch on every device, put back afterwards."""
    python, numpy, device = random.getstate(), np.random.get_state(), _torch_states(torch.cuda.is_available())
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        _set_torch_states(device)


class OwnTorchGenerators:
    """Inside `with`, torch's global generators are one engine's own; outside, the program's. They
    begin as they are when this is made.

    Putting the program's states back without keeping the engine's would give every decode step the
    same noise.
    """

    def __init__(self, cuda: bool):
        self._cuda = cuda
        self._engine_states = _torch_states(cuda)

    def __enter__(self) -> None:
        self._program_states = _torch_states(self._cuda)
        _set_torch_states(self._engine_states)

    def __exit__(self, *exc: object) -> None:
        self._engine_states = _torch_states(self._cuda)
        _set_torch_states(self._program_states)


def _torch_states(cuda: bool) -> list[Any]:
    return [torch.get_rng_state(), torch.cuda.get_rng_state_all() if cuda else []]


def _set_torch_states(states: list[Any]) -> None:
    torch.set_rng_state(states[0])
    if states[1]:
        torch.cuda.set_rng_state_all(states[1])
