r"""Word problems with a checkable answer: GSM8K (final "#### 18"), MATH (final \boxed{...}), and any file of that kind.

Rows come from JSONL files or from the Hugging Face hub. Every gold answer is read and checked when the dataset is built; one that
cannot be graded is an error that names its line, never a problem that always scores 0 or 1. The default prompt is the question
alone, the text that supervised training uses too. Left out: tool use, process rewards, judging free-form proofs.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Literal

import chz

from envs.math_answers import AnswerStyle, extract_answer, quantity
from envs.math_grading import DEFAULT_SECONDS, TooCostly, check_gold, is_equal, is_equal_async
from envs.problem_env import EnvThunk, Overlong, ProblemEnv, fit_prompts, problem_dataset
from posttrain.backend.errors import ConfigError, DataError
from posttrain.backend.ranges import COUNT, POSITIVE, WHOLE
from posttrain.renderers.types import Renderer
from rl.types import Logs, RLDataset, RLDatasetBuilder
from supervised.data import HuggingFaceBuilder
from supervised.rows import Fields, Row, read_rows

GoldStyle = Literal["boxed", "hash", "plain"]


class BadGold(DataError):
    """A reference answer that cannot be graded."""


class MathWordEnv(ProblemEnv):
    """`solution` is the worked reference, for recipes that train on it or score it."""

    def __init__(
        self,
        problem: str,
        gold: str,
        solution: str,
        renderer: Renderer,
        answer_styles: Sequence[AnswerStyle],
        numbers_only: bool = False,
        grader_seconds: float = DEFAULT_SECONDS,
    ):
        super().__init__(renderer)
        self.problem, self.gold, self.solution = problem, gold, solution
        self.answer_styles, self.numbers_only, self.grader_seconds = answer_styles, numbers_only, grader_seconds

    def question(self) -> str:
        return self.problem

    def reference_answer(self) -> str:
        return self.gold

    def answer(self, text: str) -> str | None:
        """The final answer of a response; None where there is none, or where a number is asked for and it is not one."""
        answer = extract_answer(text, self.answer_styles)
        return None if answer is None or (self.numbers_only and quantity(answer) is None) else answer

    def extract(self, text: str) -> str:
        return self.answer(text) or ""

    def check_format(self, text: str) -> bool:
        return self.answer(text) is not None

    def check_answer(self, text: str) -> bool:
        answer = self.answer(text)
        return answer is not None and is_equal(self.gold, answer, self.grader_seconds)

    async def check_answer_async(self, text: str) -> bool:
        answer = self.answer(text)
        return answer is not None and await is_equal_async(self.gold, answer, self.grader_seconds)

    def logs(self, text: str) -> Logs:
        return super().logs(text) | {"extracted": extract_answer(text, self.answer_styles) or "(none)"}


def strip_calculator_marks(text: str) -> str:
    """GSM8K's <<48/2=24>>, which tell a calculator what to compute."""
    return re.sub(r"<<[^<>]*>>", "", text)


def read_hub(name: str, config: str | None, split: str) -> Iterator[Row]:
    yield from HuggingFaceBuilder(name=name, subset=config, split=split).rows()[0]


