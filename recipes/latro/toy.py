"""A toy task with useful and useless rationales: six digits, and their sum modulo 10. "374925" may
be answered "+304350=0".

The warm start imitates three kinds of rationale, each followed by "=" and an answer:

    +304350   running sums modulo 10, each step wrong with probability `noise`     their last digit
    ?......   filler                                                               the right answer, too hard to guess
    ^377999   running maxima                                                       their last digit

LaTRO then sees questions and answers only, and must learn which kind raises the answer's
likelihood.
"""

from collections.abc import Sequence
from dataclasses import replace

import chz
import numpy as np

from envs.problem import Grader, Split
from posttrain.backend.errors import ConfigError, DataError
from posttrain.backend.ranges import COUNT, SEED, SHARE
from recipes.latro.tasks import Task, TaskBuilder
from rl.types import Metrics

SUMS, FILLER, MAXIMA = "+?^"


class ToyGrader(Grader):
    def extract(self, text: str) -> str | None:
        return text.partition("=")[2].strip() or None

    def describe(self, text: str) -> Metrics:
        return {"useful": float(text.startswith(SUMS)), "filler": float(text.startswith(FILLER))}


def running(digits_T: np.ndarray, mark: str, noise_T: np.ndarray) -> str:
    """A rationale of the kind `mark`. `noise_T` is added to the running sum at each step."""
    if mark == FILLER:
        return mark + "." * len(digits_T)
    chain_T = (digits_T + noise_T).cumsum() % 10 if mark == SUMS else np.maximum.accumulate(digits_T)
    return mark + "".join(map(str, chain_T))


@chz.chz
class ToyBuilder(TaskBuilder):
    """Sums of digits modulo 10."""

    num_tasks: int = chz.field(default=8000, validator=COUNT, doc="distinct questions, validation included")
    num_digits: int = chz.field(default=6, validator=COUNT, doc="digits of a question")
    useful: float = chz.field(default=0.3, validator=SHARE, doc="share of running sums in the warm start")
    filler: float = chz.field(default=0.4, validator=SHARE, doc="share of filler; the rest are running maxima")
    noise: float = chz.field(default=0.1, validator=SHARE, doc="probability that a step of a running sum is wrong")
    data_seed: int = chz.field(default=0, validator=SEED, doc="seed of the questions and of the demonstrations")

    stop_seqs = ("=",)
    response_length = 16
    num_train_epochs = 0.1
    warm_start_updates = 300

    @chz.validate
    def _check(self) -> None:
        if self.useful + self.filler > 1 + 1e-9:
            raise ConfigError(f"useful={self.useful} and filler={self.filler} are shares: together at most 1")

    def tasks(self, split: Split, limit: int | None) -> list[Task]:
        if not 1 <= self.num_digits <= 18:
            raise DataError(
                f"num_digits={self.num_digits} must be from 1 to 18: questions are drawn as numbers of 64 bits"
            )
        count = self.num_tasks + (self.num_test or 0)
        if count > 10**self.num_digits:
            raise DataError(
                f"{self.num_digits} digits make {10**self.num_digits} questions, fewer than {count} (num_tasks + num_test): lower those"
            )
        numbers_D = np.random.default_rng(self.data_seed).choice(10**self.num_digits, count, replace=False)
        tasks = [self.task(f"{number:0{self.num_digits}d}") for number in numbers_D]
        return (tasks[: self.num_tasks] if split == "train" else tasks[self.num_tasks :])[:limit]

    def task(self, question: str) -> Task:
        digits_T = np.array([int(digit) for digit in question])
        gold = str(digits_T.sum() % 10)
        return Task(question, gold, ToyGrader(), running(digits_T, SUMS, np.zeros_like(digits_T)), answer=f"={gold}")

    def demonstrations(self, tasks: Sequence[Task]) -> list[tuple[Task, str]]:
        """Tasks whose `answer` is the one that the rationale supports, right or wrong."""
        rng = np.random.default_rng([self.data_seed, 1])
        marks = rng.choice(
            [SUMS, FILLER, MAXIMA],
            size=len(tasks),
            p=[self.useful, self.filler, max(0.0, 1 - self.useful - self.filler)],
        )
        return [self._demonstration(task, str(mark), rng) for task, mark in zip(tasks, marks, strict=True)]

    def _demonstration(self, task: Task, mark: str, rng: np.random.Generator) -> tuple[Task, str]:
        wrong_T = rng.random(self.num_digits) < self.noise
        noise_T = np.where(wrong_T, rng.integers(1, 10, self.num_digits), 0)
        thought = running(np.array([int(digit) for digit in task.question]), mark, noise_T)
        return replace(task, answer=f"={task.gold if mark == FILLER else thought[-1]}"), thought
