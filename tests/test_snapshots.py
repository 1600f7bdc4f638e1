"""Sampling clients are immutable snapshots: each answers with its own weights, however many steps
follow and whoever else samples in its engine.
"""

# Trap: a reference policy that moves with the live one; a prefix cache that another version reads.

import asyncio
import gc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import SnapshotMemoryError, StaleSamplerError
from posttrain.backend.sampling_client import SamplingClient
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.training_client import TrainingClient
from posttrain.backend.types import AdamParams, Datum, ModelInput, SamplingParams
from posttrain.backend.weight_versions import GIB
from tests.conftest import policy_data, random_tokens

PROMPT = random_tokens(np.random.default_rng(0), 200)  # vLLM caches prefixes of 128 tokens
PARAMS = SamplingParams(max_tokens=12, seed=3, stop=[])


def step(client: TrainingClient, seed: int = 0) -> None:
    client.forward_backward(policy_data(4, seed), "importance_sampling")
    client.optim_step(AdamParams(3e-3)).result()


def trained(client: TrainingClient, tokens: list[int]) -> np.ndarray:
    """The trainer's logprobs of all tokens but the first."""
    inputs = {"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)}
    output = client.forward([Datum(ModelInput.from_ints(tokens[:-1]), inputs)], "cross_entropy").result()
    return output.loss_fn_outputs[0]["logprobs"].array


def scored(sampler: SamplingClient, tokens: list[int] = PROMPT) -> list[float]:
    return sampler.compute_logprobs(ModelInput.from_ints(tokens)).result()[1:]  # type: ignore[return-value]


def kept_bytes(service: ServiceClient) -> int:
    gc.collect()
    return service._engines.memory.used()


@pytest.fixture(params=["torch", "vllm"])
def service(request: pytest.FixtureRequest) -> ServiceClient:
    return request.getfixturevalue(f"{request.param}_service")


@pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
def test_three_versions_answer_with_their_own_weights(service: ServiceClient, rank: int) -> None:
    client = service.create_lora_training_client("micro", rank) if rank else service.create_training_client("micro")
    samplers, expected = [], []
    for seed in range(3):
        step(client, seed)
        samplers.append(client.save_weights_and_get_sampling_client())
        expected.append(trained(client, PROMPT))
    for seed in range(3, 6):
        step(client, seed)
    assert max(np.abs(expected[0] - expected[1]).max(), np.abs(expected[1] - expected[2]).max()) > 0.01
    prompt = ModelInput.from_ints(PROMPT)

    async def interleaved() -> list:
        calls = [
            call
            for _ in range(3)
            for sampler in samplers
            for call in (sampler.sample_async(prompt, 2, PARAMS), sampler.compute_logprobs_async(prompt))
        ]
        return await asyncio.gather(*calls)

    answers = asyncio.run(interleaved())
    for version in range(3):
        sampled, scores = answers[2 * version :: 6], answers[2 * version + 1 :: 6]
        for logprobs in [*scores, [None, *scored(samplers[version])]]:
            assert logprobs[1:] == pytest.approx(expected[version].tolist(), abs=1e-4)
        assert len({tuple(s.tokens) for response in sampled for s in response.sequences}) == 2, "as seeded"
    live = client.save_weights_and_get_sampling_client()
    assert scored(live) == pytest.approx(trained(client, PROMPT).tolist(), abs=1e-4)
    again, before = samplers[0].sample(prompt, 1, PARAMS).result().sequences[0], answers[0].sequences[0]
    assert again.tokens == before.tokens and again.logprobs == pytest.approx(before.logprobs, abs=1e-4)


def test_copies_are_made_for_those_who_keep_a_version_and_go_with_them(torch_service: ServiceClient) -> None:
    client = torch_service.create_training_client("micro")
    for keep, follow in ((False, False), (True, True)):
        sampler = client.save_weights_and_get_sampling_client(keep=keep, follow=follow)
        step(client)
        assert kept_bytes(torch_service) == 0
    with pytest.raises(StaleSamplerError, match="keep=False"):
        unkept = client.save_weights_and_get_sampling_client(keep=False)
        step(client)
        client.save_weights_and_get_sampling_client()
        scored(unkept)
    for _ in range(2):
        sampler = client.save_weights_and_get_sampling_client()
    del sampler
    gc.collect()
    step(client)
    assert kept_bytes(torch_service) == 0, "nobody holds it any more"
    sampler = client.save_weights_and_get_sampling_client()
    step(client)
    step(client)
    size = sum(p.numel() for p in client._trainer.base.parameters()) * 4
    assert kept_bytes(torch_service) == size, "one copy, the tied head once"
    scored(sampler)
    # the weights of the newest synced version, whose place in the engine the snapshot takes
    live = client.save_weights_and_get_sampling_client(follow=True)
    expected = scored(live)
    step(client)
    scored(sampler)
    assert scored(live) == pytest.approx(expected, abs=1e-5)
    sampler.close()
    client.save_weights_and_get_sampling_client(keep=False)
    assert kept_bytes(torch_service) == 0


def test_snapshots_outlive_the_training_client(torch_service: ServiceClient) -> None:
    for ending in ("close", "collected"):
        client = torch_service.create_training_client("micro", seed=1)
        first = client.save_weights_and_get_sampling_client()
        step(client)
        second, expected = client.save_weights_and_get_sampling_client(), trained(client, PROMPT)
        if ending == "close":
            client.close()
        del client
        gc.collect()
        before = scored(first)
        assert scored(second) == pytest.approx(expected.tolist(), abs=1e-4) and scored(first) == before
        del first, second
        assert kept_bytes(torch_service) == 0


def test_the_memory_of_snapshots_has_a_limit_that_the_error_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    probe = ServiceClient(BackendConfig(engine="torch"), tmp_path).create_training_client("micro")
    size = probe._trainer.copied_bytes()
    with ServiceClient(BackendConfig(engine="torch", snapshot_memory_gb=1.5 * size / GIB), tmp_path) as service:
        client = service.create_training_client("micro")
        first = client.save_weights_and_get_sampling_client()
        step(client)
        second = client.save_weights_and_get_sampling_client()
        step(client)  # goes on without
        client.save_weights_and_get_sampling_client(keep=False)
        with pytest.raises(SnapshotMemoryError, match="backend.snapshot_memory_gb"):
            scored(second)
        assert len(scored(first)) == len(PROMPT) - 1 and "loses its weights" in capsys.readouterr().out


def test_a_sync_waits_for_calls_that_keep_their_version(vllm_service: ServiceClient) -> None:
    client = vllm_service.create_training_client("micro")
    params = SamplingParams(max_tokens=300, seed=1, stop=[])
    old = client.save_weights_and_get_sampling_client()
    running = old.sample(ModelInput.from_ints(PROMPT[:5]), 4, params)
    expected = trained(client, PROMPT)
    step(client)
    live = client.save_weights_and_get_sampling_client()
    again = old.sample(ModelInput.from_ints(PROMPT[:5]), 4, params)
    for before, after in zip(running.result(60).sequences, again.result(60).sequences, strict=True):
        assert before.tokens == after.tokens, "sampled before the sync, and after it"
    assert scored(old) == pytest.approx(expected.tolist(), abs=1e-4) != scored(live)
