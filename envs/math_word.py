r"""Word problems with a checkable answer: GSM8K (final "#### 18"), MATH (final \boxed{...}),
similar files.

Rows come from JSONL files or from the Hugging Face hub. Every gold answer is checked when the
dataset is built; one that cannot be graded is an error that names its line. The default prompt is
the question alone, as in supervised training. Left out: tool use, process rewards, proofs.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import chz

from envs.math_answers import AnswerStyle, extract_answer, quantity
from envs.math_grading import DEFAULT_SECONDS, TooCostly, canonical, check_gold, is_equal_async
from envs.problem import Grader, Problem, ProblemSet, Split
from envs.problem_env import ProblemSetBuilder
from posttrain.backend.errors import ConfigError, DataError
from posttrain.backend.extras import need
from posttrain.backend.ranges import POSITIVE
from supervised.rows import Fields, Row, read_rows, text_of
from supervised.table_rows import table_rows

MATH_SUBSETS = ("algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory")
MATH_SUBSETS += ("prealgebra", "precalculus")
BOXED_SUFFIX = " Write your answer in \\boxed{} format."
GoldStyle = Literal["boxed", "hash", "plain"]


class BadGold(DataError):
    """A reference answer that cannot be graded."""


@dataclass(frozen=True)
class MathGrader(Grader):
    """The final answer in one of `styles`, equal to the gold answer as a number or an expression.
    `numbers_only`: an answer that is no number is a wrong format.
    """

    styles: tuple[AnswerStyle, ...] = ("boxed", "hash", "stated")
    numbers_only: bool = False
    seconds: float = DEFAULT_SECONDS

    def __post_init__(self) -> None:
        need("math_verify", "the grader of math answers")

    def extract(self, text: str) -> str | None:
        answer = extract_answer(text, self.styles)
        return None if answer is None or (self.numbers_only and quantity(answer) is None) else answer

    async def is_right(self, answer: str, gold: str) -> bool:
        return await is_equal_async(gold, answer, self.seconds)

    def vote(self, answer: str) -> str:
        return canonical(answer)

    def shown(self, text: str) -> str:
        return extract_answer(text, self.styles) or "(none)"


def strip_calculator_marks(text: str) -> str:
    """Removes GSM8K's calculator marks <<48/2=24>>."""
    return re.sub(r"<<[^<>]*>>", "", text)


@chz.chz
class WordProblems(ProblemSet):
    """Problems from `train_path` and `test_path`, or from `hub_name`. Defaults are those of MATH."""

    train_path: str | None = chz.field(default=None, doc="JSONL file to train on")
    test_path: str | None = chz.field(default=None, doc="JSONL file to evaluate on")
    hub_name: str | None = chz.field(default=None, doc="Hugging Face dataset, where no train_path is given")
    hub_config: str | None = chz.field(default=None, doc="configuration of the Hugging Face dataset")
    train_split: str = chz.field(default="train", doc="split of the Hugging Face dataset to train on")
    test_split: str | None = chz.field(default="test", doc="split to evaluate on; None = no evaluation")
    question_field: str = chz.field(default="problem", doc="field with the question")
    answer_field: str = chz.field(default="solution", doc="field with the reference solution or answer")
    gold_style: GoldStyle = chz.field(
        default="boxed", doc="how the reference marks its answer; plain = it is the answer"
    )
    answer_styles: tuple[AnswerStyle, ...] = chz.field(
        default=("boxed", "hash", "stated"), doc="styles accepted in responses; the first that occurs counts"
    )
    boxed: bool = chz.field(
        default=False,
        doc=f"ask for the answer in \\boxed{{}} after each question, and write worked solutions so: {BOXED_SUFFIX!r}",
    )
    strip_marks: bool = chz.field(default=True, doc="remove calculator marks <<1+1=2>> from the reference solution")
    bad_gold: Literal["raise", "drop"] = chz.field(
        default="raise", doc="a reference answer that cannot be graded: raise, or drop (and count)"
    )
    grader_seconds: float = chz.field(
        default=DEFAULT_SECONDS, validator=POSITIVE, doc="limit of processor time for comparing two expressions"
    )
    tag: str = chz.field(default="math", doc="name under which metrics are logged too")

    def path_of(self, split: Split) -> str | None:
        return self.train_path if split == "train" else self.test_path

    def rows(self, split: Split) -> Iterable[Row]:
        if path := self.path_of(split):
            return read_rows(path)
        if self.train_path:
            return ()
        if not self.hub_name:
            raise ConfigError("give train_path=FILE.jsonl or hub_name=OWNER/DATASET")
        hub_split = self.train_split if split == "train" else self.test_split
        return table_rows(self.hub_name, self.hub_config, hub_split) if hub_split else ()

    def read(self, split: Split, limit: int | None) -> list[Problem]:
        problems: list[Problem] = []
        bad = 0
        for where, row in islice(self.rows(split), limit):
            try:
                problems.append(self.problem(where, row))
            except BadGold as error:
                if self.bad_gold == "raise":
                    raise DataError(f"{error}; correct it, or set bad_gold=drop") from error
                bad += 1
        if bad:
            print(
                f"{self.tag} {split}: {bad} of {bad + len(problems)} problems have a reference answer that cannot be "
                "graded; dropped"
            )
        if not problems and split == "train":
            raise DataError(f"{self.tag} {split}: no problems")
        return problems

    def problem(self, where: str, row: Fields) -> Problem:
        question, solution = (text_of(where, row, name) for name in (self.question_field, self.answer_field))
        gold = solution.strip() if self.gold_style == "plain" else extract_answer(solution, [self.gold_style])
        numbers_only = self.gold_style == "hash"
        if gold is None or not (quantity(gold) if numbers_only else gradable(gold, self.grader_seconds)):
            field = f"field {self.answer_field!r}, which ends {solution[-60:]!r}"
            raise BadGold(f"{where}: no {self.gold_style} answer that can be graded in {field}")
        solution = strip_calculator_marks(solution) if self.strip_marks else solution
        grader = MathGrader(self.answer_styles, numbers_only, self.grader_seconds)
        question += BOXED_SUFFIX if self.boxed else ""
        solution = re.sub(r"####\s*(.+?)\s*$", r"\\boxed{\1}", solution) if self.boxed else solution
        return Problem(question, gold, grader, solution, (self.tag,), where)


