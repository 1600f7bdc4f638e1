r"""Programs to write, judged by their tests in a sandbox (see sandbox.py for its limits).

The answer is the last fenced code block of the response: a Python program, standard library only.
It is right if every test passes. Without a file of problems (below, "solution" is optional), simple
ones are generated. Left out: other languages, special judges, interactive problems.

    {"question": "Print the sum of two integers.", "tests": [{"stdin": "1\n2\n", "stdout": "3\n"}], "solution": "..."}
    {"question": "Write double(x).", "tests": ["assert double(2) == 4", {"assert": "assert double(-1) == -2"}]}
"""

import re
import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import chz
import numpy as np

from envs.problem import Grade, Grader, Problem, ProblemSet, Split
from envs.problem_env import ProblemSetBuilder
from envs.sandbox import Outcome, SandboxLimits, check_limits, run_program
from posttrain.backend.errors import ConfigError, DataError
from posttrain.backend.ranges import SEED, WHOLE
from posttrain.renderers.types import Renderer
from rl.types import Logs, RLDataset
from supervised.rows import Fields, read_rows

# An opening fence, perhaps indented or in a list item; the lines of the block; the closing fence.
FENCED = re.compile(
    r"^(?P<before>[ \t]*(?:(?:[-*+]|\d+[.)])[ \t]+)*)(?P<fence>`{3,}+|~{3,}+)[^\n`]*\n(?P<block>.*?)^[ \t]*(?P=fence)",
    re.DOTALL | re.MULTILINE,
)
SHOWN_CHARS = 1000  # of a failed test's output, in the transcript


@dataclass(frozen=True)
class OutputTest:
    """Standard input and the expected standard output. White space at the ends of lines and empty
    lines at the end do not count.
    """

    stdin: str
    stdout: str


@dataclass(frozen=True)
class AssertTest:
    """Statements that raise if the program is wrong, run after it in the same interpreter. A
    program that exits before them has failed.
    """

    code: str


@dataclass(frozen=True)
class Verdict:
    """How one test ended, and the detail for the transcript."""

    outcome: Outcome
    detail: str = ""


def extract_program(text: str) -> str | None:
    """The last closed fenced block without the indentation of its fence, or None."""
    *_, last = [None, *FENCED.finditer(text)]
    if last is None:
        return None
    lines = last["block"].splitlines(keepends=True)
    indents = [len(line) - len(line.lstrip(" \t")) for line in lines if line.strip()]
    margin = min([len(last["before"]), *indents])
    return "".join(line[margin:] if line.strip() else line for line in lines)


async def run_test(program: str, test: OutputTest | AssertTest, limits: SandboxLimits | None = None) -> Verdict:
    """Runs the program against one test. Raises SandboxError if the sandbox fails."""
    if isinstance(test, AssertTest):
        return await _run_assert(program, test, limits)
    run = await run_program(program, test.stdin, limits)
    if run.outcome != "passed":
        return Verdict(run.outcome, run.stderr[-SHOWN_CHARS:])
    if _lines(run.stdout) == _lines(test.stdout):
        return Verdict("passed")
    return Verdict("wrong", f"stdin {test.stdin!r}: {run.stdout[:SHOWN_CHARS]!r}, not {test.stdout[:SHOWN_CHARS]!r}")


async def _run_assert(program: str, test: AssertTest, limits: SandboxLimits | None) -> Verdict:
    # Only the end of the test prints this word: the program itself may exit with status 0.
    reached = secrets.token_hex(8)
    run = await run_program(f"{program}\n\n{test.code}\n__import__('sys').stdout.write({reached!r})\n", "", limits)
    if run.outcome == "passed":
        return Verdict("passed") if run.stdout.endswith(reached) else Verdict("wrong", f"it ended before {test.code!r}")
    failed = run.outcome == "error" and run.stderr.rstrip().rsplit("\n", 1)[-1].startswith("AssertionError")
    return Verdict("wrong", test.code) if failed else Verdict(run.outcome, run.stderr[-SHOWN_CHARS:])


def _lines(output: str) -> list[str]:
    return [line.rstrip() for line in output.rstrip().splitlines()]


@dataclass(frozen=True)
class CodeGrader(Grader):
    """Runs `tests`. Metrics: `timeouts` (0 or 1); with partial credit `tests_passed`, the reward."""

    tests: tuple[OutputTest | AssertTest, ...]
    limits: SandboxLimits | None = None
    partial_credit: bool = False

    def extract(self, text: str) -> str | None:
        return extract_program(text)

    def shown(self, text: str) -> str:
        return self.extract(text) or "(no program)"

    async def grade(self, text: str, gold: str) -> Grade:
        program, verdicts = self.extract(text), []
        for test in self.tests if program is not None else ():
            verdicts.append(await run_test(program or "", test, self.limits))
            if verdicts[-1].outcome != "passed" and not self.partial_credit:
                break
        passed = sum(verdict.outcome == "passed" for verdict in verdicts) / len(self.tests)
        metrics = {"timeouts": float(any(verdict.outcome == "timeout" for verdict in verdicts))}
        if self.partial_credit:
            metrics["tests_passed"] = passed
        return Grade(program, passed == 1, passed if self.partial_credit else None, metrics, _logs(verdicts))


def _logs(verdicts: Sequence[Verdict]) -> Logs:
    outcomes = Counter(verdict.outcome for verdict in verdicts)
    logs = {"tests": ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items()) or "none run"}
    first = next((verdict for verdict in verdicts if verdict.outcome != "passed"), None)
    return logs | ({"first failure": f"{first.outcome}: {first.detail}"} if first else {})


