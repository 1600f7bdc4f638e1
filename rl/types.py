"""The RL protocol: environments, groups, datasets, and the results of rollouts. An Env is
single-use. Environments with a shared task or game come from one EnvGroupBuilder, and advantages
are centred over the group. Builders are cheap configuration; `make_envs` makes the heavy objects.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

import chz

from posttrain.backend.choices import check_choices
from posttrain.backend.errors import CookbookError
from posttrain.backend.ranges import COUNT, SEED
from posttrain.backend.types import Datum, EncodedTextChunk, KeptRow, ModelInput, StopReason
from posttrain.renderers.types import Renderer
from posttrain.tracking.metrics_log import Metrics

if TYPE_CHECKING:  # commands answer before torch is imported
    from posttrain.backend.service_client import ServiceClient
    from posttrain.backend.training_client import TrainingClient

Action = list[int]  # the sampled tokens, stop token included
Observation = ModelInput
StopCondition = Sequence[str] | Sequence[int] | None
# Why an episode ended: by the environment, or by a limit of the run (rollouts.RolloutLimits).
EpisodeEnd = Literal["done", "max_turns", "max_trajectory_tokens", "max_sampled_tokens", "context_length", "timeout"]
# for readers of the transcript, e.g. {"gold": "42", "extracted": "41"}
Logs = dict[str, str]


class RolloutError(CookbookError):
    """This rollout cannot be scored (a grader timed out, a tool was down). It is retried if
    configured, then leaves its group and is counted under its class name; it never gets reward 0.
    """


class EnvError(RolloutError):
    """An environment's own code raised; the exception is chained."""


class EnvTimeout(RolloutError):
    """One call of an environment, or one sampled turn, took longer than the run allows."""


class MalformedStep(RolloutError):
    """An environment returned an invalid value: no StepResult, a reward that is not finite, ..."""


class SeatLost(RolloutError):
    """Another seat of the same game failed, so this seat cannot finish."""


@dataclass(frozen=True)
class TokensWithLogprobs:
    """A sampled action. `logprobs` are of the sampling distribution, at `temperature`."""

    tokens: list[int]
    logprobs: list[float]
    stop_reason: StopReason = "stop"
    temperature: float = 1.0


@dataclass
class StepResult:
    """`next_observation` is ignored when `episode_done`. Metrics are averaged where present."""

    reward: float
    episode_done: bool
    next_observation: Observation
    next_stop_condition: StopCondition = None
    metrics: Metrics = field(default_factory=dict)
    logs: Logs = field(default_factory=dict)


@dataclass
class Transition:
    """One turn. A batch reward's `token_advantages` are added to the member's advantage, per token."""

    ob: Observation
    ac: TokensWithLogprobs
    reward: float
    episode_done: bool
    metrics: Metrics = field(default_factory=dict)
    logs: Logs = field(default_factory=dict)
    token_advantages: list[float] | None = None

    def extended(self, new: list[int]) -> ModelInput:
        """This turn and new tokens after it, with the turn's own chunks: no second copy of its tokens."""
        return ModelInput([*self.ob.chunks, EncodedTextChunk(self.ac.tokens), EncodedTextChunk(new)])


class Env(ABC):
    """One episode. Single-use."""

    @abstractmethod
    async def initial_observation(self) -> tuple[Observation, StopCondition]:
        """The first prompt, and the stop condition."""

    @abstractmethod
    async def step(self, action: Action) -> StepResult:
        """Takes the sampled tokens, which lack a stop token if they are truncated. A `step` with
        the keyword `extra`, as in the Tinker cookbook, also gets {"stop_reason": "stop" or
        "length"}."""

    async def cut_short(self, reason: EpisodeEnd) -> tuple[float, Metrics]:
        """A limit of the run ends the episode: the reward to add to the last turn, and metrics.
        Called once, after the last `step`."""
        return 0.0, {}

    async def close(self) -> None:
        """Always called at the end, also after an error or a cancellation: releases the episode's
        resources and wakes its waiters."""
        return


