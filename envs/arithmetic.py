"""Sums as text: "12+34=" is answered by "46". The demo's task, for RL and its supervised warm
start.

`split_seed` splits the space of problems once. No dataset, whatever its `seed`, trains on a
held-out pair in either order. Training problems are drawn with replacement, as a pure function of
(seed, batch index). Left out: division, three operands.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import chz
import numpy as np

from envs.problem import Grader, Problem
from envs.problem_env import DrawnExamplesBuilder, DrawnProblems, DrawnProblemsBuilder
from posttrain.backend.errors import ConfigError
from posttrain.backend.ranges import COUNT
from posttrain.renderers.types import Message

OPERATORS = "+-*"
FEWSHOT = 4


class PairSpace:
    """Problems "a op b=", numbered 0 to size - 1, and the held-out numbers among them."""

    def __init__(self, num_digits: int, min_digits: int, operators: str, num_test: int, split_seed: int):
        unknown = set(operators) - set(OPERATORS)
        if unknown or not operators or len(set(operators)) < len(operators):
            raise ConfigError(f"operators={operators!r}: give some of {OPERATORS!r}, each once")
        if not 1 <= min_digits <= num_digits <= 9:
            raise ConfigError(
                f"min_digits={min_digits} and num_digits={num_digits}: 1 <= min_digits <= num_digits <= 9 is needed"
            )
        self.operators = operators
        self.smallest = 10 ** (min_digits - 1) if min_digits > 1 else 0
        self.base = 10**num_digits - self.smallest  # values an operand can have
        self.size = len(operators) * self.base**2
        if not 1 <= num_test <= self.size // 4:
            raise ConfigError(f"num_test={num_test} must be between 1 and {self.size // 4}, a quarter of all problems")
        self.test_D = np.random.default_rng(split_seed).choice(self.size, num_test, replace=False)
        pair_D = self.test_D % self.base**2
        # b op a is held out with a op b: 34+12 would give away 12+34.
        mirrored_D = self.test_D - pair_D + pair_D % self.base * self.base + pair_D // self.base
        self.held_out_D = np.unique(np.concatenate([self.test_D, mirrored_D]))

    def draw_train(self, count: int, seed: Sequence[int]) -> np.ndarray:
        """`count` problem numbers, uniform over those not held out."""
        drawn_D = np.random.default_rng(seed).integers(self.size - len(self.held_out_D), size=count)
        # The k-th number that is not held out is k plus the count of held-out numbers below it.
        below_D = self.held_out_D - np.arange(len(self.held_out_D))
        return drawn_D + np.searchsorted(below_D, drawn_D, side="right")

    def problem(self, number: int) -> Problem:
        operator, pair = divmod(int(number), self.base**2)
        a, b = (self.smallest + offset for offset in divmod(pair, self.base))
        sign = self.operators[operator]
        answer = str({"+": a + b, "-": a - b, "*": a * b}[sign])
        return Problem(f"{a}{sign}{b}=", answer, WholeNumber(), answer, ("arithmetic",))

    def fewshot(self) -> list[Message]:
        """Worked examples from the training split, the same for all problems."""
        return [message for number in self.draw_train(FEWSHOT, [0, 0]) for message in self.problem(number).messages()]


@lru_cache(maxsize=4)
def _space(*settings: Any) -> PairSpace:
    return PairSpace(*settings)


class WholeNumber(Grader):
    """The whole response is one integer, equal to the gold answer as text."""

    def extract(self, text: str) -> str | None:
        return text.strip() if re.fullmatch(r"-?\d+", text.strip()) else None

    def shown(self, text: str) -> str:
        return text


@chz.chz
class ArithmeticTask(DrawnProblems):
    """The problems and their split: give the same values to both builders."""

    num_digits: int = chz.field(default=2, validator=COUNT, doc="most digits of an operand")
    min_digits: int | None = chz.field(
        default=None, validator=COUNT, doc="fewest digits of an operand; None = num_digits"
    )
    operators: str = chz.field(default="+", doc="operators that occur, a selection of + - *")

    def space(self) -> PairSpace:
        return _space(
            self.num_digits, self.min_digits or self.num_digits, self.operators, self.num_test, self.split_seed
        )

    def draw(self, count: int, seed: Sequence[int]) -> list[Problem]:
        space = self.space()
        return [space.problem(number) for number in space.draw_train(count, seed)]

    def held_out(self) -> list[Problem]:
        space = self.space()
        return [space.problem(number) for number in space.test_D]


@chz.chz
class ArithmeticBuilder(ArithmeticTask, DrawnProblemsBuilder):
    """Sums to practise on by reinforcement learning."""

    include_fewshot: bool = chz.field(
        default=False, doc=f"put {FEWSHOT} worked examples before the question, for base models"
    )

    def recommended_max_tokens(self) -> int:
        return 2 * self.num_digits + 2  # sign, digits of a product, EOS

    def prefix(self) -> Sequence[Message]:
        return self.space().fewshot() if self.include_fewshot else ()


@chz.chz
class ArithmeticExamplesBuilder(ArithmeticTask, DrawnExamplesBuilder):
    """The same sums with their answers, to imitate."""
