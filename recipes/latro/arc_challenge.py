"""ARC-Challenge: science questions with options. The gold answer is the text of an option, and must be met exactly: "5" is not "15"."""

import chz

from envs.arc_challenge import arc_question, read_arc
from recipes.latro.tasks import Task, TaskBuilder, TextVerifier
from supervised.rows import Fields

TRIGGER = "\nThink step by step, and end with: The answer is <the text of the option>."
VERIFIER = TextVerifier()


def arc_task(where: str, row: Fields, trigger: str) -> Task:
    asked = arc_question(where, row)
    gold = asked.options[asked.gold]
    question = "\n".join([asked.stem, "Options:", *asked.options]) + trigger
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
        return [arc_task(where, row, self.trigger) for where, row in read_arc(self.data_dir, split)]