@chz.chz
class MathWordBuilder(RLDatasetBuilder):
    """Problems from `train_path` and `test_path`, or from the hub's `hub_name`. The fields' defaults are those of MATH."""

    train_path: str | None = chz.field(default=None, doc="JSONL file to train on")
    test_path: str | None = chz.field(default=None, doc="JSONL file to evaluate on")
    hub_name: str | None = chz.field(default=None, doc="Hugging Face dataset, where no train_path is given")
    hub_config: str | None = chz.field(default=None, doc="configuration of the Hugging Face dataset")
    train_split: str = chz.field(default="train", doc="split of the Hugging Face dataset to train on")
    test_split: str | None = chz.field(default="test", doc="split to evaluate on; None = no evaluation")
    question_field: str = chz.field(default="problem", doc="field with the question")
    answer_field: str = chz.field(default="solution", doc="field with the reference solution or answer")
    gold_style: GoldStyle = chz.field(default="boxed", doc="how the reference marks its answer; plain = it is the answer")
    answer_styles: tuple[AnswerStyle, ...] = chz.field(
        default=("boxed", "hash", "stated"), doc="accepted in responses; the first found counts"
    )
    prompt_template: str = chz.field(default="{question}", doc="what the user says; {question} is replaced")
    strip_marks: bool = chz.field(default=True, doc="remove calculator marks <<1+1=2>> from the reference solution")
    bad_gold: Literal["raise", "drop"] = chz.field(
        default="raise", doc="a reference answer that cannot be graded: raise, or drop (and count)"
    )
    num_train: int | None = chz.field(default=None, validator=COUNT, doc="use only the first so many training problems")
    num_test: int | None = chz.field(default=200, validator=WHOLE, doc="use only the first so many test problems; None = all")
    overlong: Overlong = chz.field(default="drop", doc="a prompt over max_prompt_tokens: drop (and count) or raise; never cut")
    max_prompt_tokens: int | None = chz.field(
        default=None, validator=COUNT, doc="most tokens of a prompt; None = the model's context less one"
    )
    grader_seconds: float = chz.field(
        default=DEFAULT_SECONDS, validator=POSITIVE, doc="most seconds for comparing two expressions"
    )
    tag: str = chz.field(default="math", doc="name under which metrics are logged too")

    async def __call__(self, renderer: Renderer) -> tuple[RLDataset, RLDataset | None]:
        if "{question}" not in self.prompt_template:
            raise ConfigError(f"prompt_template={self.prompt_template!r} has no {{question}}")
        train_rows, test_rows = self.rows()
        train = self.problems(train_rows, renderer, self.num_train, f"{self.tag} train")
        train_set = problem_dataset(train, self.batch_size, self.group_size, self.seed, tags=[self.tag])
        if test_rows is None:
            return train_set, None
        test = self.problems(test_rows, renderer, self.num_test, f"{self.tag} test")
        return train_set, problem_dataset(test, self.batch_size, 1, shuffle=False, tags=[self.tag])

    def rows(self) -> tuple[Iterable[Row], Iterable[Row] | None]:
        """Training and held-out rows."""
        if self.train_path:
            return read_rows(self.train_path), read_rows(self.test_path) if self.test_path else None
        if not self.hub_name:
            raise ConfigError("give train_path=FILE.jsonl or hub_name=OWNER/DATASET")
        test = read_hub(self.hub_name, self.hub_config, self.test_split) if self.test_split else None
        return read_hub(self.hub_name, self.hub_config, self.train_split), test

    def problems(self, rows: Iterable[Row], renderer: Renderer, limit: int | None, name: str) -> list[EnvThunk]:
        """An env for each of the first `limit` rows whose gold answer can be graded and whose prompt fits."""
        thunks: list[EnvThunk] = []
        bad = 0
        for where, row in rows:
            if limit is not None and len(thunks) + bad == limit:
                break
            try:
                thunks.append(self.problem(where, row, renderer))
            except BadGold as error:
                if self.bad_gold == "raise":
                    raise DataError(f"{error}; correct it, or set bad_gold=drop") from error
                bad += 1
        if bad:
            print(f"{name}: {bad} of {bad + len(thunks)} problems have a reference answer that cannot be graded; dropped")
        if not thunks:
            raise DataError(f"{name}: no problems")
        return fit_prompts(thunks, self.max_prompt_tokens, self.overlong, name)

    def problem(self, where: str, row: Fields, renderer: Renderer) -> EnvThunk:
        for name in (self.question_field, self.answer_field):
            if not isinstance(row.get(name), str):
                raise DataError(f"{where}: no text in field {name!r}; it has {', '.join(row) or 'none'}")
        solution = row[self.answer_field]
        gold = solution.strip() if self.gold_style == "plain" else extract_answer(solution, [self.gold_style])
        numbers_only = self.gold_style == "hash"
        if gold is None or not (quantity(gold) if numbers_only else _gradable(gold, self.grader_seconds)):
            field = f"field {self.answer_field!r}, which ends {solution[-60:]!r}"
            raise BadGold(f"{where}: no {self.gold_style} answer that can be graded in {field}")
        return partial(
            MathWordEnv,
            self.prompt_template.replace("{question}", row[self.question_field]),
            gold,
            strip_calculator_marks(solution) if self.strip_marks else solution,
            renderer,
            self.answer_styles,
            numbers_only,
            self.grader_seconds,
        )


def _gradable(gold: str, seconds: float) -> bool:
    try:
        return check_gold(gold, seconds)
    except TooCostly:
        return False


@chz.chz
class Gsm8kBuilder(MathWordBuilder):
    """GSM8K, from `data_dir` (a folder with train.jsonl and test.jsonl) or else from the hub."""

    data_dir: str | None = chz.field(default=None, doc="folder with train.jsonl and test.jsonl")
    hub_name: str | None = chz.field(default="openai/gsm8k", doc="Hugging Face dataset, where no path is given")
    hub_config: str | None = chz.field(default="main", doc="configuration of the Hugging Face dataset")
    question_field: str = chz.field(default="question", doc="field with the question")
    answer_field: str = chz.field(default="answer", doc="field with the reference solution")
    gold_style: GoldStyle = chz.field(default="hash", doc="how the reference marks its answer")
    tag: str = chz.field(default="gsm8k", doc="name under which metrics are logged too")

    def rows(self) -> tuple[Iterable[Row], Iterable[Row] | None]:
        if self.data_dir is None:
            return super().rows()
        return read_rows(f"{self.data_dir}/train.jsonl"), read_rows(f"{self.data_dir}/test.jsonl")
