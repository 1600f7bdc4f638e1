"""An environment in two lines: problems, and a list of rewards (rewards.py, rubric.py).

    from envs.single_turn import SingleTurn
    env = SingleTurn(Gsm8k(data_dir="data/gsm8k"), [correct_answer, rubric("rubric.json", judge)])

For several turns, or observations of your own, write an Env (docs/first_env.md).
"""

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import chz

from envs.problem import Grader, Problem, ProblemSet, Split
from envs.problem_env import Overlong, apply_template, fit_problems
from envs.rewards import Answer, Reward, RewardFunction, Value, as_rewards, correct_answer, weighted
from envs.rubric import rubric
from posttrain.backend.errors import ConfigError
from posttrain.backend.ranges import COUNT, NUMBER
from posttrain.backend.types import ModelInput
from posttrain.renderers.types import Message, Renderer
from posttrain.tracking.command_line import load_named
from posttrain.tracking.datasets import ListDataset, held_out
from posttrain.tracking.settings import config_to_json
from preference.endpoint import ChatEndpoint
from rl.frozen_policy import FrozenPolicy
from rl.types import (
    Action,
    Env,
    EnvGroupBuilder,
    Logs,
    Metrics,
    Observation,
    RLDataset,
    RLDatasetBuilder,
    StepResult,
    StopCondition,
    Trajectory,
)
from supervised.rows import read_rows, text_of


class SingleTurnEnv(Env):
    """One question. Its step has the rewards of the answer alone; the group's come from its
    builder."""

    def __init__(self, problem: Problem, prompt: ModelInput, renderer: Renderer, rewards: Sequence[Reward]):
        self.problem, self.prompt, self.renderer, self.rewards = problem, prompt, renderer, rewards
        self.answer: Answer | None = None

    async def initial_observation(self) -> tuple[Observation, StopCondition]:
        return self.prompt, self.renderer.get_stop_sequences()

    async def step(self, action: Action) -> StepResult:
        message, stopped = self.renderer.parse_response(action)
        answer = self.answer = Answer(self.problem, message["content"], not stopped)
        scored = await asyncio.gather(*(reward.score([answer]) for reward in self.rewards))
        reward, metrics, logs = total(self.rewards, [values[0] for values in scored])
        logs = {"question": answer.question, "answer": answer.text} | logs
        return StepResult(reward, True, ModelInput.empty(), None, metrics | {"truncated": float(not stopped)}, logs)


def total(rewards: Sequence[Reward], values: Sequence[Value]) -> tuple[float, Metrics, Logs]:
    """The weighted sum of one answer's values, and each as reward/NAME."""
    metrics, logs = {}, {}
    for reward, value in zip(rewards, values, strict=True):
        metrics |= {f"reward/{reward.name}": value.value} | value.metrics
        logs |= value.logs
    return sum(reward.weight * value.value for reward, value in zip(rewards, values, strict=True)), metrics, logs


@dataclass(frozen=True)
class SingleTurnGroupBuilder(EnvGroupBuilder):
    """`num_envs` answers to one problem. A group of one has no group rewards: there is nothing to
    compare its answer with."""

    problem: Problem
    renderer: Renderer
    rewards: Sequence[Reward]
    num_envs: int
    prefix: Sequence[Message] = ()

    async def make_envs(self) -> Sequence[SingleTurnEnv]:
        user = Message(role="user", content=self.problem.question)
        prompt = self.renderer.build_generation_prompt([*self.prefix, user])
        alone = [reward for reward in self.rewards if not reward.of_group]
        return [SingleTurnEnv(self.problem, prompt, self.renderer, alone) for _ in range(self.num_envs)]

    async def compute_group_rewards(
        self, trajectories_G: list[Trajectory], envs_G: Sequence[Env]
    ) -> list[tuple[float, Metrics]]:
        rewards = [reward for reward in self.rewards if reward.of_group] if self.num_envs > 1 else []
        answers_G = [env.answer for env in envs_G if isinstance(env, SingleTurnEnv) and env.answer is not None]
        scored_R_G = await asyncio.gather(*(reward.score(answers_G) for reward in rewards))
        return [total(rewards, [values_G[g] for values_G in scored_R_G])[:2] for g in range(len(answers_G))]

    def logging_tags(self) -> list[str]:
        return list(self.problem.tags)


# --- configuration --------------------------------------------------------------------------------


class GivenProblems:
    """Problems of a Python list, which a run's settings keep as a digest."""

    def __init__(self, problems: Sequence[Problem] = ()):
        self.problems = list(problems)
        if not all(isinstance(problem, Problem) for problem in self.problems):
            raise ConfigError("dataset: give a ProblemSet, or a list of Problems")

    def __repr__(self) -> str:
        contents = [_content(problem) for problem in self.problems]
        return f"{len(contents)} problems, sha256 {hashlib.sha256(repr(contents).encode()).hexdigest()[:16]}"


def _content(problem: Problem) -> tuple[Any, ...]:
    """A problem's texts, then what only some have: a solution, a grader of its own, a subclass's fields."""
    texts, grader = (problem.question, problem.gold, problem.id, problem.tags), problem.grader
    if type(problem) is Problem and type(grader) is Grader and problem.solution is None:
        return texts
    more = {field.name: getattr(problem, field.name) for field in fields(problem)}
    more["grader"] = [type(grader), {name: value for name, value in vars(grader).items() if name[:1] != "_"}]
    return *texts, config_to_json([type(problem), more])


