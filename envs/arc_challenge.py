"""ARC-Challenge (Clark et al. 2018): science questions with three to five options, one of them
right.

Rows come from JSONL files of the hub's form or from the hub. The answer is a letter, given anew
from A because some questions number their options, or the text of the right option. Left out:
retrieval of supporting text.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from string import ascii_uppercase
from typing import Any

import chz

from envs.graders import StatedText
from envs.math_word import read_hub
from envs.problem import Grader, Problem, ProblemSet, Split
from envs.problem_env import ProblemSetBuilder
from posttrain.backend.errors import DataError
from supervised.rows import Fields, read_rows, text_of

ANSWER_PHRASE = "The answer is"
# also (B) and **B**, and no letter of "A or B"
_ANSWER = re.compile(r"answer is:?[\s(*]*([A-Z])\b(?![\s)*]*(?:[,/&-]|or\b|and\b)[\s(*]*[A-Z]\b)")


@dataclass(frozen=True)
class OptionGrader(Grader):
    """The letter after the last "answer is", if an option has it."""

    num_options: int

    def extract(self, text: str) -> str | None:
        letters = _ANSWER.findall(text)
        return letters[-1] if letters and letters[-1] in ascii_uppercase[: self.num_options] else None


@chz.chz
class ArcChallenge(ProblemSet):
    """ARC-Challenge, from `data_dir` or else from the hub."""

    data_dir: str | None = chz.field(
        default=None, doc="folder with train.jsonl and test.jsonl; None = allenai/ai2_arc of the hub"
    )
    letters: bool = chz.field(default=True, doc="answer with an option's letter; false = with its text")

    def read(self, split: Split, limit: int | None) -> list[Problem]:
        rows = (
            read_rows(f"{self.data_dir}/{split}.jsonl")
            if self.data_dir
            else read_hub("allenai/ai2_arc", "ARC-Challenge", split)
        )
        return [self.problem(where, row) for where, row in islice(rows, limit)]

    def problem(self, where: str, row: Fields) -> Problem:
        stem, options, gold = _question(where, row)
        if not self.letters:
            return Problem(
                "\n".join([stem, "Options:", *options]), options[gold], StatedText(), tags=("arc",), id=where
            )
        lettered = [f"{letter}. {text}" for letter, text in zip(ascii_uppercase, options, strict=False)]
        grader = OptionGrader(len(options))
        return Problem("\n".join([stem, *lettered]), ascii_uppercase[gold], grader, tags=("arc",), id=where)


@chz.chz
class ArcBuilder(ArcChallenge, ProblemSetBuilder):
    """ARC-Challenge to practise on by reinforcement learning."""


def _question(where: str, row: Fields) -> tuple[str, list[str], int]:
    """The question, its options and the index of the right one. Raises DataError."""
    choices = row.get("choices")
    columns: list[Any] = [choices.get(name) for name in ("label", "text")] if isinstance(choices, Mapping) else []
    if not columns or not all(map(_are_texts, columns)) or len({*map(len, columns)}) > 1:
        raise DataError(
            f"{where}: 'choices' must hold a 'label' and a 'text' list of the same length, not {str(choices)[:80]}"
        )
    stem, key = text_of(where, row, "question"), text_of(where, row, "answerKey")
    options = dict(zip(*columns, strict=True))
    if len(options) < len(columns[0]) or len(options) > len(ascii_uppercase):
        raise DataError(
            f"{where}: {len(columns[0])} options are labelled {', '.join(columns[0])[:80]}: give each its own label, "
            f"and at most {len(ascii_uppercase)}"
        )
    if key not in options:
        raise DataError(f"{where}: answerKey {key!r} is not one of the options {', '.join(options)}")
    return stem, [text.strip() for text in options.values()], list(options).index(key)


def _are_texts(column: object) -> bool:
    return isinstance(column, list) and all(isinstance(text, str) for text in column)
