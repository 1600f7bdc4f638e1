"""Chains of small sums, worked one step a line: "34+7-8=" is answered "34+7=41\\n41-8=33\\n#33". A
task for process rewards.

The rule that wrote a chain also says which step of an attempt is the first wrong one
(`Chain.first_wrong_step`). That is for evaluation: rewards and labels come from the answer behind
the "#" alone. Chains are held out by a hash of the question, so no dataset, whatever its `seed`,
trains on one. The single sums in them are not held out: there are too few. Left out: numbers below
0.
"""

import itertools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import chz
import numpy as np

from envs.graders import LastLine
from envs.problem import Problem
from envs.problem_env import DrawnExamplesBuilder, DrawnProblems, DrawnProblemsBuilder
from posttrain.backend.errors import ConfigError
from posttrain.backend.ranges import COUNT

ANSWER = "#"
HELD_OUT_SHARE = 10  # one chain in ten


@dataclass(frozen=True)
class Chain:
    """A first number and what is added to it, one signed digit a step."""

    first: int
    terms: tuple[int, ...]

    @property
    def question(self) -> str:
        return f"{self.first}{''.join(f'{term:+d}' for term in self.terms)}="

    @property
    def steps(self) -> list[str]:
        """The worked lines and, as the last, the answer."""
        totals = np.cumsum([self.first, *self.terms]).tolist()
        worked = [f"{a}{term:+d}={b}" for a, term, b in zip(totals[:-1], self.terms, totals[1:], strict=True)]
        return [*worked, f"{ANSWER}{totals[-1]}"]

    def first_wrong_step(self, steps: Sequence[str]) -> int | None:
        """Index of the first step that is not the right one, or that is missing or too many; None
        where all are right.
        """
        right = self.steps
        wrong = (k for k in range(max(len(right), len(steps))) if list(steps[k : k + 1]) != right[k : k + 1])
        return next(wrong, None)

    @property
    def problem(self) -> Problem:
        gold = self.steps[-1].removeprefix(ANSWER)
        return Problem(self.question, gold, LastLine(rf"{ANSWER}(-?\d+)"), "\n".join(self.steps), ("chain",))


@chz.chz
class ChainTask(DrawnProblems):
    """What is asked, and what is held out: give the same to all builders."""

    num_steps: int = chz.field(default=4, validator=COUNT, doc="sums in a chain")
    max_total: int = chz.field(default=99, validator=COUNT, doc="totals go from 0 to this")
    max_term: int = chz.field(default=9, validator=COUNT, doc="what is added or taken away goes from 1 to this")

    def draw(self, count: int, seed: Sequence[int]) -> list[Problem]:
        return [chain.problem for chain in self.chains(count, seed)]

    def held_out(self) -> list[Problem]:
        return [chain.problem for chain in self.test_chains()]

    def chains(self, count: int, seed: Sequence[int], *, held_out: bool = False) -> list[Chain]:
        """`count` distinct chains, a pure function of `seed`, of those that are held out or of all
        others.
        """
        if not 1 <= self.num_steps <= 20 or not 1 <= self.max_term <= 9 <= self.max_total <= 999:
            raise ConfigError(
                f"1 to 20 num_steps, max_term from 1 to 9 and max_total from 9 to 999 are needed, not {self}"
            )
        rng, chains = np.random.default_rng(seed), {}
        for tries in itertools.count():
            if len(chains) == count:
                break
            if tries > 100 * HELD_OUT_SHARE * count:
                raise ConfigError(
                    f"there are not {count} such chains: raise num_steps={self.num_steps} or max_total={self.max_total}"
                )
            chain = self._draw_one(rng)
            if (zlib.crc32(f"{self.split_seed} {chain.question}".encode()) % HELD_OUT_SHARE == 0) == held_out:
                chains[chain] = None
        return list(chains)

    def _draw_one(self, rng: np.random.Generator) -> Chain:
        first = total = int(rng.integers(self.max_total + 1))
        terms = []
        digits, signs = (
            rng.integers(1, self.max_term + 1, self.num_steps).tolist(),
            rng.choice([-1, 1], self.num_steps).tolist(),
        )
        for digit, sign in zip(digits, signs, strict=True):
            term = digit * sign if 0 <= total + digit * sign <= self.max_total else -digit * sign
            terms.append(term)
            total += term
        return Chain(first, tuple(terms))

    def test_chains(self) -> list[Chain]:
        return self.chains(self.num_test, [self.split_seed], held_out=True)


@chz.chz
class ChainBuilder(ChainTask, DrawnProblemsBuilder):
    """Chains to practise on by reinforcement learning."""

    n_batches: int = chz.field(default=60, validator=COUNT, doc="training batches")

    def recommended_max_tokens(self) -> int:
        digits = len(str(self.max_total))
        return (2 * digits + 4) * self.num_steps + digits + 2  # "41-8=33\n" a step, "#33" and EOS


@chz.chz
class ChainExamplesBuilder(ChainTask, DrawnExamplesBuilder):
    """The same chains with their solutions, to imitate."""

    n_batches: int = chz.field(default=500, validator=COUNT, doc="training batches per epoch")
