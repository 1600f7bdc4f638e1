"""What a task is: {question, rationale (optional), answer, verifier}, and the builders that read tasks and split them.

A new data set is one file: a subclass of TaskBuilder whose `train_tasks` returns Tasks (gsm8k.py is the model), and its line in DATASETS of
train.py. The validation split is cut from the training tasks by `split_seed`; test tasks are read only when asked for.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import chz
import numpy as np

from posttrain.backend.errors import DataError
from posttrain.backend.ranges import COUNT, SEED, WHOLE
from rl.types import Metrics

NUMBER = re.compile(r"-?(?:\d[\d,]*(?:\.\d+)?|(?<!\.)\.\d+)")
ANSWER_PHRASE = re.compile(r"answer\s+is:?", re.IGNORECASE)
# Where a rationale ends and the answer begins, as models write it; the leading space or newline belongs to the stop.
ANSWER_STOPS = tuple(
    space + phrase
    for space in ("", " ", "\n")
    for phrase in ("Answer:", "The answer is", "the answer is", "The final answer is", "the final answer is")
)


class Verifier:
    """Reads the answer out of a whole response, and compares it. Exact comparison of strings; subclasses know better."""

    def extract(self, text: str) -> str | None:
        """The answer, in a form in which equal answers are equal strings; None if there is none."""
        return text.strip() or None

    async def is_right(self, extracted: str, gold: str) -> bool:
        return extracted == gold

    def describe(self, rationale: str) -> Metrics:
        """What can be said of a sampled rationale; logged, never a reward."""
        return {}


class NumberVerifier(Verifier):
    """The first number behind the last "answer is"; where that is missing, the last number of the text. 18, 18.0 and 018 are one answer."""

    def extract(self, text: str) -> str | None:
        *_, last = ANSWER_PHRASE.split(text)
        numbers = NUMBER.findall(last)
        if not numbers:
            return None
        return plain_number(numbers[-1] if last == text else numbers[0])

    async def is_right(self, extracted: str, gold: str) -> bool:
        return Fraction(extracted) == Fraction(gold.replace(",", ""))


def plain_number(text: str) -> str:
    """The one way to write a decimal: without commas and needless zeros, -3, 0.5, 18."""
    digits = text.replace(",", "").lstrip("-")
    whole, _, decimals = digits.partition(".")
    number = (whole.lstrip("0") or "0") + ("." + decimals.rstrip("0") if decimals.strip("0") else "")
    return "-" + number if text.startswith("-") and number != "0" else number


class TextVerifier(Verifier):
    """What stands behind the last "answer is", to the end of its line; equal to the gold text but for case, quotes, brackets, full stops."""

    def extract(self, text: str) -> str | None:
        before, *behind = ANSWER_PHRASE.split(text)
        return _normalised(behind[-1].strip().split("\n")[0]) or None if behind else None

    async def is_right(self, extracted: str, gold: str) -> bool:
        return extracted == _normalised(gold)


def _normalised(text: str) -> str:
    return " ".join(text.casefold().strip(" \t\n.'\"`*[](){}").split())


def is_number(text: str) -> bool:
    return NUMBER.fullmatch(text.strip()) is not None


@dataclass(frozen=True)
class Task:
    """`answer` is the text that is to stand right behind the rationale, separator included: "\\nThe answer is 72."."""

    question: str
    answer: str
    gold: str
    verifier: Verifier
    rationale: str | None = None


@chz.chz
class TaskBuilder:
    """Configuration of a data set."""

    num_validation: int = chz.field(default=200, validator=WHOLE, doc="tasks held out of the training set, for model selection")
    split_seed: int = chz.field(default=0, validator=SEED, doc="seed of that choice")
    num_test: int | None = chz.field(
        default=200, validator=WHOLE, doc="use only the first so many tasks of the test set; None = all"
    )
    num_train: int | None = chz.field(
        default=None, validator=COUNT, doc="use only this many tasks of the training file, validation included"
    )

    stop_seqs = ANSWER_STOPS  # class constants, which the recipe's options override
    response_length = 200
    num_train_epochs = 6.0
    warm_start_updates = 0  # for a preset, whose weights are random: supervised updates before the method begins

    def train_tasks(self) -> list[Task]:
        raise NotImplementedError

    def test_tasks(self) -> list[Task]:
        """Tasks that neither training nor model selection sees; [] where there are none."""
        return []

    def demonstrations(self, tasks: Sequence[Task]) -> list[tuple[Task, str]]:
        """Tasks with a rationale each, to imitate in a warm start."""
        return [(task, task.rationale) for task in tasks if task.rationale is not None]

    def split(self) -> tuple[list[Task], list[Task]]:
        """Training and validation tasks."""
        tasks = self.train_tasks()[: self.num_train]
        if not 1 <= self.num_validation < len(tasks):
            raise DataError(
                f"num_validation={self.num_validation} of {len(tasks)} tasks: it must be from 1 to {len(tasks) - 1}, "
                f"for instance {max(1, len(tasks) // 10)}"
            )
        held_out = set(np.random.default_rng(self.split_seed).permutation(len(tasks))[: self.num_validation].tolist())
        return [task for i, task in enumerate(tasks) if i not in held_out], [tasks[i] for i in sorted(held_out)]
