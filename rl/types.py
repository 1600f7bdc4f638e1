"""The RL protocol: environments, their groups, the datasets that make them, and what a rollout leaves behind.

An Env is single-use: there is no reset. Environments that share a task or a game come from one EnvGroupBuilder; the group is what
advantages are centred over. Builders are cheap, picklable and made from configuration; `make_envs` makes the heavy objects.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import chz

from backend.errors import CookbookError
from backend.types import ModelInput, StopReason
from renderers.types import Renderer

Action = list[int]  # the sampled tokens, stop token included
Observation = ModelInput
StopCondition = Sequence[str] | Sequence[int] | None
Metrics = dict[str, float]
Logs = dict[str, str]  # what a person should see in the transcript, e.g. {"gold": "42", "extracted": "41"}


class RolloutError(CookbookError):
    """This rollout cannot be scored (a grader timed out, a tool was down). It leaves its group and is counted; it is never reward 0."""


@dataclass(frozen=True)
class TokensWithLogprobs:
    """A sampled action. `logprobs` are those of the distribution sampled from, at `temperature`."""

    tokens: list[int]
    logprobs: list[float]
    stop_reason: StopReason = "stop"
    temperature: float = 1.0


@dataclass
class StepResult:
    """`next_observation` is ignored when `episode_done`. Every metric is averaged over the transitions that have it."""

    reward: float
    episode_done: bool
    next_observation: Observation
    next_stop_condition: StopCondition = None
    metrics: Metrics = field(default_factory=dict)
    logs: Logs = field(default_factory=dict)


@dataclass
class Transition:
    ob: Observation
    ac: TokensWithLogprobs
    reward: float
    episode_done: bool
    metrics: Metrics = field(default_factory=dict)
    logs: Logs = field(default_factory=dict)


class Env(ABC):
    """One episode. Create it, roll it out once, throw it away."""

    @abstractmethod
    async def initial_observation(self) -> tuple[Observation, StopCondition]:
        """The first prompt, and where sampling should stop."""

    @abstractmethod
    async def step(self, action: Action) -> StepResult:
        """Takes the sampled tokens. `action` lacks a stop token when it ran into the token limit."""


@dataclass
class Trajectory:
    transitions: list[Transition]

    @property
    def reward(self) -> float:
        """Sum of the step rewards, without the group's reward."""
        return sum(transition.reward for transition in self.transitions)


@dataclass
class TrajectoryGroup:
    """The finished rollouts of one group, member by member."""

    trajectories_G: list[Trajectory]
    final_rewards_G: list[float]  # from EnvGroupBuilder.compute_group_rewards
    metrics_G: list[Metrics]
    tags: list[str] = field(default_factory=list)
    errors: list[RolloutError] = field(default_factory=list)  # of the members that were dropped

    def get_total_rewards(self) -> list[float]:
        """Step rewards plus the group's reward, one number per member."""
        return [t.reward + final for t, final in zip(self.trajectories_G, self.final_rewards_G, strict=True)]


class EnvGroupBuilder(ABC):
    """Makes the environments of one group. Must pickle."""

    @abstractmethod
    async def make_envs(self) -> Sequence[Env]:
        """One Env per member of the group."""

    async def compute_group_rewards(self, trajectories_G: list[Trajectory], envs_G: Sequence[Env]) -> list[tuple[float, Metrics]]:
        """A reward and metrics for each finished trajectory, given all of them; added to the step rewards."""
        return [(0.0, {}) for _ in trajectories_G]

    def logging_tags(self) -> list[str]:
        """Names under which this group's metrics are also logged, e.g. ["gsm8k"]."""
        return []


class RLDataset(ABC):
    """Batches of groups, addressed by index, so that resuming is starting at an index."""

    @abstractmethod
    def get_batch(self, index: int) -> Sequence[EnvGroupBuilder]:
        """The groups of batch `index`, the same at every call. Indices past the end are later epochs."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of batches in an epoch."""


@chz.chz
class RLDatasetBuilder:
    """Configuration that builds the training set and, where there is one, the held-out set."""

    batch_size: int = chz.field(default=64, doc="groups (problems) per batch")
    group_size: int = chz.field(default=8, doc="rollouts per group: they share one problem and one baseline")
    seed: int = chz.field(default=0, doc="seed of the data: which problems, in which order")

    def recommended_max_tokens(self) -> int:
        """Most tokens a turn needs, for runs that do not say."""
        return 256

    async def __call__(self, renderer: Renderer) -> tuple[RLDataset, RLDataset | None]:
        raise NotImplementedError
