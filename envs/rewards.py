"""Rewards as functions of an answer, with weights: the second argument of SingleTurn
(single_turn.py). A group reward sees all answers of a group together. Each reward is a metric,
reward/NAME. A reward that fails is a failed rollout, never 0.

    reward = sum over rewards of weight * value
"""

import asyncio
import traceback
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import chz

from envs.pairwise import Matchups, wins_minus_losses
from envs.problem import Problem, awaited
from posttrain.backend.errors import ConfigError
from posttrain.backend.ranges import LARGEST_COUNT, NUMBER, Range
from posttrain.renderers.types import Message
from preference.reward_types import Judge
from rl import step_checks
from rl.types import Logs, MalformedStep, Metrics, RolloutError

PAIR = Range(2, LARGEST_COUNT, whole=True)


class RewardError(RolloutError):
    """A reward function raised, or returned no finite number. The answer has no reward."""


@dataclass(frozen=True)
class Answer:
    """One answer, as rewards see it. `text` is without the stop; `truncated`: it has none."""

    problem: Problem
    text: str
    truncated: bool = False

    @property
    def question(self) -> str:
        return self.problem.question

    @property
    def gold(self) -> str:
        """The reference answer, "" where there is none."""
        return self.problem.gold


@dataclass(frozen=True)
class Value:
    """A reward before its weight. The metrics are logged as they are named."""

    value: float
    metrics: Metrics = field(default_factory=dict)
    logs: Logs = field(default_factory=dict)


Number = float | Value
RewardFunction = Callable[[Answer], Number | Awaitable[Number]]
GroupRewardFunction = Callable[[Sequence[Answer]], Sequence[float] | Awaitable[Sequence[float]]]


@chz.chz
class Reward:
    """A named, weighted reward. With `of_group` it scores a whole group, otherwise one answer."""

    name: str = chz.field(doc="its metric is reward/NAME")
    weight: float = chz.field(default=1.0, validator=NUMBER, doc="factor of its value; 0 only logs it")
    of_group = False

    async def score(self, answers_G: Sequence[Answer]) -> list[Value]:
        """A finite value for each answer. RolloutError if there is none."""
        raise NotImplementedError


@chz.chz
class FunctionReward(Reward):
    """A function of one answer, async or not."""

    function: RewardFunction = chz.field(doc="Answer to a number, or to a Value")

    async def score(self, answers_G: Sequence[Answer]) -> list[Value]:
        return [await self._score(answer) for answer in answers_G]

    async def _score(self, answer: Answer) -> Value:
        result = await called(f"reward {self.name}", self.function, answer)
        value = result if isinstance(result, Value) else Value(result)
        return Value(finite(f"reward {self.name}", value.value), value.metrics, value.logs)


@chz.chz
class GroupFunctionReward(Reward):
    """A function of all answers of a group, async or not."""

    function: GroupRewardFunction = chz.field(doc="list of Answers to a list of numbers")
    of_group = True

    async def score(self, answers_G: Sequence[Answer]) -> list[Value]:
        result = await called(f"reward {self.name}", self.function, answers_G)
        if not hasattr(result, "__len__") or len(result) != len(answers_G):
            raise RewardError(f"reward {self.name} returned {result!r:.80}, not a number for each of {len(answers_G)}")
        return [Value(finite(f"reward {self.name}", value)) for value in result]


@chz.chz
class Compared(Reward):
    """Wins minus losses of an answer against the others of its group, as a share, in [-1, 1]. The
    judge is any of preference/judges.py, or an async function of a Comparison."""

    judge: Judge = chz.field(doc="Comparison to a number from -1 (A is better) to 1 (B is)")
    matchup_pattern: Matchups = chz.field(default="all_pairs_both_ways", doc="which pairs are judged")
    matchup_group_size: int = chz.field(default=4, validator=PAIR, doc="answers meet within chunks of this size")
    of_group = True

    async def score(self, answers_G: Sequence[Answer]) -> list[Value]:
        prompt = [Message(role="user", content=answers_G[0].question)]
        completions_G = [[Message(role="assistant", content=answer.text)] for answer in answers_G]
        rewards_G = await wins_minus_losses(
            self.judge, prompt, completions_G, self.matchup_pattern, self.matchup_group_size
        )
        return [Value(reward) for reward in rewards_G]


# --- as they are written --------------------------------------------------------------------------


def weighted(reward: Reward | RewardFunction, weight: float, name: str | None = None) -> Reward:
    """`reward` with another weight, and perhaps another name."""
    reward = as_reward(reward, name)
    return chz.replace(reward, weight=weight, name=name or reward.name)


def group_reward(function: GroupRewardFunction, weight: float = 1.0, name: str | None = None) -> Reward:
    """A function of all answers of a group: their length, their rank, whatever they have in common."""
    return GroupFunctionReward(name=name or _name(function), weight=weight, function=function)


def compared(judge: Judge, weight: float = 1.0, name: str = "compared", **settings: Any) -> Reward:
    """A group's answers compared in pairs by `judge`; `settings` are fields of Compared."""
    return Compared(name=name, weight=weight, judge=judge, **settings)


def as_reward(reward: Reward | RewardFunction, name: str | None = None) -> Reward:
    """A function as a reward of its own name. ConfigError for anything else."""
    if isinstance(reward, Reward):
        return reward
    if not callable(reward):
        raise ConfigError(f"{reward!r:.80} is not a reward: give a function of an Answer, or a Reward")
    return FunctionReward(name=name or _name(reward), function=reward)


def as_rewards(rewards: Sequence[Reward | RewardFunction]) -> list[Reward]:
    """ConfigError unless there is one, and names differ."""
    if not isinstance(rewards, Sequence) or isinstance(rewards, str):
        raise ConfigError(f"rewards={rewards!r:.80}: a list of rewards is needed, as [correct_answer]")
    named = [as_reward(reward) for reward in rewards]
    names = [reward.name for reward in named]
    if not named:
        raise ConfigError("rewards is empty: an environment needs at least one reward")
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"two rewards are called {twice}: give one another name, as weighted(reward, 1.0, 'name')")
    if "total" in names:
        raise ConfigError("a reward is called total, which is the sum of all: give it another name")
    return named


def _name(function: Callable[..., Any]) -> str:
    name = getattr(function, "__name__", type(function).__name__)
    if not name.isidentifier():
        raise ConfigError(f"a reward function is called {name}: give it a name, as weighted(function, 1.0, 'name')")
    return name


# --- common rewards -------------------------------------------------------------------------------


async def correct_answer(answer: Answer) -> Value:
    """1 if the problem's grader accepts the answer, or its partial credit. Logs `correct` and
    `format`, so that pass@k is measured."""
    return Value(*await answer.problem.scored(answer.text, answer.truncated))


def finished(answer: Answer) -> float:
    """1 unless the answer is truncated."""
    return float(not answer.truncated)


# --- calling a user's code ------------------------------------------------------------------------


async def called(what: str, function: Callable[..., Any], *arguments: object) -> Any:
    """The function's result, awaited if it is async. RewardError, with `what`, if it raises."""
    try:
        return await awaited(function(*arguments))
    except (RolloutError, asyncio.CancelledError):
        raise
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{what} raised {type(error).__name__}: {error} ({place.filename}:{place.lineno})"
        raise RewardError(text) from error


def finite(what: str, value: object) -> float:
    """RewardError, with `what`, unless it is a number that a reward can be."""
    try:
        return step_checks.reward(value)
    except MalformedStep:
        raise RewardError(f"{what} returned {value!r:.80}, not a finite number") from None
