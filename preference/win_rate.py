"""Win rate of a policy against a reference: both answer the same prompts; a judge compares the
answers in both orders. Win rate = mean over prompts of (r_AB - r_BA + 2) / 4: A is the reference's
answer, B the policy's, r the judge's score in [-1, 1]. A judge that always prefers one side gives
0.5. The standard error is over prompts (ddof 1). Left out: several answers per prompt.
"""

import asyncio
from collections.abc import Sequence

import numpy as np

from posttrain.backend.errors import DataError
from posttrain.backend.sampling_client import SamplingClient
from posttrain.backend.types import SamplingParams
from posttrain.renderers.types import Message, Renderer
from posttrain.tracking.metrics_log import Metrics
from posttrain.tracking.seeds import sampling_seed
from preference.reward_types import Judge, judge_all
from preference.types import Comparison


def win_rate(scores_AB_P: Sequence[float], scores_BA_P: Sequence[float]) -> tuple[float, float]:
    """Win rate of B and its standard error, nan for a single prompt."""
    won_P = (np.array(scores_AB_P) - np.array(scores_BA_P) + 2) / 4
    return float(won_P.mean()), float(won_P.std(ddof=1) / np.sqrt(len(won_P))) if len(won_P) > 1 else float("nan")


class WinRateEvaluator:
    """`prompts` are conversations to answer. Temperature 0 is greedy; otherwise the two policies
    have different seeds."""

    def __init__(
        self,
        prompts: Sequence[Sequence[Message]],
        renderer: Renderer,
        judge: Judge,
        max_tokens: int,
        temperature: float = 1.0,
        seed: int = 0,
    ):
        if not prompts:
            raise DataError("no prompts to compare two policies on")
        self.prompts, self.renderer, self.judge = prompts, renderer, judge
        self.max_tokens, self.temperature, self.seed = max_tokens, temperature, seed
        self.comparisons: list[Comparison] = []  # of the last call

    async def __call__(self, policy: SamplingClient, reference: SamplingClient) -> Metrics:
        """`win_rate`, `win_rate_stderr`, and the share of prompts where both orders agree."""
        answers_A, answers_B = await asyncio.gather(self._answers(reference, 0), self._answers(policy, 1))
        self.comparisons = [Comparison(*sides) for sides in zip(self.prompts, answers_A, answers_B, strict=True)]
        scores = await judge_all(
            self.judge, [*self.comparisons, *(comparison.swap() for comparison in self.comparisons)]
        )
        scores_AB, scores_BA = scores[: len(self.prompts)], scores[len(self.prompts) :]
        mean, stderr = win_rate(scores_AB, scores_BA)
        agreement = float(np.mean(np.sign(scores_AB) == -np.sign(scores_BA)))
        return {
            "win_rate": mean,
            "win_rate_stderr": stderr,
            "swap_agreement": agreement,
            "prompts": float(len(self.prompts)),
        }

    async def _answers(self, client: SamplingClient, side: int) -> list[list[Message]]:
        responses = await asyncio.gather(
            *(self._sample(client, prompt, side, p) for p, prompt in enumerate(self.prompts))
        )
        return [[self.renderer.parse_response(tokens)[0]] for tokens in responses]

    async def _sample(self, client: SamplingClient, prompt: Sequence[Message], side: int, p: int) -> list[int]:
        seed, stop = sampling_seed([self.seed, side, p]), self.renderer.get_stop_sequences()
        params = SamplingParams(max_tokens=self.max_tokens, seed=seed, stop=stop, temperature=self.temperature)
        response = await client.sample_async(self.renderer.build_generation_prompt(prompt), 1, params)
        return response.sequences[0].tokens
