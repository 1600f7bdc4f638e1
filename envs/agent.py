"""Problems that an agent of yours works on: a command, or a Python function, that asks the policy
through an OpenAI-compatible endpoint (rl/agent_env.py).

    python rl/train_cli.py env=agent env.problems=envs.single_turn:QuestionFile \\
        env.problems.train_path=tasks.jsonl env.problems.answer_field=answer env.command="python my_agent.py"
"""

import shlex
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import chz

from envs.problem import Problem, ProblemSet, awaited
from posttrain.backend.errors import ConfigError
from posttrain.backend.ranges import COUNT
from posttrain.renderers import get_text_content
from posttrain.renderers.types import Renderer
from posttrain.tracking.command_line import load_named
from posttrain.tracking.datasets import ListDataset, held_out
from rl.agent_endpoint import Endpoint
from rl.agent_env import Agent, AgentGroupBuilder, AgentRun, Program
from rl.types import RLDataset, RLDatasetBuilder


@dataclass(frozen=True)
class ProblemAgent:
    """`function(problem, endpoint)` for one problem."""

    function: Callable[[Problem, Endpoint], Awaitable[Any]]
    problem: Problem

    async def __call__(self, endpoint: Endpoint) -> Any:
        return await self.function(self.problem, endpoint)


@dataclass(frozen=True)
class ProblemReward:
    """`function(problem, run)`; without one, the problem's grader judges what the agent returned or
    printed, or else the policy's last words."""

    function: Callable[[Problem, AgentRun], float | Awaitable[float]] | None
    problem: Problem

    async def __call__(self, run: AgentRun) -> float:
        if self.function:
            return await awaited(self.function(self.problem, run))
        text = get_text_content(run.conversations[-1][-1]) if run.result is None else str(run.result)
        grade = await self.problem.graded(text.strip())
        return float(grade.correct) if grade.credit is None else grade.credit


@chz.chz
class AgentBuilder(RLDatasetBuilder):
    """An agent's work on the problems of a data set, by reinforcement learning."""

    problems: ProblemSet = chz.field(doc="the data set")
    command: str | None = chz.field(
        default=None,
        doc="the agent as a command, which reads the question from its standard input and prints the answer",
    )
    agent: str | None = chz.field(
        default=None, doc="in place of a command, module:NAME of `async def agent(problem, endpoint)`"
    )
    reward: str | None = chz.field(
        default=None, doc="module:NAME of `def reward(problem, run)`; None = the problem's grader judges the answer"
    )
    tag: str = chz.field(default="agent", doc="name under which metrics are logged too")
    max_tokens: int = chz.field(default=256, validator=COUNT, doc="most tokens of an answer, unless max_tokens says so")

    @chz.validate
    def _one_agent(self) -> None:
        if (self.command is None) == (self.agent is None):
            raise ConfigError(f"command={self.command}, agent={self.agent}: give one of the two")

    def recommended_max_tokens(self) -> int:
        return self.max_tokens

    async def __call__(self, renderer: Renderer) -> tuple[RLDataset, RLDataset | None]:
        function = load("agent", self.agent) if self.agent else None
        reward = load("reward", self.reward) if self.reward else None

        def groups(problems: list[Problem], num_envs: int) -> list[AgentGroupBuilder]:
            return [
                AgentGroupBuilder(
                    self._agent(problem, function), ProblemReward(reward, problem), num_envs, renderer, [self.tag]
                )
                for problem in problems
            ]

        train, test = self.problems.splits()
        dataset = ListDataset(groups(train, self.group_size), self.batch_size, self.seed, noun="problems")
        return dataset, held_out(groups(test, 1), self.batch_size)

    def _agent(self, problem: Problem, function: Any) -> Agent:
        return (
            ProblemAgent(function, problem) if function else Program(shlex.split(self.command or ""), problem.question)
        )


def load(option: str, name: str) -> Callable[..., Any]:
    """The function that "module:NAME" names. ConfigError if there is none."""
    function = load_named(option, name, "a function")
    if not callable(function):
        raise ConfigError(f"{option}={name} is {function!r:.60}, not a function")
    return function
