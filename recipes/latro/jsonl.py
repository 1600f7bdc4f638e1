"""Any JSONL file with the columns of the original LaTRO code: queries, responses, groundtruth, and optionally rationales.

`queries` is what the user says, with a chain-of-thought trigger. Where the file's queries are rendered conversations already, take
renderer_name=plain. `responses` is the answer in its template ("The answer is 7."), without an end token.
"""

import chz

from posttrain.backend.errors import DataError
from recipes.latro.tasks import NumberVerifier, Task, TaskBuilder, TextVerifier, is_number
from supervised.rows import Fields, read_rows

COLUMNS = ("queries", "responses", "groundtruth")


@chz.chz
class JsonlBuilder(TaskBuilder):
    """Numbers are compared as numbers, other ground truths as normalised text behind "answer is"."""

    train_path: str = chz.field(doc="JSONL file to train on")
    test_path: str | None = chz.field(default=None, doc="JSONL file of the test set")
    separator: str = chz.field(default="\n", doc="stands between rationale and response")

    def train_tasks(self) -> list[Task]:
        return self._tasks(self.train_path)

    def test_tasks(self) -> list[Task]:
        return self._tasks(self.test_path) if self.test_path else []

    def _tasks(self, path: str) -> list[Task]:
        return [self._task(where, row) for where, row in read_rows(path)]

    def _task(self, where: str, row: Fields) -> Task:
        if missing := [column for column in COLUMNS if not isinstance(row.get(column), str | int | float)]:
            raise DataError(
                f"{where}: no {', '.join(missing)}; the columns are {', '.join(COLUMNS)}, and rationales if there are"
            )
        query, response, gold = (str(row[column]) for column in COLUMNS)
        verifier = NumberVerifier() if is_number(gold) else TextVerifier()
        return Task(query, self.separator + response, gold, verifier, row.get("rationales"))
