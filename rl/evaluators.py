"""Evaluation of a sampling client on held-out environments: one attempt each, or n samples and the
metrics of k of them.
"""

from collections.abc import Sequence
from copy import copy
from typing import TYPE_CHECKING

import chz

from posttrain.backend.errors import ConfigError, DataError
from posttrain.backend.ranges import COUNT, SEED, TEMPERATURE
from posttrain.renderers.types import Renderer
from posttrain.tracking.datasets import ListDataset
from posttrain.tracking.seeds import EVALUATION
from rl import step_checks
from rl.metrics import compute_trajectory_metrics
from rl.names import BENCHMARKS, ENVS
from rl.rollouts import Policy, RolloutLimits, do_rollouts
from rl.sample_metrics import best_at_k, maj_at_k, mean_and_stderr, pass_at_k
from rl.types import EnvGroupBuilder, Metrics, RLDataset, RLDatasetBuilder, Trajectory, TrajectoryGroup
from supervised.evaluators import CustomEvaluator, Evaluated, EvaluatorBuilder

if TYPE_CHECKING:  # commands answer before torch is imported
    from posttrain.backend.sampling_client import SamplingClient


def all_groups(dataset: RLDataset) -> list[EnvGroupBuilder]:
    """The groups of an epoch, in order. DataError for an empty dataset."""
    builders = [builder for index in range(len(dataset)) for builder in step_checks.batch(dataset, index)]
    if not builders:
        raise DataError(f"{type(dataset).__name__} has no batch to evaluate on")
    return builders


class RLTestSetEvaluator:
    """Rolls out every group of a dataset, with metrics under `test/`; keeps the last groups."""

    def __init__(
        self,
        dataset: RLDataset,
        max_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        name: str = "test",
        limits: RolloutLimits | None = None,
    ):
        self._builders = all_groups(dataset)
        self._max_tokens, self._temperature, self._seed = max_tokens, temperature, seed
        self._name, self._limits = name, limits
        self.groups: list[TrajectoryGroup] = []

    async def __call__(self, client: "SamplingClient") -> Metrics:
        policy = Policy(client, self._max_tokens, self._temperature)
        self.groups = await do_rollouts(self._builders, policy, (self._seed, EVALUATION), self._limits)
        return compute_trajectory_metrics(self.groups, f"{self._name}/env")


class SamplesEvaluator:
    """`num_samples` rollouts of every held-out group, and `test/env/all/pass@k`, `maj@k`, `best@k`
    for k = 1, 2, 4, ... up to `num_samples`, with `..._stderr` over problems.

    pass@k and maj@k need the metric `correct` in the last turn; maj@k also the log `extracted`, or
    `vote`, the same text for equal answers (no answer where the metric `format` is 0). best@k is the
    best total reward. A problem with fewer than k rollouts left is out of the metrics at k;
    `samples_lost` counts lost rollouts.
    """

    def __init__(
        self,
        dataset: RLDataset,
        max_tokens: int,
        num_samples: int = 8,
        temperature: float = 1.0,
        seed: int = 0,
        name: str = "test",
        limits: RolloutLimits | None = None,
    ):
        if num_samples < 1:
            raise ConfigError(f"num_samples={num_samples}: at least 1 is needed")
        if temperature <= 0 and num_samples > 1:
            raise ConfigError("temperature=0 gives the same sample every time: pass@k needs a temperature above 0")
        self._builders = all_groups(dataset)
        self._max_tokens, self._num_samples, self._temperature = max_tokens, num_samples, temperature
        self._seed, self._name, self._limits = seed, name, limits
        # all samples of a problem in one group, for the transcript
        self.groups: list[TrajectoryGroup] = []

    async def __call__(self, client: "SamplingClient") -> Metrics:
        policy = Policy(client, self._max_tokens, self._temperature)
        seed = (self._seed, EVALUATION, self._num_samples)
        # Sample by sample: the first samples do not depend on later ones. Copies, since each
        # builder's `cleanup` is called when its own rollouts are over.
        builders = [copy(builder) for _ in range(self._num_samples) for builder in self._builders]
        sampled = await do_rollouts(builders, policy, seed, self._limits)
        self.groups = [merged(sampled[p :: len(self._builders)]) for p in range(len(self._builders))]
        prefix = f"{self._name}/env/all"
        lost = sum(len(group.errors) for group in self.groups)
        return {f"{prefix}/samples_lost": float(lost)} | sample_metrics(
            self.groups, powers_of_two(self._num_samples), prefix
        )


