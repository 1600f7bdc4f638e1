"""Reinforcement learning with verifiable rewards in one file: REINFORCE with a group-mean baseline.

For each of P problems the policy pi samples G answers. Answer g gets the reward R_g = 1 if it is
right, else 0, and the advantage

    A_g = R_g - mean_G(R)                                    (GRPO's baseline, without its division by the standard deviation)

which all its tokens share. One step of AdamW lowers

    L = - sum_tokens exp(log pi(token) - log q(token)) A     (the importance-sampling form of the policy gradient)

where q is the policy that sampled. Sampler and trainer have the same weights, so the ratio is 1 up
to rounding: `gap`, the mean |log pi - log q|, stays below 1e-5 on a CPU. If it grows, the samples
are off-policy.

RL needs a policy that is sometimes right. So `tiny` first imitates sums as in sl_loop.py, unless
load_checkpoint_path is given.

    python recipes/rl_loop.py                          # two minutes on 2 cores
    python recipes/rl_loop.py group_size=16 steps=100 learning_rate=1e-4

Expect greedy held-out accuracy to rise from about 0.75 after the warm start to above 0.9.

The file uses only the backend, with the names of the Tinker SDK: with that SDK only the imports and
the two lines that make the client differ. Left out (see rl/): environments with several turns,
other estimators and losses, checkpoints and resume, a run folder with metrics, plots and
transcripts.
"""

if not __package__:  # run as a file: put the project on the path
    import os
    import sys

    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import time
from typing import Literal

import chz
import numpy as np

from posttrain.backend.config import BackendConfig
from posttrain.backend.ranges import COUNT, LEARNING_RATE, NON_NEGATIVE, SEED, WHOLE
from posttrain.backend.sampling_client import SamplingClient
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.types import AdamParams, Datum, ModelInput, SampledSequence, SamplingParams, TensorData
from posttrain.tracking.command_line import run_command

NUM_HELD_OUT = 200
MAX_TOKENS = 8


@chz.chz
class Config:
    """Reinforcement learning on two-digit addition, in one file."""

    model_name: str = chz.field(default="tiny", doc="a preset, a local folder, or a Hugging Face hub name")
    load_checkpoint_path: str | None = chz.field(default=None, doc="start from these weights instead of a warm start")
    warm_start_loss: float = chz.field(
        default=0.6, validator=NON_NEGATIVE, doc="nats per answer at which the warm start ends; some 200 steps for tiny"
    )
    steps: int = chz.field(default=60, validator=COUNT, doc="RL steps")
    batch_size: int = chz.field(default=64, validator=COUNT, doc="problems per step (P)")
    group_size: int = chz.field(default=8, validator=COUNT, doc="answers sampled per problem (G)")
    learning_rate: float = chz.field(default=2e-4, validator=LEARNING_RATE, doc="of RL, constant")
    eval_every: int = chz.field(default=10, validator=WHOLE, doc="steps between greedy tests on held-out sums")
    seed: int = chz.field(default=0, validator=SEED, doc="seed of the weights, the split, the batches and the sampling")
    engine: Literal["auto", "vllm", "torch"] = chz.field(default="auto", doc="sampler; auto = vLLM where there is one")


