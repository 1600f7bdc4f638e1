r"""Decides whether two answers are equal, never by substring. The first rule that applies decides:

1. The same text after math_answers.normalise.
2. Two numbers, exactly, as fractions: 1,000 = 1000.0; 1/2 = \frac12 = 0.5; 1/3 is not 0.333. Units
  are compared where both have one: 5 cm = 5, but not 5 km; 50% = 50; 36\pi cm^3 = 36\pi. 1011_2 is
  neither 1011 nor 11. 5 m is 5, and 5m a product, as 6xy is. 1\frac12 is 3/2; 1\frac32, which may be a
  product, is no number. Ratios, as math_verify has them: 3:4 = 6:8 = 3/4. Times of day:
  2:30 is neither 1:15 nor 1/15, 10:00 not 10; 2:30 p.m. = 14:30, and = 2:30, like a unit.
3. Inequalities and intervals, by their ends: x>3 is (3,\infty).
4. Lists and tuples by element, with the same brackets; the order is free in braces or without
  brackets. 1,234 is a number, 1, 234 a list.
5. Words (three letters in a row that name no function), as text without case.
6. Anything else: sympy, through latex2sympy and math_verify, in a process with a time limit.
"""

import asyncio
import atexit
import json
import re
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from math import gcd
from pathlib import Path
from typing import Any, NamedTuple

from envs.math_answers import MAX_ANSWER_CHARS, normalise, numeral, quantity, same_time, without_units
from envs.math_intervals import Solution, inequality, intervals
from envs.math_limits import explodes
from envs.problem import GraderError
from posttrain.backend.extras import how_to_install

DEFAULT_SECONDS = 5.0
FREE = ("", "{}")  # brackets of lists without an order
PATIENCE = 20.0  # limit by the clock, as a multiple of the limit of processor time
# the spaces of x + 1, but not those of 1 2 and of 1, 234
_NO_MEANING = re.compile(r"\s+(?!\d)|(?<![\d,])\s+")
_PAIR = r"\\(?:[cdt]?frac|[dt]?binom)(?=\s*\{)"
# the products 2(3), (2)3, (2)\frac12 and 2\binom42, which the parser would take for mixed numbers; not of \sin^2(x)
_PRODUCT = re.compile(
    rf"(?<![\^_]\d)(?<=[\d)])\s*(?=\()|(?<=\))\s*(?=\d|{_PAIR})|(?<![\^_]\d)(?<=\d)\s*(?=\\[dt]?binom)"
)
_DERIVATIVE = re.compile(r"\{\s*(?:d|\\partial)\s*[A-Za-z]\s*\}\Z")
_MIXED = re.compile(
    r"(?<![\w.^}\])])(?P<whole>\d+)\s*(?P<part>\\c?frac\s*\{\s*(?P<over>\d+)\s*\}\s*\{\s*(?P<under>\d+)\s*\})"
)


