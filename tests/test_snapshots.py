"""Sampling clients are immutable snapshots: each answers with its own weights, however many steps
follow and whoever else samples in its engine.
"""

# Trap: a reference policy that moves with the live one; a prefix cache that another version reads.

import asyncio
import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from posttrain.backend import base_models
from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import EngineError, SnapshotMemoryError, StaleSamplerError
from posttrain.backend.sampling_client import SamplingClient
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.training_client import TrainingClient
from posttrain.backend.types import AdamParams, Datum, ModelInput, SamplingParams
from posttrain.backend.weight_versions import GIB, Weights, WeightVersion
from tests.conftest import ROOT, SAMPLER_GAP, policy_data, random_tokens, rounded
from tests.processes import PATIENCE

PROMPT = random_tokens(np.random.default_rng(0), 200)  # vLLM caches prefixes of 128 tokens
PARAMS = SamplingParams(max_tokens=12, seed=3, stop=[])


def step(client: TrainingClient, seed: int = 0, rate: float = 3e-3) -> None:
    client.forward_backward(policy_data(4, seed), "importance_sampling")
    client.optim_step(AdamParams(rate)).result()


def trainer(client: TrainingClient) -> Any:
    return client._trainer


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


@pytest.fixture(scope="module")
def vllm_micro(vllm_service: ServiceClient) -> TrainingClient:
    """One engine for those who train a few steps from wherever it is."""
    return vllm_service.create_training_client("micro")


@pytest.mark.parametrize(
    ("engine", "rank"),
    [("torch", 0), ("torch", 4), ("vllm", 0), pytest.param("vllm", 4, marks=pytest.mark.slow)],
)
def test_three_versions_answer_with_their_own_weights(engine: str, rank: int, request: pytest.FixtureRequest) -> None:
    service = request.getfixturevalue(f"{engine}_service")
    if rank:
        client = service.create_lora_training_client("micro", rank)
    else:
        client = request.getfixturevalue("vllm_micro") if engine == "vllm" else service.create_training_client("micro")
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
            assert logprobs[1:] == pytest.approx(expected[version].tolist(), abs=SAMPLER_GAP)
        assert len({tuple(s.tokens) for response in sampled for s in response.sequences}) == 2, "as seeded"
    live = client.save_weights_and_get_sampling_client()
    assert scored(live) == pytest.approx(trained(client, PROMPT).tolist(), abs=SAMPLER_GAP)
    again, before = samplers[0].sample(prompt, 1, PARAMS).result().sequences[0], answers[0].sequences[0]
    assert again.tokens == before.tokens and again.logprobs == pytest.approx(before.logprobs, abs=SAMPLER_GAP)


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
    size = sum(p.numel() for p in trainer(client).base.parameters()) * 4
    assert kept_bytes(torch_service) == size, "one copy, the tied head once"
    scored(sampler)
    # the weights of the newest synced version, whose place in the engine the snapshot takes
    live = client.save_weights_and_get_sampling_client(follow=True)
    expected = scored(live)
    step(client)
    scored(sampler)
    assert scored(live) == pytest.approx(expected, abs=rounded(1e-5))
    sampler.close()
    client.save_weights_and_get_sampling_client(keep=False)
    assert kept_bytes(torch_service) == 0


