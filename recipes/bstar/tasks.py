"""B-STaR's data sets: disjoint sets of problems, each problem with a grader, and human solutions
for the warm start.

A new task is a subclass of TaskBuilder with `sets`, or of ReadTaskBuilder for a ProblemSet of
envs/. A human solution has the form that the model is to write, answer included.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import chz
import numpy as np

from envs.arc_challenge import ANSWER_PHRASE, ArcChallenge
from envs.code import CodeProblems
from envs.math_word import Gsm8k, WordProblems
from envs.problem import Problem, ProblemSet, check_apart
from envs.problem_env import ProblemEnv, apply_template, fit_problems
from envs.sandbox import SandboxLimits
from posttrain.backend.errors import ConfigError, DataError
from posttrain.backend.ranges import COUNT, SEED, WHOLE
from posttrain.renderers.types import Renderer
from posttrain.tracking.seeds import DEV
from preference.steps import StepFormat

Query = ProblemEnv  # `problem.id` is its key in all records, `problem.solution` the human solution


@dataclass(frozen=True)
class Sets:
    """`warm_start`: solutions to imitate. `prm`: questions of the process reward model's data."""

    warm_start: list[Problem]
    prm: list[Problem]
    train: list[Problem]
    test: list[Problem]


@dataclass(frozen=True)
class Task:
    """The sets as environments. `dev`: indices into `train`, to choose the settings on."""

    warm_start: list[Query]
    prm: list[Query]
    train: list[Query]
    test: list[Query]
    dev: list[int]
    form: StepFormat
    max_tokens: int


@chz.chz
class TaskBuilder:
    """Settings of every data set."""

    num_train: int | None = chz.field(
        default=None, validator=COUNT, doc="number of training queries, the first ones; None = all"
    )
    num_test: int | None = chz.field(
        default=200, validator=WHOLE, doc="number of test queries, the first ones; None = all"
    )
    num_dev: int = chz.field(
        default=40,
        validator=COUNT,
        doc="training queries on which temperature and threshold are chosen, drawn by split_seed",
    )
    num_warm_start: int | None = chz.field(
        default=None, validator=COUNT, doc="number of human solutions to imitate, the first ones; None = all"
    )
    num_prm: int | None = chz.field(
        default=None, validator=COUNT, doc="number of queries whose answers are labelled step by step; None = all"
    )
    split_seed: int = chz.field(default=0, validator=SEED, doc="seed of the dev subset, and of generated sets")
    form: StepFormat = chz.field(default_factory=StepFormat, doc="end of a step, and start of the answer step")
    max_tokens: int = chz.field(default=256, validator=COUNT, doc="maximum tokens of a sampled solution")

    def sets(self, renderer: Renderer) -> Sets:
        raise NotImplementedError

    def __call__(self, renderer: Renderer) -> Task:
        """DataError for an empty set, duplicate ids, or a test question in another set."""
        sets = self.sets(renderer)
        train, test = sets.train[: self.num_train], sets.test[: self.num_test]
        warm_start, prm = sets.warm_start[: self.num_warm_start], sets.prm[: self.num_prm]
        for name, problems in (("training", train), ("test", test), ("warm-start", warm_start), ("prm", prm)):
            _check_ids(name, problems)
            if name != "test":
                check_apart(problems, test, name)
        if not train or not test:
            raise DataError(f"{len(train)} training and {len(test)} test queries: neither set may be empty")
        if not 1 <= self.num_dev <= len(train):
            raise ConfigError(f"num_dev={self.num_dev} must be from 1 to the {len(train)} training queries")
        dev = sorted(np.random.default_rng([self.split_seed, DEV]).permutation(len(train))[: self.num_dev].tolist())
        query = cache(lambda problem: ProblemEnv(problem, renderer))
        warm_start, prm, train, test = ([query(problem) for problem in part] for part in (warm_start, prm, train, test))
        return Task(warm_start, prm, train, test, dev, self.form, self.max_tokens)


