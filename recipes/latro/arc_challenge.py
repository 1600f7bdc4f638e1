"""ARC-Challenge: science questions with options. The gold answer is the text of an option, and must be met exactly: "5" is not "15"."""

from collections.abc import Iterable

import chz

from backend.errors import DataError
from envs.math_word import read_hub
from recipes.latro.tasks import Task, TaskBuilder, TextVerifier
from supervised.rows import Fields, Row, read_rows

TRIGGER = "\nThink step by step, and end with: The answer is <the text of the option>."
VERIFIER = TextVerifier()


def arc_task(where: str, row: Fields, trigger: str) -> Task:
    options = dict(zip(row["choices"]["label"], row["choices"]["text"], strict=True))
    if row["answerKey"] not in options:
        raise DataError(f"{where}: answerKey {row['answerKey']!r} is none of the options {', '.join(options)}")
    gold = options[row["answerKey"]].strip()
    question = row["question"] + "\nOptions:\n" + "\n".join(options.values()) + trigger
    return Task(question, f"\nThe answer is {gold.removesuffix('.')}.", gold, VERIFIER)


@chz.chz
class ArcChallengeBuilder(TaskBuilder):
    """ARC-Challenge, from `data_dir` or else from the hub."""

    data_dir: str | None = chz.field(
        default=None, doc="folder with train.jsonl and test.jsonl; None = allenai/ai2_arc of the hub"
    )
    trigger: str = chz.field(default=TRIGGER, doc="follows the options")

    num_train_epochs = 12.0

    def train_tasks(self) -> list[Task]:
        return self._tasks("train")

    def test_tasks(self) -> list[Task]:
        return self._tasks("test")

    def _tasks(self, split: str) -> list[Task]:
        rows: Iterable[Row] = (
            read_rows(f"{self.data_dir}/{split}.jsonl") if self.data_dir else read_hub("allenai/ai2_arc", "ARC-Challenge", split)
        )
        return [arc_task(where, row, self.trigger) for where, row in rows]
