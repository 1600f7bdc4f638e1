"""What a client of the server holds: a session, its models in training, and its samplers."""

import asyncio
import time
from dataclasses import dataclass, field

from posttrain.backend.sampling_client import SamplingClient
from posttrain.backend.training_client import TrainingClient
from posttrain.serve.order import InOrder
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
    queue: InOrder[TrainingClient]
    substituted: set[str] = field(default_factory=set)  # losses whose substitution was logged


@dataclass(eq=False)
class Sampler:
    id: str
    session: Session
    base_model: str
    model_path: str | None
    opened: "asyncio.Task[SamplingClient]"
    copies: int = 0  # of its client, in other processes