def is_equal(gold: str, answer: str, seconds: float = DEFAULT_SECONDS) -> bool:
    """Whether `answer` is the gold answer. `seconds`: processor time of one symbolic comparison.

    An answer that is too costly by itself is wrong: math_limits.py refuses it, or it exceeds the
    limits against the gold answer 1 too. Raises GraderError if only the comparison is too costly.
    """
    if len(answer) > MAX_ANSWER_CHARS:
        return False
    gold, answer = _strip_assignments(normalise(gold), normalise(answer))
    if not answer:
        return False
    if _NO_MEANING.sub("", gold) == _NO_MEANING.sub("", answer):
        return True
    gold_numeral, other_numeral = numeral(gold), numeral(answer)
    if gold_numeral or other_numeral:
        in_ten = [str(int(n.digits)) if n and n.base == 10 else None for n in (gold_numeral, other_numeral)]
        if any(in_ten):
            return is_equal(in_ten[0] or gold, in_ten[1] or answer, seconds)
        return gold_numeral == other_numeral
    if (same := same_time(gold, answer)) is not None:
        return same
    gold_ratio, ratio = _ratio(gold), _ratio(answer)
    if gold_ratio and ratio:
        return _proportional(gold_ratio, ratio)
    if terms := gold_ratio or ratio:
        if len(terms) > 2 or terms[1].startswith("0") or (_may_be_time(terms) and gcd(*map(int, terms)) > 1):
            return False  # 2:30 is a time and not 1/15; 21:10 may be a ratio
        gold, answer = (gold.replace(":", "/"), answer) if gold_ratio else (gold, answer.replace(":", "/"))
    gold_number, number = quantity(gold), quantity(answer)
    if gold_number and number:
        return gold_number.value == number.value and (
            not gold_number.unit or not number.unit or gold_number.unit == number.unit
        )
    gold, answer = without_units(gold, answer)
    solutions = _solutions(gold, answer)
    if solutions:
        return _solutions_equal(*solutions, seconds)
    gold_sequence, sequence = _sequence(gold), _sequence(answer)
    if (gold_number and sequence) or (number and gold_sequence):
        return False
    if gold_sequence and sequence:
        return _sequences_equal(gold_sequence, sequence, seconds)
    gold = str(gold_number.value) if gold_number else gold
    answer = str(number.value) if number else answer
    if is_words(gold) or is_words(answer):
        return _bare_words(gold) == _bare_words(answer)
    if re.search(r"[\d)}]\s+\d", re.sub(r"\\begin\{\w+\}", "", answer)):  # "1 2": the parser would add them
        return False
    # a base within an expression: the parser would drop it
    if re.search(r"[\d)]\s*_", gold + "," + answer):
        return False
    if explodes(answer):
        return False
    if any(int(match["over"]) >= int(match["under"]) for match in _MIXED.finditer(answer)):
        return False  # 1\frac32: 5/2, or 3/2
    return _symbolically_equal(with_products(gold), with_products(answer), seconds)


def with_products(text: str) -> str:
    r"""Signs where the parser reads something else: 2\frac12\pi is (2+\frac12)\pi, \frac{4}{2}3 is
    \frac{4}{2}\cdot 3."""
    text = _MIXED.sub(r"(\g<whole>+\g<part>)", text)
    ends = [_group_end(text, _group_end(text, match.end())) for match in re.finditer(_PAIR, text)]
    for end in sorted(ends, reverse=True):
        if re.match(rf"\s*(?:[\d.{{(]|{_PAIR})", text[end:]) and not _DERIVATIVE.search(text[:end]):
            text = text[:end] + r"\cdot " + text[end:]
    return _PRODUCT.sub(r"\\cdot ", text)


def _group_end(text: str, start: int) -> int:
    """The index after the group in braces that begins at or after `start`; that of the text where it has no end."""
    depth = 0
    for match in re.finditer(r"\\.|[{}]", text[start:], re.DOTALL):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth <= 0:
            return start + match.end()
    return len(text)


def _symbolically_equal(gold: str, answer: str, seconds: float) -> bool:
    try:
        return bool(WORKER.ask(gold, answer, seconds)["equal"])
    except TooCostly:
        try:
            WORKER.ask("1", answer, seconds)
        except TooCostly:
            return False
        raise


async def is_equal_async(gold: str, answer: str, seconds: float = DEFAULT_SECONDS) -> bool:
    """`is_equal` off the event loop: all but plain numbers run in one thread."""
    if len(answer) > MAX_ANSWER_CHARS or (quantity(gold) and quantity(answer)):
        return is_equal(gold, answer)
    return await asyncio.get_running_loop().run_in_executor(_THREAD, is_equal, gold, answer, seconds)


def canonical(answer: str) -> str:
    """One text for answers that are equal by rules 1 to 5, without units, so 1/2 for 0.5; of other
    expressions the notation is normalised, and no more."""
    text = normalise(answer)
    if match := _ASSIGNMENT.fullmatch(text):
        text = match[1].strip()
    if number := quantity(text):
        return str(number.value)
    sequence = _sequence(text)
    if sequence and not _names_several(sequence):
        items, free = [canonical(item) for item in sequence.items], sequence.brackets in FREE
        left, right = ("", "") if free else sequence.brackets
        return left + ", ".join(sorted(items) if free else items) + right
    return _bare_words(text) if is_words(text) else _NO_MEANING.sub("", text)