def _check_ids(name: str, problems: Sequence[Problem]) -> None:
    ids = [problem.id for problem in problems]
    if len(set(ids)) < len(ids):
        twice = next(id for id in ids if ids.count(id) > 1)
        raise DataError(f"two {name} queries have the id {twice!r}: ids tell the samples of queries apart")


# --- data sets of envs/ -------------------------------------------------------------------------


@chz.chz
class ReadTaskBuilder(TaskBuilder):
    """A ProblemSet. Human solutions are the warm start; all training problems are PRM queries."""

    max_prompt_tokens: int | None = chz.field(
        default=None, validator=COUNT, doc="drop longer prompts; None = those that leave no room for max_tokens"
    )

    def source(self) -> ProblemSet:
        raise NotImplementedError

    def written(self, problems: list[Problem]) -> list[Problem]:
        """Problems with the prompt's question, and with the solution to imitate."""
        return problems

    def sets(self, renderer: Renderer) -> Sets:
        train, test = (
            self._fitting(self.written(problems), split, renderer)
            for split, problems in zip(("train", "test"), self.source().splits(), strict=True)
        )
        return Sets([problem for problem in train if problem.solution is not None], train, train, test)

    def _fitting(self, problems: list[Problem], split: str, renderer: Renderer) -> list[Problem]:
        """Problems with ids. Drops and counts too long prompts and solutions."""
        room = self.max_prompt_tokens or renderer.tokenizer.model_max_length - self.max_tokens
        fitting, overlong = [], 0
        for n, problem in enumerate(fit_problems(problems, renderer, room, name=split)):
            solution = problem.solution
            if solution and len(renderer.tokenizer.encode(solution, add_special_tokens=False)) >= self.max_tokens:
                solution, overlong = None, overlong + 1
            fitting.append(replace(problem, id=f"{split}-{n}", solution=solution))
        if overlong:
            print(
                f"{split}: {overlong} of {len(fitting)} human solutions are longer than "
                f"max_tokens={self.max_tokens}; left out"
            )
        return fitting


@chz.chz
class Gsm8kBuilder(ReadTaskBuilder):
    """GSM8K, from `data_dir` or the hub: one step per line, the answer after "####"."""

    data_dir: str | None = chz.field(
        default=None, doc="folder with train.jsonl and test.jsonl; None = openai/gsm8k of the hub"
    )
    calculator_marks: bool = chz.field(default=False, doc="keep <<48/2=24>> in the human solutions")
    prompt_template: str = chz.field(default="{question}", doc="the user's message; {question} is replaced")
    form: StepFormat = chz.field(
        default_factory=lambda: StepFormat(separator="\n", answer_marker="####"), doc="separators of a solution's steps"
    )
    max_tokens: int = chz.field(default=320, validator=COUNT, doc="maximum tokens of a sampled solution")

    def source(self) -> ProblemSet:
        return Gsm8k(
            data_dir=self.data_dir,
            strip_marks=not self.calculator_marks,
            answer_styles=("hash",),
            num_train=self.num_train,
            num_test=self.num_test,
        )

    def written(self, problems: list[Problem]) -> list[Problem]:
        return [replace(p, solution=(p.solution or "").strip()) for p in apply_template(self.prompt_template, problems)]


MATH_ANSWER = "# Answer:"
# the end of a line, or of a sentence if the next word begins like one
STEP_END = re.compile(r"\s*\n\s*|(?<=[.!?])\s+(?=[A-Z$\\])")