@chz.chz
class EnvEvaluator(EvaluatorBuilder):
    """The held-out problems of an environment or a benchmark: `NAME/env/all/...`, and with several
    samples pass@k, maj@k and best@k."""

    short_names = {"env": ENVS | BENCHMARKS}
    env: RLDatasetBuilder = chz.field(doc="the environment or benchmark")
    name: str = chz.field(default="eval", doc="the metrics are NAME/env/all/correct, and so on")
    num_problems: int | None = chz.field(default=None, validator=COUNT, doc="the first problems; None = all")
    num_samples: int = chz.field(default=1, validator=COUNT, doc="samples per problem")
    temperature: float | None = chz.field(
        default=None, validator=TEMPERATURE, doc="sampling temperature; None = 0 (greedy) for one sample, 1 for several"
    )
    max_tokens: int | None = chz.field(
        default=None, validator=COUNT, doc="most tokens sampled per turn; None = what the environment recommends"
    )
    seed: int = chz.field(default=0, validator=SEED, doc="seed of sampling")
    limits: RolloutLimits = chz.field(default_factory=RolloutLimits, doc="limits of a rollout")

    async def __call__(self, renderer: Renderer) -> CustomEvaluator:
        groups = all_groups(await step_checks.held_out(self.env, renderer))[: self.num_problems]
        dataset = ListDataset(groups, len(groups), shuffle=False)
        max_tokens = self.max_tokens or self.env.recommended_max_tokens()
        common = {"seed": self.seed, "name": self.name, "limits": self.limits}
        if self.num_samples == 1:
            evaluator = RLTestSetEvaluator(dataset, max_tokens, self.temperature or 0.0, **common)
        else:
            temperature = 1.0 if self.temperature is None else self.temperature
            evaluator = SamplesEvaluator(dataset, max_tokens, self.num_samples, temperature, **common)

        async def evaluate(model: Evaluated) -> Metrics:
            metrics = await evaluator(await model.sampling_client())
            if isinstance(evaluator, SamplesEvaluator):  # whose metrics are of k samples alone
                metrics = compute_trajectory_metrics(evaluator.groups, f"{self.name}/env") | metrics
            return metrics

        return evaluate


def powers_of_two(num_samples: int) -> tuple[int, ...]:
    """1, 2, 4, ... up to `num_samples`."""
    return tuple(2**i for i in range(num_samples.bit_length()))


def sample_metrics(groups_P: Sequence[TrajectoryGroup], ks: Sequence[int], prefix: str) -> Metrics:
    """The metrics of SamplesEvaluator; a group's members are the samples of a problem."""
    metrics: Metrics = {}
    for name, values_P in sample_values(groups_P, ks).items():
        if present := [value for value in values_P if value is not None]:
            metrics[f"{prefix}/{name}"], metrics[f"{prefix}/{name}_stderr"] = mean_and_stderr(present)
    return metrics


def sample_values(groups_P: Sequence[TrajectoryGroup], ks: Sequence[int]) -> dict[str, list[float | None]]:
    """best@k, pass@k and maj@k of each problem; None where fewer than k samples are left."""
    values: dict[str, list[float | None]] = {}
    for k in ks:
        there_P = [len(group.trajectories_G) >= k for group in groups_P]
        groups = [group for group, there in zip(groups_P, there_P, strict=True) if there]
        computed: dict[str, list[float]] = {f"best@{k}": [best_at_k(group.get_total_rewards(), k) for group in groups]}
        correct_P_N = [[is_correct(trajectory) for trajectory in group.trajectories_G] for group in groups]
        graded_P_N = [[bool(correct) for correct in correct_N] for correct_N in correct_P_N if None not in correct_N]
        if len(graded_P_N) == len(groups):
            computed[f"pass@{k}"] = [pass_at_k(sum(correct_N), len(correct_N), k) for correct_N in graded_P_N]
            turns = [
                trajectory.transitions[-1]
                for group in groups
                for trajectory in group.trajectories_G
                if trajectory.transitions
            ]
            if all("extracted" in turn.logs for turn in turns):
                answers_P_N = [[answer(trajectory) for trajectory in group.trajectories_G] for group in groups]
                pairs = zip(answers_P_N, graded_P_N, strict=True)
                computed[f"maj@{k}"] = [maj_at_k(answers_N, correct_N, k) for answers_N, correct_N in pairs]
        for name, present in computed.items():
            remaining = iter(present)
            values[name] = [next(remaining) if there else None for there in there_P]
    return values


def is_correct(trajectory: Trajectory) -> bool | None:
    """The metric `correct` of the last turn, None if there is none. False without a turn."""
    if not trajectory.transitions:
        return False
    correct = trajectory.transitions[-1].metrics.get("correct")
    return None if correct is None else correct == 1


def answer(trajectory: Trajectory) -> str | None:
    """The log `vote` of the last turn, or else `extracted`; None where the format was wrong or there is no turn."""
    if not trajectory.transitions:
        return None
    last = trajectory.transitions[-1]
    return last.logs.get("vote", last.logs.get("extracted", "")).strip() if last.metrics.get("format", 1.0) else None


def merged(groups: Sequence[TrajectoryGroup]) -> TrajectoryGroup:
    """Several rollouts of one builder as one group."""
    return TrajectoryGroup(
        trajectories_G=[trajectory for group in groups for trajectory in group.trajectories_G],
        final_rewards_G=[reward for group in groups for reward in group.final_rewards_G],
        metrics_G=[metrics for group in groups for metrics in group.metrics_G],
        tags=groups[0].tags,
        errors=[error for group in groups for error in group.errors],
        num_retries=sum(group.num_retries for group in groups),
        builder=groups[0].builder,
    )
