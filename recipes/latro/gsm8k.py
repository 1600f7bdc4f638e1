"""GSM8K: word problems with worked solutions. The rationale is the solution without its calculator marks; LaTRO does not read it."""

from collections.abc import Iterable

import chz

from envs.math_word import read_hub, strip_calculator_marks
from posttrain.backend.errors import DataError
from recipes.latro.tasks import NumberVerifier, Task, TaskBuilder, is_number
from supervised.rows import Row, read_rows, text_of

TRIGGER = "\nLet's think step by step, and end with: The answer is <number>."
VERIFIER = NumberVerifier()


def gsm8k_task(where: str, question: str, solution: str, trigger: str) -> Task:
    rationale, marked, gold = solution.rpartition("\n####")
    gold = gold.strip().replace(",", "")
    if not marked or not is_number(gold):
        raise DataError(f"{where}: the solution does not end in a line '#### <number>', but {solution[-40:]!r}")
    return Task(question + trigger, f"\nThe answer is {gold}.", gold, VERIFIER, strip_calculator_marks(rationale))


@chz.chz
class Gsm8kBuilder(TaskBuilder):
    """GSM8K, from `data_dir` or else from the hub."""

    data_dir: str | None = chz.field(default=None, doc="folder with train.jsonl and test.jsonl; None = openai/gsm8k of the hub")
    trigger: str = chz.field(default=TRIGGER, doc="follows the question")

    warm_start_updates = 300

    def train_tasks(self) -> list[Task]:
        return self._tasks("train")

    def test_tasks(self) -> list[Task]:
        return self._tasks("test")

    def _tasks(self, split: str) -> list[Task]:
        rows: Iterable[Row] = (
            read_rows(f"{self.data_dir}/{split}.jsonl") if self.data_dir else read_hub("openai/gsm8k", "main", split)
        )
        return [
            gsm8k_task(where, text_of(where, row, "question"), text_of(where, row, "answer"), self.trigger) for where, row in rows
        ]
