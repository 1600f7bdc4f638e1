"""A JSONL file of problems to evaluate on. The columns of its first row tell what it holds: a
benchmark as published, programs to write (code.py), ARC, GSM8K, or questions with an answer.
"""

from collections.abc import Mapping
from functools import partial

import chz

from envs.arc_challenge import ArcChallenge
from envs.benchmark import BenchmarkBuilder
from envs.code import read_problem
from envs.code_benchmarks import HumanEval, Mbpp
from envs.graders import StatedText
from envs.ifeval import IfEval
from envs.math_answers import quantity
from envs.math_benchmarks import Math500
from envs.math_word import Gsm8k, MathGrader
from envs.multiple_choice import Gpqa, MmluPro
from envs.problem import Problem
from posttrain.backend.errors import DataError
from posttrain.renderers.types import Renderer
from rl.types import RLDataset
from supervised.rows import Fields, read_rows, text_of


def question_and_answer(where: str, row: Fields) -> Problem:
    """GSM8K's row; or an answer that is a number, equal as a number, or a text that the response
    states after "the answer is"."""
    answer = text_of(where, row, "answer").strip()
    if "####" in answer:
        return Gsm8k().problem(where, row)
    grader = MathGrader() if quantity(answer) else StatedText()
    return Problem(text_of(where, row, "question"), answer, grader, id=where)


BENCHMARKS = {
    ("prompt", "canonical_solution", "test", "entry_point"): HumanEval,
    ("code", "test_list"): Mbpp,
    ("prompt", "instruction_id_list", "kwargs"): IfEval,
    ("question", "options", "answer", "category"): partial(MmluPro, shots=0),
    ("Question", "Correct Answer"): Gpqa,
    ("problem", "answer"): Math500,
}
ROWS = {
    ("question", "choices", "answerKey"): ArcChallenge().problem,
    ("question", "tests"): read_problem,
    ("question", "answer"): question_and_answer,
}


@chz.chz
class BenchmarkFile(BenchmarkBuilder):
    """Problems of a JSONL file."""

    def benchmark(self) -> BenchmarkBuilder | None:
        """The benchmark with the columns of the file, and the options that are given."""
        columns = self._columns()
        make = next((make for needed, make in BENCHMARKS.items() if columns.issuperset(needed)), None)
        default = BenchmarkBuilder()
        fields = {name: getattr(self, name) for name in chz.chz_fields(BenchmarkBuilder)}
        given = {name: value for name, value in fields.items() if value != getattr(default, name)}
        return make(**given) if make else None

    def problem(self, where: str, row: Fields) -> Problem:
        read = next((read for needed, read in ROWS.items() if set(needed) <= row.keys()), None)
        if read is None:
            forms = "; ".join(", ".join(needed) for needed in [*BENCHMARKS, *ROWS])
            raise DataError(f"{where}: the columns are {', '.join(row)}; a file of problems has one of: {forms}")
        return read(where, row)

    async def test_set(self, renderer: Renderer) -> RLDataset | None:
        if benchmark := self.benchmark():
            return await benchmark.test_set(renderer)
        return await BenchmarkBuilder.test_set(self, renderer)

    def ratios(self) -> Mapping[str, tuple[str, str]]:
        benchmark = self.benchmark()
        return benchmark.ratios() if benchmark else {}

    def recommended_max_tokens(self) -> int:
        benchmark = self.benchmark()
        return benchmark.recommended_max_tokens() if benchmark else 512

    def _columns(self) -> set[str]:
        return set(read_rows(self.path or "", most=1)[0][1])