@chz.chz
class MathTextBuilder(ReadTaskBuilder):
    r"""JSONL files of problems with a worked solution whose last \boxed{...} is the answer, as in
    MATH.

    A human solution is rewritten: one sentence or line per step, and a last step "# Answer:
    \boxed{...}". Left out: diagrams ([asy] code stays in the text).
    """

    train_path: str = chz.field(doc="JSONL file to train on")
    test_path: str = chz.field(doc="JSONL file of the test set")
    question_field: str = chz.field(default="problem", doc="field with the question")
    solution_field: str = chz.field(default="solution", doc="field with the worked solution")
    prompt_template: str = chz.field(default="{question}", doc="the user's message; {question} is replaced")
    form: StepFormat = chz.field(
        default_factory=lambda: StepFormat(separator="\n", answer_marker=MATH_ANSWER),
        doc="separators of a solution's steps",
    )
    max_tokens: int = chz.field(default=768, validator=COUNT, doc="maximum tokens of a sampled solution")

    def source(self) -> ProblemSet:
        return WordProblems(
            train_path=self.train_path,
            test_path=self.test_path,
            question_field=self.question_field,
            answer_field=self.solution_field,
            answer_styles=("boxed",),
            bad_gold="drop",
            num_train=self.num_train,
            num_test=self.num_test,
        )

    def written(self, problems: list[Problem]) -> list[Problem]:
        return [replace(p, solution=_in_steps(p)) for p in apply_template(self.prompt_template, problems)]


def _in_steps(problem: Problem) -> str:
    return "\n".join([*STEP_END.split((problem.solution or "").strip()), f"{MATH_ANSWER} \\boxed{{{problem.gold}}}"])


@chz.chz
class ArcBuilder(ReadTaskBuilder):
    """ARC-Challenge, from `data_dir` or the hub, for a model that can already reason in words: it
    has no solutions to imitate. The paper's setting is reward=outcome.
    """

    data_dir: str | None = chz.field(
        default=None, doc="folder with train.jsonl and test.jsonl; None = allenai/ai2_arc of the hub"
    )
    trigger: str = chz.field(
        default=f"\nThink step by step, and end with: {ANSWER_PHRASE} <letter>.", doc="follows the options"
    )
    bare_answers: bool = chz.field(default=False, doc="use the bare answer as the human solution, for a base model")
    form: StepFormat = chz.field(
        default_factory=lambda: StepFormat(separator="\n", answer_marker=ANSWER_PHRASE),
        doc="separators of a solution's steps",
    )
    max_tokens: int = chz.field(default=256, validator=COUNT, doc="maximum tokens of a sampled solution")

    def source(self) -> ProblemSet:
        return ArcChallenge(data_dir=self.data_dir, num_train=self.num_train, num_test=self.num_test)

    def written(self, problems: list[Problem]) -> list[Problem]:
        solutions = [f"{ANSWER_PHRASE} {problem.gold}." if self.bare_answers else None for problem in problems]
        return [
            replace(p, question=p.question + self.trigger, solution=text)
            for p, text in zip(problems, solutions, strict=True)
        ]


@chz.chz
class CodeTaskBuilder(ReadTaskBuilder):
    """Programs graded by tests: JSONL files or, without `train_path`, generated ones
    (envs/code.py).

    The paper's setting is reward=outcome. A human solution is the reference program in a fenced
    block; a step is a line, and the answer step is the line that closes the block. Left out:
    partial credit.
    """

    train_path: str | None = chz.field(default=None, doc="JSONL file to train on; None = generated problems")
    test_path: str | None = chz.field(default=None, doc="JSONL file of the test set")
    num_test: int | None = chz.field(
        default=20, validator=WHOLE, doc="number of test problems, the first ones; None = all of a file"
    )
    prompt_template: str = chz.field(default="{question}", doc="the user's message; {question} is replaced")
    limits: SandboxLimits = chz.field(default_factory=SandboxLimits, doc="limits of one run of a program")
    form: StepFormat = chz.field(
        default_factory=lambda: StepFormat(separator="\n", answer_marker="```"), doc="separators of a solution's steps"
    )
    max_tokens: int = chz.field(
        default=80, validator=COUNT, doc="maximum tokens of a sampled program; some hundreds for human-written problems"
    )

    def source(self) -> ProblemSet:
        names = ("train_path", "test_path", "num_train", "num_test", "split_seed", "limits")
        return CodeProblems(**{name: getattr(self, name) for name in names})

    def written(self, problems: list[Problem]) -> list[Problem]:
        return apply_template(self.prompt_template, problems)
