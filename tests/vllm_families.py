"""What the tests of every model family with vLLM share."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from posttrain.backend.config import BackendConfig
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.training_client import TrainingClient
from posttrain.backend.types import AdamParams, Datum, ModelInput, SamplingParams
from tests.architectures import FAMILIES, NOT_WITH_VLLM
from tests.conftest import prompt_of
from tests.test_sampling import trainer_logprobs

SERVED = [family for family in FAMILIES if family not in NOT_WITH_VLLM]


@contextmanager
def families_service(folder: Path) -> Iterator[ServiceClient]:
    with pytest.MonkeyPatch.context() as patch:
        import vllm.model_executor.models.registry as registry

        # vLLM looks at every new architecture in a process of its own, for ten seconds each.
        patch.setattr(registry, "_run_in_subprocess", lambda fn: fn())
        with ServiceClient(BackendConfig(engine="vllm", max_num_seqs=8, sampler_memory_gb=0.1), folder) as service:
            yield service


def move_every_weight(client: TrainingClient) -> None:
    tokens = prompt_of(60).to_ints()
    inputs = {"target_tokens": tokens[1:], "weights": np.ones(len(tokens) - 1, dtype=np.float32)}
    for _ in range(2):  # LoRA's first step moves B alone
        client.forward_backward([Datum(ModelInput.from_ints(tokens[:-1]), inputs)], "cross_entropy")
        client.optim_step(AdamParams(1e-2)).result()


def largest_gap(client: TrainingClient) -> float:
    """Of sampled logprobs from the trainer's, over prompts beyond a window and two calls, the
    second of which finds a cached prefix.
    """
    sampler = client.save_weights_and_get_sampling_client()
    gaps = []
    long = prompt_of(min(150, sampler.max_length - 16))
    for prompt in (prompt_of(40), long, long):
        params = SamplingParams(max_tokens=8, seed=1, temperature=0.7, stop=[])
        for sequence in sampler.sample(prompt, 2, params).result().sequences:
            trained = trainer_logprobs(client, prompt, sequence.tokens, temperature=0.7)[prompt.length - 1 :]
            gaps.append(float(np.abs(trained - np.array(sequence.logprobs)).max()))
    return max(gaps)
