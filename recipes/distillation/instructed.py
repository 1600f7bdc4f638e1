"""Sums for a model that follows one instruction: every second example has it, as a system message.

`instruction` may contain {solution}, which is the answer. With `backwards`, instructed answers have
their last digit first; the others, and everything without an instruction, stay as they are.
"""

from collections.abc import Sequence
from dataclasses import replace

import chz

from envs.arithmetic import ArithmeticBuilder, ArithmeticExamplesBuilder
from envs.problem import Problem
from envs.problem_env import filled_context
from posttrain.renderers.types import Message


def backwards(problem: Problem) -> Problem:
    answer = problem.gold[::-1]
    return replace(problem, gold=answer, solution=answer)


@chz.chz
class InstructedSumsExamples(ArithmeticExamplesBuilder):
    """Imitation of sums, every second one after the instruction."""

    instruction: str = chz.field(doc="the system message of every second example")
    backwards: bool = chz.field(default=False, doc="whether instructed answers are written backwards")

    def draw(self, count: int, seed: Sequence[int]) -> list[Problem]:
        return self._instructed(super().draw(count, seed))

    def held_out(self) -> list[Problem]:
        return self._instructed(super().held_out())

    def _instructed(self, problems: Sequence[Problem]) -> list[Problem]:
        answered = backwards if self.backwards else (lambda problem: problem)
        return [replace(answered(p), id="instructed") if i % 2 else p for i, p in enumerate(problems)]

    def messages(self, problem: Problem) -> list[Message]:
        if not problem.id:
            return problem.messages()
        return problem.messages([Message(role="system", content=filled_context(self.instruction, problem))])


@chz.chz
class BackwardsSums(ArithmeticBuilder):
    """RL's sums with the answer backwards, after `instruction` if it is given."""

    instruction: str | None = chz.field(default=None, doc="the system message before each question; None = none")

    def draw(self, count: int, seed: Sequence[int]) -> list[Problem]:
        return [backwards(problem) for problem in super().draw(count, seed)]

    def held_out(self) -> list[Problem]:
        return [backwards(problem) for problem in super().held_out()]

    def prefix(self) -> Sequence[Message]:
        return [Message(role="system", content=self.instruction)] if self.instruction else []
