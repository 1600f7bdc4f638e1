"""MATH-500 (Lightman et al. 2023: 500 problems of the test set of MATH) and AIME (15 problems a
contest, answers from 0 to 999). An answer in a box, or stated, is right if it equals the reference
as an expression (math_grading.py).
"""

import chz

from envs.benchmark import BenchmarkBuilder
from envs.math_grading import DEFAULT_SECONDS
from envs.math_word import MathGrader, gradable
from envs.problem import Problem
from posttrain.backend.errors import DataError
from supervised.rows import Fields, text_of

STEP_BY_STEP = "{question}\n\nPlease reason step by step, and put your final answer within \\boxed{}."


@chz.chz
class Math500(BenchmarkBuilder):
    """MATH-500; by subject and level too."""

    hub_name: str = chz.field(default="HuggingFaceH4/MATH-500", doc="Hugging Face dataset")
    prompt_template: str = chz.field(default=STEP_BY_STEP, doc="the user message; {question} is replaced")

    def problem(self, where: str, row: Fields) -> Problem:
        gold = text_of(where, row, "answer").strip()
        if not gradable(gold, DEFAULT_SECONDS):
            raise DataError(f"{where}: the answer {gold!r} cannot be graded")
        subject = [row["subject"]] if isinstance(row.get("subject"), str) else []
        tags = ("math500", *subject, *([f"level {row['level']}"] if "level" in row else []))
        return Problem(text_of(where, row, "problem"), gold, MathGrader(), None, tags, where)


@chz.chz
class Aime(BenchmarkBuilder):
    """AIME 2024; another year by hub_name and split, or by path."""

    hub_name: str = chz.field(default="HuggingFaceH4/aime_2024", doc="Hugging Face dataset")
    split: str = chz.field(default="train", doc="split to evaluate on; the hub has all problems in train")
    prompt_template: str = chz.field(default=STEP_BY_STEP, doc="the user message; {question} is replaced")

    def recommended_max_tokens(self) -> int:
        return 8192

    def problem(self, where: str, row: Fields) -> Problem:
        answer = row.get("answer")
        gold = str(answer) if isinstance(answer, int) else text_of(where, row, "answer").strip()
        if not gold.isdecimal() or int(gold) > 999:
            raise DataError(f"{where}: the answer {gold!r} is not a whole number from 0 to 999")
        grader = MathGrader(numbers_only=True)
        return Problem(text_of(where, row, "problem"), str(int(gold)), grader, None, ("aime",), where)
