"""Scorers of answers: a preference model says which of two is better, a reward model how good an
answer is. Rules, local models and endpoints share these two calls. A group of answers is scored as
one batch, never with other waiting requests: scores then do not depend on timing.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path

import chz
import torch

from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import ConfigError, ModelError
from posttrain.backend.losses import Tensors
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.training_client import TrainingClient
from posttrain.renderers import get_renderer
from posttrain.renderers.types import Message, Renderer, Tokenizer
from posttrain.tracking.model_source import find_model
from preference.types import Comparison
from rl import step_checks
from rl.types import MalformedStep, RolloutError, TrajectoryGroup

# in [-1, 1]: 1 = B is better, -1 = A is, 0 = neither
Judge = Callable[[Comparison], Awaitable[float]]


def no_loss(scalars_N: torch.Tensor, inputs: Tensors) -> tuple[torch.Tensor, Tensors]:
    """For a forward pass whose scalars alone are wanted."""
    return torch.zeros_like(scalars_N), {}


class JudgeError(RolloutError):
    """A judge failed or its reply is no judgement. Its comparison has no score."""


class PreferenceModel(ABC):
    """A Judge that takes many comparisons at once."""

    @abstractmethod
    async def compare(self, comparisons_D: Sequence[Comparison]) -> list[float]:
        """A score in [-1, 1] for each comparison: 1 = B is better."""

    async def __call__(self, comparison: Comparison) -> float:
        return (await self.compare([comparison]))[0]


class RewardModel(ABC):
    @abstractmethod
    async def score(self, conversations_D: Sequence[Sequence[Message]]) -> list[float]:
        """A finite number for the last answer of each conversation; more is better."""

    async def score_each(self, conversations_D: Sequence[Sequence[Message]]) -> list[float | RolloutError]:
        """The same, with an error in the place of what cannot be scored."""
        return [*await self.score(conversations_D)]

    async def __call__(self, prompt: Sequence[Message], completion: Sequence[Message]) -> float:
        return (await self.score([[*prompt, *completion]]))[0]


async def judge_all(judge: Judge, comparisons_D: Sequence[Comparison]) -> list[float]:
    """One call where the judge takes many comparisons, else concurrent calls. JudgeError for a
    score outside [-1, 1]."""
    if not comparisons_D:
        return []
    if isinstance(judge, PreferenceModel):
        scores_D = await judge.compare(comparisons_D)
    else:
        scores_D = list(await asyncio.gather(*(judge(comparison) for comparison in comparisons_D)))
    return [_score(answered) for answered in scores_D]


def _score(answered: object) -> float:
    if (score := judged(answered, -1)) is None:
        raise JudgeError(
            f"the judge answered {answered!r:.80}: a number from -1 (A is better) to 1 (B is better) is needed"
        )
    return score


def judged(answered: object, least: float) -> float | None:
    """A number from `least` to 1, Python's, numpy's or torch's; None for anything else."""
    with suppress(MalformedStep):
        if least <= (score := step_checks.reward(answered)) <= 1:
            return score
    return None


def too_long(tokens: int, max_length: int) -> JudgeError | None:
    """The error of a conversation that exceeds the context of the model that scores it."""
    if tokens <= max_length:
        return None
    return JudgeError(f"a conversation has {tokens} tokens, the reward model's context {max_length}: lower max_tokens")


def drop_too_long(groups_P: Sequence[TrajectoryGroup], max_length: int) -> None:
    """Members whose last prompt and answer exceed the context leave their groups."""
    for group in groups_P:
        for g in reversed(range(len(group.trajectories_G))):
            turns = group.trajectories_G[g].transitions
            if turns and (error := too_long(turns[-1].ob.length + len(turns[-1].ac.tokens), max_length)):
                group.drop_member(g, error)


@chz.chz
class JudgeBuilder:
    """Configuration of a judge; part of an environment's configuration."""

    def __call__(self, tokenizer: Tokenizer) -> Judge:
        """`tokenizer` is the tokenizer of the judged policy."""
        raise NotImplementedError


@chz.chz
class RewardModelBuilder:
    def __call__(self, tokenizer: Tokenizer) -> RewardModel:
        """`tokenizer` is the tokenizer of the scored policy."""
        raise NotImplementedError


@chz.chz
class SavedModel:
    """Path and backend of a saved model."""

    path: str = chz.field(
        doc="checkpoint folder, as RUN/checkpoints/final", munger=lambda _, path: str(Path(path).expanduser())
    )
    renderer_name: str | None = chz.field(default=None, doc="None = the training run's")
    backend: BackendConfig = chz.field(default_factory=BackendConfig, doc="how this machine runs the model")

    def open(
        self,
        create: Callable[[ServiceClient, str], TrainingClient],
        tokenizer: Tokenizer,
        service: ServiceClient | None = None,
    ) -> tuple[TrainingClient, Renderer]:
        """The frozen model, by default in a new service. ModelError for another tokenizer."""
        client = create(service or ServiceClient(self.backend), self.path)
        reward_tokenizer: Tokenizer = client.get_tokenizer()
        if reward_tokenizer.get_vocab() != tokenizer.get_vocab():
            raise ModelError(
                f"{self.path} has another tokenizer than the policy ({len(reward_tokenizer)} tokens, "
                f"the policy {len(tokenizer)}): train it from a model of the policy's family"
            )
        return client, get_renderer(self._renderer_name(), reward_tokenizer)

    def check_renderer(self, renderer: Renderer, policy_renderer: Renderer) -> None:
        """ConfigError unless the policy's text is written as the model's training text was."""
        if type(renderer) is not type(policy_renderer):
            kinds = f"{type(renderer).__name__}, the policy by {type(policy_renderer).__name__}"
            raise ConfigError(f"{self.path} was trained on text written by {kinds}: give both the same renderer_name")

    def _renderer_name(self) -> str | None:
        source = find_model(self.path)
        trained_with = source.renderer_name
        if not source.settings:
            return self.renderer_name
        if self.renderer_name not in (None, trained_with):
            raise ConfigError(
                f"renderer_name={self.renderer_name}: {self.path} was trained with renderer_name={trained_with}; leave "
                "it out"
            )
        return trained_with
