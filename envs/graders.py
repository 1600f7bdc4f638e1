"""Verifiers of short answers: a number or a text after "the answer is", or a pattern in the last
line.

math_word.py has the grader of mathematical expressions, code.py that of programs.
"""

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

from envs.math_answers import without_separators
from envs.problem import Grader

LONGEST_NUMBER = 1000  # digits; from 4,300 on Python raises, and a wrong answer would be a lost rollout
ANSWER_PHRASE = re.compile(r"answer\s+is:?", re.IGNORECASE)
_DECIMAL = r"(?:\d{1,3}(?:,\d{3})+(?!,?\d)|\d+)(?:\.\d+)?|(?<!\.)\.\d+"  # 1,234 is a number, 3,4 are two
_MINUS = r"(?<![\w)\]}])[-\u2212\u2013]|\bnegative\s|(?<!\d )\bminus\s"  # of -5, and not of 10-5
_NUMBER = re.compile(
    rf"(?P<minus>{_MINUS})?(?:\\?[$€£])?"
    rf"(?:(?:(?P<whole>\d+)\s)?(?<!/)(?P<over>{_DECIMAL})\s?/\s?(?P<under>[1-9]\d*)(?![\d/])"
    rf"|(?P<decimal>{_DECIMAL})(?:e(?P<power>[+-]?\d{{1,3}}))?)",
    re.IGNORECASE,
)
_VULGAR, _FULL_WIDTH = re.compile("[¼½¾⅓-⅞]"), {0xFF01 + code: 0x21 + code for code in range(94)}


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
        *before, last = ANSWER_PHRASE.split(text)
        found = numbers(last)
        return found[0 if before else -1] if found else None

    async def is_right(self, answer: str, gold: str) -> bool:
        if len(answer) > LONGEST_NUMBER:
            return False
        return Fraction(answer) == Fraction(with_ascii_minus(gold).replace(",", ""))


def with_ascii_minus(text: str) -> str:
    """The minus sign of typesetting, U+2212, as "-": read as no sign it would turn -5 into 5."""
    return text.replace("\u2212", "-")


def is_number(text: str) -> bool:
    return re.fullmatch(rf"-?(?:{_DECIMAL})", with_ascii_minus(text).strip()) is not None


def numbers(text: str) -> list[str]:
    """The numbers in `text`, equal ones as equal texts: -3, 0.5 (also for 1/2 and 5e-1), 1/3, 18."""
    text = _VULGAR.sub(lambda match: unicodedata.normalize("NFKC", f" {match[0]}"), text.translate(_FULL_WIDTH))
    text = without_separators(text.replace("{,}", ",").replace("\u2044", "/"))
    return [_plain(match) for match in _NUMBER.finditer(text)]


def _plain(match: re.Match[str]) -> str:
    number = match["decimal"]
    if len(match[0]) <= LONGEST_NUMBER and (match["over"] or match["power"]):
        value = _value(number or match["over"]) * Fraction(10) ** int(match["power"] or 0)
        value = _value(match["whole"] or "0") + value / int(match["under"] or 1)
        millionths = value * 10**6
        whole, rest = divmod(millionths.numerator, 10**6)
        number = f"{whole}.{rest:06d}" if millionths.denominator == 1 else str(value)
    number = _without_zeros(number or match["over"])
    return "-" + number if match["minus"] and number != "0" else number


def _value(decimal: str) -> Fraction:
    return Fraction(decimal.replace(",", ""))


def _without_zeros(number: str) -> str:
    """Without commas and needless zeros: 0.5, 18, 1/3."""
    whole, _, decimals = number.replace(",", "").partition(".")
    return (whole.lstrip("0") or "0") + ("." + decimals.rstrip("0") if decimals.strip("0") else "")


class StatedText(Grader):
    """The rest of the line after the last "answer is", without case, quotes, brackets, full stops."""

    def extract(self, text: str) -> str | None:
        _, *after = ANSWER_PHRASE.split(text)
        return normalised(after[-1].strip().split("\n")[0]) or None if after else None

    async def is_right(self, answer: str, gold: str) -> bool:
        return answer == normalised(gold)


def normalised(text: str) -> str:
    """Without case, spaces, and the quotes, brackets and full stops around it."""
    return " ".join(with_ascii_minus(text).casefold().strip(" \t\n.'\"`*[](){}").split())
