"""Graders on texts that a policy may write to hold the event loop: 300,000 characters of one kind. What
takes time with the square of a text does not end here.
"""

from collections.abc import Callable
from typing import Any

import pytest

from envs import instructions, math_answers
from envs.arc_challenge import OptionGrader
from envs.code import extract_program
from envs.code_benchmarks import FunctionGrader, MbppGrader
from envs.graders import StatedNumber, StatedText
from envs.math_grading import is_equal
from envs.tool_use import LINE

SIZE = 300_000
GRADERS: dict[str, Callable[[str], Any]] = {
    "math": lambda text: math_answers.extract_answer(text),
    "long math": lambda text: is_equal("18", text),
    "number": StatedNumber().extract,
    "text": StatedText().extract,
    "letter": OptionGrader(4).extract,
    "program": extract_program,
    "function": FunctionGrader((), prompt="def f(x):\n", entry_point="f").extract,
    "mbpp": MbppGrader(()).extract,
    "tool lines": LINE.findall,
    "placeholders": lambda text: instructions.has_placeholders(text, 1),
    "postscript": lambda text: instructions.has_postscript(text, "P.S."),
    "bullets": lambda text: instructions.number_of_bullets(text, 1),
    "words": lambda text: instructions.number_of_words(text, 1, "at least"),
    "sentences": lambda text: instructions.count_sentences(text),
}
PIECES = ["\n", " ", " \n", "~", "*", "**a", "[", "[BEGIN]\n", "```\n", "answer is ", "calc: 1", "#### ", "1,", "A "]


# Trap: a regular expression that a policy makes slow: all rollouts wait for it.
@pytest.mark.parametrize("grader", GRADERS)
def test_no_text_takes_a_graders_time(grader: str):
    for piece in PIECES:
        text = piece * (SIZE // len(piece))
        GRADERS[grader](text)
        GRADERS[grader]("answer is " + text + "x")


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("  calc: 1 + 1 \r\n\n answer: 2", [("calc", "1 + 1"), ("answer", "2")]),
        ("\n\n\tcalc:\t1\n", [("calc", "1")]),
        ("calc: \nanswer: x  y", [("answer", "x  y")]),
        ("I calc: 1", []),
    ],
)
def test_lines_of_a_tool_are_read_without_the_space_around_them(text: str, lines: list[tuple[str, str]]):
    assert LINE.findall(text) == lines