def gradable(gold: str, seconds: float) -> bool:
    """Whether a reference answer can be compared with an answer."""
    try:
        return check_gold(gold, seconds)
    except TooCostly:
        return False


@chz.chz
class HendrycksMath(WordProblems):
    """MATH (Hendrycks et al. 2021), from files or a hub name that is given; else all its 12,500
    problems but MATH-500 to train on, and MATH-500 held out, from the hub."""

    subsets: tuple[str, ...] = chz.field(default=MATH_SUBSETS, doc="subjects of the hub's data set")

    def rows(self, split: Split) -> Iterable[Row]:
        if self.train_path or self.hub_name or self.path_of(split):
            yield from super().rows(split)
            return
        held_out = table_rows("HuggingFaceH4/MATH-500", None, "test")
        if split == "test":
            yield from held_out
            return
        questions = {fields["problem"] for _, fields in held_out}
        for subset in self.subsets:
            for part in ("train", "test"):
                rows = table_rows("EleutherAI/hendrycks_math", subset, part)
                yield from (row for row in rows if row[1].get("problem") not in questions)


@chz.chz
class Gsm8k(WordProblems):
    """GSM8K, from `data_dir` or else from the hub."""

    data_dir: str | None = chz.field(default=None, doc="folder with train.jsonl and test.jsonl")
    hub_name: str | None = chz.field(default="openai/gsm8k", doc="Hugging Face dataset, where no path is given")
    hub_config: str | None = chz.field(default="main", doc="configuration of the Hugging Face dataset")
    question_field: str = chz.field(default="question", doc="field with the question")
    answer_field: str = chz.field(default="answer", doc="field with the reference solution")
    gold_style: GoldStyle = chz.field(default="hash", doc="how the reference marks its answer")
    tag: str = chz.field(default="gsm8k", doc="name under which metrics are logged too")

    def rows(self, split: Split) -> Iterable[Row]:
        if self.data_dir is None or self.path_of(split):
            return super().rows(split)
        return read_rows(f"{self.data_dir}/{split}.jsonl")


@chz.chz
class MathWordBuilder(WordProblems, ProblemSetBuilder):
    """Word problems to practise on by reinforcement learning."""


@chz.chz
class MathBuilder(HendrycksMath, ProblemSetBuilder):
    """MATH to practise on by reinforcement learning."""


@chz.chz
class Gsm8kBuilder(Gsm8k, ProblemSetBuilder):
    """GSM8K to practise on by reinforcement learning."""
