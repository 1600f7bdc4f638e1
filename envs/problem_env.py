"""A Problem as a single-turn environment, its group, and datasets for RL and for imitation.

reward = format_coef * (format - 1) + correct, with format and correct in {0, 1}. A truncated
response has format 0. Left out: several turns, tools.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import chz

from envs.problem import Grade, Problem, ProblemSet, check_apart
from posttrain.backend.errors import ConfigError, DataError
from posttrain.backend.ranges import COUNT, SEED, WHOLE
from posttrain.backend.types import Datum, ModelInput
from posttrain.renderers.types import Message, Renderer
from posttrain.tracking.datasets import DrawnDataset, ListDataset, held_out
from posttrain.tracking.seeds import EXAMPLES, GROUPS
from rl.types import Action, Env, EnvGroupBuilder, Observation, RLDataset, RLDatasetBuilder, StepResult, StopCondition
from supervised.data import ChatDatasetBuilder, render
from supervised.rows import Fields, Row
from supervised.types import SupervisedDataset, SupervisedDatasetBuilder

Overlong = Literal["drop", "raise"]


class ProblemEnv(Env):
    """One question, after the messages of `prefix`: a system message, worked examples."""

    format_coef = 0.1

    def __init__(self, problem: Problem, renderer: Renderer, prefix: Sequence[Message] = ()):
        self.problem, self.renderer, self.prefix = problem, renderer, prefix
        self._rendered: ModelInput | None = None  # a group renders its question once and shares it

    def question(self) -> str:
        return self.problem.question

    def messages(self) -> list[Message]:
        return self.problem.messages(self.prefix)

    async def grade(self, text: str) -> Grade:
        return await self.problem.graded(text)

    def build_prompt(self) -> ModelInput:
        if self._rendered is None:
            user = Message(role="user", content=self.problem.question)
            self._rendered = self.renderer.build_generation_prompt([*self.prefix, user])
        return self._rendered

    async def initial_observation(self) -> tuple[Observation, StopCondition]:
        return self.build_prompt(), self.renderer.get_stop_sequences()

    async def step(self, action: Action) -> StepResult:
        message, stopped = self.renderer.parse_response(action)
        value, metrics, logs = await self.problem.scored(message["content"], truncated=not stopped)
        return StepResult(
            reward=self.format_coef * (metrics["format"] - 1) + value,
            episode_done=True,
            next_observation=ModelInput.empty(),
            next_stop_condition=self.renderer.get_stop_sequences(),
            metrics=metrics | {"truncated": float(not stopped)},
            logs={"question": self.problem.question} | logs,
        )


EnvThunk = Callable[[], ProblemEnv]


@dataclass(frozen=True)
class ProblemGroupBuilder(EnvGroupBuilder):
    """`num_envs` attempts at one problem. `env_thunk` must pickle: a partial, not a lambda."""

    env_thunk: EnvThunk
    num_envs: int
    tags: list[str] = field(default_factory=list)

    async def make_envs(self) -> Sequence[ProblemEnv]:
        envs_G = [self.env_thunk() for _ in range(self.num_envs)]
        prompt = envs_G[0].build_prompt()
        for env in envs_G:
            env._rendered = prompt
        return envs_G

    def logging_tags(self) -> list[str]:
        return self.tags

    def teacher_prompt(self, context: str) -> ModelInput:
        """The question after `context` as a system message (rl/distill.py)."""
        env = self.env_thunk()
        filled = filled_context(context, env.problem)
        user = Message(role="user", content=env.problem.question)
        return env.renderer.build_generation_prompt([Message(role="system", content=filled), *env.prefix, user])


def filled_context(context: str, problem: Problem) -> str:
    """{question}, {solution} and {gold} replaced. DataError if the problem has no solution."""
    if "{solution}" in context and problem.solution is None:
        raise DataError(f"distill.context has {{solution}}, and problem {problem.id or problem.question!r} has none")
    values = {"{question}": problem.question, "{solution}": problem.solution or "", "{gold}": problem.gold}
    return re.sub("|".join(values), lambda name: values[name[0]], context)


def problem_groups(
    problems: Sequence[Problem],
    renderer: Renderer,
    group_size: int,
    prefix: Sequence[Message] = (),
    env_class: type[ProblemEnv] = ProblemEnv,
) -> list[ProblemGroupBuilder]:
    """One group per problem, with its tags."""
    return [
        ProblemGroupBuilder(partial(env_class, problem, renderer, prefix), group_size, list(problem.tags))
        for problem in problems
    ]


def fit_problems(
    problems: Sequence[Problem],
    renderer: Renderer,
    max_prompt_tokens: int | None = None,
    overlong: Overlong = "drop",
    name: str = "dataset",
    prefix: Sequence[Message] = (),
) -> list[Problem]:
    """The problems whose prompt fits; the rest is dropped, counted in a printed line, never
    truncated.

    `max_prompt_tokens` None means the model's context less one token. Raises DataError if none
    fits, or if one does not and `overlong` is "raise".
    """
    limit = max_prompt_tokens or renderer.tokenizer.model_max_length - 1
    lengths = [ProblemEnv(problem, renderer, prefix).build_prompt().length for problem in problems]
    kept = [problem for problem, length in zip(problems, lengths, strict=True) if length <= limit]
    dropped = len(problems) - len(kept)
    count = (
        f"{name}: {dropped} of {len(problems)} prompts are longer than {limit} tokens (the longest has "
        f"{max(lengths, default=0)})"
    )
    if dropped and (overlong == "raise" or not kept):
        also = ", or set overlong=drop" if kept else ""
        raise DataError(f"{count}; raise max_prompt_tokens or the model's max_length{also}")
    if dropped:
        print(f"{count}; dropped")
    return kept


def apply_template(template: str, problems: Sequence[Problem]) -> list[Problem]:
    """The problems with `template` around their question."""
    if "{question}" not in template:
        raise ConfigError(f"prompt_template={template!r} has no {{question}}")
    return [replace(problem, question=template.replace("{question}", problem.question)) for problem in problems]


# --- sets that are read -------------------------------------------------------------------------


@chz.chz
class ProblemSetBuilder(ProblemSet, RLDatasetBuilder):
    """Mixed with a ProblemSet: problems for RL. Held out is one attempt at each test problem."""

    prompt_template: str = chz.field(default="{question}", doc="the user message; {question} is replaced")
    overlong: Overlong = chz.field(
        default="drop", doc="a prompt over max_prompt_tokens: drop (and count) or raise; never truncated"
    )
    max_prompt_tokens: int | None = chz.field(
        default=None, validator=COUNT, doc="most tokens of a prompt; None = the model's context less one"
    )
    few_shot: int = chz.field(
        default=0,
        validator=WHOLE,
        doc="worked training problems before each question, the first ones; they are not trained on",
    )
    env_class = ProblemEnv

    async def __call__(self, renderer: Renderer) -> tuple[RLDataset, RLDataset | None]:
        train, test = (apply_template(self.prompt_template, problems) for problems in self.splits())
        prefix = self._prefix(train[: self.few_shot])
        shown = {message["content"] for message in prefix}
        left = [problem for problem in train if problem.question not in shown]
        if train and not left:
            raise DataError(f"few_shot={self.few_shot} of {len(train)} training problems leaves none to train on")
        dataset = ListDataset(self.groups(left, renderer, self.group_size, "train", prefix), self.batch_size, self.seed)
        return dataset, held_out(self.groups(test, renderer, 1, "test", prefix), self.batch_size)

    async def test_set(self, renderer: Renderer) -> RLDataset | None:
        """Reads no training problems but those of `few_shot`. DataError where one of them is a test problem."""
        examples = self.problems_of("train", self.few_shot) if self.few_shot else []
        problems = self.problems_of("test", self.num_test)
        check_apart(examples, problems, "few_shot")
        test, shown = (apply_template(self.prompt_template, part) for part in (problems, examples))
        return held_out(self.groups(test, renderer, 1, "test", self._prefix(shown)), self.batch_size)

    def _prefix(self, examples: Sequence[Problem]) -> list[Message]:
        """DataError where there is no example, or one has no worked solution."""
        if self.few_shot and not examples:
            raise DataError(f"few_shot={self.few_shot}: {type(self).__name__} has no training problems to show")
        return [message for example in examples for message in example.messages()]

    def groups(
        self, problems: list[Problem], renderer: Renderer, size: int, split: str, prefix: Sequence[Message] = ()
    ) -> list[ProblemGroupBuilder]:
        name = f"{problems[0].tags[0] if problems and problems[0].tags else 'problems'} {split}"
        fitting = fit_problems(problems, renderer, self.max_prompt_tokens, self.overlong, name, prefix)
        return problem_groups(fitting, renderer, size, prefix, self.env_class)


@chz.chz
class ProblemExamples(ChatDatasetBuilder):
    """Questions with their worked solutions, to imitate. Problems without a solution are left out."""

    problems: ProblemSet = chz.field(doc="the data set")
    prompt_template: str = chz.field(default="{question}", doc="the user message; {question} is replaced")

    def rows(self) -> tuple[list[Row], list[Row]]:
        train, test = (apply_template(self.prompt_template, problems) for problems in self.problems.splits())
        if not any(problem.solution for problem in train):
            raise DataError(f"none of the {len(train)} problems has a worked solution to imitate")
        solved, solved_test = ([p for p in part if p.solution] for part in (train, test))
        return [(p.id, {"problem": p}) for p in solved], [(p.id, {"problem": p}) for p in solved_test]

    def messages(self, fields: Fields) -> list[Message]:
        return fields["problem"].messages()


# --- sets that are drawn ------------------------------------------------------------------------


@chz.chz
class DrawnProblems:
    """An endless space of problems: training problems are drawn by a seed, some are held out."""

    num_test: int = chz.field(default=200, validator=WHOLE, doc="held-out problems")
    split_seed: int = chz.field(
        default=0, validator=SEED, doc="seed of the choice of held-out problems; the same for warm start and RL"
    )

    def draw(self, count: int, seed: Sequence[int]) -> list[Problem]:
        """`count` problems that are not held out."""
        raise NotImplementedError

    def held_out(self) -> list[Problem]:
        raise NotImplementedError


@chz.chz
class DrawnProblemsBuilder(DrawnProblems, RLDatasetBuilder):
    """Problems for RL. Held out is one attempt at each held-out problem."""

    n_batches: int = chz.field(default=100, validator=COUNT, doc="training batches")
    env_class = ProblemEnv

    def prefix(self) -> Sequence[Message]:
        """Messages before each training question."""
        return ()

    async def __call__(self, renderer: Renderer) -> tuple[RLDataset, RLDataset | None]:
        prefix = self.prefix()

        def draw(epoch: int, index: int) -> list[ProblemGroupBuilder]:
            problems = self.draw(self.batch_size, [self.seed, GROUPS, epoch * self.n_batches + index])
            return problem_groups(problems, renderer, self.group_size, prefix, self.env_class)

        test = fit_problems(self.held_out(), renderer, overlong="raise", prefix=prefix)
        test_groups = problem_groups(test, renderer, 1, prefix, self.env_class)
        return DrawnDataset(draw, self.n_batches), ListDataset(test_groups, self.batch_size, shuffle=False)


@chz.chz
class DrawnExamplesBuilder(DrawnProblems, SupervisedDatasetBuilder):
    """The same problems with their solutions, to imitate, with the same held-out problems."""

    n_batches: int = chz.field(default=30, validator=COUNT, doc="training batches per epoch")

    def messages(self, problem: Problem) -> list[Message]:
        return problem.messages()

    def __call__(self, renderer: Renderer) -> tuple[SupervisedDataset, SupervisedDataset | None]:
        def draw(epoch: int, index: int) -> list[Datum]:
            problems = self.draw(self.batch_size, [self.seed, EXAMPLES, epoch, index])
            return render([self.messages(problem) for problem in problems], renderer, self)

        test = render([self.messages(problem) for problem in self.held_out()], renderer, self)
        return DrawnDataset(draw, self.n_batches), ListDataset(test, self.batch_size, shuffle=False)
