r"""Bounds the numbers of an expression by its text, before an algebra system computes them.

9^99999999, 99999!, \binom{10^9}{7} and towers of powers would take the grader's whole time, and a
policy could escape the reward of a wrong answer with them. Left out: integrals, and expressions
whose size no number in them shows.
"""

import math
import re

MAX_EXPONENT_DIGITS = 4  # exponents, arguments of factorials, ends of sums: up to 10,000
MAX_DIGITS = 20_000  # of a number that a power or a factorial makes
MAX_POLYNOMIAL_POWER = 100  # of a sum with letters in it

_TOKEN = re.compile(r"\d+(?:[\d,]*\.?\d+)?(?:[eE][+-]?\d+)?|\.\d+|\\?[A-Za-z]+|\\?[{}]|!+|\S")
_OPEN, _CLOSED = ("(", "[", "{", "\\{"), (")", "]", "}", "\\}")
_COUNTED = {"\\binom", "\\dbinom", "\\tbinom", "\\Gamma", "\\gamma", "gamma"}
_COUNTED |= {"factorial", "binomial", "\\choose", "fibonacci"}


def explodes(expression: str) -> bool:
    """Whether a power, factorial or binomial may exceed MAX_DIGITS digits, or an exponent 10,000.
    A text whose size cannot be read counts as one, too: an exception would be the environment's
    failure, and a wrong answer would lose its rollout instead of its reward."""
    try:
        _digits(_TOKEN.findall(expression))
    except (OverflowError, ValueError, IndexError, RecursionError):
        return True
    return False


def _digits(tokens: list[str]) -> float:
    """An upper bound of log10 of the value, letters counted as 1. OverflowError above MAX_DIGITS."""
    total, base, inside, counted = 0.0, 0.0, [""], False
    i = 0
    while i < len(tokens):
        token = tokens[i]
        if token == "^":
            operand, i = _operand(tokens, i + 1)
            while tokens[i : i + 1] == ["^"]:  # a tower is computed from its top
                above, i = _operand(tokens, i + 1)
                operand = ["(", *operand, ")", "^", "(", *above, ")"]
            exponent = _limited(_digits(operand))
            if exponent > MAX_POLYNOMIAL_POWER and _is_sum_with_letters(inside):
                raise OverflowError
            base *= exponent
        elif token[0] == "!":
            for _ in range(0, len(token), 2):  # !! is one double factorial
                base = _limited(base) * base
            i += 1
        else:
            inside, i = _operand(tokens, i)
            base = _size(inside[0]) if len(inside) == 1 else _digits(inside)
            if counted:
                _limited(base)
            counted = token in _COUNTED
        if base > MAX_DIGITS:
            raise OverflowError
        if i >= len(tokens) or tokens[i][0] not in "^!":
            total += math.log10(1 + 10**base) if base < 300 else base
    return total


def _operand(tokens: list[str], start: int) -> tuple[list[str], int]:
    """The token, signed token or inside of a group at `start`, and the index after it."""
    while start < len(tokens) and tokens[start] in ("+", "-"):
        start += 1
    if start >= len(tokens) or tokens[start] not in _OPEN:
        return tokens[start : start + 1] or ["1"], start + 1
    depth = 0
    for i in range(start, len(tokens)):
        depth += (tokens[i] in _OPEN) - (tokens[i] in _CLOSED)
        if depth == 0:
            return tokens[start + 1 : i] or ["1"], i + 1
    return tokens[start + 1 :] or ["1"], len(tokens)


def _is_sum_with_letters(tokens: list[str]) -> bool:
    return not {"+", "-"}.isdisjoint(tokens) and any(token.isalpha() for token in tokens)


def _size(token: str) -> float:
    # isdecimal: what int() reads; isdigit would add superscripts and circled digits
    mantissa, _, exponent = token.lower().partition("e") if token[0].isdecimal() else (token, "", "")
    digits = sum(char.isdecimal() for char in mantissa)
    if len(exponent.lstrip("+-0")) > MAX_EXPONENT_DIGITS - 1:
        raise OverflowError
    figure = int("".join(filter(str.isdecimal, mantissa))[:15] or 1)
    return (math.log10(max(figure, 1)) + max(0, digits - 15) if digits else 0.0) + abs(int(exponent or 0))


def _limited(digits: float) -> float:
    """10**digits. OverflowError beyond MAX_EXPONENT_DIGITS."""
    if digits > MAX_EXPONENT_DIGITS + 1e-4:
        raise OverflowError
    return 10**digits
