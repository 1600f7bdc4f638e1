"""LaTRO's data sets: problems of envs/ with a trigger after the question, and the answer's text
apart from the rationale.

A new data set is a subclass of TaskBuilder with `tasks`, and a line in DATASETS of train.py. The
validation split is cut from the training tasks by `split_seed`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import chz

from envs.arc_challenge import ArcChallenge
from envs.graders import StatedNumber, StatedText, is_number
from envs.math_word import Gsm8k, WordProblems
from envs.problem import Problem, Split, check_apart, split_off
from posttrain.backend.errors import DataError
from posttrain.backend.ranges import COUNT, SEED, WHOLE
from supervised.rows import Fields, read_rows

# Phrases that begin the answer and end the rationale; a leading space or newline is part of the
# stop.
ANSWER_STOPS = tuple(
    space + phrase
    for space in ("", " ", "\n")
    for phrase in ("Answer:", "The answer is", "the answer is", "The final answer is", "the final answer is")
)


@dataclass(frozen=True)
class Task(Problem):
    """`solution` is the rationale alone, `answer` the text after it: "\nThe answer is 72."."""

    answer: str = ""


@chz.chz
class TaskBuilder:
    """Settings of a data set."""

    num_validation: int = chz.field(default=200, validator=WHOLE, doc="training tasks held out for model selection")
    split_seed: int = chz.field(default=0, validator=SEED, doc="seed of the validation split")
    num_test: int | None = chz.field(
        default=200, validator=WHOLE, doc="number of test tasks, the first ones; None = all"
    )
    num_train: int | None = chz.field(
        default=None, validator=COUNT, doc="number of training tasks, the first ones, validation included; None = all"
    )

    stop_seqs = ANSWER_STOPS  # class constants: defaults of the recipe's options
    response_length = 200
    num_train_epochs = 6.0
    warm_start_updates = 0  # for a preset, whose weights are random

    def tasks(self, split: Split, limit: int | None) -> list[Task]:
        """The first `limit` training tasks, validation included, or test tasks; [] if none."""
        raise NotImplementedError

    def demonstrations(self, tasks: Sequence[Task]) -> list[tuple[Task, str]]:
        """Tasks with a rationale each, for the warm start to imitate."""
        return [(task, task.solution) for task in tasks if task.solution is not None]

    def split(self) -> tuple[list[Task], list[Task]]:
        """Training and validation tasks."""
        return split_off(self.tasks("train", self.num_train), self.num_validation, self.split_seed, "num_validation")

    def test_tasks(self) -> list[Task]:
        """Tasks for the final evaluation. DataError if a training question is among them."""
        test = self.tasks("test", self.num_test)
        check_apart(self.tasks("train", self.num_train), test)
        return test


def stated(problem: Problem, answer: str, trigger: str, rationale: str | None = None) -> Task:
    answer = f"\nThe answer is {answer}."
    return Task(problem.question + trigger, problem.gold, problem.grader, rationale, problem.tags, problem.id, answer)


@chz.chz
class Gsm8kBuilder(TaskBuilder):
    """GSM8K, from `data_dir` or the hub. The rationale, which LaTRO does not use, is the worked
    solution without calculator marks.
    """

    data_dir: str | None = chz.field(
        default=None, doc="folder with train.jsonl and test.jsonl; None = openai/gsm8k of the hub"
    )
    trigger: str = chz.field(
        default="\nLet's think step by step, and end with: The answer is <number>.", doc="follows the question"
    )

    warm_start_updates = 300

    def tasks(self, split: Split, limit: int | None) -> list[Task]:
        return [self.task(problem) for problem in Gsm8k(data_dir=self.data_dir).read(split, limit)]

    def task(self, problem: Problem) -> Task:
        gold, (rationale, marked, _) = problem.gold.replace(",", ""), (problem.solution or "").rpartition("\n####")
        if not marked or not is_number(gold):
            raise DataError(f"{problem.id}: the solution does not end in a line '#### <number>', but {problem.gold!r}")
        return stated(Problem(problem.question, gold, StatedNumber(), id=problem.id), gold, self.trigger, rationale)


@chz.chz
class ArcChallengeBuilder(TaskBuilder):
    """ARC-Challenge, from `data_dir` or the hub. An answer must equal an option's text: "5" is not
    "15".
    """

    data_dir: str | None = chz.field(
        default=None, doc="folder with train.jsonl and test.jsonl; None = allenai/ai2_arc of the hub"
    )
    trigger: str = chz.field(
        default="\nThink step by step, and end with: The answer is <the text of the option>.", doc="follows the options"
    )

    num_train_epochs = 12.0

    def tasks(self, split: Split, limit: int | None) -> list[Task]:
        problems = ArcChallenge(data_dir=self.data_dir, letters=False).read(split, limit)
        return [stated(problem, problem.gold.removesuffix("."), self.trigger) for problem in problems]


@chz.chz
class MathBuilder(TaskBuilder):
    r"""MATH-style rows; the solution's last \boxed{...} is the answer, an expression."""

    train_path: str = chz.field(doc="JSONL file to train on")
    test_path: str | None = chz.field(default=None, doc="JSONL file of the test set")
    question_field: str = chz.field(default="problem", doc="field with the question")
    solution_field: str = chz.field(default="solution", doc="field with the worked solution")
    trigger: str = chz.field(
        default="\nLet's think step by step, and end with: The answer is \\boxed{...}.", doc="follows the question"
    )

    response_length = 500

    def tasks(self, split: Split, limit: int | None) -> list[Task]:
        source = WordProblems(
            train_path=self.train_path,
            test_path=self.test_path,
            question_field=self.question_field,
            answer_field=self.solution_field,
            answer_styles=("boxed", "stated"),
            strip_marks=False,
            bad_gold="drop",
        )
        return [stated(p, f"\\boxed{{{p.gold}}}", self.trigger, p.solution) for p in source.read(split, limit)]


@chz.chz
class JsonlBuilder(TaskBuilder):
    """JSONL with the columns of the original LaTRO code.

    `queries`: the user's message with a trigger, or a rendered conversation (set
    renderer_name=plain). `responses`: the answer in its template ("The answer is 7."), without an
    end token. `groundtruth`: compared as a number if it is one, else as text. `rationales`:
    optional.
    """

    train_path: str = chz.field(doc="JSONL file to train on")
    test_path: str | None = chz.field(default=None, doc="JSONL file of the test set")
    separator: str = chz.field(default="\n", doc="text between rationale and response")

    def tasks(self, split: Split, limit: int | None) -> list[Task]:
        path = self.train_path if split == "train" else self.test_path
        return [self.task(*row) for row in read_rows(path)[:limit]] if path else []

    def task(self, where: str, row: Fields) -> Task:
        columns = ("queries", "responses", "groundtruth")
        if missing := [column for column in columns if not isinstance(row.get(column), str | int | float)]:
            raise DataError(
                f"{where}: no {', '.join(missing)}; the columns are {', '.join(columns)}, and rationales if there are"
            )
        query, response, gold = (str(row[column]) for column in columns)
        rationale = row.get("rationales")
        if not isinstance(rationale, str | None):
            raise DataError(f"{where}: 'rationales' is {str(rationale)[:60]!r}; it is a text, where a row has one")
        grader = StatedNumber() if is_number(gold) else StatedText()
        return Task(query, gold, grader, rationale, id=where, answer=self.separator + response)
