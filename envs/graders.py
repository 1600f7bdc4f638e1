"""Verifiers of short answers: a number or a text after "the answer is", or a pattern in the last
line.

math_word.py has the grader of mathematical expressions, code.py that of programs.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

from envs.problem import Grader

NUMBER = re.compile(r"-?(?:\d[\d,]*(?:\.\d+)?|(?<!\.)\.\d+)")
LONGEST_NUMBER = 1000  # digits; from 4,300 on Python raises, and a wrong answer would be a lost rollout
ANSWER_PHRASE = re.compile(r"answer\s+is:?", re.IGNORECASE)


@dataclass(frozen=True)
class LastLine(Grader):
    """The last line must match `pattern` as a whole; its first group is the answer."""

    pattern: str

    def extract(self, text: str) -> str | None:
        match = re.fullmatch(self.pattern, text.rsplit("\n", 1)[-1])
        return match[1] if match else None


class StatedNumber(Grader):
    """The first number after the last "answer is", else the last number of the text. 18.0 = 018."""

    def extract(self, text: str) -> str | None:
        text = with_ascii_minus(text)
        *_, last = ANSWER_PHRASE.split(text)
        numbers = NUMBER.findall(last)
        if not numbers:
            return None
        return plain_number(numbers[-1] if last == text else numbers[0])

    async def is_right(self, answer: str, gold: str) -> bool:
        if len(answer) > LONGEST_NUMBER:
            return False
        return Fraction(answer) == Fraction(with_ascii_minus(gold).replace(",", ""))


def with_ascii_minus(text: str) -> str:
    """The minus sign of typesetting, U+2212, as "-": read as no sign it would turn -5 into 5."""
    return text.replace("\u2212", "-")


def is_number(text: str) -> bool:
    return NUMBER.fullmatch(with_ascii_minus(text).strip()) is not None


def plain_number(text: str) -> str:
    """A decimal without commas and needless zeros: -3, 0.5, 18."""
    digits = text.replace(",", "").lstrip("-")
    whole, _, decimals = digits.partition(".")
    number = (whole.lstrip("0") or "0") + ("." + decimals.rstrip("0") if decimals.strip("0") else "")
    return "-" + number if text.startswith("-") and number != "0" else number


class StatedText(Grader):
    """The rest of the line after the last "answer is", without case, quotes, brackets, full stops."""

    def extract(self, text: str) -> str | None:
        _, *after = ANSWER_PHRASE.split(text)
        return _normalised(after[-1].strip().split("\n")[0]) or None if after else None

    async def is_right(self, answer: str, gold: str) -> bool:
        return answer == _normalised(gold)


def _normalised(text: str) -> str:
    return " ".join(with_ascii_minus(text).casefold().strip(" \t\n.'\"`*[](){}").split())
