"""Random numbers of the backend, without a change to the program's global generators."""

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

# Held by the thread whose numbers the global generators make: several threads open models, and sample.
_in_use = threading.RLock()


def seed_of(*numbers: int) -> int:
    """A seed for torch, of its own for each list. Neighbours would not do, nor what differs from bit 32 on: torch's
    generator on a CPU reads the 32 low bits alone."""
    return hash(numbers) % 2**63


@contextmanager
def drawn_from(seed: int) -> Iterator[None]:
    """Weights made inside depend on `seed` only (all are made on the CPU)."""
    with _in_use, torch.random.fork_rng(devices=[]):
        # torch.manual_seed would also reseed every GPU, for good
        torch.default_generator.manual_seed(seed if seed < 2**32 else seed_of(seed))
        yield


@contextmanager
def global_generators_kept() -> Iterator[None]:
    """Restores the generators of Python's `random`, numpy and torch (all devices) at the end."""
    with _in_use:
        python, numpy, device = random.getstate(), np.random.get_state(), _torch_states(torch.cuda.is_available())
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            _set_torch_states(device)


class OwnTorchGenerators:
    """Inside `with`, torch's global generators are an engine's: a function of its seed and of how often
    it was entered. Outside, the program's. Without them every decode step would have the same noise; kept
    states might be earlier ones, which torch puts back in another thread after it has compiled something."""

    def __init__(self, cuda: bool, seed: int):
        self._cuda, self._seed, self._count = cuda, seed, 0

    def __enter__(self) -> None:
        _in_use.acquire()
        self._program_states = _torch_states(self._cuda)
        self._count += 1
        seed = seed_of(self._seed, self._count)
        torch.default_generator.manual_seed(seed)
        if self._cuda:
            torch.cuda.manual_seed_all(seed)

    def __exit__(self, *exc: object) -> None:
        _set_torch_states(self._program_states)
        _in_use.release()


def _torch_states(cuda: bool) -> list[Any]:
    return [torch.get_rng_state(), torch.cuda.get_rng_state_all() if cuda else []]


def _set_torch_states(states: list[Any]) -> None:
    torch.set_rng_state(states[0])
    if states[1]:
        torch.cuda.set_rng_state_all(states[1])
