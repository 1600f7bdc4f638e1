"""A question, one answer, a verifier: the single-turn environment, its group, and a dataset over a list of problems.

reward = format_coef * (format - 1) + correct, with format and correct in {0, 1}. A response that ran into the token limit is a
format failure, whatever it says. Left out: several turns, tools, partial credit.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from posttrain.backend.errors import DataError
from posttrain.backend.types import ModelInput
from posttrain.renderers.types import Message, Renderer
from posttrain.tracking.datasets import ListDataset
from rl.types import Action, Env, EnvGroupBuilder, Logs, Observation, RolloutError, StepResult, StopCondition

Overlong = Literal["drop", "raise"]


class GraderError(RolloutError):
    """A grader crashed or ran out of time: the response has no reward."""


class ProblemEnv(Env):
    """One question. `prefix` is said before it: a system message, worked examples."""

    format_coef = 0.1

    def __init__(self, renderer: Renderer, prefix: Sequence[Message] = ()):
        self.renderer = renderer
        self.prefix = prefix
        self._rendered: ModelInput | None = None  # set by build_prompt; a group renders its question once and shares it

    @abstractmethod
    def question(self) -> str: ...

    @abstractmethod
    def check_answer(self, text: str) -> bool:
        """Whether the response is right. Raises GraderError if that cannot be decided."""

    @abstractmethod
    def check_format(self, text: str) -> bool:
        """Whether the response holds an answer where one was asked for."""

    @abstractmethod
    def reference_answer(self) -> str: ...

    def extract(self, text: str) -> str:
        """The part of the response that is graded, for the transcript."""
        return text

    async def check_answer_async(self, text: str) -> bool:
        """Override it where grading may take long, so as not to hold up the other rollouts."""
        return self.check_answer(text)

    def build_prompt(self) -> ModelInput:
        if self._rendered is None:
            user = Message(role="user", content=self.question())
            self._rendered = self.renderer.build_generation_prompt([*self.prefix, user])
        return self._rendered

    async def initial_observation(self) -> tuple[Observation, StopCondition]:
        return self.build_prompt(), self.renderer.get_stop_sequences()

    async def step(self, action: Action) -> StepResult:
        message, stopped = self.renderer.parse_response(action)
        text = message["content"]
        formatted = float(stopped and self.check_format(text))
        correct = float(await self.check_answer_async(text))
        return StepResult(
            reward=self.format_coef * (formatted - 1) + correct,
            episode_done=True,
            next_observation=ModelInput.empty(),
            next_stop_condition=self.renderer.get_stop_sequences(),
            metrics={"format": formatted, "correct": correct, "truncated": float(not stopped)},
            logs=self.logs(text),
        )

    def logs(self, text: str) -> Logs:
        return {"question": self.question(), "gold": self.reference_answer(), "extracted": self.extract(text)}


EnvThunk = Callable[[], ProblemEnv]


@dataclass(frozen=True)
class ProblemGroupBuilder(EnvGroupBuilder):
    """`num_envs` attempts at one problem. `env_thunk` must pickle: functools.partial of an env class does, a lambda does not."""

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


def problem_dataset(
    env_thunks: Sequence[EnvThunk],
    batch_size: int,
    group_size: int,
    seed: int = 0,
    *,
    shuffle: bool = True,
    tags: Sequence[str] = (),
) -> ListDataset[ProblemGroupBuilder]:
    """A list of problems, reshuffled every epoch. `shuffle=False` keeps the order, for held-out sets."""
    groups = [ProblemGroupBuilder(thunk, group_size, list(tags)) for thunk in env_thunks]
    return ListDataset(groups, batch_size, seed, shuffle=shuffle)


def fit_prompts(
    env_thunks: Sequence[EnvThunk], max_prompt_tokens: int | None = None, overlong: Overlong = "drop", name: str = "dataset"
) -> list[EnvThunk]:
    """The problems whose prompt fits; the others are dropped and counted on one printed line, or refused. Never cut.

    `max_prompt_tokens` None means the model's context less one token to sample. Raises DataError, also when none fits.
    """
    kept, longest, limit = [], 0, max_prompt_tokens or 0
    for thunk in env_thunks:
        env = thunk()
        limit = max_prompt_tokens or env.renderer.tokenizer.model_max_length - 1
        length = env.build_prompt().length
        longest = max(longest, length)
        if length <= limit:
            kept.append(thunk)
    dropped = len(env_thunks) - len(kept)
    found = f"{name}: {dropped} of {len(env_thunks)} prompts are longer than {limit} tokens (the longest has {longest})"
    if dropped and (overlong == "raise" or not kept):
        also = ", or set overlong=drop" if kept else ""
        raise DataError(f"{found}; raise max_prompt_tokens or the model's max_length{also}")
    if dropped:
        print(f"{found}; dropped")
    return kept
