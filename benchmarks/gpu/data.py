"""Random prompts and policy data, and the trainer's logprobs of what was sampled."""

import numpy as np

from posttrain.backend.training_client import TrainingClient
from posttrain.backend.types import Datum, ModelInput

FIRST, VOCABULARY = 4, 260  # of the presets' tokenizer


def prompt_of(length: int, seed: int = 0) -> ModelInput:
    return ModelInput.from_ints(np.random.default_rng([seed, length]).integers(FIRST, VOCABULARY, length).tolist())


def policy_data(count: int, temperature: float) -> list[Datum]:
    rng = np.random.default_rng(0)
    data = []
    for length in rng.integers(3, 60, count):
        tokens = rng.integers(FIRST, VOCABULARY, length + 1)
        inputs = {
            "target_tokens": tokens[1:],
            "logprobs": rng.normal(-5.5, 0.4, length).astype(np.float32),
            "advantages": rng.normal(0, 1, length).astype(np.float32),
            "temperature": np.full(length, temperature, dtype=np.float32),
        }
        data.append(Datum(ModelInput.from_ints(tokens[:-1].tolist()), inputs))
    return data


def trainer_logprobs(
    client: TrainingClient, prompt: ModelInput, tokens: list[int], temperature: float = 1.0
) -> np.ndarray:
    """Of the sampled tokens."""
    sequence = prompt.to_ints() + tokens
    ones = np.ones(len(sequence) - 1, dtype=np.float32)
    inputs = {"target_tokens": sequence[1:], "weights": ones, "temperature": ones * temperature}
    output = client.forward([Datum(ModelInput.from_ints(sequence[:-1]), inputs)], "cross_entropy").result()
    return output.loss_fn_outputs[0]["logprobs"].array[prompt.length - 1 :]
