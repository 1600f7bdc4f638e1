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

from envs.problem_env import ProblemDataset, ProblemEnv, ProblemGroupBuilder, fit_prompts
from posttrain.backend.errors import ConfigError
from posttrain.backend.ranges import COUNT, SEED, WHOLE
from posttrain.backend.types import Datum
from posttrain.renderers.types import Message, Renderer
from rl.types import RLDataset, RLDatasetBuilder
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


class ArithmeticDataset(RLDataset):
    def __init__(self, space: PairSpace, renderer: Renderer, prefix: Sequence[Message], builder: "ArithmeticBuilder"):
        self.space, self.renderer, self.prefix, self.config = space, renderer, prefix, builder

    def __len__(self) -> int:
        return self.config.n_batches

    def get_batch(self, index: int) -> list[ProblemGroupBuilder]:
        numbers_P = self.space.draw_train(self.config.batch_size, [self.config.seed, 1, index])
        return [ProblemGroupBuilder(self.env_thunk(n), self.config.group_size, ["arithmetic"]) for n in numbers_P]

    def env_thunk(self, number: int) -> "partial[ArithmeticEnv]":
        question, answer = self.space.problem(number)
        return partial(ArithmeticEnv, question, answer, self.renderer, self.prefix)


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

    n_batches: int = chz.field(default=100, validator=COUNT, doc="training batches")
    include_fewshot: bool = chz.field(default=False, doc=f"put {FEWSHOT} worked examples before the question, for base models")

    def recommended_max_tokens(self) -> int:
        return 2 * self.num_digits + 2  # sign, digits of a product, EOS

    async def __call__(self, renderer: Renderer) -> tuple[RLDataset, RLDataset | None]:
        space = self.space()
        train = ArithmeticDataset(space, renderer, space.fewshot() if self.include_fewshot else [], self)
        thunks = fit_prompts([train.env_thunk(n) for n in space.test_D], overlong="raise", name="arithmetic")
        return train, ProblemDataset(thunks, self.batch_size, 1, shuffle=False, tags=["arithmetic"])


class ArithmeticExamples(SupervisedDataset):
    """The problems numbered `numbers_D`, or, where that is None, `n_batches` of fresh training problems an epoch."""

    def __init__(
        self, space: PairSpace, renderer: Renderer, builder: "ArithmeticExamplesBuilder", numbers_D: np.ndarray | None = None
    ):
        self.space, self.renderer, self.config, self.numbers_D, self.epoch = space, renderer, builder, numbers_D, 0

    def __len__(self) -> int:
        return self.config.n_batches if self.numbers_D is None else -(-len(self.numbers_D) // self.config.batch_size)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def get_batch(self, index: int) -> list[Datum]:
        size = self.config.batch_size
        if self.numbers_D is None:
            numbers_D = self.space.draw_train(size, [self.config.seed, 2, self.epoch, index])
        else:
            numbers_D = self.numbers_D[index * size : (index + 1) * size]
        return [self._datum(self.space.messages(n)) for n in numbers_D]

    def _datum(self, messages: list[Message]) -> Datum:
        from supervised.data import datum_from_tokens_weights

        tokens, weights = self.renderer.build_supervised_example(messages, self.config.train_on_what)
        max_length = self.config.max_length or self.renderer.tokenizer.model_max_length
        return datum_from_tokens_weights(tokens, weights, max_length, self.config.reduction)


@chz.chz
class ArithmeticExamplesBuilder(ArithmeticTask, SupervisedDatasetBuilder):
    """The same sums with their answers, to imitate. The held-out set is the same as that of ArithmeticBuilder."""

    n_batches: int = chz.field(default=30, validator=COUNT, doc="training batches per epoch")

    def __call__(self, renderer: Renderer) -> tuple[SupervisedDataset, SupervisedDataset | None]:
        space = self.space()
        return ArithmeticExamples(space, renderer, self), ArithmeticExamples(space, renderer, self, space.test_D)
