"""The RL protocol: environments, their groups, the datasets that make them, and what a rollout
leaves behind.

An Env is single-use: there is no reset. Environments that share a task or a game come from one
EnvGroupBuilder; the group is what advantages are centred over. Builders are cheap and made from
configuration; `make_envs` makes the heavy objects.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, runtime_checkable

import chz

from posttrain.backend.errors import CookbookError
from posttrain.backend.loss_terms import KeptRow
from posttrain.backend.ranges import COUNT, SEED
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.training_client import TrainingClient
from posttrain.backend.types import Datum, ModelInput, StopReason
from posttrain.renderers.types import Renderer

Action = list[int]  # the sampled tokens, stop token included
Observation = ModelInput
StopCondition = Sequence[str] | Sequence[int] | None
# Why an episode ended: the environment said so, or which limit of the run was met
# (rollouts.RolloutLimits).
EpisodeEnd = Literal["done", "max_turns", "max_trajectory_tokens", "max_sampled_tokens", "context_length", "timeout"]
Metrics = dict[str, float]
# what a person should see in the transcript, e.g. {"gold": "42", "extracted": "41"}
Logs = dict[str, str]


class RolloutError(CookbookError):
    """This rollout cannot be scored (a grader timed out, a tool was down). It is retried if the run
    says so, then leaves its group and is counted under the name of its class; it is never reward
    0."""


class EnvError(RolloutError):
    """An environment's own code raised; the exception is chained."""


class EnvTimeout(RolloutError):
    """One call of an environment, or one sampled turn, took longer than the run allows."""


class MalformedStep(RolloutError):
    """An environment returned what is no StepResult: a reward that is no finite number, an
    observation that is none.
    """


class SeatLost(RolloutError):
    """Another seat of the same game failed, so this one cannot be finished."""


@dataclass(frozen=True)
class TokensWithLogprobs:
    """A sampled action. `logprobs` are those of the distribution sampled from, at `temperature`."""

    tokens: list[int]
    logprobs: list[float]
    stop_reason: StopReason = "stop"
    temperature: float = 1.0


@dataclass
class StepResult:
    """`next_observation` is ignored when `episode_done`. Every metric is averaged over the
    transitions that have it.
    """

    reward: float
    episode_done: bool
    next_observation: Observation
    next_stop_condition: StopCondition = None
    metrics: Metrics = field(default_factory=dict)
    logs: Logs = field(default_factory=dict)


@dataclass
class Transition:
    """One turn. `token_advantages`, where a batch reward sets them, are added to the member's
    advantage token by token.
    """

    ob: Observation
    ac: TokensWithLogprobs
    reward: float
    episode_done: bool
    metrics: Metrics = field(default_factory=dict)
    logs: Logs = field(default_factory=dict)
    token_advantages: list[float] | None = None


class Env(ABC):
    """One episode. Create it, roll it out once, throw it away."""

    @abstractmethod
    async def initial_observation(self) -> tuple[Observation, StopCondition]:
        """The first prompt, and where sampling should stop."""

    @abstractmethod
    async def step(self, action: Action) -> StepResult:
        """Takes the sampled tokens. `action` lacks a stop token when it ran into the token limit.

        A class whose `step` has the keyword `extra`, as the Tinker cookbook's have, is also given
        {"stop_reason": "stop" or "length"}.
        """

    async def cut_short(self, reason: EpisodeEnd) -> tuple[float, Metrics]:
        """A limit of the run ends the episode here: the reward to add to the last turn, and
        metrics. Asked once, after the last `step`.
        """
        return 0.0, {}

    async def close(self) -> None:
        """Always called at the end, also after an error or a cancellation: release what the episode
        holds, and wake who waits for it.
        """
        return


@dataclass
class Trajectory:
    """One episode. `supervised` are sequences with weights whose cross-entropy is trained beside
    the policy gradient (see BatchReward).

    A seat whose game ended before its turn has no transition: its reward counts, in its group's
    baseline as in the metrics, and there is nothing of it to train on, to grade or to score.
    """

    transitions: list[Transition]
    stop_reason: EpisodeEnd = "done"
    supervised: list[Datum] = field(default_factory=list)
    kept: list[KeptRow] = field(
        default_factory=list
    )  # where a batch reward's forward pass has its rows, for training to go on from
    kept_supervised: list[KeptRow] = field(default_factory=list)  # and those of `supervised`

    @property
    def reward(self) -> float:
        """Sum of the step rewards, without the group's reward."""
        return sum(transition.reward for transition in self.transitions)

    def copy(self) -> "Trajectory":
        """One that shares nothing with this one, for code that may change it. Without
        `supervised`.
        """
        turns = [
            Transition(
                ob=ModelInput.from_ints(turn.ob.to_ints()),
                ac=replace(turn.ac, tokens=[*turn.ac.tokens], logprobs=[*turn.ac.logprobs]),
                reward=turn.reward,
                episode_done=turn.episode_done,
                metrics={**turn.metrics},
                logs={**turn.logs},
            )
            for turn in self.transitions
        ]
        return Trajectory(turns, self.stop_reason)