def check_gold(gold: str, seconds: float = DEFAULT_SECONDS) -> bool:
    """Whether a gold answer can be graded: a number, words, an expression that parses, or a list."""
    gold = normalise(gold)
    if quantity(gold) or is_words(gold):
        return True
    sequence = _sequence(gold)
    if sequence:
        return all(check_gold(item, seconds) for item in sequence.items)
    return bool(gold) and WORKER.ask(gold, None, seconds)["gold"]


def is_words(text: str) -> bool:
    """Whether `text` has words beside formulas and LaTeX commands, or is a choice such as (A)."""
    plain = re.sub(r"\\(?:begin|end)\{\w+\}|\\[A-Za-z]+|\b(?:sin|cos|tan|log|exp|mod)\b", " ", text)
    return bool(re.search(r"[A-Za-z]{3,}", plain)) or bool(re.fullmatch(r"\(?[A-Z]\)?", text))


def _bare_words(text: str) -> str:
    return re.sub(r"[\s\"']", "", text.lower()).strip("().")


def _ratio(text: str) -> list[str]:
    """The terms of a ratio or a time of day, 3:4 or 2:30; [] for other texts."""
    return re.split(r"\s*:\s*", text) if re.fullmatch(r"\d+(?:\.\d+)?(?:\s*:\s*\d+(?:\.\d+)?)+", text) else []


def _proportional(gold: list[str], answer: list[str]) -> bool:
    """3:4 and 6:8, but not 1:15 and 2:30, which may be times of day."""
    left, right = [Fraction(term) for term in gold], [Fraction(term) for term in answer]
    if left == right or len(left) != len(right) or all(map(_may_be_time, (gold, answer))):
        return left == right
    return any(left) and any(right) and all(a * sum(right) == b * sum(left) for a, b in zip(left, right, strict=True))


def _may_be_time(terms: list[str]) -> bool:
    return len(terms) == 2 and bool(re.fullmatch(r"(?:[01]?\d|2[0-4]):[0-5]\d", ":".join(terms)))


_ASSIGNMENT = re.compile(r"(?:\\?[A-Za-z]+|[A-Za-z]_\{?\w+\}?|[A-Za-z]\([a-z]\))\s*=\s*([^=]+)")


def _strip_assignments(gold: str, answer: str) -> tuple[str, str]:
    """x = 5 against 5: drops the left-hand side where only one of the two has it."""
    gold_match, match = _ASSIGNMENT.fullmatch(gold), _ASSIGNMENT.fullmatch(answer)
    if bool(gold_match) == bool(match):
        return gold, answer
    return (gold_match[1], answer) if gold_match else (gold, match[1] if match else answer)


class Items(NamedTuple):
    brackets: str  # "", "()", "[)", "{}" ...
    items: list[str]


def _sequence(text: str) -> Items | None:
    """Splits at the commas outside brackets, without a pair around the whole; 1 \\pm 2 outside a tuple
    is 1 + 2, 1 - 2. None for one item."""
    text = text.replace("\\{", "{").replace("\\}", "}")
    brackets = ""
    if text[:1] in tuple("([{") and text[-1:] in tuple(")]}") and _closes_at_end(text):
        brackets, text = text[0] + text[-1], text[1:-1]
    depth, items = 0, [""]
    for char in text:
        depth += (char in "([{") - (char in ")]}")
        if char == "," and depth == 0:
            items.append("")
        else:
            items[-1] += char
    signs = "" if brackets in ("()", "[]", "(]", "[)") else "+-"
    items = [
        (item.replace("\\pm", sign) if sign else item).strip().removeprefix("+").strip()
        for item in items
        for sign in (signs if item.count("\\pm") == 1 and signs else [""])
    ]
    return Items(brackets, items) if len(items) > 1 and all(items) else None


def _closes_at_end(text: str) -> bool:
    depth = 0
    for i, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if depth == 0:
            return i == len(text) - 1
    return False


