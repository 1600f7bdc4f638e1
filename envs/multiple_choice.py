"""Questions with lettered options: MMLU-Pro (Wang et al. 2024) and GPQA (Rein et al. 2023), each
with the prompt and the answer's patterns of its authors' code; ARC is in arc_challenge.py.

Different here: a response without an answer is wrong, where MMLU-Pro's code then draws a letter.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase

import chz
import numpy as np

from envs.benchmark import BenchmarkBuilder, list_of
from envs.problem import Grader, Problem
from posttrain.backend.errors import DataError
from posttrain.backend.ranges import SEED, WHOLE
from supervised.rows import Fields, Row, text_of

# in this order: the first that matches is the answer
MMLU_PRO_ANSWER = (
    r"answer is \(?([A-J])\)?",
    r"[aA]nswer:\s*([A-J])",
    r"\b([A-J])\b(?!.*\b[A-J]\b)",
)
GPQA_ANSWER = (
    r"answer is \((.)\)",
    r"[Aa]nswer: \((.)\)",
    r"answer \((.)\)",
    r"\(([A-D])\)",
    r"[Aa]nswer(?: is)?:?\s*\**([A-D])\b",
)


@dataclass(frozen=True)
class ChoiceGrader(Grader):
    """The letter that the first matching pattern finds, if an option has it."""

    patterns: tuple[str, ...]
    num_options: int

    def extract(self, text: str) -> str | None:
        found = (re.search(pattern, text, re.DOTALL) for pattern in self.patterns)
        letter = next((match[1] for match in found if match), None)
        return letter if letter and letter in ascii_uppercase[: self.num_options] else None


def lettered(options: Sequence[str], form: str) -> str:
    """A line for each option."""
    return "\n".join(form.format(letter, text) for letter, text in zip(ascii_uppercase, options, strict=False))


@chz.chz
class MmluPro(BenchmarkBuilder):
    """MMLU-Pro: up to ten options, worked examples of the same category before the question."""

    hub_name: str = chz.field(default="TIGER-Lab/MMLU-Pro", doc="Hugging Face dataset")
    shots: int = chz.field(
        default=5, validator=WHOLE, doc="worked examples of the category before each question; 5 are published"
    )
    shots_split: str = chz.field(default="validation", doc="split of the worked examples")

    def problems(self, rows: Sequence[Row]) -> list[Problem]:
        if self.shots and self.path and not Path(self.path).expanduser().is_dir():
            raise DataError(
                f"{self.path} is a file of questions: give a folder that has {self.split}.jsonl and "
                f"{self.shots_split}.jsonl, or set shots=0"
            )
        examples: dict[str, list[str]] = {}
        for where, row in self.rows(self.shots_split) if self.shots else []:
            solution = text_of(where, row, "cot_content").removeprefix("A: ")
            category = text_of(where, row, "category")
            examples.setdefault(category, []).append(f"{_question(where, row)}Answer: {solution}\n\n")
        problems = []
        for where, row in rows:
            category = text_of(where, row, "category")
            there = examples.get(category, [])
            if len(there) < self.shots:
                raise DataError(
                    f"{where}: shots={self.shots}, but the split {self.shots_split!r} has {len(there)} examples of "
                    f"{category!r}; it has {', '.join(examples) or 'none'}"
                )
            problems.append(_mmlu_pro(where, row, category, there[: self.shots]))
        return problems


def _mmlu_pro(where: str, row: Fields, category: str, examples: Sequence[str]) -> Problem:
    options, letter = list_of(where, row, "options"), text_of(where, row, "answer")
    letters = ascii_uppercase[: len(options)]
    if letter not in letters or not letter:
        raise DataError(f"{where}: answer {letter!r} is not one of {letters}")
    head = (
        f"The following are multiple choice questions (with answers) about {category}. Think step by step and then "
        'finish your answer with "the answer is (X)" where X is the correct letter choice.\n\n\n'
    )
    question = head + "".join(examples) + _question(where, row) + "Answer: Let's think step by step."
    return Problem(question, letter, ChoiceGrader(MMLU_PRO_ANSWER, len(options)), None, ("mmlu_pro", category), where)


def _question(where: str, row: Fields) -> str:
    options = lettered(list_of(where, row, "options"), "{}. {}")
    return f"Question:\n{text_of(where, row, 'question')}\nOptions:\n{options}\n"


@chz.chz
class Gpqa(BenchmarkBuilder):
    """GPQA, zero-shot with a chain of thought; the options' order is drawn by order_seed."""

    hub_name: str = chz.field(default="Idavidrein/gpqa", doc="Hugging Face dataset (its terms must be accepted)")
    subset: str | None = chz.field(
        default="gpqa_diamond", doc="gpqa_diamond, gpqa_main or gpqa_extended of the Hugging Face dataset"
    )
    split: str = chz.field(default="train", doc="split to evaluate on; the hub has all questions in train")
    order_seed: int = chz.field(default=0, validator=SEED, doc="seed of the order of a question's options")

    def problems(self, rows: Sequence[Row]) -> list[Problem]:
        return [self.shuffled(index, *row) for index, row in enumerate(rows)]

    def shuffled(self, index: int, where: str, row: Fields) -> Problem:
        answers = ["Correct Answer", *(f"Incorrect Answer {number}" for number in (1, 2, 3))]
        texts = [text_of(where, row, name).strip() for name in answers]
        order = np.random.default_rng([self.order_seed, index]).permutation(len(texts)).tolist()
        options = lettered([texts[place] for place in order], "({}) {}")
        question = (
            f"What is the correct answer to this question: {text_of(where, row, 'Question').strip()}\n\nChoices:\n"
            f"{options}\n\nLet's think step by step. Then give the single, most likely answer in the format "
            '"The correct answer is (insert answer here)".'
        )
        domain = row.get("High-level domain")
        tags = ("gpqa", *([domain] if isinstance(domain, str) else []))
        return Problem(question, ascii_uppercase[order.index(0)], ChoiceGrader(GPQA_ANSWER, 4), None, tags, where)
