"""Which replica samples a request. A rollout's group stays on a replica, where its prompt is cached;
a new one goes to the replica with the fewest open sequences; one whose replica is crowded passes
its next turns on. Without a group, requests with equal prompts are one.
"""

import weakref
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import numpy as np

# A replica is crowded when its open sequences, without the group's own, are more than this many times
# those of the lightest replica.
SLACK = 1.5


class SamplingGroup:
    """Requests that share a prompt's beginning. `number` places it where the same run must place its
    groups alike; `only`: on this replica, while it serves."""

    def __init__(self, number: int, only: int | None = None):
        self.number, self.only = number, only
        self.replica: int | None = None
        self.open = 0  # sequences, on `replica`


_current: ContextVar[SamplingGroup | None] = ContextVar("sampling_group", default=None)


@contextmanager
def sampling_group(seed: tuple[int, ...], only: int | None = None) -> Iterator[None]:
    """Requests made inside, and in tasks begun inside, are one group, the last number of whose seed
    is its own."""
    token = _current.set(SamplingGroup(seed[-1] if seed else 0, only))
    try:
        yield
    finally:
        _current.reset(token)


class Router:
    """Places groups on replicas. Not thread-safe. `deterministic`: by the group's number alone, while
    that replica serves."""

    def __init__(self, num_replicas: int, deterministic: bool):
        self.open_S = [0] * num_replicas  # sequences
        self._deterministic = deterministic
        self._next = 0  # of replicas with equally many
        self._prompts: weakref.WeakValueDictionary[bytes, SamplingGroup] = weakref.WeakValueDictionary()

    def group_of(self, prompt: Sequence[int]) -> SamplingGroup:
        """The group of the calling context, else that of the prompt."""
        if (group := _current.get()) is not None:
            return group
        key = np.asarray(prompt, np.int64).tobytes()
        if (group := self._prompts.get(key)) is None:
            group = self._prompts[key] = SamplingGroup(zlib.crc32(key))
        return group

    def open(self, group: SamplingGroup, sequences: int, serving: Sequence[int]) -> int:
        """The replica for the group's next sequences; one of `serving`."""
        chosen = self._choose(group, serving)
        if chosen != group.replica:
            group.replica, group.open = chosen, 0
        group.open += sequences
        self.open_S[chosen] += sequences
        return chosen

    def close(self, group: SamplingGroup, sequences: int, replica: int) -> None:
        self.open_S[replica] -= sequences
        if replica == group.replica:
            group.open = max(0, group.open - sequences)

    def _choose(self, group: SamplingGroup, serving: Sequence[int]) -> int:
        if group.only in serving:
            return group.only  # type: ignore[return-value]
        if self._deterministic:
            place = group.number % len(self.open_S)
            return place if place in serving else serving[group.number % len(serving)]
        open_S: Mapping[int, int] = {replica: self.open_S[replica] for replica in serving}
        fewest = min(open_S.values())
        if group.replica in open_S and open_S[group.replica] - group.open <= SLACK * fewest:
            return group.replica
        lightest = [replica for replica in serving if open_S[replica] == fewest]
        self._next += 1
        return lightest[self._next % len(lightest)]
