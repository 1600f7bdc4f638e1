"""A training process: a rank of the group, with the trainers of all training clients of a service, by
number. All ranks get the same calls in the same order; the first returns what they come to.
"""

import contextlib
import fcntl
import os
import pickle
import socket
import struct
import sys
import sysconfig
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from posttrain.backend import ranks
from posttrain.backend.cluster import node_address
from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import ConfigError
from posttrain.backend.sharded_trainer import ShardedScalarTrainer, ShardedTrainer
from posttrain.backend.types import LoraConfig
from posttrain.backend.weight_files import write_shard

SIOCGIFADDR = 0x8915  # of Linux: an interface's address
KINDS = {"language": ShardedTrainer, "scalar": ShardedScalarTrainer}
TORCH, SITE_PACKAGES = os.path.dirname(torch.__file__), sysconfig.get_path("purelib")
STANDARD_LIBRARY = (sysconfig.get_path("stdlib"), "<frozen ")


@dataclass(frozen=True)
class Position:
    """Where a rank is: in which call since its start, and a trainer's method in it, None for other calls and between
    two; at which line, None within torch, where it computes or waits for other ranks. Seconds of this process's clock
    and of its processor time."""

    call: int
    method: str | None
    line: str | None
    seconds: float
    processor_seconds: float


class TrainerRank:
    def __init__(self, rank: int, count: int, config: BackendConfig):
        self._rank, self._count, self._config = rank, count, config
        self._trainers: dict[int, ShardedTrainer] = {}
        self._calls, self._method, self._thread = 0, None, 0
        if rank:  # all print the same
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115

    def position(self) -> Position:
        """Answered also while another call computes, or waits for other ranks."""
        line = line_of(self._thread) if self._method else None
        return Position(self._calls, self._method, line, time.monotonic(), time.process_time())

    def serve_store(self) -> tuple[str, int]:
        """Host and port at which the ranks find each other; the first rank's. The port is bound
        before its number is told."""
        host = "127.0.0.1" if self._config.cluster is None else node_address()
        self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=ranks.TIMEOUT)
        return host, self._store.port

    def join(self, host: str, port: int) -> None:
        if self._rank:
            self._store = TCPStore(host, port, timeout=ranks.TIMEOUT)
        if self._config.cluster is not None and (interface := interface_of(node_address())):
            # gloo would take the interface of the host's name, which is the loopback on many systems
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        self._processes = ranks.join(self._rank, self._count, self._store)

    def check_seen(self, folder: str) -> None:
        """ConfigError, in all ranks, if the node of one does not have the folder."""
        with self._processes.same_outcome():
            if not os.path.isdir(folder):
                raise ConfigError(f"node {node_address()} does not see {folder}: take a folder that all nodes share")

    def open(self, number: int, kind: str, model_name: str, seed: int, lora: LoraConfig | None) -> dict[str, Any]:
        """What the driver has to know of the trainer."""
        with self._processes.same_outcome():
            shard = self._config.trainer_sharding == "shard"
            trainer = KINDS[kind](model_name, self._config, seed, lora, processes=self._processes, shard=shard)
            self._trainers[number] = trainer
        names = ("hf_config", "max_length", "vocabulary", "compute_dtype", "output_name")
        return {name: getattr(trainer, name) for name in names}

    def call(self, number: int, method: str, arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> bytes:
        """The first rank's result, pickled: arrays that Ray unpickles are read-only."""
        positional, keywords = arguments
        self._calls, self._method, self._thread = self._calls + 1, method, threading.get_ident()
        try:
            result = getattr(self._trainers[number], method)(*positional, **keywords)
        finally:
            self._method = None
        return pickle.dumps(result if self._rank == 0 else None)

    def publish(self, number: int, folder: Path) -> None:
        """Writes this rank's rows of the sampler's weights."""
        with self._processes.same_outcome():
            write_shard(folder, self._rank, self._count, self._trainers[number].weight_shard())

    def drop(self, number: int) -> None:
        self._trainers.pop(number, None)


def line_of(thread: int) -> str | None:
    """The line at which a thread of this process is, in the code that calls Python's library; None within torch."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(SITE_PACKAGES) or not file.startswith(STANDARD_LIBRARY):
            return None if file.startswith(TORCH) else f"{file}:{frame.f_lineno} in {frame.f_code.co_name}"
        frame = frame.f_back
    return None


def interface_of(address: str) -> str | None:
    """The network interface with this address; None if no interface of this machine has it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has no address
                found = fcntl.ioctl(asked.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()))
                if socket.inet_ntoa(found[20:24]) == address:
                    return name
    return None
