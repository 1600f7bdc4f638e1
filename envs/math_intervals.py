r"""Inequalities as intervals: x > 3 is (3,\infty); x < 1 or x >= 5 is (-\infty,1) \cup [5,\infty).

Left out: \neq, complements of sets.
"""

import re
from typing import NamedTuple

_SIGNS = [(r"\\leqslant|\\leq|\\le(?![A-Za-z])|≤|=<", "<="), (r"\\geqslant|\\geq|\\ge(?![A-Za-z])|≥|=>", ">=")]
_SIGNS += [(r"\\lt(?![A-Za-z])", "<"), (r"\\gt(?![A-Za-z])", ">")]
_VARIABLE = re.compile(r"\\?[A-Za-z]+(?:_\{?\w+\}?)?")


class Interval(NamedTuple):
    """The ends are texts."""

    left: str  # "(" or "["
    low: str
    high: str
    right: str  # ")" or "]"


class Solution(NamedTuple):
    variable: str  # "" without one
    intervals: list[Interval]


def inequality(text: str) -> Solution | None:
    """Intervals of x > 3, 1 < x <= 2, or several inequalities in one variable with commas or "or"."""
    for pattern, sign in _SIGNS:
        text = re.sub(pattern, sign, text)
    if not re.search(r"[<>]", text):
        return None
    parts = [_interval(part) for part in re.split(r",|\\cup|\\vee|\\lor", text)]
    valid = [part for part in parts if part]
    if len(valid) < len(parts) or len({variable for variable, _ in valid}) != 1:
        return None
    return Solution(valid[0][0], [interval for _, interval in valid])


def _interval(text: str) -> tuple[str, Interval] | None:
    """The variable and the interval of a < x, x > a, or a < x <= b."""
    parts = [part.strip() for part in re.split(r"(<=|>=|<|>)", text)]
    if len(parts) not in (3, 5) or len({sign[0] for sign in parts[1::2]}) != 1:
        return None
    if parts[1][0] == ">":  # read from right to left
        parts = [part.replace(">", "<") for part in reversed(parts)]
    if len(parts) == 5 and _VARIABLE.fullmatch(parts[2]):
        return parts[2], Interval(_bracket(parts[1], "(["), parts[0], parts[4], _bracket(parts[3], ")]"))
    if len(parts) == 3 and _VARIABLE.fullmatch(parts[0]) and not _VARIABLE.fullmatch(parts[2]):
        return parts[0], Interval("(", "-\\infty", parts[2], _bracket(parts[1], ")]"))
    if len(parts) == 3 and _VARIABLE.fullmatch(parts[2]) and not _VARIABLE.fullmatch(parts[0]):
        return parts[2], Interval(_bracket(parts[1], "(["), parts[0], "\\infty", ")")
    return None


def _bracket(sign: str, open_closed: str) -> str:
    return open_closed[sign == "<="]


def intervals(text: str) -> Solution | None:
    """Intervals of interval notation: (3,\\infty), [1,2) \\cup (5,7], perhaps after "x \\in"."""
    named = re.match(r"(\\?[A-Za-z]+)\s*\\in(?![A-Za-z])", text)
    parts = [_brackets(part.strip()) for part in (text[named.end() :] if named else text).split("\\cup")]
    valid = [part for part in parts if part]
    return Solution(named[1] if named else "", valid) if len(valid) == len(parts) else None


def _brackets(text: str) -> Interval | None:
    """(a,b) with exactly one comma outside inner brackets."""
    if len(text) < 5 or text[0] not in "([" or text[-1] not in ")]":
        return None
    depth, commas = 0, []
    for i, char in enumerate(text[1:-1], start=1):
        depth += (char in "([{") - (char in ")]}")
        if depth < 0:
            return None
        if char == "," and depth == 0:
            commas.append(i)
    if len(commas) != 1:
        return None
    low, high = text[1 : commas[0]].strip(), text[commas[0] + 1 : -1].strip()
    return Interval(text[0], low, high, text[-1]) if low and high else None
