"""Sums written as text, "12+34=" answered by "46": the demo's task, for RL and for its supervised warm start.

The space of problems is split once by `split_seed`: held-out pairs, in either order, are never trained on, by either dataset,
whatever their `seed`. Training problems are drawn with replacement, as a pure function of (seed, batch index).
Left out: division, three operands.
"""

import re
from collections.abc import Sequence
from functools import partial

import chz
import numpy as np

from envs.problem_env import EnvThunk, ProblemEnv, ProblemGroupBuilder, fit_prompts, problem_dataset
from posttrain.backend.errors import ConfigError
from posttrain.backend.ranges import COUNT, SEED, WHOLE
from posttrain.backend.types import Datum
from posttrain.renderers.types import Message, Renderer
from posttrain.tracking.datasets import DrawnDataset, ListDataset
from posttrain.tracking.seeds import EXAMPLES, GROUPS
from rl.types import RLDataset, RLDatasetBuilder
from supervised.data import render
from supervised.types import SupervisedDataset, SupervisedDatasetBuilder

OPERATORS = "+-*"
FEWSHOT = 4


class PairSpace:
    """All "a op b=" with operands of `min_digits` to `num_digits` digits, numbered 0 to size - 1, and the held-out numbers among them."""

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
        # b op a is held out with a op b: 34+12 must not give away 12+34.
        mirrored_D = self.test_D - pair_D + pair_D % self.base * self.base + pair_D // self.base
        self.held_out_D = np.unique(np.concatenate([self.test_D, mirrored_D]))

    def draw_train(self, count: int, seed: Sequence[int]) -> np.ndarray:
        """`count` problem numbers, uniform over those not held out."""
        drawn_D = np.random.default_rng(seed).integers(self.size - len(self.held_out_D), size=count)
        # The k-th number that is not held out: k plus how many held-out numbers lie below it.
        below_D = self.held_out_D - np.arange(len(self.held_out_D))
        return drawn_D + np.searchsorted(below_D, drawn_D, side="right")

    def problem(self, number: int) -> tuple[str, str]:
        """Question and answer."""
        operator, pair = divmod(int(number), self.base**2)
        a, b = (self.smallest + offset for offset in divmod(pair, self.base))
        sign = self.operators[operator]
        return f"{a}{sign}{b}=", str({"+": a + b, "-": a - b, "*": a * b}[sign])

    def messages(self, number: int) -> list[Message]:
        question, answer = self.problem(number)
        return [Message(role="user", content=question), Message(role="assistant", content=answer)]

    def fewshot(self) -> list[Message]:
        """Worked examples from the training split, the same for all problems."""
        return [message for number in self.draw_train(FEWSHOT, [0, 0]) for message in self.messages(number)]


class ArithmeticEnv(ProblemEnv):
    def __init__(self, problem: str, answer: str, renderer: Renderer, prefix: Sequence[Message] = ()):
        super().__init__(renderer, prefix)
        self.problem, self.answer = problem, answer

    def question(self) -> str:
        return self.problem

    def reference_answer(self) -> str:
        return self.answer

    def check_answer(self, text: str) -> bool:
        return text.strip() == self.answer

    def check_format(self, text: str) -> bool:
        return re.fullmatch(r"-?\d+", text.strip()) is not None


@chz.chz
class ArithmeticTask:
    """What is asked, and what is held out: give the same to both builders."""

    num_digits: int = chz.field(default=2, validator=COUNT, doc="most digits of an operand: the difficulty")
    min_digits: int | None = chz.field(
        default=None, validator=COUNT, doc="fewest digits of an operand; None = num_digits, so that all are of one length"
    )
    operators: str = chz.field(default="+", doc="which of + - * occur")
    num_test: int = chz.field(default=200, validator=WHOLE, doc="held-out problems")
    split_seed: int = chz.field(
        default=0, validator=SEED, doc="seed of the choice of held-out problems; the same for warm start and RL"
    )

    def space(self) -> PairSpace:
        return PairSpace(self.num_digits, self.min_digits or self.num_digits, self.operators, self.num_test, self.split_seed)


@chz.chz
class ArithmeticBuilder(ArithmeticTask, RLDatasetBuilder):
    """Sums to practise on by reinforcement learning. The held-out set is one attempt at each held-out problem."""

    env_class = ArithmeticEnv
    n_batches: int = chz.field(default=100, validator=COUNT, doc="training batches")
    include_fewshot: bool = chz.field(default=False, doc=f"put {FEWSHOT} worked examples before the question, for base models")

    def recommended_max_tokens(self) -> int:
        return 2 * self.num_digits + 2  # sign, digits of a product, EOS

    async def __call__(self, renderer: Renderer) -> tuple[RLDataset, RLDataset | None]:
        space = self.space()
        prefix = space.fewshot() if self.include_fewshot else []

        def draw(epoch: int, index: int) -> list[ProblemGroupBuilder]:
            numbers_P = space.draw_train(self.batch_size, [self.seed, GROUPS, epoch * self.n_batches + index])
            return [ProblemGroupBuilder(thunk(n), self.group_size, ["arithmetic"]) for n in numbers_P]

        def thunk(number: int) -> EnvThunk:
            return partial(self.env_class, *space.problem(number), renderer, prefix)

        test = fit_prompts([thunk(n) for n in space.test_D], overlong="raise", name="arithmetic")
        held_out = problem_dataset(test, self.batch_size, 1, shuffle=False, tags=["arithmetic"])
        return DrawnDataset(draw, self.n_batches), held_out


@chz.chz
class ArithmeticExamplesBuilder(ArithmeticTask, SupervisedDatasetBuilder):
    """The same sums with their answers, to imitate. The held-out set is the same as that of ArithmeticBuilder."""

    n_batches: int = chz.field(default=30, validator=COUNT, doc="training batches per epoch")

    def __call__(self, renderer: Renderer) -> tuple[SupervisedDataset, SupervisedDataset | None]:
        space = self.space()

        def data(numbers_D: np.ndarray) -> list[Datum]:
            return render([space.messages(number) for number in numbers_D], renderer, self)

        def draw(epoch: int, index: int) -> list[Datum]:
            return data(space.draw_train(self.batch_size, [self.seed, EXAMPLES, epoch, index]))

        return DrawnDataset(draw, self.n_batches), ListDataset(data(space.test_D), self.batch_size, shuffle=False)
