"""A question with a verifier, for RL, warm starts, LaTRO, B-STaR and process reward models.

A Problem is text, without tokenizer or environment (see problem_env.py). A new verifier is a
Grader; a new data set is a ProblemSet that reads its rows (math_word.py, arc_challenge.py,
code.py).
"""

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import chz
import numpy as np

from posttrain.backend.errors import DataError
from posttrain.backend.ranges import COUNT, WHOLE
from posttrain.renderers.types import Message
from rl.types import Logs, Metrics, RolloutError

Split = Literal["train", "test"]


class GraderError(RolloutError):
    """A grader crashed or ran out of time: the response has no reward."""


@dataclass(frozen=True)
class Grade:
    """A verdict. `answer`: the text by which samples vote; None: the format is wrong. `credit`
    replaces `correct` as reward."""

    answer: str | None
    correct: bool
    credit: float | None = None
    metrics: Metrics = field(default_factory=dict)
    logs: Logs = field(default_factory=dict)


class Grader:
    """Extracts the answer of a response and compares it. Default: the whole response, as text. A
    subclass may write `is_right` and `grade` without `async`.
    """

    has_answer = True  # a short answer, on which samples can vote (maj@k) and which the transcript shows

    def extract(self, text: str) -> str | None:
        """The answer, or None."""
        return text.strip() or None

    async def is_right(self, answer: str, gold: str) -> bool:
        """Raises GraderError if the comparison fails."""
        return answer in (gold, gold.strip())  # a file's line break is no part of the answer

    def vote(self, answer: str) -> str:
        """The text that stands for all answers equal to `answer`: of it maj@k counts the votes."""
        return answer

    async def grade(self, text: str, gold: str) -> Grade:
        answer = self.extract(text)
        if answer is None:
            return Grade(None, False)
        if not isinstance(answer, str):  # which equals no gold answer
            raise GraderError(f"{type(self).__name__}.extract returned {answer!r:.80}, neither a text nor None")
        return Grade(self.vote(answer), bool(await awaited(self.is_right(answer, gold))))

    def shown(self, text: str) -> str:
        """The answer as the transcript shows it."""
        return self.extract(text) or ""

    def describe(self, text: str) -> Metrics:
        """Further metrics of a response or a rationale; never part of the reward."""
        return {}


@dataclass(frozen=True)
class Problem:
    """`solution` is a worked one with the answer. `id` is the row or place the problem came from.
    DataError for a question or gold answer that is no text, and a grader that is no Grader."""

    question: str
    gold: str
    grader: Grader = field(default_factory=Grader, compare=False)
    solution: str | None = None
    tags: tuple[str, ...] = ()
    id: str = ""

    def __post_init__(self) -> None:
        for name, kind, wanted in (
            ("question", str, "a text"),
            ("gold", str, "a text (write several values as JSON)"),
            ("grader", Grader, "an object of Grader"),
        ):
            if not isinstance(value := getattr(self, name), kind):
                raise DataError(f"Problem {self.id or repr(self.question)[:80]}: {name}={value!r:.80} is not {wanted}")

    def messages(self, prefix: Sequence[Message] = ()) -> list[Message]:
        """The question and the worked solution, to imitate."""
        if self.solution is None:
            raise DataError(f"problem {self.id or self.question!r} has no worked solution")
        return [
            *prefix,
            Message(role="user", content=self.question),
            Message(role="assistant", content=self.solution),
        ]

    async def graded(self, text: str) -> Grade:
        """The grader's verdict. GraderError if it gives anything else."""
        grade = await awaited(self.grader.grade(text, self.gold))
        if not isinstance(grade, Grade):
            raise GraderError(
                f"{type(self.grader).__name__}.grade returned {grade!r:.100}, not a Grade(answer, correct, credit)"
            )
        return grade

    async def scored(self, text: str, truncated: bool) -> tuple[float, Metrics, Logs]:
        """1 for a correct response, or its partial credit; the metrics `format` and `correct`; logs."""
        grade = await self.graded(text)
        metrics = {"format": float(grade.answer is not None and not truncated), "correct": float(grade.correct)}
        logs = {"gold": self.gold} | ({"extracted": self.grader.shown(text)} if self.grader.has_answer else {})
        if grade.answer is not None and grade.answer != logs.get("extracted", grade.answer):
            logs["vote"] = grade.answer
        value = float(grade.correct) if grade.credit is None else grade.credit
        return value, metrics | grade.metrics | self.grader.describe(text), logs | grade.logs


async def awaited(result: Any) -> Any:
    return await result if inspect.isawaitable(result) else result


def check_apart(train: Sequence[Problem], test: Sequence[Problem], name: str = "training") -> None:
    """Raises DataError, with the first example, where a question is in both sets."""
    held_out = {problem.question: problem for problem in test}
    if both := [problem for problem in train if problem.question in held_out]:
        first, twin = both[0], held_out[both[0].question]
        places = f"{first.id} (as {twin.id}): " if first.id or twin.id else ""
        raise DataError(
            f"{len(both)} {name} problems are in the test set too, first {places}{first.question[:80]!r}; remove them from "
            "one of the sets"
        )


P = TypeVar("P", bound=Problem)


def split_off(problems: Sequence[P], count: int, seed: int, name: str) -> tuple[list[P], list[P]]:
    """The rest, and `count` problems drawn by `seed`, both in their order. The rest has no problem
    with a drawn question. DataError unless 1 <= count < len(problems).
    """
    if not 1 <= count < len(problems):
        raise DataError(
            f"{name}={count} of {len(problems)} problems: it must be from 1 to {len(problems) - 1}, "
            f"for instance {max(1, len(problems) // 10)}"
        )
    drawn = np.random.default_rng(seed).permutation(len(problems))[:count].tolist()
    held_out = [problems[i] for i in sorted(drawn)]
    questions = {problem.question for problem in held_out}
    return [problem for problem in problems if problem.question not in questions], held_out


@chz.chz
class ProblemSet:
    """Configuration of a data set with a training and a test split."""

    num_train: int | None = chz.field(
        default=None, validator=COUNT, doc="number of training problems, the first ones; None = all"
    )
    num_test: int | None = chz.field(
        default=200, validator=WHOLE, doc="number of test problems, the first ones; None = all"
    )

    def read(self, split: Split, limit: int | None) -> list[Problem]:
        """The problems in the first `limit` rows of "train" or "test"; [] without a test split."""
        raise NotImplementedError

    def problems_of(self, split: Split, limit: int | None) -> list[Problem]:
        """Those that `read` returns. DataError for anything else."""
        result: Any = self.read(split, limit)
        problems = list(result) if isinstance(result, Iterable) else None
        if problems is None or not all(isinstance(problem, Problem) for problem in problems):
            raise DataError(
                f"{type(self).__name__}.read({split!r}, ...) returned {result!r:.100}, not a list of Problems"
            )
        return problems

    def splits(self) -> tuple[list[Problem], list[Problem]]:
        """Training and test problems. Raises DataError where a question is in both."""
        train, test = self.problems_of("train", self.num_train), self.problems_of("test", self.num_test)
        check_apart(train, test)
        return train, test