def _sequences_equal(gold: Items, answer: Items, seconds: float) -> bool:
    if len(gold.items) != len(answer.items):
        return False
    if not (gold.brackets in FREE and answer.brackets in FREE) or _names_several(gold) != _names_several(answer):
        pairs = zip(gold.items, answer.items, strict=True)
        kinds = ["" if items.brackets in FREE else items.brackets for items in (gold, answer)]
        return kinds[0] == kinds[1] and all(is_equal(g, a, seconds) for g, a in pairs)
    left = list(answer.items)
    for item in gold.items:
        match = next((i for i, other in enumerate(left) if is_equal(item, other, seconds)), None)
        if match is None:
            return False
        del left[match]
    return True


def _names_several(items: Items) -> bool:
    """Whether it gives values to different variables: x=1, y=2, but not x_1=1, x_2=2."""
    return (
        len({match[0] for item in items.items if (match := re.match(r"\\?[A-Za-z]+(?=(?:_\{?\w+\}?)?\s*=)", item))}) > 1
    )


def _solutions(gold: str, answer: str) -> tuple[Solution, Solution] | None:
    """Both as intervals, where one is an inequality and the other can be read as intervals."""
    inequalities = inequality(gold), inequality(answer)
    both = inequalities[0] or intervals(gold), inequalities[1] or intervals(answer)
    return (both[0], both[1]) if any(inequalities) and both[0] and both[1] else None


def _solutions_equal(gold: Solution, answer: Solution, seconds: float) -> bool:
    named = {solution.variable for solution in (gold, answer) if solution.variable}
    if len(named) > 1 or len(gold.intervals) != len(answer.intervals):
        return False
    left = list(answer.intervals)
    for interval in gold.intervals:
        same = (
            i
            for i, other in enumerate(left)
            if (interval.left, interval.right) == (other.left, other.right)
            and all(is_equal(a, b, seconds) for a, b in ((interval.low, other.low), (interval.high, other.high)))
        )
        match = next(same, None)
        if match is None:
            return False
        del left[match]
    return True


class TooCostly(GraderError):
    """A comparison exceeded its processor time or memory, or crashed the algebra system."""


class SymbolicWorker:
    """A process, started at the first question and again after a crash. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def ask(self, gold: str, answer: str | None, seconds: float) -> dict[str, Any]:
        """The reply of math_worker.py. Raises GraderError at the time limit or if the process dies."""
        with self._lock:
            process = self._process or self._start()
            try:
                print(
                    json.dumps({"seconds": seconds, "patience": PATIENCE, "gold": gold, "answer": answer}),
                    file=process.stdin,
                    flush=True,
                )
                reply = process.stdout.readline() if process.stdout else ""
            except BrokenPipeError:
                reply = ""
            except BaseException:  # Ctrl-C: the next question must not read this reply
                self.stop()
                raise
            if reply:
                return json.loads(reply)
            code = process.wait()
            self.stop()
        comparison = f"comparing {answer!r} with the gold answer {gold!r}"
        if code == -signal.SIGPROF:
            raise TooCostly(f"{comparison} took longer than {seconds:g} s")
        # an exception in the algebra system, no memory, a stack overflow
        if code in (1, -signal.SIGSEGV):
            raise TooCostly(f"{comparison} crashed the grader (exit code {code})")
        failure = (
            f"was not done in {PATIENCE * seconds:g} s by the clock"
            if code == -signal.SIGALRM
            else f"crashed the grader ({code})"
        )
        raise GraderError(f"{comparison} {failure}")

    def _start(self) -> subprocess.Popen[str]:
        # -I: none of this project's folders on its path
        command = [sys.executable, "-I", str(Path(__file__).with_name("math_worker.py"))]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
        if not (self._process.stdout and self._process.stdout.readline()):
            self.stop()
            raise GraderError(f"the math grader does not start; install its packages: {how_to_install('math_verify')}")
        return self._process

    def stop(self) -> None:
        process, self._process = self._process, None
        if process:
            process.kill()
            process.communicate()


WORKER = SymbolicWorker()
atexit.register(WORKER.stop)
_THREAD = ThreadPoolExecutor(1, thread_name_prefix="math-grading")