def main(config: Config) -> None:
    with ServiceClient(BackendConfig(engine=config.engine)) as service:
        client = service.create_training_client(config.model_name, seed=config.seed)
        tokenizer = client.get_tokenizer()
        rng = np.random.default_rng(config.seed)
        # a pair is held out in both orders
        pairs = rng.permutation([(a, b) for a in range(10, 100) for b in range(a, 100)])
        held_out, train = pairs[:NUM_HELD_OUT].tolist(), pairs[NUM_HELD_OUT:]

        def draw(count: int) -> list[list[int]]:
            return rng.permuted(rng.choice(train, count), axis=1).tolist()

        def prompt(a: int, b: int) -> list[int]:
            return tokenizer.encode(f"{a}+{b}=")

        def reward(a: int, b: int, answer: SampledSequence) -> float:
            return float(tokenizer.decode(answer.tokens) == f"{a + b}{tokenizer.eos_token}")

        def accuracy(sampler: SamplingClient) -> float:
            greedy = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0)
            futures = [sampler.sample(ModelInput.from_ints(prompt(a, b)), 1, greedy) for a, b in held_out]
            return float(
                np.mean([reward(a, b, f.result().sequences[0]) for (a, b), f in zip(held_out, futures, strict=True)])
            )

        def datum(question: list[int], answer: list[int], **tracks: list[float]) -> Datum:
            """Position t predicts token t + 1. Tracks cover the answer, and are 0 before it."""
            tokens, padding = question + answer, [0.0] * (len(question) - 1)
            inputs = {name: TensorData(data=padding + track, dtype="float32") for name, track in tracks.items()}
            return Datum(
                ModelInput.from_ints(tokens[:-1]),
                {"target_tokens": TensorData(data=tokens[1:], dtype="int64"), **inputs},
            )

        if config.load_checkpoint_path:
            client.load_state(config.load_checkpoint_path).result()
        else:
            loss = float("inf")
            while loss > config.warm_start_loss:
                examples_D = [(prompt(a, b), tokenizer.encode(f"{a + b}{tokenizer.eos_token}")) for a, b in draw(128)]
                forward_backward = client.forward_backward(
                    [datum(q, a, weights=[1.0] * len(a)) for q, a in examples_D], "cross_entropy"
                )
                client.optim_step(AdamParams(learning_rate=2e-3))
                loss = forward_backward.result().metrics["loss:sum"] / len(examples_D)

        for step in range(config.steps):
            # The weights go to the sampler in memory; after the next sync this client raises.
            sampler = client.save_weights_and_get_sampling_client()
            if step % config.eval_every == 0:
                print(f"step {step:3d}  held-out accuracy {accuracy(sampler):.3f}", flush=True)
            start = time.time()
            problems_P = draw(config.batch_size)
            params_P = [
                SamplingParams(max_tokens=MAX_TOKENS, temperature=1.0, seed=int(rng.integers(2**40)))
                for _ in problems_P
            ]
            prompts_P = [ModelInput.from_ints(prompt(a, b)) for a, b in problems_P]
            futures_P = [
                sampler.sample(p, config.group_size, params) for p, params in zip(prompts_P, params_P, strict=True)
            ]
            data_D, answers_D, rewards_D = [], [], []
            for (a, b), future in zip(problems_P, futures_P, strict=True):
                answers_G = future.result().sequences
                rewards_G = np.array([reward(a, b, answer) for answer in answers_G])
                for answer, advantage in zip(answers_G, (rewards_G - rewards_G.mean()).tolist(), strict=True):
                    tracks = {"logprobs": answer.logprobs, "advantages": [advantage] * len(answer.tokens)}
                    data_D.append(datum(prompt(a, b), answer.tokens, **tracks))
                answers_D += answers_G
                rewards_D += rewards_G.tolist()
            # Both calls return futures at once; they run in this order.
            forward_backward = client.forward_backward(data_D, "importance_sampling")
            optim_step = client.optim_step(AdamParams(learning_rate=config.learning_rate))
            outputs = zip(forward_backward.result().loss_fn_outputs, answers_D, strict=True)
            gaps_D = [
                output["logprobs"].to_numpy()[-len(answer.tokens) :] - answer.logprobs for output, answer in outputs
            ]
            gap, seconds = np.abs(np.concatenate(gaps_D)).mean(), time.time() - start
            optim_step.result()
            print(f"step {step:3d}  reward {np.mean(rewards_D):.3f}  gap {gap:.1e}  {seconds:.2f} s", flush=True)
        print(
            f"step {config.steps:3d}  held-out accuracy {accuracy(client.save_weights_and_get_sampling_client()):.3f}"
        )


if __name__ == "__main__":
    run_command(main, Config)