@chz.chz
class ProblemList(ProblemSet):
    """Problems of a Python list."""

    problems: GivenProblems = chz.field(doc="to train on")
    test_problems: GivenProblems = chz.field(default_factory=GivenProblems, doc="held out")

    def read(self, split: Split, limit: int | None) -> list[Problem]:
        return (self.problems if split == "train" else self.test_problems).problems[:limit]


@chz.chz
class QuestionFile(ProblemSet):
    """Questions of JSONL files, for rewards that need no reference answer."""

    train_path: str = chz.field(doc="JSONL file to train on")
    test_path: str | None = chz.field(default=None, doc="JSONL file to evaluate on")
    question_field: str = chz.field(default="question", doc="field with the question")
    answer_field: str | None = chz.field(default=None, doc="field with a reference answer, which judges are shown")

    def read(self, split: Split, limit: int | None) -> list[Problem]:
        path = self.train_path if split == "train" else self.test_path
        rows = read_rows(path)[:limit] if path else []
        answer = self.answer_field
        return [
            Problem(text_of(where, row, self.question_field), text_of(where, row, answer) if answer else "", id=where)
            for where, row in rows
        ]


@chz.chz
class SingleTurnBuilder(RLDatasetBuilder):
    """Problems with a list of rewards. Held out is one answer to each test problem."""

    problems: ProblemSet = chz.field(doc="the data set")
    rewards: str | tuple[Reward | RewardFunction, ...] = chz.field(
        default=(), doc="from Python a list of functions and Rewards; module:NAME of one from the command line"
    )
    system: str | None = chz.field(default=None, doc="a system message before each question")
    prompt_template: str = chz.field(default="{question}", doc="the user message; {question} is replaced")
    max_prompt_tokens: int | None = chz.field(
        default=None, validator=COUNT, doc="most tokens of a prompt; None = the model's context less one"
    )
    overlong: Overlong = chz.field(
        default="drop", doc="a prompt over max_prompt_tokens: drop (and count) or raise; never truncated"
    )

    def all_rewards(self) -> list[Reward]:
        return as_rewards(load_rewards(self.rewards))

    async def __call__(self, renderer: Renderer) -> tuple[RLDataset, RLDataset | None]:
        rewards = self.all_rewards()
        if self.group_size == 1 and (relative := [reward.name for reward in rewards if reward.of_group]):
            raise ConfigError(
                f"group_size=1: the reward {relative[0]} compares the answers of a group; set it to 2 or more"
            )
        prefix = [Message(role="system", content=self.system)] if self.system else []

        def groups(problems: list[Problem], num_envs: int, split: str) -> list[SingleTurnGroupBuilder]:
            templated = apply_template(self.prompt_template, problems)
            shown = fit_problems(templated, renderer, self.max_prompt_tokens, self.overlong, split, prefix)
            return [SingleTurnGroupBuilder(problem, renderer, rewards, num_envs, prefix) for problem in shown]

        train, test = self.problems.splits()
        dataset = ListDataset(groups(train, self.group_size, "train"), self.batch_size, self.seed, noun="problems")
        return dataset, held_out(groups(test, 1, "test"), self.batch_size)


def load_rewards(rewards: str | Sequence[Any]) -> Sequence[Any]:
    """The list that "module:NAME" names. ConfigError if there is none."""
    if not isinstance(rewards, str):
        return rewards
    loaded = load_named("rewards", rewards, "a list of rewards")
    if not isinstance(loaded, list | tuple):
        raise ConfigError(f"rewards={rewards} is {loaded!r:.60}, not a list of rewards")
    return loaded


def SingleTurn(  # noqa: N802 (as a class of environments)
    dataset: ProblemSet | Sequence[Problem],
    rewards: Sequence[Reward | RewardFunction],
    test: Sequence[Problem] = (),
    **settings: Any,
) -> SingleTurnBuilder:
    """The environment of a data set, or of lists of Problems to train and to `test` on, with these
    rewards; `settings` are fields of SingleTurnBuilder (batch_size, group_size, system ...).
    ConfigError for a malformed list of rewards."""
    if isinstance(dataset, ProblemSet) and test:
        raise ConfigError("test: a data set has its own held-out problems")
    problems = (
        dataset
        if isinstance(dataset, ProblemSet)
        else ProblemList(problems=GivenProblems(dataset), test_problems=GivenProblems(test))
    )
    return SingleTurnBuilder(problems=problems, rewards=tuple(as_rewards(rewards)), **settings)


@chz.chz
class RubricBuilder(SingleTurnBuilder):
    """Problems whose answers a rubric scores, with further rewards beside it: by options alone."""

    criteria: str = chz.field(doc="JSON or JSONL file of criteria, each with name, text and perhaps weight")
    judge: ChatEndpoint | None = chz.field(default=None, doc="the endpoint that judges")
    judge_model: FrozenPolicy | None = chz.field(default=None, doc="in place of an endpoint, a model of this machine")
    rubric_weight: float = chz.field(default=1.0, validator=NUMBER, doc="factor of the rubric's value")
    correct_weight: float | None = chz.field(
        default=None, validator=NUMBER, doc="factor of a correct final answer; None = answers are not graded"
    )

    def all_rewards(self) -> list[Reward]:
        judge = self.judge or self.judge_model
        if judge is None or (self.judge and self.judge_model):
            raise ConfigError(
                "the rubric has no judge: give env.judge.base_url=URL env.judge.model=NAME, or "
                "env.judge_model.base_model=NAME; one of the two"
            )
        graded = [] if self.correct_weight is None else [weighted(correct_answer, self.correct_weight)]
        return as_rewards([rubric(self.criteria, judge, self.rubric_weight), *graded, *load_rewards(self.rewards)])
