"""Sums that are easy with a calculator: the tool is a structured call in the model's own format.
reward = 1 if the last number of the answer is the exact value, else 0. envs/tool_use.py has the
calculator itself, and the same tasks for base models, in lines of text.
"""

from collections.abc import Callable
from functools import partial

import chz
import numpy as np

from envs.graders import numbers
from envs.tool_games import ToolGame, ToolGameBuilder, ToolGameExamplesBuilder, called
from envs.tool_use import Calculator, CalculatorError, calculate, read_number
from posttrain.renderers.types import Message
from rl.tool_env import ToolEnv, ToolLimits
from rl.tools import Tool, ToolError, tool


def calculator(expression: str) -> str:
    """The exact value of an expression.

    Args:
        expression: numbers, + - * / and parentheses
    """
    try:
        return str(calculate(expression))
    except CalculatorError as error:
        raise ToolError(str(error)) from None


CALCULATOR = tool(calculator)


def score(answer: str, expression: str) -> float:
    """Compares the last number of `answer` with the exact value."""
    found = numbers(answer)
    return float(bool(found) and read_number(found[-1]) == calculate(expression))


def open_sum(expression: str, prompt: str, tools: list[Tool], limits: ToolLimits) -> ToolEnv:
    opening = Message(role="user", content=prompt.format(expression=expression))
    return ToolEnv([opening], tools, partial(score, expression=expression), limits)


@chz.chz
class Sums(ToolGame, Calculator):
    """The expressions of envs/tool_use.py."""

    prompt: str = chz.field(default="What is {expression}?", doc="first message of an episode")

    def tools(self) -> list[Tool]:
        return [CALCULATOR]

    def demonstration(self, task: str, rng: np.random.Generator) -> list[Message]:
        """A call with the whole expression and the answer; without tools the answer alone."""
        value = str(calculate(task))
        calls = called("calculator", value, expression=task) if self.use_tools else []
        opening = Message(role="user", content=self.prompt.format(expression=task))
        return [opening, *calls, Message(role="assistant", content=value)]


@chz.chz
class SumsBuilder(Sums, ToolGameBuilder):
    """Sums to work out with a calculator by reinforcement learning."""

    tag: str = chz.field(default="calculator", doc="name under which metrics are logged too")

    def open_env(self) -> Callable[[str], ToolEnv]:
        return partial(open_sum, prompt=self.prompt, tools=self.offered(), limits=self.limits)


@chz.chz
class SumsExamplesBuilder(Sums, ToolGameExamplesBuilder):
    """Calls and answers to imitate."""