@dataclass
class Trajectory:
    """One episode. `supervised` are weighted sequences whose cross-entropy is added to the loss
    (see BatchReward).

    A seat whose game ended before its turn has no transition. Its reward counts in the baseline and
    the metrics; there is nothing to train on, to grade or to score.
    """

    transitions: list[Transition]
    stop_reason: EpisodeEnd = "done"
    supervised: list[Datum] = field(default_factory=list)
    # its rows in a batch reward's forward pass, which training continues; and those of `supervised`
    kept: list[KeptRow] = field(default_factory=list)
    kept_supervised: list[KeptRow] = field(default_factory=list)

    @property
    def reward(self) -> float:
        """Sum of the step rewards, without the group's reward."""
        return sum(transition.reward for transition in self.transitions)

    @property
    def num_sampled_tokens(self) -> int:
        return sum(len(transition.ac.tokens) for transition in self.transitions)

    def new_observations(self) -> list[tuple[list[int], bool]]:
        """Of each turn the tokens of its observation, and whether it continues the turn before: then the new
        ones alone."""
        found, seen = [], []
        for turn in self.transitions:
            ob = turn.ob.to_ints()
            continues = bool(seen) and ob[: len(seen)] == seen
            found.append((ob[len(seen) :] if continues else ob, continues))
            seen = ob + turn.ac.tokens
        return found

    def copy(self) -> "Trajectory":
        """A copy that shares nothing, for code that may change it. Without `supervised`."""
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
    errors: list[RolloutError] = field(default_factory=list)  # of dropped members
    num_retries: int = 0
    # the group's builder, where a batch reward finds the task
    builder: "EnvGroupBuilder | None" = None
    sampled_at_step: int | None = None  # the training step of its first weights
    # groups of equal rewards that were sampled at this place before, their tokens and finished rollouts
    # (their lost ones are in `errors`)
    refills: int = 0
    refill_tokens: int = 0
    refill_rollouts: int = 0

    def get_total_rewards(self) -> list[float]:
        """Step rewards plus the group's reward, one number per member."""
        return [t.reward + final for t, final in zip(self.trajectories_G, self.final_rewards_G, strict=True)]

    def drop_member(self, g: int, error: RolloutError) -> None:
        """Removes member `g` because of `error`."""
        for members in (self.trajectories_G, self.final_rewards_G, self.metrics_G):
            del members[g]
        self.errors.append(error)


class EnvGroupBuilder(ABC):
    """Makes the environments of a group. `make_envs` is called again for fresh ones on a retry."""

    # False where the members play one game: a failure then fails the group
    members_are_independent = True
    # games of dependent members: all seats of the first, then of the second
    num_games: int = 1

    @abstractmethod
    async def make_envs(self) -> Sequence[Env]:
        """One Env per member of the group."""

    async def compute_group_rewards(
        self, trajectories_G: list[Trajectory], envs_G: Sequence[Env]
    ) -> Sequence[tuple[float, Metrics] | RolloutError]:
        """A reward and metrics for each finished trajectory, added to the step rewards, or a RolloutError
        in the place of one that cannot be scored: that member alone is lost. The trajectories are
        copies: a turn removed from a copy (no move) is not trained on, though its reward counts; other
        changes have no effect."""
        return [(0.0, {}) for _ in trajectories_G]

    def logging_tags(self) -> list[str]:
        """Names under which this group's metrics are also logged, e.g. ["gsm8k"]."""
        return []

    async def cleanup(self) -> None:
        """Always called at the end, scored or failed: releases the members' shared resources."""
        return


@runtime_checkable
class RLDataset(Protocol):
    """Batches of groups by index: a resume starts at an index. posttrain/tracking/datasets.py has
    two implementations."""

    @abstractmethod
    def get_batch(self, index: int) -> Sequence[EnvGroupBuilder]:
        """The groups of batch `index`, a pure function; indices past the end are later epochs."""

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

    @chz.validate
    def _check_choices(self) -> None:
        check_choices(self)

    def recommended_max_tokens(self) -> int:
        """Most tokens a turn needs; the default of max_tokens."""
        return 256

    async def __call__(self, renderer: Renderer) -> tuple[RLDataset, RLDataset | None]:
        raise NotImplementedError

    async def test_set(self, renderer: Renderer) -> RLDataset | None:
        """The held-out set alone, for an evaluation without training."""
        return (await self(renderer))[1]

    def seats(self) -> int | None:
        """Seats of a game that the policy plays, in a group's order of members; None = not known."""
        return None

    def ratios(self) -> Mapping[str, tuple[str, str]]:
        """Metrics that are ratios of sums over all problems: name -> the two metrics of an episode."""
        return {}


class BatchReward(Protocol):
    """Rewards from a model, for a step's finished groups, between rollouts and advantages."""

    async def __call__(self, groups_P: Sequence[TrajectoryGroup]) -> Metrics:
        """Adds, in place, to `final_rewards_G`, to a turn's `reward` or `token_advantages`, or to a
        trajectory's `supervised`. Returns metrics of the step. A member that cannot be scored is
        removed with `drop_member`, never scored 0; the other seats of its game are removed then."""
        ...


@chz.chz
class BatchRewardBuilder:
    """Configuration of a BatchReward. `training_client` is the trained policy, with current weights
    at every call."""

    def check_groups(self, builders_P: Sequence[EnvGroupBuilder]) -> None:
        """ConfigError for groups that lack what the reward reads; called with the first batch, before any model is
        loaded."""

    async def __call__(
        self, service: "ServiceClient", training_client: "TrainingClient", renderer: Renderer
    ) -> BatchReward:
        raise NotImplementedError
