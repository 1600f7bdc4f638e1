r"""Problems with a free-form mathematical answer in \boxed{...}, as in MATH. Answers are compared as expressions: 1/2 is \frac{1}{2}."""

import chz

from envs.math_answers import extract_answer, extract_boxed
from envs.math_grading import is_equal_async
from posttrain.backend.errors import DataError
from recipes.latro.tasks import Task, TaskBuilder, Verifier
from supervised.rows import read_rows, text_of

TRIGGER = "\nLet's think step by step, and end with: The answer is \\boxed{...}."


class BoxedVerifier(Verifier):
    def extract(self, text: str) -> str | None:
        return extract_answer(text, ("boxed", "stated"))

    async def is_right(self, extracted: str, gold: str) -> bool:
        return await is_equal_async(gold, extracted)


VERIFIER = BoxedVerifier()


@chz.chz
class MathBuilder(TaskBuilder):
    """MATH-style rows: a problem, and a solution whose last \\boxed{...} is the answer."""

    train_path: str = chz.field(doc="JSONL file to train on")
    test_path: str | None = chz.field(default=None, doc="JSONL file of the test set")
    question_field: str = chz.field(default="problem", doc="field with the question")
    solution_field: str = chz.field(default="solution", doc="field with the worked solution")
    trigger: str = chz.field(default=TRIGGER, doc="follows the question")

    response_length = 500

    def train_tasks(self) -> list[Task]:
        return self._tasks(self.train_path)

    def test_tasks(self) -> list[Task]:
        return self._tasks(self.test_path) if self.test_path else []

    def _tasks(self, path: str) -> list[Task]:
        return [
            self._task(where, text_of(where, row, self.question_field), text_of(where, row, self.solution_field))
            for where, row in read_rows(path)
        ]

    def _task(self, where: str, question: str, solution: str) -> Task:
        gold = extract_boxed(solution)
        if gold is None:
            raise DataError(f"{where}: no \\boxed{{...}} in field {self.solution_field!r}, which ends {solution[-40:]!r}")
        return Task(question + self.trigger, f"\nThe answer is \\boxed{{{gold}}}.", gold, VERIFIER, solution)
