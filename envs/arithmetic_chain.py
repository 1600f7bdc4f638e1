"""Chains of sums, one step a line: "34+7-8=" is answered "34+7=41\\n41-8=33\\n#33". For process
rewards.

`Chain.first_wrong_step` finds the first wrong step of an attempt, for evaluation only: rewards and
labels come from the answer after the "#". Chains are held out by a hash of the question, whatever a
dataset's `seed`. Single sums are not held out: there are too few. Left out: negative totals.
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
    """A first number and the signed digits added to it, one a step."""

    first: int
    terms: tuple[int, ...]

    @property
    def question(self) -> str:
        return f"{self.first}{''.join(f'{term:+d}' for term in self.terms)}="

    @property
    def steps(self) -> list[str]:
        """The worked lines, then the answer."""
        totals = np.cumsum([self.first, *self.terms]).tolist()
        worked = [f"{a}{term:+d}={b}" for a, term, b in zip(totals[:-1], self.terms, totals[1:], strict=True)]
        return [*worked, f"{ANSWER}{totals[-1]}"]

    def first_wrong_step(self, steps: Sequence[str]) -> int | None:
        """Index of the first step that is wrong, missing or too many; None where all are right."""
        right = self.steps
        wrong = (k for k in range(max(len(right), len(steps))) if list(steps[k : k + 1]) != right[k : k + 1])
        return next(wrong, None)

    @property
    def problem(self) -> Problem:
        gold = self.steps[-1].removeprefix(ANSWER)
        return Problem(self.question, gold, LastLine(rf"{ANSWER}(-?\d+)"), "\n".join(self.steps), ("chain",))


@chz.chz
class ChainTask(DrawnProblems):
    """The chains and their split: give the same values to all builders."""

    num_steps: int = chz.field(default=4, validator=COUNT, doc="sums in a chain")
    max_total: int = chz.field(default=99, validator=COUNT, doc="largest total; the smallest is 0")
    max_term: int = chz.field(default=9, validator=COUNT, doc="largest number added or subtracted; the smallest is 1")

    def draw(self, count: int, seed: Sequence[int]) -> list[Problem]:
        return [chain.problem for chain in self.chains(count, seed)]

    def held_out(self) -> list[Problem]:
        return [chain.problem for chain in self.test_chains()]

    def chains(self, count: int, seed: Sequence[int], *, held_out: bool = False) -> list[Chain]:
        """`count` distinct chains, training or held-out ones, a pure function of `seed`."""
        if not 1 <= self.num_steps <= 20 or not 1 <= self.max_term <= 9 <= self.max_total <= 999:
            raise ConfigError(
                f"1 to 20 num_steps, max_term from 1 to 9 and max_total from 9 to 999 are needed, not {self}"
            )
        if self.max_total < 2 * self.max_term - 1:
            raise ConfigError(
                f"max_total={self.max_total}: a term of {self.max_term} may fit neither added nor subtracted; set it to "
                f"{2 * self.max_term - 1} or more, or lower max_term"
            )
        rng, chains = np.random.default_rng(seed), {}
        for tries in itertools.count():
            if len(chains) == count:
                break
            if tries > 100 * HELD_OUT_SHARE * count:
                raise ConfigError(
                    f"there are fewer than {count} such chains: raise num_steps={self.num_steps} or max_total={self.max_total}"
                )
            chain = self._draw_chain(rng)
            if (zlib.crc32(f"{self.split_seed} {chain.question}".encode()) % HELD_OUT_SHARE == 0) == held_out:
                chains[chain] = None
        return list(chains)

    def _draw_chain(self, rng: np.random.Generator) -> Chain:
        first = total = int(rng.integers(self.max_total + 1))
        terms = []
        digits = rng.integers(1, self.max_term + 1, self.num_steps).tolist()
        signs = rng.choice([-1, 1], self.num_steps).tolist()
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
        return (2 * digits + 4) * self.num_steps + digits + 2  # "41-8=33\n" per step, "#33", EOS


@chz.chz
class ChainExamplesBuilder(ChainTask, DrawnExamplesBuilder):
    """The same chains with their solutions, to imitate."""

    n_batches: int = chz.field(default=500, validator=COUNT, doc="training batches per epoch")