def test_weights_that_go_just_before_their_turn_end_their_calls_and_not_the_engine(
    torch_service: ServiceClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = torch_service.create_training_client("micro")
    old = client.save_weights_and_get_sampling_client()
    step(client)
    live, load = client.save_weights_and_get_sampling_client(), WeightVersion.load

    def dropped(version: WeightVersion, load_weights: Callable[[Weights], None]) -> bool:
        old.close()  # by another thread, after the engine chose the version
        return load(version, load_weights)

    with monkeypatch.context() as patch:
        patch.setattr(WeightVersion, "load", dropped)
        with pytest.raises(EngineError, match="version 0 are gone"):
            scored(old)
    assert scored(live) == pytest.approx(trained(client, PROMPT).tolist(), abs=SAMPLER_GAP)


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
        assert scored(second) == pytest.approx(expected.tolist(), abs=SAMPLER_GAP) and scored(first) == before
        del first, second
        assert kept_bytes(torch_service) == 0


def test_the_memory_of_snapshots_has_a_limit_that_the_error_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    probe = ServiceClient(BackendConfig(engine="torch"), tmp_path).create_training_client("micro")
    size = trainer(probe).sampled.copied_bytes()
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


def test_a_sync_waits_for_calls_that_keep_their_version(vllm_micro: TrainingClient) -> None:
    client = vllm_micro
    params = SamplingParams(max_tokens=300, seed=1, stop=[])
    old = client.save_weights_and_get_sampling_client()
    running = old.sample(ModelInput.from_ints(PROMPT[:5]), 4, params)
    expected = trained(client, PROMPT)
    step(client)
    live = client.save_weights_and_get_sampling_client()
    again = old.sample(ModelInput.from_ints(PROMPT[:5]), 4, params)
    for before, after in zip(running.result(PATIENCE).sequences, again.result(PATIENCE).sequences, strict=True):
        assert before.tokens == after.tokens, "sampled before the sync, and after it"
    assert scored(old) == pytest.approx(expected.tolist(), abs=SAMPLER_GAP) != scored(live)


# --- several policies of one base model -------------------------------------------------------------


@pytest.fixture(params=["torch", pytest.param("vllm", marks=[pytest.mark.slow, pytest.mark.needs_vllm])])
def shared(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ServiceClient]:
    with ServiceClient(BackendConfig(engine=request.param, share_engines=True), tmp_path) as service:
        yield service


def test_one_engine_for_adapters_and_folders_of_one_model(shared: ServiceClient) -> None:
    adapters = [shared.create_lora_training_client("micro", rank=rank, seed=0) for rank in (4, 8)]
    for seed, client in enumerate(adapters):
        step(client, seed)
    saved = [client.save_weights_for_sampler(f"adapter{i}").result().path for i, client in enumerate(adapters)]
    samplers = [client.save_weights_and_get_sampling_client() for client in adapters]
    live = adapters[0].save_weights_and_get_sampling_client(follow=True)
    expected = [trained(client, PROMPT) for client in adapters]
    base = shared.create_sampling_client(base_model="micro")
    expected_base = trained(shared.create_training_client("micro"), PROMPT)
    step(adapters[0])
    folders = [shared.create_sampling_client(model_path=path) for path in saved]
    assert len({sampler._engine for sampler in (*samplers, *folders, base, live)}) == 1
    for sampler, logprobs in zip((*samplers, *folders, base), (*expected, *expected, expected_base), strict=True):
        assert scored(sampler) == pytest.approx(logprobs.tolist(), abs=SAMPLER_GAP)
    assert scored(live) == pytest.approx(expected[0].tolist(), abs=SAMPLER_GAP), "the newest that was synced"
    adapters[0].save_weights_and_get_sampling_client(follow=True)
    assert scored(live) == pytest.approx(trained(adapters[0], PROMPT).tolist(), abs=SAMPLER_GAP)


def test_versions_take_turns_of_bounded_length(torch_service: ServiceClient, monkeypatch: pytest.MonkeyPatch) -> None:
    client = torch_service.create_training_client("micro")
    samplers = []
    for seed in range(3):
        step(client, seed)
        samplers.append(client.save_weights_and_get_sampling_client())
    turns: list[int] = []
    load = samplers[0]._engine._load
    monkeypatch.setattr(samplers[0]._engine, "_load", lambda version: (turns.append(version.number), load(version)))
    params = SamplingParams(max_tokens=2, seed=1, stop=[])

    async def many() -> None:
        calls = (sampler.sample_async(ModelInput.from_ints([5, 6]), 16, params) for sampler in samplers * 12)
        await asyncio.gather(*calls)

    asyncio.run(many())
    # 192 sequences of each version in turns of 64: the first is that of the version already loaded
    assert turns == [1, 2, 3, 1, 2, 3, 1, 2]


def test_two_adapters_at_once_train_as_each_alone(torch_service: ServiceClient) -> None:
    """Bit for bit, in two threads, with the base's tensors in memory once."""

    def adapter(service: ServiceClient, rank: int) -> TrainingClient:
        return service.create_lora_training_client("micro", rank=rank, seed=0)

    ranks = (2, 4)
    together = [adapter(torch_service, rank) for rank in ranks]
    steps = [
        future
        for seed in range(3)
        for client, rank in zip(together, ranks, strict=True)
        for future in (
            client.forward_backward(policy_data(6, 10 * rank + seed), "importance_sampling"),
            client.optim_step(AdamParams(1e-3)),
        )
    ]
    for future in steps:
        future.result()
    tensors = [{p.data_ptr(): p.numel() for p in trainer(client).base.parameters()} for client in together]
    common = sum(tensors[0][pointer] for pointer in tensors[0].keys() & tensors[1].keys())
    assert common == sum(p.numel() for p in trainer(torch_service.create_training_client("micro")).base.parameters())
    for client, rank in zip(together, ranks, strict=True):
        with ServiceClient(torch_service.config) as service:
            alone = adapter(service, rank)
            for seed in range(3):
                alone.forward_backward(policy_data(6, 10 * rank + seed), "importance_sampling")
                alone.optim_step(AdamParams(1e-3)).result()
            for name, parameter in trainer(alone).named_trainable.items():
                assert torch.equal(parameter, trainer(client).named_trainable[name])
            for (name, weight), (_, expected) in zip(
                trainer(alone).sampled.sampler_weights(), trainer(client).sampled.sampler_weights(), strict=True
            ):
                assert torch.equal(weight, expected), name


def test_a_base_model_ends_with_its_last_adapter_and_a_rewritten_folder_is_read_anew(
    torch_service: ServiceClient, tmp_path: Path
) -> None:
    client = torch_service.create_lora_training_client("micro", rank=4)
    sampler = client.save_weights_and_get_sampling_client()
    bases = torch_service._engines.bases._opened
    step(client)
    client.close()
    del client
    gc.collect()
    assert len(bases) == 1, "the snapshot's copy has only the adapter's tensors"
    engine = sampler._engine
    del sampler
    gc.collect()
    engine._thread.join()  # it ends after its last client, and holds the version until then
    del engine
    gc.collect()
    assert not len(bases)
    full, folder = torch_service.create_training_client("micro", seed=1), tmp_path / "checkpoints" / "base"
    full.save_state("base").result()
    first = torch_service.create_lora_training_client(str(folder), rank=4)
    step(full)
    full.save_state("base", overwrite=True).result()
    second = torch_service.create_lora_training_client(str(folder), rank=4)
    assert trained(second, PROMPT) == pytest.approx(trained(full, PROMPT), abs=rounded(1e-4))
    assert np.abs(trained(first, PROMPT) - trained(second, PROMPT)).max() > 1e-3


def test_a_pass_in_another_thread_begins_with_the_memory_that_the_last_one_freed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Trap: glibc keeps a whole pass's activations for each thread
    given_back: list[int] = []
    monkeypatch.setattr(base_models, "return_free_memory", lambda: given_back.append(1))
    turn = base_models.Turn()

    def passes() -> None:
        for _ in range(2):
            with turn:
                pass

    passes()
    assert not given_back  # one adapter pays nothing
    for count in (1, 2):
        thread = threading.Thread(target=passes)
        thread.start()
        thread.join()
        assert len(given_back) == 2 * count - 1
        passes()
        assert len(given_back) == 2 * count


MEASURE = """
import sys
from posttrain.backend.config import BackendConfig
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.types import AdamParams
from tests.conftest import policy_data

with ServiceClient(BackendConfig(engine="torch")) as service:
    clients = [service.create_lora_training_client("gpt2-small", rank=8, seed=0) for _ in range(int(sys.argv[1]))]
    passes = [client.forward_backward(policy_data(2), "importance_sampling") for client in clients]
    steps = [client.optim_step(AdamParams(1e-4)) for client in clients]
    for future in passes + steps:
        future.result()
    trained = sum(p.nbytes for p in clients[0]._trainer.named_trainable.values())
    peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(peak * 1024, trained)
"""


@pytest.mark.slow
@pytest.mark.cpu_only
def test_two_adapters_need_hardly_more_memory_than_one() -> None:
    """The second brings weights, gradients and two moments. In one arena of the allocator, as each
    thread's arena keeps what it has freed.
    """
    peaks, trained = [], 0
    for count in (1, 2):
        command = [sys.executable, "-c", MEASURE, str(count)]
        output = subprocess.check_output(command, text=True, cwd=ROOT, env=os.environ | {"MALLOC_ARENA_MAX": "1"})
        peak, trained = map(int, output.split()[-2:])
        peaks.append(peak)
    assert peaks[1] <= 1.1 * peaks[0] + 4 * trained
