r"""Decides whether two answers are equal. Never by substring. The first rule that applies decides:

1. the same text, after spacing, dollar signs, unicode minus and the like are normalised
   (math_answers.py);
2. two numbers: exactly, as fractions. 1,000 = 1000 = 1000.0; 1/2 = \frac12 = 0.5; 1/3 is not 0.333.
   Units are dropped, unless
   both sides have one and they differ: 5 cm = 5, $5 = 5 dollars, 5 cm is not 5 km. A percent sign
   is a unit: 50% = 50, not 0.5. A base other than ten belongs to a number: 1011_2 is neither 1011
   nor 11;
3. an inequality and an interval, or two inequalities, by their ends: x>3 is (3,\infty);
4. comma-separated lists and tuples, element by element, with the same brackets: (1,2) is not 1,2.
   Without brackets, or in
   braces, the order is free. 1,234 is a number, 1, 234 a list;
5. words (three letters in a row that are no function's name): as text, without case;
6. anything else: sympy, through latex2sympy and math_verify, in a process that is killed when its
   time is over.

An answer that is too costly by itself is wrong: powers and factorials that math_limits.py refuses,
and what uses up the time or the memory of the grader also beside the gold answer 1. A comparison
that only together takes too long is a GraderError.
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
from pathlib import Path
from typing import Any, NamedTuple

from envs.math_answers import MAX_ANSWER_CHARS, normalise, numeral, quantity
from envs.math_intervals import Solution, inequality, intervals
from envs.math_limits import explodes
from envs.problem import GraderError

DEFAULT_SECONDS = 5.0
# a grader that has not used up its processor time by so many times `seconds` is stuck on a busy
# machine
PATIENCE = 20.0
# the spaces of x + 1, but not those of 1 2 and of 1, 234
_NO_MEANING = re.compile(r"\s+(?!\d)|(?<![\d,])\s+")


def is_equal(gold: str, answer: str, seconds: float = DEFAULT_SECONDS) -> bool:
    """Whether `answer` is the gold answer. `seconds` of processor time bound one symbolic
    comparison. Raises GraderError.
    """
    gold, answer = _strip_assignments(normalise(gold), normalise(answer))
    if not answer or len(answer) > MAX_ANSWER_CHARS:
        return False
    if _NO_MEANING.sub("", gold) == _NO_MEANING.sub("", answer):
        return True
    gold_numeral, other_numeral = numeral(gold), numeral(answer)
    if gold_numeral or other_numeral:
        in_ten = [str(int(one.digits)) if one and one.base == 10 else None for one in (gold_numeral, other_numeral)]
        if any(in_ten):
            return is_equal(in_ten[0] or gold, in_ten[1] or answer, seconds)
        return gold_numeral == other_numeral
    gold_number, number = quantity(gold), quantity(answer)
    if gold_number and number:
        return gold_number.value == number.value and (
            not gold_number.unit or not number.unit or gold_number.unit == number.unit
        )
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
    if re.search(r"[\d)}]\s+\d", answer):  # "1 2": the parser would add them
        return False
    # a base within an expression: the parser would drop it
    if re.search(r"[\d)]\s*_", gold + "," + answer):
        return False
    if explodes(answer):
        return False
    return _symbolically_equal(gold, answer, seconds)


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
    """`is_equal` without holding up the event loop: all but plain numbers waits its turn in one
    thread.
    """
    if len(answer) > MAX_ANSWER_CHARS or (quantity(gold) and quantity(answer)):
        return is_equal(gold, answer)
    return await asyncio.get_running_loop().run_in_executor(_THREAD, is_equal, gold, answer, seconds)


def check_gold(gold: str, seconds: float = DEFAULT_SECONDS) -> bool:
    """Whether a gold answer can be graded against: a number, words, an expression that parses, or a
    list of these.
    """
    gold = normalise(gold)
    if quantity(gold) or is_words(gold):
        return True
    sequence = _sequence(gold)
    if sequence:
        return all(check_gold(item, seconds) for item in sequence.items)
    return bool(gold) and WORKER.ask(gold, None, seconds)["gold"]


def is_words(text: str) -> bool:
    """Letters that are neither a formula nor a LaTeX command: names, weekdays, the (A) of a
    multiple choice.
    """
    plain = re.sub(r"\\[A-Za-z]+|\b(?:sin|cos|tan|log|exp|mod)\b", " ", text)
    return bool(re.search(r"[A-Za-z]{3,}", plain)) or bool(re.fullmatch(r"\(?[A-Z]\)?", text))


def _bare_words(text: str) -> str:
    return re.sub(r"[\s\"']", "", text.lower()).strip("().")


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
    """Splits at the commas outside brackets, after taking off one pair around the whole. None where
    there is no such comma.
    """
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
    items = [item.strip() for item in items]
    return Items(brackets, items) if len(items) > 1 and all(items) else None


def _closes_at_end(text: str) -> bool:
    depth = 0
    for i, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if depth == 0:
            return i == len(text) - 1
    return False


def _sequences_equal(gold: Items, answer: Items, seconds: float) -> bool:
    free = {"", "{}"}
    if len(gold.items) != len(answer.items):
        return False
    if not {gold.brackets, answer.brackets} <= free:
        pairs = zip(gold.items, answer.items, strict=True)
        return gold.brackets == answer.brackets and all(is_equal(g, a, seconds) for g, a in pairs)
    left = list(answer.items)
    for item in gold.items:
        match = next((i for i, other in enumerate(left) if is_equal(item, other, seconds)), None)
        if match is None:
            return False
        del left[match]
    return True


def _solutions(gold: str, answer: str) -> tuple[Solution, Solution] | None:
    """Both as intervals, where one of them is an inequality and the other can be read so."""
    inequalities = inequality(gold), inequality(answer)
    both = inequalities[0] or intervals(gold), inequalities[1] or intervals(answer)
    return (both[0], both[1]) if any(inequalities) and both[0] and both[1] else None


def _solutions_equal(gold: Solution, answer: Solution, seconds: float) -> bool:
    named = {solution.variable for solution in (gold, answer) if solution.variable}
    if len(named) > 1 or len(gold.intervals) != len(answer.intervals):
        return False
    left = list(answer.intervals)
    for one in gold.intervals:
        same = (
            i
            for i, other in enumerate(left)
            if (one.left, one.right) == (other.left, other.right)
            and all(is_equal(a, b, seconds) for a, b in ((one.low, other.low), (one.high, other.high)))
        )
        match = next(same, None)
        if match is None:
            return False
        del left[match]
    return True


class TooCostly(GraderError):
    """A comparison used up its processor time or memory, or made the algebra system fail."""


class SymbolicWorker:
    """One process, started at the first question and again after each that killed it. Safe to ask
    from any thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def ask(self, gold: str, answer: str | None, seconds: float) -> dict[str, Any]:
        """The reply of math_worker.py. Raises GraderError if the time is over or the process
        dies.
        """
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
            except BaseException:  # Ctrl-C: the next question must not read this one's answer
                self.stop()
                raise
            if reply:
                return json.loads(reply)
            code = process.wait()
            self.stop()
        what = f"comparing {answer!r} with the gold answer {gold!r}"
        if code == -signal.SIGPROF:
            raise TooCostly(f"{what} took longer than {seconds:g} s")
        # an exception within the algebra system, memory used up, a stack overflown
        if code in (1, -signal.SIGSEGV):
            raise TooCostly(f"{what} crashed the grader (exit code {code})")
        how = (
            f"was not done in {PATIENCE * seconds:g} s by the clock"
            if code == -signal.SIGALRM
            else f"crashed the grader ({code})"
        )
        raise GraderError(f"{what} {how}")

    def _start(self) -> subprocess.Popen[str]:
        # -I: no folder of ours on its path
        command = [sys.executable, "-I", str(Path(__file__).with_name("math_worker.py"))]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
        if not (self._process.stdout and self._process.stdout.readline()):
            self.stop()
            raise GraderError(
                "the math grader does not start; install its packages: pip install 'posttrain-cookbook[train]'"
            )
        return self._process

    def stop(self) -> None:
        process, self._process = self._process, None
        if process:
            process.kill()
            process.communicate()


WORKER = SymbolicWorker()
atexit.register(WORKER.stop)
_THREAD = ThreadPoolExecutor(1, thread_name_prefix="math-grading")
