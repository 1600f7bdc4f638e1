"""Sums modulo 10 of several digits, added two at a time in any order: many derivations are right.

"7+2+3+9=" may be answered by "3+2=5\\n9+7=6\\n5+6=1\\n#1". The grader reads only the number after
the "#", so a wrong derivation is right by chance one time in ten: errors for a process reward model
to find. Left out: negative numbers.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import chz
import numpy as np

from envs.graders import LastLine
from envs.problem import Problem
from posttrain.backend.errors import ConfigError
from posttrain.backend.ranges import COUNT, NON_NEGATIVE, NUMBER, WHOLE
from posttrain.backend.service_client import ServiceClient
from posttrain.renderers.types import Renderer
from preference.steps import StepFormat
from recipes.bstar.records import Candidate
from recipes.bstar.rewards import Queries, Reward, RewardBuilder
from recipes.bstar.tasks import Query, Sets, TaskBuilder

STEP = re.compile(r"(\d+)\+(\d+)=(\d+)")


@dataclass(frozen=True)
class Sum:
    numbers: tuple[int, ...]
    modulus: int | None

    @property
    def question(self) -> str:
        return "+".join(map(str, self.numbers)) + "="

    def total(self, *numbers: int) -> int:
        return sum(numbers) % self.modulus if self.modulus else sum(numbers)

    @property
    def answer(self) -> int:
        return self.total(*self.numbers)

    def solution(self, rng: np.random.Generator) -> str:
        """A derivation in a random order."""
        left, lines = list(self.numbers), []
        while len(left) > 1:
            a, b = (left.pop(int(rng.integers(len(left)))) for _ in range(2))
            left.append(self.total(a, b))
            lines.append(f"{a}+{b}={left[-1]}")
        return "\n".join([*lines, f"#{self.answer}"])

    def valid(self, text: str) -> bool:
        """Whether every step adds two remaining numbers correctly and ends in the answer."""
        left = Counter(self.numbers)
        *steps, answer = text.split("\n")
        for step in steps:
            match = STEP.fullmatch(step)
            if not match:
                return False
            a, b, total = map(int, match.groups())
            left.subtract((a, b))
            if total != self.total(a, b) or min(left[a], left[b]) < 0:
                return False
            left[total] += 1
        return left.total() == 1 and answer == f"#{self.answer}"


@dataclass(frozen=True)
class SumGrader(LastLine):
    """The number after the "#" of the last line."""

    sum: Sum


@chz.chz
class SumsBuilder(TaskBuilder):
    """Sums in any order."""

    num_train: int | None = chz.field(default=100, validator=COUNT, doc="training queries")
    num_test: int | None = chz.field(default=120, validator=WHOLE, doc="test queries")
    num_warm_start: int | None = chz.field(
        default=8000, validator=COUNT, doc="questions whose solutions the warm start imitates"
    )
    num_dev: int = chz.field(
        default=16, validator=COUNT, doc="training queries on which temperature and threshold are chosen"
    )
    num_prm: int | None = chz.field(
        default=1500, validator=COUNT, doc="questions whose answers are labelled step by step"
    )
    form: StepFormat = chz.field(
        default_factory=lambda: StepFormat(separator="\n", answer_marker="#"), doc="separators of a solution's steps"
    )
    max_tokens: int = chz.field(default=40, validator=COUNT, doc="maximum tokens of a sampled solution")
    operands: int = chz.field(default=5, validator=COUNT, doc="numbers in a sum")
    largest: int = chz.field(default=9, validator=COUNT, doc="numbers go from 0 to this")
    modulus: int | None = chz.field(
        default=10, validator=COUNT, doc="totals are taken modulo this; None = whole totals"
    )

    def sets(self, renderer: Renderer) -> Sets:
        """Test, training, warm-start and PRM sums; no other set has a test sum's numbers in any
        order.

        ConfigError if a size is None or there are not enough sums.
        """
        wanted = (self.num_test, self.num_train, self.num_warm_start, self.num_prm)
        counts = [count for count in wanted if count is not None]
        if len(counts) < len(wanted):
            raise ConfigError("sums are generated: set task.num_train, num_test, num_warm_start and num_prm to numbers")
        rng = np.random.default_rng([self.split_seed, self.operands, self.largest])
        drawn: dict[tuple[int, ...], Sum] = {}
        held_out: set[tuple[int, ...]] = set()
        for _ in range(100 * sum(counts)):
            if len(drawn) == sum(counts):
                break
            numbers = tuple(rng.integers(self.largest + 1, size=self.operands).tolist())
            alike = tuple(sorted(numbers))
            if alike not in held_out and numbers not in drawn:
                held_out |= {alike} if len(drawn) < counts[0] else set()
                drawn[numbers] = Sum(numbers, self.modulus)
        else:
            raise ConfigError(
                f"there are fewer than {sum(counts)} sums of {self.operands} numbers to {self.largest}: raise task.largest"
            )
        test, train, warm_start, prm = (
            self._problems(part, list(drawn.values())[sum(counts[:part]) : sum(counts[: part + 1])])
            for part in range(4)
        )
        return Sets(warm_start, prm, train, test)

    def _problems(self, part: int, sums: Sequence[Sum]) -> list[Problem]:
        rng = np.random.default_rng([self.split_seed, 1, part])
        return [
            Problem(
                addition.question,
                str(addition.answer),
                SumGrader(r"#(\d{1,9})", addition),
                addition.solution(rng),
                ("sums",),
                f"{part}-{n}",
            )
            for n, addition in enumerate(sums)
        ]


@chz.chz
class OracleRewardBuilder(RewardBuilder):
    """The outcome plus the score of a process reward model without error: a control experiment."""

    coef: float = chz.field(default=0.2, validator=NON_NEGATIVE, doc="weight of the step score")
    logit: float = chz.field(
        default=5.0, validator=NUMBER, doc="smallest step logit of a valid derivation; its negative for an invalid one"
    )

    def __call__(self, service: ServiceClient, renderer: Renderer, prm_path: str, form: StepFormat) -> Reward:
        return self.score

    async def score(self, candidates: Sequence[Candidate], queries: Queries) -> list[Candidate]:
        return [
            replace(candidate, reward=float(candidate.correct) + self.coef * self._smallest_logit(candidate, queries))
            for candidate in candidates
        ]

    def _smallest_logit(self, candidate: Candidate, queries: Queries) -> float:
        total = sum_of(queries[candidate.query])
        if total is None:
            raise ConfigError("reward=oracle works for sums only: set task=sums, or another reward")
        return self.logit if total.valid(candidate.text) else -self.logit


def sum_of(query: Query) -> Sum | None:
    """The sum of a query, which tells valid derivations from others; None if it has none."""
    grader = query.problem.grader
    return grader.sum if isinstance(grader, SumGrader) else None
