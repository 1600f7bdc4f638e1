"""HumanEval (Chen et al. 2021) and MBPP (Austin et al. 2021): Python functions, right if all tests
pass in the sandbox (sandbox.py). A model answers in words and a fenced block, or continues the
code.

As published: HumanEval's program is prompt, completion, test, check(entry_point), 3 s; MBPP's
question shows its tests. Different here: no worked examples before MBPP's question.
"""

import re
from dataclasses import dataclass

import chz

from envs.benchmark import BenchmarkBuilder, list_of
from envs.code import CodeGrader, assert_test, extract_program
from envs.problem import Problem
from envs.sandbox import SandboxLimits, check_limits
from posttrain.backend.errors import DataError
from posttrain.renderers.types import Renderer
from rl.types import RLDataset
from supervised.rows import Fields, text_of

SECONDS = 3.0
# where a continuation leaves the function (Chen et al. 2021, section 2.2)
ENDS = re.compile(r"\n(?:class |def |#|if |print)")
DONE = re.compile(r"\[BEGIN\]\n?((?:(?!\[BEGIN\]).)*?)\[DONE\]", re.DOTALL)


@chz.chz
class CodeBenchmark(BenchmarkBuilder):
    """Programs judged by the benchmark's tests."""

    limits: SandboxLimits = chz.field(
        default_factory=lambda: SandboxLimits(cpu_seconds=int(SECONDS), wall_seconds=2 * SECONDS),
        doc="limits of one run of a program",
    )

    def recommended_max_tokens(self) -> int:
        return 1024

    async def test_set(self, renderer: Renderer) -> RLDataset | None:
        await check_limits(self.limits)  # fails here on a machine without a sandbox
        return await BenchmarkBuilder.test_set(self, renderer)


@dataclass(frozen=True)
class FunctionGrader(CodeGrader):
    """A program that defines `entry_point` after the imports and helpers of `prompt`; a response
    without that definition continues the prompt."""

    prompt: str = ""
    entry_point: str = ""

    def extract(self, text: str) -> str | None:
        block = extract_program(text)
        code = text if block is None else block
        definition = re.compile(rf"^[ \t]*(?:async )?def {re.escape(self.entry_point)}\b", re.MULTILINE)
        if definition.search(code):
            return definition.split(self.prompt)[0] + "\n" + code
        return self.prompt + ENDS.split(code)[0]


@chz.chz
class HumanEval(CodeBenchmark):
    """HumanEval: complete a function from its signature and docstring."""

    hub_name: str = chz.field(default="openai/openai_humaneval", doc="Hugging Face dataset")
    prompt_template: str = chz.field(
        default="Complete the following Python function. Answer with the whole function in one fenced code block.\n\n"
        "```python\n{question}```",
        doc="the user message; {question} is replaced",
    )

    def problem(self, where: str, row: Fields) -> Problem:
        prompt, name = text_of(where, row, "prompt"), text_of(where, row, "entry_point")
        test = assert_test(where, f"{text_of(where, row, 'test')}\ncheck({name})")
        gold = text_of(where, row, "canonical_solution")
        grader = FunctionGrader((test,), self.limits, prompt=prompt, entry_point=name)
        return Problem(prompt, gold, grader, None, ("humaneval",), text_of(where, row, "task_id"))


@dataclass(frozen=True)
class MbppGrader(CodeGrader):
    """The last fenced block, what is between [BEGIN] and [DONE], or else the whole response."""

    def extract(self, text: str) -> str | None:
        block, marked = extract_program(text), DONE.findall(text)
        return block or (marked[-1] if marked else text)


@chz.chz
class Mbpp(CodeBenchmark):
    """MBPP: a function from a sentence and three tests."""

    hub_name: str = chz.field(default="google-research-datasets/mbpp", doc="Hugging Face dataset")
    subset: str | None = chz.field(default="full", doc="full or sanitized of the Hugging Face dataset")

    def problem(self, where: str, row: Fields) -> Problem:
        text = text_of(where, row, "text" if "text" in row else "prompt")  # full, sanitized
        tests = list_of(where, row, "test_list")
        if not tests:
            raise DataError(f"{where}: 'test_list' is empty")
        imports = row.get("test_imports")
        setup = row.get("test_setup_code") or ("\n".join(imports) if isinstance(imports, list) else "")
        checked = tuple(assert_test(where, f"{setup}\n{test}" if setup else test) for test in tests)
        shown = "\n".join(tests)
        question = (
            f"You are an expert Python programmer, and here is your task: {text}\nYour code should pass these tests:\n"
            f"\n{shown}\n\nAnswer with the program in one fenced code block."
        )
        grader = MbppGrader(checked, self.limits)
        return Problem(question, text_of(where, row, "code"), grader, None, ("mbpp",), where)