@dataclass
class TrajectoryGroup:
    """The finished rollouts of one group, member by member."""

    trajectories_G: list[Trajectory]
    final_rewards_G: list[float]  # from EnvGroupBuilder.compute_group_rewards
    metrics_G: list[Metrics]
    tags: list[str] = field(default_factory=list)
    errors: list[RolloutError] = field(default_factory=list)  # of the members that were dropped
    num_retries: int = 0
    # what the group was made from: a batch reward finds the task there
    builder: "EnvGroupBuilder | None" = None
    sampled_at_step: int | None = None  # the training step whose weights it began with

    def get_total_rewards(self) -> list[float]:
        """Step rewards plus the group's reward, one number per member."""
        return [t.reward + final for t, final in zip(self.trajectories_G, self.final_rewards_G, strict=True)]

    def drop_member(self, g: int, error: RolloutError) -> None:
        """Member `g` leaves the group; `error` says why."""
        for members in (self.trajectories_G, self.final_rewards_G, self.metrics_G):
            del members[g]
        self.errors.append(error)


class EnvGroupBuilder(ABC):
    """Makes the environments of one group. `make_envs` may be called again: a retry wants fresh
    ones.
    """

    # False where the members play one game: then a failure is the group's
    members_are_independent = True
    # that the members play, where they are not independent: all seats of the first, then of the
    # second
    num_games: int = 1

    @abstractmethod
    async def make_envs(self) -> Sequence[Env]:
        """One Env per member of the group."""

    async def compute_group_rewards(
        self, trajectories_G: list[Trajectory], envs_G: Sequence[Env]
    ) -> list[tuple[float, Metrics]]:
        """A reward and metrics for each finished trajectory, given all of them; added to the step
        rewards.

        The trajectories are copies. A turn that is taken out of one (it was no move) is not trained
        on; other changes have no effect.
        """
        return [(0.0, {}) for _ in trajectories_G]

    def logging_tags(self) -> list[str]:
        """Names under which this group's metrics are also logged, e.g. ["gsm8k"]."""
        return []

    async def cleanup(self) -> None:
        """Always called at the end of the group, scored or failed: release what `make_envs` made
        for all members together.
        """
        return


@runtime_checkable
class RLDataset(Protocol):
    """Batches of groups, addressed by index, so that resuming is starting at an index.
    posttrain/tracking/datasets.py has two.
    """

    @abstractmethod
    def get_batch(self, index: int) -> Sequence[EnvGroupBuilder]:
        """The groups of batch `index`, the same at every call. Indices past the end are later
        epochs.
        """

    @abstractmethod
    def __len__(self) -> int:
        """Number of batches in an epoch."""


@chz.chz
class RLDatasetBuilder:
    """Configuration that builds the training set and, where there is one, the held-out set."""

    batch_size: int = chz.field(default=64, validator=COUNT, doc="groups (problems) per batch")
    group_size: int = chz.field(
        default=8, validator=COUNT, doc="rollouts per group: they share one problem and one baseline"
    )
    seed: int = chz.field(default=0, validator=SEED, doc="seed of the data: which problems, in which order")

    def recommended_max_tokens(self) -> int:
        """Most tokens a turn needs, for runs that do not say."""
        return 256

    async def __call__(self, renderer: Renderer) -> tuple[RLDataset, RLDataset | None]:
        raise NotImplementedError


class BatchReward(Protocol):
    """Rewards that need a model, computed for all finished groups of a step at once, between the
    rollouts and the advantages.
    """

    async def __call__(self, groups_P: Sequence[TrajectoryGroup]) -> Metrics:
        """Adds, in place, to `final_rewards_G`, to a turn's `reward` or `token_advantages`, or to a
        trajectory's `supervised`.

        Returns metrics of the step. A member that it cannot score is to be removed with
        `drop_member`, never scored 0.
        """
        ...


@chz.chz
class BatchRewardBuilder:
    """Configuration of a BatchReward. `training_client` is the policy that is trained, with its
    present weights at every call.
    """

    async def __call__(
        self, service: ServiceClient, training_client: TrainingClient, renderer: Renderer
    ) -> BatchReward:
        raise NotImplementedError
