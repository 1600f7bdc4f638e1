"""Where the finished groups of a training step come from.

Synchronous: the whole batch is rolled out with the present weights, then trained on. Streaming and asynchronous sources fit behind the same
`next_groups`; they differ in when rollouts start and which weights they see.
"""

from typing import Protocol

from backend.sampling_client import SamplingClient
from rl.rollouts import Policy, do_rollouts
from rl.types import RLDataset, TrajectoryGroup

TRAINING_STREAM, EVALUATION_STREAM = 0, 1  # first number of a seed: evaluation must not change what training samples


class GroupSource(Protocol):
    async def next_groups(self, step: int, client: SamplingClient) -> list[TrajectoryGroup]:
        """The groups to train on at `step`. `client` samples from the weights that the step starts with."""
        ...


class SynchronousGroups:
    """On-policy: batch `step` of the dataset, as a pure function of (seed, step) and the weights."""

    def __init__(self, dataset: RLDataset, max_tokens: int, temperature: float, seed: int):
        self._dataset, self._max_tokens, self._temperature, self._seed = dataset, max_tokens, temperature, seed

    async def next_groups(self, step: int, client: SamplingClient) -> list[TrajectoryGroup]:
        policy = Policy(client, self._max_tokens, self._temperature)
        return await do_rollouts(self._dataset.get_batch(step), policy, (self._seed, TRAINING_STREAM, step))
