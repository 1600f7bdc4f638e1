"""What a client of the server holds: a session, its models in training, and its samplers."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from posttrain.backend.errors import SnapshotMemoryError
from posttrain.backend.sampling_client import SamplingClient
from posttrain.backend.training_client import TrainingClient
from posttrain.serve.order import NumberedQueue
from posttrain.serve.store import Run


@dataclass(eq=False)
class Session:
    id: str
    user_metadata: dict[str, str]
    display_name: str | None
    last_seen: float = field(default_factory=time.monotonic)
    models: dict[str, "Model"] = field(default_factory=dict)
    samplers: dict[str, "Sampler"] = field(default_factory=dict)


@dataclass(eq=False)
class Model:
    """A model in training. Its requests wait in `queue`, also while it is being opened."""

    run: Run
    session: Session
    opened: "asyncio.Task[TrainingClient]"
    queue: NumberedQueue[TrainingClient]
    substituted: set[str] = field(default_factory=set)  # losses whose substitution was logged


@dataclass(eq=False)
class Sampler:
    id: str
    session: Session
    base_model: str
    model_path: str | None
    opened: "asyncio.Task[SamplingClient]"
    copies: int = 0  # of its client, in other processes
    last_used: float = field(default_factory=time.monotonic)
    sampling: int = 0  # requests without an answer
    let_go: bool = False  # its weights made room for those of others

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Around a request. SnapshotMemoryError if the weights are gone."""
        if self.let_go:
            raise SnapshotMemoryError(
                f"the weights of sampler {self.id} were dropped: it was the least recently used, and snapshots had no "
                "more room (backend.snapshot_memory_gb); save weights that are needed later under a name"
            )
        self.sampling, self.last_used = self.sampling + 1, time.monotonic()
        try:
            yield
        finally:
            self.sampling -= 1

    @property
    def keeps_old_weights(self) -> bool:
        """Whether its end would free memory, and disturb no request."""
        opened = self.opened
        is_open = opened.done() and not opened.cancelled() and not opened.exception()
        return is_open and not self.sampling and opened.result().holds_old_weights

    def let_weights_go(self) -> None:
        self.let_go = True
        self.opened.result().close()
