"""Finding the answer in a solution and deciding equality: hand cases of both kinds, and graders
that hang.
"""

import asyncio
import json
import shlex
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from envs import math_grading
from envs.math_answers import extract_answer, quantity
from envs.math_grading import WORKER, canonical, check_gold, is_equal, is_equal_async
from envs.math_limits import explodes
from envs.problem import GraderError
from rl.types import RolloutError

HANGS = "9^{9^{9^9}}"

EQUAL = [
    ("1000", "1,000"),
    ("12", "12.0"),
    ("3", "3.00"),
    ("18", "$18"),
    ("18", r"\$18.00"),
    ("18", "18 dollars"),
    ("18", "18$"),
    ("18", r"18.00 \$"),
    ("18", "$18$"),
    ("18", r"\(18\)"),
    ("18", "18."),
    ("-3", "\u22123"),
    ("-5", "-$5"),
    ("2125", "2,125 square feet"),
    ("5", r"5\text{ cm}"),
    ("90", r"90^\circ"),
    ("50", "50%"),
    (r"50\%", "50 percent"),
    (r"\frac{1}{2}", "0.5"),
    (r"\frac12", "1/2"),
    (r"\dfrac{2}{4}", ".5"),
    ("2.5", r"2\frac{1}{2}"),
    ("2.5", "2 1/2"),
    ("5", "x=5"),
    ("x = 5", "5"),
    ("(1,2)", r"\left( 1, 2 \right)"),
    ("(1/2, 3)", "(0.5,3.0)"),
    ("2, 3", "3 and 2"),
    (r"\{1,2\}", r"\{2,1\}"),
    (r"\text{Evelyn}", "evelyn"),
    (r"\text{(C)}", "C"),
    (r"\sqrt{2}", "sqrt(2)"),
    (r"x^2+2x+1", "(x+1)^2"),
    (r"\frac{\sqrt{3}}{2}", r"\sqrt{3}/2"),
    ("y=2x+1", "y = 1+2x"),
    (r"-3<x<2", "(-3,2)"),
    ("10!", "3628800"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    (r"\text{Tom and Jerry}", "Tom and Jerry."),
    ("1,000 eggs", "10^3"),
    (r"\pm 2", "-2, 2"),
    ("2+3i", "3i+2"),
    (r"2\sqrt{3}+1", "1 + 2sqrt(3)"),
    ("1011_2", "1011_{2}"),
    ("1011_2", r"1011_{\text{two}}"),
    ("1011_2", "(1011)_2"),
    ("1011_2", "0001011_2"),
    ("1011_2", "1011 (base 2)"),
    ("BEE_{16}", "BEE_{16}"),
    ("11_{10}", "11"),
    ("1000", "1e3"),
    ("1e3", "1000"),
    ("0.00025", "2.5E-4"),
    ("1500", r"1.5 \times 10^3"),
    ("1500", "1.5 x 10^{3}"),
    (r"6.02 \cdot 10^{23}", "602" + "0" * 21),
    ("3", r"\log_2 8"),
    ("3", r"\log_28"),
    ("3", r"\log_{2} 8"),
    ("3", "log_2(8)"),
    (r"\frac{3}{4}", r"\frac3{4}"),
    (r"\frac{3}{4}", r"\frac{3}4"),
    ("(3,oo)", "x>3"),
    ("x>3", "(3,oo)"),
    ("(-oo,3)", "x<3"),
    ("x<3", r"(-\infty, 3)"),
    (r"[3,\infty)", r"x \ge 3"),
    (r"x \geq 3", "3 <= x"),
    ("(1,2]", "1 < x <= 2"),
    ("2 >= x > 1", "(1,2]"),
    (r"(-\infty,1)\cup[5,\infty)", r"x<1 \text{ or } x \geq 5"),
    (r"x>\frac12", "(0.5, +∞)"),
    (r"x \in [0,1)", "0 <= x < 1"),
    ("2^{100}", "1267650600228229401496703205376"),
    ("7^{2023}", "7^{2023}+0"),
    (r"\binom{100}{2}", "4950"),
    ("120!/118!", "14280"),
    ("(1+x)^{10}", "(x+1)^{10}"),
    (r"11,\! 111,\! 100", "11111100"),
    ("1234", r"1\,234"),
    ("1234", "1\u202f234"),
    ("12 345 678", r"12'345\ 678"),
    ("1000000", "1.000.000"),
    ("1.1", "1 100/1000"),
    ("3:4", "3/4"),
    ("3:4", "6:8"),
    ("1:2:3", "2:4:6"),
    ("02:30", "2:30"),
    (r"\frac{1\pm\sqrt5}{2}", r"\frac{1+\sqrt5}{2}, \frac{1-\sqrt5}{2}"),
    (r"\pm1,\pm2", "1,-1,2,-2"),
    ("±3", "+3, -3"),
    ("x=1, y=2", "1, 2"),
    ("1, 2", "x_1=2, x_2=1"),
    (r"\begin{pmatrix}1/2&2\\3&4\end{pmatrix}", r"\begin{bmatrix} \frac12 & 2 \\ 3 & 4.0 \end{bmatrix}"),
    (r"\ln 4", "2ln(2)"),
    (r"\sin(2x)", "2 sin x cos x"),
    (r"\sin^2 x", "sin^2(x)"),
    (r"\emptyset", r"\varnothing"),
    ("5", "5 pounds of flour"),
    ("30", "30 sec"),
    ("(1,2)", "(1;2)"),
    ("5", "5 m"),
    ("5", r"5\text{ m}"),
    ("5", r"5\,\mathrm{m}^2"),
    ("5 m", "5 metres"),
    ("5 meters", "5 metres"),
    ("10 feet", "10 ft"),
    (r"10\text{ cm}^2", "10 square centimeters"),
    ("5 hours", "5 h"),
    ("5", "5 m/s"),
    (r"36\pi", r"36\pi \text{ m}^2"),
    ("14:30", "2:30 p.m."),
    ("2:30 p.m.", "14:30"),
    ("2:30", "2:30 PM"),
    ("8:00 a.m.", "8 am"),
    ("12:15 am", "0:15"),
    ("12:15 pm", "12:15"),
    ("21:10", r"\frac{21}{10}"),
    ("6ab", "6ba"),
    ("6", "2(3)"),
    ("6", "(2)(3)"),
    (r"\sin^2(x)+2x+2", r"2(x+1)+\sin^2(x)"),
    ("x(x+1)(x+2)", "(x+2)(x+1)x"),
    # signs that models write without LaTeX
    ("12", "12 cm²"),
    ("12 cm^2", "12 cm²"),
    ("x^2+1", "x²+1"),
    ("x^{12}", "x¹²"),
    ("2^{n}", "2ⁿ"),
    (r"1.5\times10^{-3}", "1.5·10⁻³"),
    ("x_1", "x₁"),
    ("1011_2", "1011₂"),
    (r"\frac12", "½"),
    ("2.75", "2¾"),
    (r"\frac{\sqrt{3}}{2}", "√3/2"),
    (r"\sqrt{x+1}", "√(x+1)"),
    (r"\sqrt[3]{5}", "∛5"),
    ("6", "2·3"),
    (r"90^\circ", "90º"),
    ("e^{x}", "exp(x)"),
]
DIFFERENT = [
    ("1", "1 000"),
    ("1, 200", "1 200"),
    (r"\begin{pmatrix} 1\\ 100 \end{pmatrix}", r"\begin{pmatrix} 1100 \end{pmatrix}"),
    ("12", "112"),
    ("112", "12"),
    ("12", "1"),
    ("3", "-3"),
    ("1000", "1.000"),
    ("1,234", "1, 234"),
    ("0.5", "50%"),
    ("1/3", "0.333"),
    ("0.1", "0.10000001"),
    ("5 cm", "5 km"),
    ("5", "5 thousand"),
    ("5", "5 less than before"),
    ("7", "5 or maybe 7"),
    ("7", "5 or 7"),
    ("3", "1 2"),
    ("abc+2", "abc-2"),
    ("2.5 abc", "25 abc"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 3 \end{pmatrix}"),
    ("12", "1 2"),
    ("1/2", "1/0"),
    ("x=5", "y=5"),
    ("(1,2)", "1,2"),
    ("(1,2)", "(2,1)"),
    ("[0,1)", "[0,1]"),
    ("1,2,2", "1,1,2"),
    (r"\text{even}", "odd"),
    ("5", ""),
    ("5", "x"),
    (r"\sqrt{2}", r"\sqrt{3}"),
    (r"\pi", "3.14"),
    ("x^2", "x^3"),
    ("5", r"\frac{5"),
    ("5", "9" * 2000),
    ("1011_2", "1011"),
    ("1011", "1011_2"),
    ("1011_2", "1011_3"),
    ("1011_2", "11"),
    ("1011_2", "1012_2"),
    ("5", "2_2+3_2"),
    ("1000", "1e4"),
    ("1000", "1e-3"),
    ("e", "1e1"),
    ("3", r"\log_2 9"),
    ("(3,oo)", "x<3"),
    ("(3,oo)", r"x \ge 3"),
    ("x>3", "y>3"),
    ("x>3", "x>4"),
    ("(1,2)", "1 < x <= 2"),
    (r"(-\infty,1)\cup[5,\infty)", "x<1"),
    ("1 < x < 2", r"(1,2)\cup\{5\}"),
    ("x>3", "3"),
    ("3:4", "4/3"),
    ("1:2:3", "1/6"),
    ("1:2", "0:0"),
    ("2:30", "1:15"),
    ("10:00", "10"),
    ("±3", "(3,-3)"),
    ("±3", "3"),
    ("(1,2)", "1;2"),
    (r"\{1,2\}", "(1;2)"),
    ("x=1, y=2", "2, 1"),
    ("-5", "--5"),
    (r"\begin{pmatrix}1&2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    (r"\begin{pmatrix}12\\34\end{pmatrix}", r"\begin{pmatrix}1 2\\3 4\end{pmatrix}"),
    (r"\sin x", "nis(x)"),
    ("5", "5 hundreds"),
    ("5", "5 million"),
    ("5", "5 tenths"),
    ("5", "5 at least"),
    ("5", "5 remainder two"),
    ("5", "5 out of ten"),
    ("5", "five"),  # as in math_verify; a policy learns numerals from the reward
    ("5", "5m"),
    ("5m", "5"),
    ("5", "5 x"),
    ("5 m", "5 g"),
    ("5 m", "5 m^2"),
    ("6", "6xy"),
    ("6xy", "6"),
    ("6ab", "6"),
    ("36\\pi", "36\\pi h"),
    ("2:30", "1/15"),
    ("1/15", "2:30"),
    ("14:30", "2:30"),
    ("14:30", "2:30 a.m."),
    ("2:30 a.m.", "2:30 p.m."),
    ("12:15 am", "12:15 pm"),
    ("14:30", "14:30 a.m."),
    ("5", "2(3)"),
    ("5", "(2)3"),
]
# What an answer may hold to use up a grader's time; all are wrong at once, whatever the gold answer
# is.
EXPLODING = [
    "9^99999999",
    "9⁹⁹⁹⁹⁹⁹⁹⁹",
    "9^{-99999999}",
    "9^{ 9^{ 9^9 } }",
    "10**10**10",
    "(9^9)^9999999",
    "9^{9999*9999}",
    r"9^{\left(99999999\right)}",
    r"\left(\frac12\right)^{99999999}",
    r"\frac{1}{9^{99999999}}",
    r"\sqrt{9^{999999}}",
    "x^{99999999}",
    "(x+1)^{99999}",
    "100000!",
    "(10^6)!",
    "((9!)!)!",
    "9!!!!!!",
    r"\binom{100000000}{50000000}",
    r"\gamma(100000000)",
    r"\prod_{k=1}^{1000000} k",
    r"\sum_{i=1}^{100000000} i^i",
    "1e999999999",
    "0.5e-99999",
]


@pytest.mark.parametrize(("gold", "answer"), EQUAL)
def test_equal_answers(gold: str, answer: str):
    assert is_equal(gold, answer)


@pytest.mark.parametrize(("gold", "answer"), DIFFERENT)
def test_different_answers(gold: str, answer: str):
    assert not is_equal(gold, answer)


# Trap: an answer that uses up the grader's time, and so escapes its zero.
@pytest.mark.parametrize("answer", EXPLODING)
def test_exploding_answers_are_wrong_and_cost_no_time(answer: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(WORKER, "ask", lambda *_: pytest.fail("asked"))
    for gold in ("5", r"\sqrt{2}", "x+1"):
        assert not is_equal(gold, answer)


@pytest.mark.parametrize(
    "expression",
    [
        r"2^{2^3}",
        "2024!",
        "5!!",
        r"\frac{20!}{10!10!}",
        "1,000,000^2",
        r"\sum_{k=1}^{2024} k",
        "x^2+y^2=100000",
        "3^{3^3}",
        "(x+1)^{50}",
    ],
)
def test_expressions_of_common_size_do_not_explode(expression: str):
    assert not explodes(expression)


# Trap: an exception on the model's text is an EnvError, so that a wrong answer loses its rollout
# instead of its reward.
@pytest.mark.parametrize("answer", ["12 cm²", "x²+1", "①", "x₁", "x^", "2^", r"\le^", "++", "{" * 1000, "x^" * 500])
def test_odd_answers_are_wrong_and_no_failure(answer: str):
    for gold in ("5", r"\sqrt{2}", "x+1"):
        assert not is_equal(gold, answer)


def test_units_after_an_expression():
    for answer in (r"36\pi\text{ cm}^3", "36π cm³", r"36\pi", r"36\pi \text{ cubic feet}"):
        assert is_equal(r"36\pi", answer)
        assert is_equal(answer, r"36\pi")
    assert is_equal(r"10\sqrt{3}\text{ square units}", "10√3 square units")
    assert not is_equal(r"36\pi \text{ cm}^3", r"36\pi \text{ cm}^2")
    assert not is_equal(r"36\pi", r"6\pi \text{ cm}^2") and not is_equal("5l", "5") and not is_equal("12", "144 cm²")


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processor time runs out before the clock does, on a machine as busy as can be."""
    monkeypatch.setattr(math_grading, "PATIENCE", 1000.0)


def test_an_answer_that_is_too_costly_by_itself_is_wrong(patient: None):
    assert not is_equal(r"\sqrt{2}", r"\int \frac{1}{x^{99}+1} dx", seconds=0.5)


def test_a_busy_machine_is_no_wrong_answer(monkeypatch: pytest.MonkeyPatch):
    # the clock runs out before the processor time
    monkeypatch.setattr(math_grading, "PATIENCE", 1e-4)
    with pytest.raises(GraderError, match="by the clock") as error:
        is_equal(r"\sqrt{2}", r"\int \frac{1}{x^{99}+1} dx", seconds=5)
    assert not isinstance(error.value, math_grading.TooCostly)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"so \boxed{1} or rather \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}} done", r"\{1, 2\}"),
        (r"\boxed{\frac{1}{2}", None),
        (r"\boxed{ }", None),
        (r"hence \boxed 7.", "7"),
        (r"hence $\boxed7$", "7"),
        (r"hence \boxed {7}", "7"),
        ("####: 55", "55"),
        ("####55", "55"),
        ("#### **55**", "55"),
        ("48/2 = <<48/2=24>>24\n#### 1,024\n", "1,024"),
        ("#### 5\n#### 6 eggs", "6 eggs"),
        ("#### \n7", None),
        ("**Answer**: 18", "18"),
        ("**Final Answer:** *18*", "18"),
        ("The answer is 3*4", "3*4"),
        ("The **answer** is **x**2**.", "x**2"),
        ("So the final answer is: **42**. Good luck!", "42"),
        ("The answer is $3.50. It is not 4.", "$3.50"),
        ("Therefore it is\nAnswer: 7 apples", "7 apples"),
        ("She has $18\nA: 18", "18"),
        ("I do not know. 18", None),
        (r"the answer is 3, that is \boxed{4}", "4"),
        ("The answer is 18, since 9*2=18.", "18"),
        ("The answer is $5$ because $2+3=5$.", "$5$"),
    ],
)
def test_extraction(text: str, expected: str | None):
    assert extract_answer(text) == expected


def test_extraction_takes_only_the_styles_asked_for():
    assert extract_answer("the answer is 3\n#### 4", ["hash"]) == "4"
    assert extract_answer("the answer is 3", ["hash", "boxed"]) is None


def votes(*answers: str) -> int:
    return len({canonical(answer) for answer in answers})


def test_equal_answers_are_one_vote():
    assert votes("1/2", "0.5", r"\frac12", ".50", "x = 0.5", "50/100 m") == 1
    assert votes("1,234", "$1234.00", "1234 dollars") == 1
    assert votes("1, 2", "2 and 1", r"\{2,1\}", "2.0, 1") == 1
    assert votes("(1,2)", "( 1, 4/2 )") == 1 and votes("Monday", r"\text{monday}", "(monday).") == 1
    assert (
        votes("(1,2)", "(2,1)", "1,2", "[1,2]", "12", "-12", "12%", "1.2") == 7
    )  # 12% has the vote of 12, as it is equal to it
    assert votes("x=1, y=2", "2, 1") == votes("6xy", "6") == votes("Mon", "Tue") == 2


def test_units_that_change_the_value_are_no_units():
    assert quantity("3 dozen") is None and quantity("5 and a half") is None and quantity("2 pi") is None
    assert quantity("5 miles per hour") == (5, "miles per hour")


def test_golds_that_cannot_be_graded_against():
    assert all(map(check_gold, ["5", r"\text{Evelyn}", r"\frac{\sqrt{3}}{2}", "(1, x)"]))
    assert check_gold(r"\frac{1\pm\sqrt5}{2}")
    assert not any(map(check_gold, ["", r"\frac{3", "((", "1, ((3"]))


# Trap: a grader that hangs, scored as wrong.
def test_a_hanging_comparison_ends_with_a_typed_error_and_the_next_one_works(patient: None):
    with pytest.raises(GraderError, match="longer than 0.5 s"):
        is_equal(HANGS, r"\sqrt{2}", seconds=0.5)
    assert issubclass(GraderError, RolloutError)
    assert is_equal(r"\sqrt{2}", "2^{1/2}")


def test_a_crashed_worker_is_an_error_and_not_a_wrong_answer():
    assert is_equal("x+1", "1+x")
    process = WORKER._process
    assert process is not None
    process.kill()
    with pytest.raises(GraderError, match="crashed"):
        is_equal("x+1", "1+x")
    assert is_equal("x+1", "1+x")


def test_numbers_and_words_never_reach_the_worker(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(WORKER, "ask", lambda *_: pytest.fail("asked"))
    assert is_equal("1,000", "$1000.00") and not is_equal("12", "112") and not is_equal("Monday", "Tuesday")


def test_grading_off_the_main_thread():
    results: list[bool] = []
    thread = threading.Thread(target=lambda: results.append(is_equal(r"\sqrt{8}", r"2\sqrt{2}")))
    thread.start()
    thread.join()
    assert results == [True]


def test_grading_from_coroutines_beside_a_comparison_that_hangs():
    async def grade() -> Sequence[bool | BaseException]:
        return await asyncio.gather(
            asyncio.to_thread(is_equal, r"\sqrt{2}", "2^{1/2}"),
            is_equal_async(HANGS, r"\sqrt{2}", 0.5),
            is_equal_async(r"\sqrt{2}", r"\sqrt{3}"),
            is_equal_async("12", "112"),
            return_exceptions=True,
        )

    equal, hung, different, numbers = asyncio.run(grade())
    assert (equal, different, numbers) == (True, False, False) and isinstance(hung, GraderError)


def test_grading_from_coroutines_leaves_the_loop_free(monkeypatch: pytest.MonkeyPatch):
    """The grader here waits for the loop."""
    free = threading.Event()
    monkeypatch.setattr(WORKER, "ask", lambda *_: {"equal": free.wait(600)})

    async def grade() -> bool:
        grading = asyncio.create_task(is_equal_async(r"\sqrt{2}", "2^{1/2}"))
        await asyncio.sleep(0)
        free.set()
        return await grading

    assert asyncio.run(grade())


def test_a_machine_that_allows_less_memory_than_the_limit_can_grade():
    request = {"seconds": 60.0, "patience": 4.0, "gold": "1/2", "answer": "0.5"}
    file = Path(math_grading.__file__).with_name("math_worker.py")
    worker = f"ulimit -v 3500000; exec {shlex.quote(sys.executable)} -I {shlex.quote(str(file))}"
    out = subprocess.run(["bash", "-c", worker], input=json.dumps(request), capture_output=True, text=True, timeout=120)
    assert json.loads(out.stdout.splitlines()[-1]) == {"gold": True, "equal": True}, out.stderr