# --- where problems come from -------------------------------------------------------------------


def read_problem(where: str, row: Fields) -> Problem:
    """One line of a file; the program is its gold answer. Raises DataError."""
    question, tests, solution = row.get("question"), row.get("tests"), row.get("solution", "")
    if not isinstance(question, str) or not isinstance(solution, str):
        raise DataError(
            f"{where}: 'question', and 'solution' where there is one, must be text; the fields are {', '.join(row)} "
            "(form: docs/data_formats.md)"
        )
    if not isinstance(tests, list) or not tests:
        raise DataError(f"{where}: 'tests' must be a list of at least one test")
    checked = tuple(_read_test(f"{where}: tests[{i}]", test) for i, test in enumerate(tests))
    return _problem(question, checked, solution, where)


def _problem(question: str, tests: tuple[OutputTest | AssertTest, ...], program: str, id: str) -> Problem:
    """A Problem; its worked solution is the program in a fenced block, None without a program."""
    solution = f"```python\n{program.rstrip()}\n```" if program.rstrip() else None
    return Problem(question, program, CodeGrader(tests), solution, ("code",), id)


def _read_test(where: str, test: Any) -> OutputTest | AssertTest:
    test = {"assert": test} if isinstance(test, str) else test
    if not isinstance(test, dict) or set(test) not in ({"stdin", "stdout"}, {"assert"}):
        raise DataError(f"{where} must have 'stdin' and 'stdout', or 'assert', not {str(test)[:80]}")
    if not all(isinstance(value, str) for value in test.values()):
        raise DataError(f"{where}: the values must be text")
    return OutputTest(test["stdin"], test["stdout"]) if "stdin" in test else assert_test(where, test["assert"])


def assert_test(where: str, code: str) -> AssertTest:
    """DataError unless it is Python."""
    try:
        compile(code, "<test>", "exec")
    except (SyntaxError, ValueError) as error:
        raise DataError(f"{where}: its test is not Python: {error}") from error
    return AssertTest(code)


def generated_problems() -> list[Problem]:
    """162 problems, "Print 1*a+1*b ..." to "Print 9*a-9*b ...", each with three tests."""
    return [_generated(c, d, sign) for c in range(1, 10) for d in range(1, 10) for sign in "+-"]


def _generated(c: int, d: int, sign: str) -> Problem:
    pairs = np.random.default_rng([c, d, ord(sign)]).integers(-20, 100, (3, 2)).tolist()
    expression = f"{c}*a{sign}{d}*b"
    answers = [c * a + (d if sign == "+" else -d) * b for a, b in pairs]
    tests = tuple(OutputTest(f"{a}\n{b}\n", f"{answer}\n") for (a, b), answer in zip(pairs, answers, strict=True))
    question = f"Print {expression} for integers a and b, one per line."
    return _problem(question, tests, f"a=int(input())\nb=int(input())\nprint({expression})\n", expression)


@chz.chz
class CodeProblems(ProblemSet):
    """Programs to write, from `train_path` and `test_path`, or generated."""

    train_path: str | None = chz.field(default=None, doc="JSONL file to train on; None = generated problems")
    test_path: str | None = chz.field(default=None, doc="JSONL file to evaluate on")
    num_test: int | None = chz.field(
        default=20, validator=WHOLE, doc="number of test problems, the first ones; None = all of a file"
    )
    split_seed: int = chz.field(default=0, validator=SEED, doc="seed of the choice of generated test problems")
    partial_credit: bool = chz.field(default=False, doc="reward the fraction of tests passed; otherwise all or nothing")
    limits: SandboxLimits = chz.field(default_factory=SandboxLimits, doc="limits of one run of a program")

    def read(self, split: Split, limit: int | None) -> list[Problem]:
        path = self.train_path if split == "train" else self.test_path
        rows, is_generated = read_rows(path) if path else [], not (path or self.train_path)
        problems = self._generated(split) if is_generated else [read_problem(*row) for row in rows]
        return [
            replace(p, grader=replace(p.grader, limits=self.limits, partial_credit=self.partial_credit))  # type: ignore[type-var]
            for p in problems[:limit]
        ]

    def _generated(self, split: Split) -> list[Problem]:
        problems, num_test = generated_problems(), self.num_test
        if num_test is None or not 0 <= num_test < len(problems):
            raise ConfigError(
                f"num_test={num_test} of {len(problems)} generated problems: set it to 0 to {len(problems) - 1}"
            )
        order = np.random.default_rng(self.split_seed).permutation(len(problems))
        return [problems[i] for i in (order[:num_test] if split == "test" else order[num_test:])]


@chz.chz
class CodeBuilder(CodeProblems, ProblemSetBuilder):
    """Programs to write by reinforcement learning."""

    need_namespaces: bool = chz.field(
        default=False, doc="refuse a machine whose sandbox cannot isolate network and files"
    )

    def recommended_max_tokens(self) -> int:
        return 512 if self.train_path or self.test_path else 80

    async def __call__(self, renderer: Renderer) -> tuple[RLDataset, RLDataset | None]:
        isolation = await check_limits(self.limits)  # fails here on a machine without a sandbox
        if self.need_namespaces and not isolation.namespaces:
            raise ConfigError(f"need_namespaces=true, but this machine's sandbox has {isolation}")
        print(f"code: programs run with {isolation}")
        return await ProblemSetBuilder.__call__(self, renderer)
