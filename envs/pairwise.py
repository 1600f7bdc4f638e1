"""Rewards from pairwise comparisons: the answers of a group are judged against each other.

So a group needs a judge of pairs, not a reward model with a scale. Larger groups are compared
within chunks of `matchup_group_size`. Rewards sum to 0 before the format term: progress shows in a
win rate against a fixed policy (preference/win_rate.py). Left out: ratings over groups (Elo), byes.

    reward_g = mean over g's matchups of (1 for a win, -1 for a loss, or a score between) + format_coef * (format - 1)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import chz
import numpy as np

from envs.completion_env import CompletionEnv, GoldReward, Prompt, PromptsBuilder, completions
from posttrain.backend.errors import ConfigError
from posttrain.backend.ranges import COUNT, NON_NEGATIVE
from posttrain.renderers.types import Message, Renderer
from posttrain.tracking.datasets import ListDataset, held_out
from preference.reward_types import Judge, JudgeBuilder, judge_all
from preference.types import Comparison
from rl.types import Env, EnvGroupBuilder, Metrics, RLDataset, RLDatasetBuilder, RolloutError, Trajectory

Matchups = Literal["all_pairs_both_ways", "all_pairs_one_way"]


def matchups(size: int, pattern: Matchups, chunk_size: int) -> list[tuple[int, int]]:
    """Pairs (A, B) of members, within even chunks of at least `chunk_size` of the `size` members."""
    chunks = np.array_split(np.arange(size), max(1, size // chunk_size))
    pairs = [(int(a), int(b)) for chunk in chunks for a, b in combinations(chunk, 2)]
    return pairs if pattern == "all_pairs_one_way" else [order for a, b in pairs for order in ((a, b), (b, a))]


async def wins_minus_losses(
    judge: Judge, prompt: Prompt, answers_G: Sequence[Sequence[Message]], pattern: Matchups, chunk_size: int
) -> list[float]:
    """Mean over each answer's matchups. RolloutError for a single answer."""
    if len(answers_G) == 1:
        raise RolloutError("only one member is left of a group judged in pairs: there is nothing to compare it with")
    pairs = matchups(len(answers_G), pattern, chunk_size)
    scores = await judge_all(judge, [Comparison(prompt, answers_G[a], answers_G[b]) for a, b in pairs])
    signed_G: list[list[float]] = [[] for _ in answers_G]
    for (a, b), score in zip(pairs, scores, strict=True):
        signed_G[a].append(-score)
        signed_G[b].append(score)
    return [float(np.mean(signed)) for signed in signed_G]


@dataclass(frozen=True)
class PairwisePreferenceGroupBuilder(EnvGroupBuilder):
    """`num_envs` answers to one prompt, judged in pairs."""

    prompt: Prompt
    renderer: Renderer
    judge: Judge
    num_envs: int
    matchup_pattern: Matchups = "all_pairs_both_ways"
    matchup_group_size: int = 4
    format_coef: float = 1.0
    gold: GoldReward | None = None

    async def make_envs(self) -> Sequence[Env]:
        return [CompletionEnv(self.prompt, self.renderer, self.format_coef, self.gold) for _ in range(self.num_envs)]

    async def compute_group_rewards(
        self, trajectories_G: list[Trajectory], envs_G: Sequence[Env]
    ) -> list[tuple[float, Metrics]]:
        """Mean of wins minus losses of each answer. RolloutError if only one member is left."""
        rewards_G = await wins_minus_losses(
            self.judge, self.prompt, completions(envs_G), self.matchup_pattern, self.matchup_group_size
        )
        return [(reward, {"win_minus_loss": reward}) for reward in rewards_G]

    def logging_tags(self) -> list[str]:
        return ["pair_pref"]


@chz.chz
class PairwiseBuilder(RLDatasetBuilder):
    """Groups of answers judged in pairs. The held-out set is one such group per held-out prompt."""

    prompts: PromptsBuilder = chz.field(doc="builder of the prompts")
    judge: JudgeBuilder = chz.field(doc="the judge: a saved model, an endpoint, a rule")
    group_size: int = chz.field(default=4, validator=COUNT, doc="answers per prompt")
    matchup_pattern: Matchups = chz.field(
        default="all_pairs_both_ways", doc="all_pairs_both_ways, or all_pairs_one_way with half the judgements"
    )
    matchup_group_size: int = chz.field(
        default=4, validator=COUNT, doc="answers meet within chunks of this size (or a few more)"
    )
    format_coef: float = chz.field(
        default=1.0, validator=NON_NEGATIVE, doc="subtracted from the reward of a truncated answer"
    )

    async def __call__(self, renderer: Renderer) -> tuple[RLDataset, RLDataset | None]:
        if min(self.group_size, self.matchup_group_size) < 2:
            raise ConfigError(
                f"group_size={self.group_size}, matchup_group_size={self.matchup_group_size}: a pair needs at least 2"
            )
        judge, gold = self.judge(renderer.tokenizer), self.prompts.gold()
        settings = (self.group_size, self.matchup_pattern, self.matchup_group_size, self.format_coef, gold)
        train, test = (
            [PairwisePreferenceGroupBuilder(prompt, renderer, judge, *settings) for prompt in prompts]
            for prompts in self.prompts()
        )
        return ListDataset(train, self.batch_size, self.seed), held_out(test, self.batch_size)
