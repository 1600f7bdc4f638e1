r"""Products without a sign: what stands beside a fraction or in brackets is multiplied, and a whole
number before a proper fraction is a mixed number. The parser behind the grader adds in both."""

from fractions import Fraction
from math import comb

import numpy as np
import pytest

from envs.math_grading import is_equal

EQUAL = [
    *((r"\frac{1}{1}2", "2"), (r"\frac{1}{2}12", "6"), (r"\frac{1}{2}10^2", "50"), (r"\frac{4}{2}{3}", "6")),
    *((r"\frac{6}{3}\frac{1}{2}", "1"), (r"\tfrac12\tfrac13", "1/6"), (r"\frac{6}{3}(5)", "10")),
    *((r"(2)\frac12", "1"), (r"2\binom{4}{2}", "12"), (r"\binom{4}{2}3", "18"), (r"\binom{4}{2}\frac12", "3")),
    *((r"-1\frac12", "-3/2"), (r"1+2\dfrac12", "7/2"), (r"3\cdot2\frac12", "15/2"), (r"2\frac12x", "2.5x")),
    *((r"2\frac12\pi", r"\frac{5}{2}\pi"), (r"\frac{\pi}{2}3", r"\frac{3\pi}{2}"), (r"x^2\frac12", r"\frac{x^2}{2}")),
    *((r"2\frac{3x}{2}", "3x"), (r"\frac{\frac12}{3}", "1/6"), (r"\frac{1}{2}(x+1)", r"\frac{x+1}{2}")),
    *((r"\frac{d}{dx}(x^2)", "2x"), (r"\log_{2}8", "3"), (r"\sin(x)\frac12", r"\frac{\sin x}{2}")),
]
UNEQUAL = [
    *((r"\frac{1}{1}2", "3"), (r"\frac{1}{2}12", "3/2"), (r"2\frac12\pi", r"\pi"), (r"2\binom{4}{2}", "8")),
    *((r"(2)\frac12", "5/2"), (r"1\frac32", "5/2"), (r"1\frac32", "3/2"), ("1 3/2", "5/2")),  # improper: either
]


@pytest.mark.parametrize(("written", "value"), EQUAL)
def test_a_product_without_a_sign_is_a_product(written: str, value: str):
    assert is_equal(value, written) and is_equal(written, value)


@pytest.mark.parametrize(("written", "value"), UNEQUAL)
def test_a_product_is_no_sum(written: str, value: str):
    assert not is_equal(value, written)


def test_factors_in_a_row_have_the_value_computed_exactly():
    rng = np.random.default_rng(0)

    def digit(least: int = 1) -> int:
        return int(rng.integers(least, 10))

    def fraction(over: int, under: int) -> str:
        return str(rng.choice(["\\frac", "\\dfrac", "\\tfrac"])) + rng.choice(["{%d}{%d}", " %d%d"]) % (over, under)

    def factor() -> tuple[str, Fraction]:
        a, b, c = digit(), digit(), digit(2)
        kinds = [
            (fraction(a, b), Fraction(a, b)),
            (f"({a})", Fraction(a)),
            (rf"\left({fraction(a, b)}\right)", Fraction(a, b)),
            (rf"\binom{{{max(a, b)}}}{{{min(a, b)}}}", Fraction(comb(max(a, b), min(a, b)))),
            (rf"\frac{{{fraction(a, b)}}}{{{c}}}", Fraction(a, b) / c),
        ]
        return kinds[rng.integers(len(kinds))]

    for _ in range(60):
        first, value = factor() if rng.random() < 0.7 else (f"{(whole := digit())}(1)", Fraction(whole))
        text, others = first, [factor() for _ in range(rng.integers(1, 3))]
        for written, number in others:
            text, value = text + written, value * number
        assert is_equal(str(value), text), text
