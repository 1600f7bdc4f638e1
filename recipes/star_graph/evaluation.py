"""Accuracy on held-out graphs, decoded greedily by the project's sampler.

test/first_hop: share of graphs with the right second node, the task's one decision; test/exact:
with the whole path right; test/node_k: with node k right. Left out: beams, sampling.
"""

import asyncio

import numpy as np

from envs.star_graph import HeldOut
from envs.star_graph_data import Targets, path_accuracy
from envs.star_graph_tokens import Layout
from posttrain.backend.sampling_client import SamplingClient
from posttrain.backend.training_client import TrainingClient
from posttrain.backend.types import ModelInput, SamplingParams


async def decode_paths(
    sampler: SamplingClient, prefixes_B_P: np.ndarray, layout: Layout, targets: Targets
) -> np.ndarray:
    """(B, target_length): greedy paths from the source, in the tokenizer's ids. A reversed model
    decodes from the goal.
    """
    if targets == "teacherless":
        return await _decode_at_once(sampler, prefixes_B_P, layout)
    params = SamplingParams(max_tokens=layout.target_length, temperature=0.0, stop=[], seed=0)
    prompts_B = [ModelInput.from_ints(prefix_P) for prefix_P in prefixes_B_P.tolist()]
    responses_B = await asyncio.gather(*(sampler.sample_async(prompt, 1, params) for prompt in prompts_B))
    tokens_B_L = np.array([response.sequences[0].tokens for response in responses_B])
    return tokens_B_L[:, ::-1] if targets == "reversed" else tokens_B_L


async def _decode_at_once(sampler: SamplingClient, prefixes_B_P: np.ndarray, layout: Layout) -> np.ndarray:
    """Teacherless: one pass over the prompt and l - 1 dummies; the path's tokens are the likeliest
    tokens at each dummy, the last is sampled.
    """
    dummies = [layout.dollar] * (layout.target_length - 1)
    params = SamplingParams(max_tokens=1, temperature=0.0, stop=[], seed=0)
    prompts_B = [ModelInput.from_ints([*prefix_P, *dummies]) for prefix_P in prefixes_B_P.tolist()]
    responses_B = await asyncio.gather(*(sampler.sample_async(p, 1, params, topk_prompt_logprobs=1) for p in prompts_B))
    paths_B = []
    for response in responses_B:
        assert response.topk_prompt_logprobs is not None
        best = [entries[0][0] for entries in response.topk_prompt_logprobs[layout.prefix_length :] if entries]
        paths_B.append(best + response.sequences[0].tokens)
    return np.array(paths_B)


class AccuracyEvaluator:
    """Evaluator of a TrainingClient's policy."""

    def __init__(self, test: HeldOut, layout: Layout, targets: Targets = "forward"):
        self.targets: Targets = targets
        self.layout, self.ids_B_T = layout, layout.encode(test.tokens_B_T)

    async def __call__(self, client: TrainingClient) -> dict[str, float]:
        return await self.of_sampler(await client.save_weights_and_get_sampling_client_async())

    async def of_sampler(self, sampler: SamplingClient) -> dict[str, float]:
        prefix, nodes_L = self.layout.prefix_length, self.layout.nodes_L
        paths_B_L = await decode_paths(sampler, self.ids_B_T[:, :prefix], self.layout, self.targets)
        accuracy = path_accuracy(paths_B_L[:, nodes_L], self.ids_B_T[:, prefix:][:, nodes_L])
        return {f"test/{name}": value for name, value in accuracy.items()}
