"""REINFORCE on star graphs as Q#'s train_reinforce.py (Zhou et al. 2025): one rollout per prompt, r
= 1 if the whole path is right.

    python recipes/star_graph/reinforce.py model_name=GPT/checkpoints/final rollouts=sampled baseline=0

    baseline 0   w_i = 1.1 r_i - 0.1                      baseline 1   w_i = r_i - mean of the batch's r
    loss = (1/M) sum_i w_i sum_t -log pi(y_it)            M prompts; pi: softmax at temperature 1

Left out: warm-up, weight decay, clipping; a baseline per prompt and importance weights (see rl/).
"""

if not __package__:  # run as a file: put the project on the path
    import os
    import sys

    sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import asyncio
from collections.abc import Sequence
from typing import Literal

import chz
import numpy as np

from posttrain.backend.errors import ConfigError
from posttrain.backend.ranges import LEARNING_RATE
from posttrain.backend.training_client import TrainingClient
from posttrain.backend.types import Datum, ForwardBackwardOutput, ModelInput, SampledSequence, SamplingParams
from posttrain.tracking.command_line import run_command
from posttrain.tracking.run_config import log_path_field
from recipes.star_graph import pretrain
from supervised import train


@chz.chz
class Config(pretrain.Config):
    """REINFORCE on star graphs, from a trained policy."""

    rollouts: Literal["greedy", "sampled"] = chz.field(
        default="greedy", doc="greedy (Q#'s code) or sampled at temperature 1"
    )
    baseline: Literal[0, 1] = chz.field(
        default=1, doc="1: the batch's mean reward; 0: none, wrong paths have weight -0.1"
    )
    learning_rate: float = chz.field(
        default=1e-4, validator=LEARNING_RATE, doc="at the first step; 1e-5 in Q#, for GPT-2"
    )
    log_path: str = log_path_field("runs/star_graph_reinforce")


def weights(rewards_B: np.ndarray, baseline: Literal[0, 1]) -> np.ndarray:
    """w_B of rewards 0 and 1."""
    return rewards_B - rewards_B.mean() if baseline else 1.1 * rewards_B - 0.1


def weighted_datum(prefix: Sequence[int], rollout: SampledSequence, weight: float) -> Datum:
    """For the loss "reinforce": -`weight` times the log-likelihood of the sampled tokens."""
    tokens, before = [*prefix, *rollout.tokens], len(prefix) - 1
    sampled = len(rollout.tokens)
    return Datum(
        ModelInput.from_ints(tokens[:-1]),
        {
            "target_tokens": tokens[1:],
            "logprobs": [0.0] * before + rollout.logprobs,
            "advantages": np.array([0.0] * before + [weight] * sampled, dtype=np.float32),
            "mask": np.array([0.0] * before + [1.0] * sampled, dtype=np.float32),
        },
    )


class Reinforce:
    """An Objective of the supervised loop. Batches are prompts with right paths; rollouts train."""

    def __init__(self, target_length: int, rollouts: Literal["greedy", "sampled"], baseline: Literal[0, 1], seed: int):
        self.target_length, self.seed = target_length, seed
        self.baseline: Literal[0, 1] = baseline
        self.temperature = 0.0 if rollouts == "greedy" else 1.0
        self.rewards_B = np.zeros(0)  # of the current batch

    async def passes(self, client: TrainingClient, batch: list[Datum]) -> list[train.Pass]:
        sampler = await client.save_weights_and_get_sampling_client_async()
        rows = [[*datum.model_input.to_ints(), int(datum.loss_fn_inputs["target_tokens"].array[-1])] for datum in batch]
        prefixes = [row[: -self.target_length] for row in rows]
        sampled = [sampler.sample_async(ModelInput.from_ints(prefix), 1, self.params(prefix)) for prefix in prefixes]
        rollouts = [response.sequences[0] for response in await asyncio.gather(*sampled)]
        right = [rollout.tokens == row[-self.target_length :] for rollout, row in zip(rollouts, rows, strict=True)]
        self.rewards_B = np.array(right, dtype=np.float64)
        weights_B = weights(self.rewards_B, self.baseline) / len(batch)
        data = [weighted_datum(*member) for member in zip(prefixes, rollouts, weights_B.tolist(), strict=True)]
        return [(data, client.forward_backward(data, "reinforce"))]

    def params(self, prefix: Sequence[int]) -> SamplingParams:
        """The seed is a function of the prompt, so that a resumed run draws the same samples."""
        seed = int(np.random.SeedSequence([self.seed, *prefix]).generate_state(1)[0])
        return SamplingParams(max_tokens=self.target_length, temperature=self.temperature, stop=[], seed=seed)

    def metrics(self, batch: list[Datum], outputs: Sequence[ForwardBackwardOutput]) -> train.Metrics:
        return {"reward": float(self.rewards_B.mean()), "reinforce_loss": outputs[0].metrics["loss:sum"]}


async def main(config: Config) -> train.Metrics:
    if not config.model_name:
        raise ConfigError(
            "model_name: REINFORCE starts from a trained policy; give the checkpoint of recipes/star_graph/pretrain.py"
        )
    return await pretrain.train_with(
        config, lambda layout: Reinforce(layout.target_length, config.rollouts, config.baseline, config.seed)
    )


if __name__ == "__main__":
    run_command(main, Config)
