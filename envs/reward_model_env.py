"""Answers scored by a reward model: reward = coef * score + format_coef * (format - 1).

A group is scored in one batched call. To add a reward model to an environment's own reward, use
preference.bradley_terry.RewardModelReward.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import chz

from envs.completion_env import CompletionEnv, GoldReward, Prompt, PromptsBuilder, completions
from posttrain.backend.ranges import NON_NEGATIVE
from posttrain.renderers.types import Renderer
from posttrain.tracking.datasets import ListDataset, held_out
from preference.reward_types import JudgeError, RewardModel, RewardModelBuilder
from rl.types import Env, EnvGroupBuilder, Metrics, RLDataset, RLDatasetBuilder, RolloutError, Trajectory


@dataclass(frozen=True)
class RewardModelGroupBuilder(EnvGroupBuilder):
    """`num_envs` answers to one prompt, each scored by itself."""

    prompt: Prompt
    renderer: Renderer
    reward_model: RewardModel
    num_envs: int
    format_coef: float = 1.0
    coef: float = 1.0
    gold: GoldReward | None = None

    async def make_envs(self) -> Sequence[Env]:
        return [CompletionEnv(self.prompt, self.renderer, self.format_coef, self.gold) for _ in range(self.num_envs)]

    async def compute_group_rewards(
        self, trajectories_G: list[Trajectory], envs_G: Sequence[Env]
    ) -> list[tuple[float, Metrics] | RolloutError]:
        scores_G = await self.reward_model.score_each([[*self.prompt, *answer] for answer in completions(envs_G)])
        return [self._reward(score) for score in scores_G]

    def _reward(self, score: float | RolloutError) -> tuple[float, Metrics] | RolloutError:
        if isinstance(score, RolloutError):
            return score
        if not math.isfinite(score):
            return JudgeError(f"the reward model scored {score}, which is not finite")
        return self.coef * score, {"proxy": score}


@chz.chz
class RewardModelEnvBuilder(RLDatasetBuilder):
    """Prompts whose answers a reward model scores. Held out is one answer per held-out prompt."""

    prompts: PromptsBuilder = chz.field(doc="builder of the prompts")
    reward_model: RewardModelBuilder = chz.field(doc="the model that scores")
    format_coef: float = chz.field(
        default=1.0, validator=NON_NEGATIVE, doc="subtracted from the reward of a truncated answer"
    )
    coef: float = chz.field(default=1.0, validator=NON_NEGATIVE, doc="factor of the score")

    async def __call__(self, renderer: Renderer) -> tuple[RLDataset, RLDataset | None]:
        model, gold = self.reward_model(renderer.tokenizer), self.prompts.gold()
        settings = (self.format_coef, self.coef, gold)
        train, test = (
            [RewardModelGroupBuilder(prompt, renderer, model, size, *settings) for prompt in prompts]
            for prompts, size in zip(self.prompts(), (self.group_size, 1), strict=True)
        )
        return ListDataset(train, self.batch_size, self.seed), held_out(test, self.batch_size)
