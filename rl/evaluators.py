"""Evaluation of a sampling client on held-out environments."""

from collections.abc import Awaitable, Callable

from backend.sampling_client import SamplingClient
from rl.group_sources import EVALUATION_STREAM
from rl.metrics import compute_trajectory_metrics
from rl.rollouts import Policy, do_rollouts
from rl.types import Metrics, RLDataset, TrajectoryGroup

SamplingClientEvaluator = Callable[[SamplingClient], Awaitable[Metrics]]


class RLTestSetEvaluator:
    """Rolls out every group of a dataset; metrics are prefixed with `test/`. The last groups are kept for the transcript."""

    def __init__(self, dataset: RLDataset, max_tokens: int, temperature: float = 0.0, seed: int = 0, name: str = "test"):
        self._builders = [builder for i in range(len(dataset)) for builder in dataset.get_batch(i)]
        self._max_tokens, self._temperature, self._seed, self._name = max_tokens, temperature, seed, name
        self.groups: list[TrajectoryGroup] = []

    async def __call__(self, client: SamplingClient) -> Metrics:
        policy = Policy(client, self._max_tokens, self._temperature)
        self.groups = await do_rollouts(self._builders, policy, (self._seed, EVALUATION_STREAM))
        return compute_trajectory_metrics(self.groups, f"{self._name}/env")
