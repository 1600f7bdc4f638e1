"""Versions of a policy's weights, for sampling. The newest is the trainer's own tensors. Before they
change, a version that a call may need again is copied: of an adapter its tensors, else all weights,
to the CPU, within backend.snapshot_memory_gb.
"""

import itertools
import os
import threading
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from posttrain.backend.errors import CookbookError, EngineError, SnapshotMemoryError, StaleSamplerError
from posttrain.backend.memory import GIB

Weights = Iterable[tuple[str, torch.Tensor]]


@dataclass
class WeightCopy:
    """Weights that no step changes. `num_bytes` are the copy's own: an adapter's, without its base,
    whose `owner` is kept."""

    weights: Callable[[], Weights]
    num_bytes: int
    owner: object = None


class WeightSource(Protocol):
    """What a version is made from: a SampledModel."""

    def sampler_weights(self) -> Weights: ...

    def copied_bytes(self) -> int: ...

    def copied_weights(self) -> WeightCopy: ...


class SnapshotMemory:
    """The copies of one ServiceClient, within a number of bytes."""

    def __init__(self, limit_gb: float | None):
        """None: a quarter of the machine's memory."""
        self.limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
        if limit_gb is not None:
            self.limit = int(limit_gb * GIB)
        self._versions: weakref.WeakSet[WeightVersion] = weakref.WeakSet()
        self.make_room: Callable[[], bool] = lambda: False
        """Called, in any thread, where a copy finds no room: whether it has closed a client."""

    def used(self) -> int:
        return sum(version.copied_bytes for version in list(self._versions))

    def copy(self, version: "WeightVersion", source: WeightSource) -> WeightCopy:
        """SnapshotMemoryError if the copy would exceed the limit."""
        needed = source.copied_bytes()
        while (used := self.used()) + needed > self.limit:
            if self.make_room():
                continue
            raise SnapshotMemoryError(
                f"keeping version {version.number} of the weights needs {needed / GIB:.3g} GiB, and snapshots may take "
                f"{self.limit / GIB:.3g} GiB, of which {used / GIB:.3g} are in use: raise backend.snapshot_memory_gb, "
                "close sampling clients that are no longer needed, or take a client of the live policy (follow=True)"
            )
        self._versions.add(version)
        return source.copied_weights()


class WeightVersion:
    """One version of a policy's weights. `number` counts the changes of the policy's weights."""

    def __init__(self, number: int, weights: Callable[[], Weights]):
        self.number = number
        self.is_newest = False  # of its policy: followers sample from it
        self.last_turn = 0  # when the engine loaded it
        self.lost: CookbookError | None = None  # the reason why the weights were not kept
        self.copied_bytes = 0
        self._weights: Callable[[], Weights] | None = weights
        self._owner: object = None
        self.files: Any = None  # in which it was published; None without replicas, or once they are gone
        self._holders: set[object] = set()
        # Held while the weights are read, and while the trainer's are exchanged for a copy.
        # Reentrant: garbage collection may call in at any point.
        self._lock = threading.RLock()

    @property
    def is_held(self) -> bool:
        """Whether a client wants it whatever the live policy does."""
        return bool(self._holders)

    @property
    def can_be_loaded(self) -> bool:
        return self._weights is not None

    def load(self, load_weights: Callable[[Weights], None]) -> bool:
        """False if the weights are gone: another thread may drop them at any time."""
        with self._lock:
            if (weights := self._weights) is None:
                return False
            load_weights(weights())
            return True

    def hold(self, client: object) -> Callable[[], object]:
        """Keeps the version until the returned function is called or `client` is garbage-collected."""
        holder = object()
        self._holders.add(holder)
        return weakref.finalize(client, self._release, holder)

    def _release(self, holder: object) -> None:
        self._holders.discard(holder)
        self.drop_if_unwanted()

    def drop_if_unwanted(self) -> None:
        if not self._holders and not self.is_newest:
            self.drop()

    def drop(self) -> None:
        """Only the engine has the weights from here on, until it loads others."""
        self._weights, self._owner, self.files, self.copied_bytes = None, None, None, 0

    def lives_in(self, source: WeightSource) -> None:
        """The trainer's tensors are this version's."""
        if self._weights is None:
            self._weights = source.sampler_weights

    def published_in(self, files: WeightSource) -> None:
        """Files of these weights are its copy, once it is kept."""
        with self._lock:
            self._weights, self.files = files.sampler_weights, files

    def keep(self, source: WeightSource, memory: SnapshotMemory) -> None:
        """Exchanges the trainer's tensors for a copy. SnapshotMemoryError if there is no room."""
        with self._lock:
            if not self.copied_bytes and self._weights is not None:
                copy = memory.copy(self, self.files or source)
                self._weights, self.copied_bytes, self._owner = copy.weights, copy.num_bytes, copy.owner

    def lose(self, reason: CookbookError | None = None) -> None:
        with self._lock:
            self.lost = reason
            self.drop()


class Policy:
    """The versions of one policy in its engine. `newest` is the last that was synced."""

    def __init__(self, memory: SnapshotMemory, shares_engine: bool):
        self.newest: WeightVersion | None = None
        # seeds of calls without one: reproducible, never repeated
        self.unseeded_calls = itertools.count()
        self._memory, self._shares_engine = memory, shares_engine
        self._versions: weakref.WeakSet[WeightVersion] = weakref.WeakSet()

    def publish(self, version: WeightVersion) -> None:
        """Makes it the newest."""
        before, self.newest = self.newest, version
        version.is_newest = True
        self._versions.add(version)
        if before is not None and before is not version:
            before.is_newest = False
            before.drop_if_unwanted()

    def before_change(self, source: WeightSource) -> None:
        """The trainer's tensors are about to change. Copies the newest version if a
        client holds it, or if another version may take its place in the engine. Without room for
        the copy training goes on, and who asks for the weights later is told why they are gone."""
        if (version := self.newest) is None:
            return
        others = any(other.is_held for other in list(self._versions) if other is not version)
        if not (version.is_held or others or self._shares_engine):
            version.lose()
            return
        try:
            version.keep(source, self._memory)
        except SnapshotMemoryError as error:
            version.lose(error)
            print(f"WARNING a sampling client loses its weights: {error}", flush=True)

    def before_end(self, source: WeightSource) -> None:
        """The trainer is no longer needed: as `before_change`. May be called by the garbage
        collector, so it waits for nobody: a version that is being read stays the trainer's."""
        version = self.newest
        if version is not None and version._lock.acquire(blocking=False):
            try:
                self.before_change(source)
            finally:
                version._lock.release()


def stale(version: WeightVersion, newest: WeightVersion) -> StaleSamplerError:
    return StaleSamplerError(
        f"this sampling client is of policy version {version.number} only (keep=False), and the policy is at version "
        f"{newest.number}: take a new client from save_weights_and_get_sampling_client, or one that keeps its weights "
        "(keep=True) or follows the live policy (follow=True)"
    )


def refusal(
    policy: Policy, version: WeightVersion | None, keep: bool, loaded: WeightVersion | None
) -> CookbookError | None:
    """Why a call of this version (None = the newest) cannot be answered, or not any more."""
    newest = policy.newest
    if version and newest and version is not newest and not keep:
        return stale(version, newest)
    if (needed := version or newest) is None:
        return EngineError("the engine has no weights yet")
    if needed is not loaded and not needed.can_be_loaded:
        return needed.lost or EngineError(f"the weights of version {needed.number} are gone")
    return None
