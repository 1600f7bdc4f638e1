"""Weights for samplers in other processes, as files: each rank writes its rows of every tensor, readers
join them along the first dimension. In shared memory this is a copy; on a shared file system it
reaches other nodes.
"""

import json
import os
import shutil
import weakref
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from posttrain.backend.errors import EngineError
from posttrain.backend.memory import GIB
from posttrain.backend.weight_versions import WeightCopy, Weights


class FileWeights:
    """The weights in a folder, name by name; iterable any number of times, and a WeightSource. The
    folder is removed when nobody holds this."""

    def __init__(self, folder: Path):
        self.folder = folder
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(read_joined(self.folder))

    def sampler_weights(self) -> Weights:
        return self

    def copied_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.folder.glob("*"))

    def copied_weights(self) -> WeightCopy:
        return WeightCopy(self.sampler_weights, self.copied_bytes())


def write_shard(folder: Path, rank: int, ranks: int, weights: Weights) -> None:
    """This rank's rows of each tensor; all of it where a tensor is not divided, in rank 0 alone.
    The file appears when it is complete. A tensor with two names is written once."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    names: dict[tuple[Any, ...], str] = {}
    same: dict[str, str] = {}  # of a tied head
    for name, tensor in weights:
        stored = tensor.detach().cpu().contiguous()
        key = (stored.data_ptr(), *stored.shape)
        if stored.numel() and key in names:
            same[name] = names[key]
        else:
            names[key], tensors[name] = name, stored
    file = _file(folder, rank, ranks)
    unfinished = file.with_suffix(".unfinished")
    try:
        save_file(tensors, unfinished, metadata={"same": json.dumps(same)})
        os.replace(unfinished, file)
    except (OSError, SafetensorError) as error:
        needed, room = sum(tensor.nbytes for tensor in tensors.values()) / GIB, shutil.disk_usage(folder).free / GIB
        raise EngineError(
            f"new weights of {needed:.3g} GiB cannot be written to {folder.parent}, which has {room:.3g} GiB free "
            f"({error}): set backend.sync_dir to a folder with more room (in a container /dev/shm is 64 MB by default)"
        ) from error


def read_joined(folder: Path) -> Weights:
    """Every tensor, one at a time. FileNotFoundError unless all ranks have written."""
    files = sorted(folder.glob("*.safetensors"))
    if not files or files != [_file(folder, rank, len(files)) for rank in range(len(files))]:
        raise FileNotFoundError(f"{folder} lacks the weights of some ranks: {[file.name for file in files]}")
    with ExitStack() as stack:
        shards: list[Any] = [stack.enter_context(safe_open(file, "pt")) for file in files]
        names_R = [set(shard.keys()) for shard in shards]
        same: dict[str, str] = {}
        for shard in shards:
            same |= json.loads(shard.metadata()["same"])
        for name in [*shards[0].offset_keys(), *same]:
            stored = same.get(name, name)
            parts = [shard.get_tensor(stored) for shard, names in zip(shards, names_R, strict=True) if stored in names]
            yield name, parts[0] if len(parts) == 1 else torch.cat(parts)


def _file(folder: Path, rank: int, ranks: int) -> Path:
    return folder / f"{rank:05}-of-{ranks:05}.safetensors"
