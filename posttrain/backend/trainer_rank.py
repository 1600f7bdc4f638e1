"""A training process: a rank of the group, with the trainers of all training clients of a service, by
number. All ranks get the same calls in the same order; the first returns what they come to.
"""

import os
import pickle
import socket
import sys
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from posttrain.backend import ranks
from posttrain.backend.config import BackendConfig
from posttrain.backend.sharded_trainer import ShardedScalarTrainer, ShardedTrainer
from posttrain.backend.types import LoraConfig
from posttrain.backend.weight_files import write_shard

KINDS = {"language": ShardedTrainer, "scalar": ShardedScalarTrainer}


class TrainerRank:
    def __init__(self, rank: int, count: int, config: BackendConfig):
        self._rank, self._count, self._config = rank, count, config
        self._trainers: dict[int, ShardedTrainer] = {}
        if rank:  # all print the same
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115

    def serve_store(self, several_nodes: bool) -> tuple[str, int]:
        """Host and port at which the ranks find each other; the first rank's. The port is bound
        before its number is told."""
        host = _address() if several_nodes else "127.0.0.1"
        self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=ranks.TIMEOUT)
        return host, self._store.port

    def join(self, host: str, port: int) -> None:
        if self._rank:
            self._store = TCPStore(host, port, timeout=ranks.TIMEOUT)
        self._processes = ranks.join(self._rank, self._count, self._store)

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
        result = getattr(self._trainers[number], method)(*positional, **keywords)
        return pickle.dumps(result if self._rank == 0 else None)

    def publish(self, number: int, folder: Path) -> None:
        """Writes this rank's rows of the sampler's weights."""
        with self._processes.same_outcome():
            write_shard(folder, self._rank, self._count, self._trainers[number].weight_shard())

    def drop(self, number: int) -> None:
        self._trainers.pop(number, None)


def _address() -> str:
    """This node's, as other nodes see it: of the interface that a packet would leave by."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("10.255.255.255", 1))
            return str(probe.getsockname()[0])
        except OSError:
            return socket.gethostbyname(socket.gethostname())
