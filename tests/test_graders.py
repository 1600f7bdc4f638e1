"""Graders of short answers: which number, text or letter a response states."""

import asyncio

import pytest

from envs.arc_challenge import OptionGrader
from envs.calculator import score as calculator_score
from envs.graders import StatedNumber, StatedText, is_number


def test_answers_are_read_exactly():
    """LaTRO's rules, and the difference between an option and a part of one."""
    number, text = StatedNumber(), StatedText()
    assert number.extract("The answer is 1,234.") == "1234"
    assert number.extract("so 3 and 4") == "4"
    assert number.extract("The answer is 3. No: the answer is 5, not 6.") == "5"
    assert number.extract("no idea") is None
    assert not asyncio.run(number.is_right("1" * 5000, "1"))
    assert asyncio.run(number.is_right("18.0", "18")) and not asyncio.run(number.is_right("18", "180"))
    for said, right in [("the answer is 5.", True), ("The answer is 15", False), ("The answer is 5, 15 or 25", False)]:
        assert asyncio.run(text.is_right(text.extract(said) or "", "5")) is right
    assert text.extract("five") is None
    minus = "the answer is \u22125"
    assert (
        asyncio.run(number.is_right("-5", "\u22125")) and text.extract(minus) == "-5" and calculator_score(minus, "-5")
    )
    assert (
        calculator_score("-7/14", "-1/2") and not calculator_score("10-5", "-5") and not calculator_score("3,4", "34")
    )
    assert asyncio.run(number.is_right("1/3", "0.3")) is False and not is_number("3,4") and is_number("1,234")


# Trap: an operator read as a sign, or a list as one number, makes a wrong answer right.
@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is 18.", "18"),
        ("The answer is 18.0", "18"),
        ("The answer is 018", "18"),
        ("The answer is $1,800.50.", "1800.5"),
        ("The answer is .5", "0.5"),
        ("The answer is -.50", "-0.5"),
        ("The answer is -0.0", "0"),
        ("The answer is \u22125", "-5"),
        ("so... 5", "5"),
        ("so...5", "5"),
        ("so 10-5", "5"),
        ("so 10\u20135", "5"),
        ("so 10 or -5", "-5"),
        ("The answer is -$5", "-5"),
        ("The answer is negative 5", "-5"),
        ("the roots are 3,4", "4"),
        ("The answer is 1,23", "1"),
        ("The answer is 1,234,567", "1234567"),
        ("The answer is 2/4", "0.5"),
        ("The answer is 2/6", "1/3"),
        ("The answer is -3 1/2 m", "-3.5"),
        ("The answer is 1.5e3", "1500"),
        ("on 3/4/2020", "2020"),
        ("#### 1 000", "1000"),
        ("The answer is -12\u202f345\u202f678.5 m", "-12345678.5"),
        ("The answer is $1'000", "1000"),
        ("The answer is 1.000.000", "1000000"),
        (r"The answer is 1{,}000", "1000"),
        ("the page 3 2024", "2024"),
        ("The answer is 12 200-metre runs", "12"),
        ("The answer is 1.000", "1"),
        ("The answer is 1 250/1000", "1.25"),
        ("The answer is 3\u00bd", "3.5"),
        ("The answer is \uff0d\uff11\uff12", "-12"),
    ],
)
def test_equal_numbers_are_one_vote(text: str, answer: str):
    assert StatedNumber().extract(text) == answer


@pytest.mark.parametrize("said", ["A or B", "(A) or (B)", "A, B", "A and B", "A/B", "**A** & **B**"])
def test_two_letters_are_no_choice(said: str):
    assert OptionGrader(4).extract(f"The answer is {said}.") is None
    assert OptionGrader(4).extract("The answer is A, and Bob is right.") == "A"


OPTIONS = ("A cell wall", "photosynthesis", "heat", "30 km/h")
STATED = {
    "B": ["photosynthesis", "The answer is Photosynthesis.", "B. photosynthesis", "Answer:\n\nB) photosynthesis"],
    "C": [
        *(
            "Answer: C",
            "(C)",
            "**C**",
            "C.",
            "The correct answer is C",
            "**Answer:** C",
            "**Answer**: C",
            "ANSWER: (C)",
        ),
        *(
            "Final answer: $\\boxed{C}$",
            "\\boxed{C}",
            "Answer: option C",
            "The correct option is (C).",
            "Heat.\n\n**C**",
        ),
        "answer is: C, since A is wrong",
    ],
    "A": ["The answer is A cell wall.", "The answer is A, because"],
    "D": ["The answer is 30 km/h. So it is.", "Answer: heat\nNo. Answer: (D) 30 km/h"],
}
UNSTATED = [
    *("Answer: A or B", "Answer: A/B", "Answer: Both B and C", "The answer is not C", "Answer: C is wrong"),
    *("A\nB\nC\nD", "A. A cell wall\nB. photosynthesis\nC. heat\nD. 30 km/h", "(A) and (B)", "photosynthesis\nheat"),
    *("Answer: E", "The answer is E.", "Answer:", "", "Answer: Carbon", "A cell", "C. photosynthesis", "A plant"),
    *("Answer: A plant needs it", "Answer: I think so", "The best option is A walk"),
]


@pytest.mark.parametrize(("said", "letter"), [(said, letter) for letter in STATED for said in STATED[letter]])
def test_an_option_is_read_as_published_harnesses_read_it(said: str, letter: str):
    assert OptionGrader(4, OPTIONS).extract(said) == letter


@pytest.mark.parametrize("said", UNSTATED)
def test_what_names_no_option_or_several_is_no_choice(said: str):
    assert OptionGrader(4, OPTIONS).extract(said) is None


def test_an_article_is_no_letter():
    assert OptionGrader(2, ("a wave", "A cell wall")).extract("The answer is A cell wall.") == "B"
    assert OptionGrader(2, ("3", "2")).extract("The answer is 2.") == "B"
