"""A sync into a vLLM model as one copy. Its loaders write tensor after tensor, each through Python:
17 of the 19 ms of a sync of 0.5B weights on an H100. What they copy where is recorded when the engine
opens, checked with random weights, and copied at once from then on.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from posttrain.backend.engine import Weights

GROUP_BYTES = 2**28  # of weights that are cast or merged for a sync, held at once


@dataclass(frozen=True)
class Copy:
    """A part of the tensor `name` of a checkpoint, and its place in a parameter."""

    name: str
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    target: torch.Tensor

    def source(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.contiguous()
        return tensor.as_strided(self.size, self.stride, tensor.storage_offset() + self.offset)


def by_name(copies: list[Copy]) -> dict[str, list[Copy]]:
    of: dict[str, list[Copy]] = {}
    for copy in copies:
        of.setdefault(copy.name, []).append(copy)
    return of


class Copies:
    """Loads weights as the loaders it was recorded from."""

    def __init__(self, copies: list[Copy]):
        self._of = by_name(copies)

    def places(self, shapes: Mapping[str, torch.Size]) -> dict[str, torch.Tensor]:
        """The parts of the model's parameters that hold a checkpoint's tensors of these names and shapes,
        in the same order of elements."""
        found = {}
        for name, shape in shapes.items():
            copies = self._of.get(name, [])
            storages = {copy.target.untyped_storage().data_ptr() for copy in copies}
            starts = {copy.target.storage_offset() - copy.offset for copy in copies}
            as_given = all(copy.target.stride() == copy.stride for copy in copies)
            is_whole = sum(copy.target.numel() for copy in copies) == shape.numel()
            if as_given and is_whole and len(storages) == len(starts) == 1:
                stride = torch.empty(shape, device="meta").stride()
                found[name] = copies[0].target.as_strided(shape, stride, starts.pop())
        return found

    @torch.inference_mode()
    def __call__(self, weights: Weights) -> None:
        """KeyError if a tensor is missing."""
        missing, size = set(self._of), 0
        targets: list[torch.Tensor] = []
        sources: list[torch.Tensor] = []
        for name, tensor in weights:
            missing.discard(name)
            for copy in self._of.get(name, []):
                targets.append(copy.target)
                sources.append(copy.source(tensor))
                size += sources[-1].nbytes
            if size > GROUP_BYTES:
                torch._foreach_copy_(targets, sources)  # pyright: ignore[reportPrivateImportUsage]
                targets, sources, size = [], [], 0
        if targets:
            torch._foreach_copy_(targets, sources)  # pyright: ignore[reportPrivateImportUsage]
        if missing:
            raise KeyError(f"weights that a sync must bring: {sorted(missing)[:3]}")


@torch.no_grad()
def record(model: Any, weights: Callable[[], Weights]) -> tuple[list[str], Copies | None]:
    """Loads `weights`, random and the same in each call, into an engine with dummies. Names the
    parameters that the loaders leave out. The copies are None where the loaders do not only copy:
    then a sync has to call them."""
    parameters = {name: p.data for name, p in model.named_parameters() if p.is_floating_point()}
    for parameter in parameters.values():
        parameter.fill_(torch.nan)
    with _Recorder(parameters) as recorder:
        model.load_weights(recorder.given(weights()))
    names = [name for name, parameter in parameters.items() if parameter.isnan().any()]
    copies = list(recorder.copies.values())
    copies_only = not names and _are_all(copies, parameters, weights)
    for parameter in parameters.values():
        parameter.zero_()
    return names, Copies(copies) if copies_only else None


class _Recorder(TorchDispatchMode):
    """Notes the copies from given tensors into parameters."""

    def __init__(self, parameters: dict[str, torch.Tensor]):
        super().__init__()
        self._parameters = {p.untyped_storage().data_ptr() for p in parameters.values()}
        self._given: dict[int, str] = {}
        self.copies: dict[tuple[Any, ...], Copy] = {}

    def given(self, weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights:
            tensor = tensor.clone(memory_format=torch.contiguous_format)  # alone in its storage
            self._given[tensor.untyped_storage().data_ptr()] = name
            yield name, tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default:
            target, source = args[:2]
            name = self._given.get(source.untyped_storage().data_ptr())
            if name is not None and target.untyped_storage().data_ptr() in self._parameters:
                part = source.expand(target.shape)
                place = target.data_ptr(), tuple(target.shape), target.stride()
                # a later copy to the same place wins
                self.copies[place] = Copy(
                    name, tuple(part.shape), part.stride(), part.storage_offset(), target.detach()
                )
        return func(*args, **(kwargs or {}))


def _are_all(copies: list[Copy], parameters: dict[str, torch.Tensor], weights: Callable[[], Weights]) -> bool:
    """Whether the copies give each parameter what the loaders have just given it."""
    of = by_name(copies)
    for name, tensor in weights():
        for copy in of.pop(name, []):
            if not torch.equal(copy.target, copy.source(tensor).to(copy.target.dtype)):
                return False
    for copy in copies:
        copy.target.zero_()
    for copy in copies:
        copy.target.add_(1)
    # each place is written once; what else was loaded does not depend on the weights: padding
    if of or not all(bool((copy.target == 1).all()) for copy in copies):
        return False
    for copy in copies:
        copy.target.zero_()
    return not any(bool(parameter.any()) for parameter in parameters.values())
