"""Supervised fine-tuning in one file: maximum likelihood of the answer, given the question.

For a sequence x_1 .. x_T made of a prompt and an answer, one step lowers

    L = - sum_t  w_t log p(x_t | x_<t),      w_t = 1 on the answer's tokens (its EOS among them), 0 on the prompt's

by AdamW with a linearly falling learning rate. The task is two-digit addition, "12+34=" answered by
"46<eos>". The model, `tiny`, has 0.8M parameters with random initial weights.

    python recipes/sl_loop.py                          # about a minute on 2 cores
    python recipes/sl_loop.py model_name=small learning_rate=5e-4

Expect the held-out loss to fall from 6 nats per token to about 0.1, and 9 of 10 held-out sums
right, with seed 0; other seeds learn to carry later (recipes/README.md).

The file uses only the backend, with the names of the Tinker SDK: with that SDK only the imports and
the two lines that make the client differ. Left out (see supervised/): datasets and chat templates,
making the next batch during a step, checkpoints and resume, a run folder with metrics and plots.
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
from posttrain.backend.ranges import COUNT, LEARNING_RATE, SEED, WHOLE
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.types import AdamParams, Datum, ModelInput, SamplingParams, TensorData
from posttrain.tracking.command_line import run_command

NUM_HELD_OUT = 200


@chz.chz
class Config:
    """Supervised fine-tuning on two-digit addition, in one file."""

    model_name: str = chz.field(default="tiny", doc="a preset, a local folder, or a Hugging Face hub name")
    steps: int = chz.field(default=300, validator=COUNT, doc="optimizer steps")
    batch_size: int = chz.field(default=128, validator=COUNT, doc="examples per step")
    learning_rate: float = chz.field(
        default=2e-3, validator=LEARNING_RATE, doc="at the first step; falls to 0 at the last"
    )
    eval_every: int = chz.field(default=50, validator=WHOLE, doc="steps between held-out losses")
    seed: int = chz.field(default=0, validator=SEED, doc="seed of the weights, the split and the batches")
    engine: Literal["auto", "vllm", "torch"] = chz.field(
        default="auto", doc="sampler of the final test; auto = vLLM where there is one"
    )


def main(config: Config) -> None:
    with ServiceClient(BackendConfig(engine=config.engine)) as service:
        client = service.create_training_client(config.model_name, seed=config.seed)
        tokenizer = client.get_tokenizer()

        def datum(a: int, b: int) -> Datum:
            prompt, answer = tokenizer.encode(f"{a}+{b}="), tokenizer.encode(f"{a + b}{tokenizer.eos_token}")
            tokens, weights = prompt + answer, [0.0] * len(prompt) + [1.0] * len(answer)
            # Position t of the input predicts token t + 1: the targets are the tokens, shifted by one.
            inputs = {
                "target_tokens": TensorData(data=tokens[1:], dtype="int64"),
                "weights": TensorData(data=weights[1:], dtype="float32"),
            }
            return Datum(ModelInput.from_ints(tokens[:-1]), inputs)

        # A pair is held out in both orders: a model that saw 34+12=46 may know 12+34=.
        rng = np.random.default_rng(config.seed)
        pairs = rng.permutation([(a, b) for a in range(10, 100) for b in range(a, 100)])
        held_out, train = pairs[:NUM_HELD_OUT].tolist(), pairs[NUM_HELD_OUT:]
        test_D = [datum(a, b) for a, b in held_out]

        def held_out_loss() -> float:
            outputs = client.forward(test_D, "cross_entropy").result().loss_fn_outputs
            logprobs = np.concatenate([output["logprobs"].to_numpy() for output in outputs])
            weights = np.concatenate([datum.loss_fn_inputs["weights"].to_numpy() for datum in test_D])
            return float(-(weights * logprobs).sum() / weights.sum())

        start = time.time()
        for step in range(config.steps):
            # each pair in a random order
            pairs_D = rng.permuted(rng.choice(train, config.batch_size), axis=1).tolist()
            if step % config.eval_every == 0:
                print(
                    f"step {step:4d}  held-out loss {held_out_loss():.3f} nats per token  {time.time() - start:5.1f} s",
                    flush=True,
                )
            # Both calls return futures at once; they run in this order.
            forward_backward = client.forward_backward([datum(a, b) for a, b in pairs_D], "cross_entropy")
            optim_step = client.optim_step(AdamParams(learning_rate=config.learning_rate * (1 - step / config.steps)))
            forward_backward.result()
            optim_step.result()
        print(
            f"step {config.steps:4d}  held-out loss {held_out_loss():.3f} nats per token  {time.time() - start:5.1f} s",
            flush=True,
        )

        # Test: the sampler gets the weights in memory and answers the held-out sums.
        sampler = client.save_weights_and_get_sampling_client()
        greedy = SamplingParams(max_tokens=8, temperature=0.0)
        futures = [sampler.sample(ModelInput.from_ints(tokenizer.encode(f"{a}+{b}=")), 1, greedy) for a, b in held_out]
        answers = [tokenizer.decode(future.result().sequences[0].tokens) for future in futures]
        correct = [answer == f"{a + b}{tokenizer.eos_token}" for answer, (a, b) in zip(answers, held_out, strict=True)]
        for (a, b), answer in zip(held_out[:5], answers[:5], strict=True):
            print(f"{a}+{b}= {answer}")
        print(f"held-out accuracy {np.mean(correct):.3f}")


if __name__ == "__main__":
    run_command(main, Config)
