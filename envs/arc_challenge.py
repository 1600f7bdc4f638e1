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

from envs.graders import StatedText, normalised
from envs.problem import Grader, Problem, ProblemSet, Split
from envs.problem_env import ProblemSetBuilder
from posttrain.backend.errors import DataError
from supervised.rows import Fields, read_rows, text_of
from supervised.table_rows import table_rows

ANSWER_PHRASE = "The answer is"
# also (B) and **B**, and no letter of "A or B"
_ONE = r"([A-Z])\b(?![\s)*]*(?:[,/&-]|or\b|and\b)[\s(*]*[A-Z]\b)"
_ANSWER = re.compile(rf"answer is:?[\s(*]*{_ONE}")
# what else begins an answer, as in simple-evals ("Answer: C") and MMLU-Pro's code
_STATED = re.compile(r"(?i:answer)(?:\s+is\b|[*_]{0,2}\s?:)|(?i:(?:correct|right|best)\s(?:option|choice)\s+is)\b")
_OPENING = r"[\s:*_(\[`\"'$]*(?:\\(?:boxed|text|mathrm|mathbf)\{\s*)*(?:(?i:option|choice|letter)\s+[(*\[]*)?"
# and no letter that is denied, or is the article of "A plant"
_FIRST = re.compile(
    rf"{_OPENING}(?!A\s+(?!(?:because|since|as|is)\b)[a-z]){_ONE}(?![\s)*]*(?:is|are)\s+(?:not|wrong|incorrect|false)\b)"
)
_ALONE = re.compile(r"[\s*_(\[`$]*(?:\\boxed\{)?([A-Z])[\s*_)\]`$.:}]*")
_LETTERED = re.compile(r"[\s*_(\[`]*([A-Z])[*_)\].:`]+\s+(.*)")
_READ = 300  # characters of an answer


@dataclass(frozen=True)
class OptionGrader(Grader):
    """The letter after the last "answer is", if an option has it. Where there is none: the letter or the
    text of an option after "Answer:" and the like, or as the last line, alone."""

    num_options: int
    options: tuple[str, ...] = ()

    def extract(self, text: str) -> str | None:
        if letters := [*_ANSWER.finditer(text)]:
            last = letters[-1]
            article = last[1] == "A" and self._line_named(text[last.start(1) : last.start(1) + _READ])
            return article or self._known(last[1])  # "the answer is A cell" is no A
        return self._stated(text) or self._last_line(text)

    def _known(self, letter: str) -> str | None:
        return letter if letter in ascii_uppercase[: self.num_options] else None

    def _stated(self, text: str) -> str | None:
        """Of the last phrase that an option follows."""
        for phrase in reversed([*_STATED.finditer(text)]):
            after = text[phrase.end() : phrase.end() + _READ]
            named = self._line_named(after)
            first = None if named else _FIRST.match(after)
            if letter := named or (first and self._known(first[1])):
                return letter
        return None

    def _line_named(self, text: str) -> str | None:
        """The letter of the option whose text is the first line or sentence."""
        line = text.lstrip(" \n:").split("\n")[0]
        return self._named(line) or self._named(re.split(r"\.\s", line)[0])

    def _named(self, text: str) -> str | None:
        """The letter of the one option with this text. A text of one letter means the letter."""
        wanted = normalised(text)
        same = [i for i, option in enumerate(self.options) if normalised(option) == wanted]
        return ascii_uppercase[same[0]] if len(same) == 1 and (len(wanted) > 1 or wanted.isdigit()) else None

    def _last_line(self, text: str) -> str | None:
        """The letter of a last line that has nothing else, or the option's text after it. None where other
        lines are such, too."""
        found = set()
        for line in (lines := [line for line in text.split("\n") if line.strip()]):
            if len(line) <= _READ and (letter := self._alone(line)):
                found.add(letter)
        last = self._alone(lines[-1][:_READ]) if lines else None
        return last if found == {last} else None

    def _alone(self, line: str) -> str | None:
        if alone := _ALONE.fullmatch(line):
            return self._known(alone[1])
        lettered = _LETTERED.fullmatch(line)
        named = self._named(lettered[2]) if lettered else None
        if lettered and named != lettered[1]:
            return None
        return named or self._named(line)


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
            else table_rows("allenai/ai2_arc", "ARC-Challenge", split)
        )
        return [self.problem(where, row) for where, row in islice(rows, limit)]

    def problem(self, where: str, row: Fields) -> Problem:
        stem, options, gold = _question(where, row)
        if not self.letters:
            return Problem(
                "\n".join([stem, "Options:", *options]), options[gold], StatedText(), tags=("arc",), id=where
            )
        lettered = [f"{letter}. {text}" for letter, text in zip(ascii_uppercase, options, strict=False)]
        grader = OptionGrader(len(options), tuple(options))
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
