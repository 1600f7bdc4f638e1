"""backend.lora=unmerged: the sampler computes an adapter beside the base's weights, as the trainer
does; backend.lora=shared: it also has these weights with the trainer. All families are in
test_vllm_adapters.py.
"""

import asyncio
from pathlib import Path
from typing import Any

import chz
import numpy as np
import pytest
import torch

import posttrain.backend.vllm_engine
from posttrain.backend.base_models import BaseModels
from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import ConfigError
from posttrain.backend.merged_lora import base_weights
from posttrain.backend.sampling_client import SamplingClient
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.training_client import TrainingClient
from posttrain.backend.types import LoraConfig, ModelInput, SamplingParams
from posttrain.backend.vllm_settings import check_unmerged
from tests.conftest import BESIDE_VLLM, GAP_BESIDE_VLLM, rounded, trainer_of
from tests.test_snapshots import PARAMS, PROMPT, scored, step, trained

UNMERGED = BackendConfig(lora="unmerged", engine="torch", max_num_seqs=16, sampler_memory_gb=0.1)
SLOW_VLLM = pytest.param("vllm", marks=[pytest.mark.slow, pytest.mark.needs_vllm])
TORCH_AND_SLOW_VLLM = pytest.mark.parametrize("engine", ["torch", SLOW_VLLM])


def opened(tmp_path: Path, **settings: Any) -> ServiceClient:
    beside = BESIDE_VLLM if settings.get("engine") == "vllm" else {}
    return ServiceClient(chz.replace(UNMERGED, **beside | settings), tmp_path)


def near(expected: Any, engine: str, most: float = 1e-4) -> Any:
    """Logprobs that differ by rounding."""
    in_bf16 = engine == "vllm" and BESIDE_VLLM
    return pytest.approx(np.asarray(expected).tolist(), abs=GAP_BESIDE_VLLM if in_bf16 else rounded(most))


@pytest.fixture
def base_loads(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Grows when a vLLM engine is given all weights of a base."""
    loads, load = [], posttrain.backend.vllm_engine.load_all
    counted = lambda *given: (loads.append(given), load(*given))[1]  # noqa: E731
    monkeypatch.setattr(posttrain.backend.vllm_engine, "load_all", counted)
    return loads


# Trap: an adapter that stays under its id, or in cached prefixes of its id; B scaled where it lies.
@pytest.mark.parametrize("engine", ["torch", pytest.param("vllm", marks=pytest.mark.needs_vllm)])
def test_a_sync_brings_the_new_adapter_alone_and_versions_keep_theirs(
    engine: Any, tmp_path: Path, base_loads: list[Any]
) -> None:
    """Of the prompt, vLLM caches the first 128 tokens. A client follows through a sync in mid-generation."""
    with opened(tmp_path, engine=engine) as service:
        client = service.create_training_client("micro", LoraConfig(rank=4, alpha=10))
        live = client.save_weights_and_get_sampling_client(follow=True)
        versions: list[tuple[SamplingClient, np.ndarray]] = []
        for seed in range(3):
            running = live.sample(ModelInput.from_ints(PROMPT), 2, SamplingParams(max_tokens=60, seed=1, stop=[]))
            step(client, seed)
            versions.append((client.save_weights_and_get_sampling_client(), trained(client, PROMPT)))
            sampler, expected = versions[-1]
            for _ in range(2):  # the second time from the cache
                assert scored(sampler) == near(expected, engine)
            (sequence,) = sampler.sample(ModelInput.from_ints(PROMPT), 1, PARAMS).result().sequences
            ours = trained(client, PROMPT + sequence.tokens)[len(PROMPT) - 1 :]
            assert sequence.logprobs == near(ours, engine)
            assert [len(sequence.tokens) for sequence in running.result().sequences] == [60, 60]
        assert min(np.abs(a[1] - b[1]).max() for a, b in zip(versions, versions[1:], strict=False)) > 0.01
        for sampler, expected in versions:  # the first two from their copies
            assert scored(sampler) == near(expected, engine)
        assert len(base_loads) == (engine == "vllm")


@TORCH_AND_SLOW_VLLM
def test_a_saved_adapter_and_the_base_are_sampled_beside_the_live_one(engine: Any, tmp_path: Path) -> None:
    with opened(tmp_path, engine=engine) as service:
        client = service.create_training_client("micro", LoraConfig(rank=4))
        step(client)
        path, expected = client.save_weights_for_sampler("adapter").result().path, trained(client, PROMPT)
        step(client, 1)
        live = client.save_weights_and_get_sampling_client()
        saved = service.create_sampling_client(model_path=path)
        base = service.create_sampling_client(base_model="micro")
        assert scored(saved) == near(expected, engine)
        assert scored(live) == near(trained(client, PROMPT), engine)
        full = service.create_training_client("micro")
        assert scored(base) == near(trained(full, PROMPT), engine)


@TORCH_AND_SLOW_VLLM
def test_adapters_of_one_base_take_turns_in_one_engine(engine: Any, tmp_path: Path, base_loads: list[Any]) -> None:
    with opened(tmp_path, engine=engine, share_engines=True) as service:
        clients = [service.create_training_client("micro", LoraConfig(rank=rank)) for rank in (4, 8)]
        for seed, client in enumerate(clients):
            step(client, seed)
        samplers = [client.save_weights_and_get_sampling_client() for client in clients]
        expected = [trained(client, PROMPT).tolist() for client in clients]

        async def at_once() -> list[list[float | None]]:
            prompt = ModelInput.from_ints(PROMPT)
            return await asyncio.gather(*(sampler.compute_logprobs_async(prompt) for sampler in samplers * 3))

        for found, ours in zip(asyncio.run(at_once()), expected * 3, strict=True):
            assert found[1:] == near(ours, engine)
        assert np.abs(np.array(expected[0]) - expected[1]).max() > 0.01
        assert samplers[0]._engine is samplers[1]._engine and len(base_loads) == (engine == "vllm")


@pytest.mark.cpu_only
@TORCH_AND_SLOW_VLLM
def test_a_resumed_adapter_is_trained_and_sampled_as_the_uninterrupted_one(engine: Any, tmp_path: Path) -> None:
    """Bit for bit."""
    with opened(tmp_path, engine=engine) as service:
        whole = service.create_training_client("micro", LoraConfig(rank=4))
        step(whole)
        path = whole.save_state("middle").result().path
        resumed = service.create_training_client_from_state_with_optimizer(path)
        sampled = []
        for client in (whole, resumed):
            step(client, 1)
            sampler = client.save_weights_and_get_sampling_client()
            sampled.append(sampler.sample(ModelInput.from_ints(PROMPT), 2, PARAMS).result().sequences)
        assert sampled[0] == sampled[1]


@pytest.fixture(scope="module")
def coarse_base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A `micro` on the bf16 grid, as hub models are, without weights so small that their steps are fine."""
    with ServiceClient(BackendConfig(engine="torch"), tmp_path_factory.mktemp("base")) as service:
        client = service.create_training_client("micro")
        with torch.no_grad():
            for p in trainer_of(client).base.parameters():
                p.copy_(torch.where(p.abs() < 0.01, torch.copysign(torch.tensor(0.01), p), p).bfloat16())
        return client.save_state("base").result().path


# Trap: a LoRA update that bf16 rounds away.
@TORCH_AND_SLOW_VLLM
@pytest.mark.parametrize("lora", ["merged", "unmerged"])
def test_in_bf16_an_update_below_half_a_step_of_the_weights_is_sampled_unmerged(
    engine: Any, lora: Any, coarse_base: str, tmp_path: Path
) -> None:
    with opened(tmp_path, engine=engine, lora=lora, dtype="bfloat16") as service:
        client = service.create_training_client(coarse_base, LoraConfig(rank=4))
        logprobs = []
        for rate in (1e-6, 0.0):  # of B, zero at first: B A is then at most 4e-6, and half a step 3e-5
            sampler = client.save_weights_and_get_sampling_client(keep=False)
            logprobs.append(scored(sampler))
            assert np.abs(np.array(logprobs[-1]) - trained(client, PROMPT)).mean() < 0.02
            step(client, rate=rate)
        changed = np.mean([before != after for before, after in zip(*logprobs, strict=True)])
        assert changed == 0 if lora == "merged" else changed > 0.5


def test_what_is_not_sampled_unmerged_is_refused_by_name(tmp_path: Path) -> None:
    def refused(says: str, lora: LoraConfig | None = None, **settings: Any) -> None:
        with pytest.raises(ConfigError, match=says), opened(tmp_path, **settings) as service:
            service.create_training_client("tiny", lora)

    refused("not for train_unembed", LoraConfig(rank=4, train_unembed=True))
    refused("set backend.trainer_processes=1", trainer_processes=2)
    refused("backend.sampler_replicas=0", sampler_replicas=1)
    with pytest.raises(ConfigError, match=r"ranks up to 512 .* 513: backend\.lora=merged"):
        check_unmerged(chz.replace(UNMERGED, engine="vllm"), LoraConfig(rank=513))
    check_unmerged(UNMERGED, LoraConfig(rank=513))  # torch has room for it


# --- backend.lora=shared --------------------------------------------------------------------------


def weights_of(client: TrainingClient) -> dict[str, torch.Tensor]:
    return base_weights(trainer_of(client).base)


def check_samples_as_trained(client: TrainingClient, sampler: SamplingClient, engine: str) -> None:
    assert scored(sampler) == near(trained(client, PROMPT), engine)


@pytest.mark.parametrize("engine", ["torch", pytest.param("vllm", marks=pytest.mark.needs_vllm)])
def test_passes_and_sampler_read_one_base(engine: Any, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Two adapters train on it; what they learn, and what is sampled, is what it is without sharing."""
    if engine == "vllm":
        request.getfixturevalue("packing_off")
    logprobs: dict[str, list[np.ndarray]] = {}
    for lora in ("unmerged", "shared"):
        with opened(tmp_path, engine=engine, lora=lora) as service:
            clients = [service.create_training_client("micro", LoraConfig(rank=rank)) for rank in (4, 8)]
            before = {name: weight.detach().clone() for name, weight in weights_of(clients[0]).items()}
            places = {name: weight.data_ptr() for name, weight in weights_of(clients[0]).items()}
            samplers = [clients[0].save_weights_and_get_sampling_client()]
            step(clients[0])
            samplers.append(clients[0].save_weights_and_get_sampling_client())
            check_samples_as_trained(clients[0], samplers[1], engine)
            samplers.append(clients[1].save_weights_and_get_sampling_client())
            step(clients[1], 1)
            check_samples_as_trained(clients[1], clients[1].save_weights_and_get_sampling_client(), engine)
            check_samples_as_trained(clients[0], samplers[1], engine)
            for name, weight in weights_of(clients[1]).items():
                assert (
                    torch.equal(weight, before[name]) and weight.data_ptr() == weights_of(clients[0])[name].data_ptr()
                )
            moved = {name for name, weight in weights_of(clients[0]).items() if weight.data_ptr() != places[name]}
            # the torch sampler reads the trainer's tensors, vLLM's are read by the trainer
            assert moved == (set(places) if (engine, lora) == ("vllm", "shared") else set())
            logprobs[lora] = [np.array(scored(sampler)) for sampler in samplers]
            logprobs[lora] += [trained(client, PROMPT) for client in clients]
            if (engine, lora) == ("torch", "shared"):
                sampled = samplers[1]._engine._engine._model.named_parameters()  # type: ignore[union-attr]
                assert {weight.data_ptr() for _, weight in sampled} == set(places.values())
            for sampler in samplers:  # the engines end, and with them what the trainer reads is still there
                sampler._engine.close()
            logprobs[lora] += [trained(client, PROMPT) for client in clients]
    for merged, shared in zip(logprobs["unmerged"], logprobs["shared"], strict=True):
        assert shared == near(merged, engine, 1e-5)


def test_what_cannot_share_its_weights_is_refused_by_name(tmp_path: Path) -> None:
    def refused(says: str, **settings: Any) -> None:
        with pytest.raises(ConfigError, match=says), opened(tmp_path, lora="shared", **settings) as service:
            service.create_training_client("micro", LoraConfig(rank=4))

    refused("leave backend.share_engines out, or take backend.lora=unmerged", share_engines=True)
    refused("set backend.trainer_processes=1", trainer_processes=2)
    refused("leave backend.param_dtype out", dtype="bfloat16", param_dtype="float32")


@TORCH_AND_SLOW_VLLM
def test_a_saved_adapter_has_weights_of_its_own(engine: Any, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if engine == "vllm":
        request.getfixturevalue("packing_off")
    with opened(tmp_path, engine=engine, lora="shared") as service:
        client = service.create_training_client("micro", LoraConfig(rank=4))
        step(client)
        path, expected = client.save_weights_for_sampler("adapter").result().path, trained(client, PROMPT)
        saved = service.create_sampling_client(model_path=path)
        live = client.save_weights_and_get_sampling_client()
        step(client, 1)
        check_samples_as_trained(client, client.save_weights_and_get_sampling_client(), engine)
        for sampler in (saved, live):
            assert scored(sampler) == near(expected, engine)


@pytest.mark.needs_vllm
@pytest.mark.cpu_only
def test_vllm_on_a_cpu_does_not_share_its_weights(tmp_path: Path) -> None:
    says = "Set backend.engine=torch, or take backend.lora=unmerged"
    with opened(tmp_path, lora="shared", engine="vllm") as service, pytest.raises(ConfigError, match=says):
        service.create_training_client("micro", LoraConfig(rank=4))


def test_a_place_with_other_values_is_not_taken() -> None:
    """As where vLLM's checkpoints have a weight permuted."""
    base = BaseModels().view("micro", 0, torch.device("cpu"), torch.float32)[1]
    parameters = dict(base.model.named_parameters())
    places = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    (first, second, third), others = list(places)[:3], list(places)[3:]
    places[first] = places[first].flip(0)
    places[second] = places[second].double()
    del places[third]
    assert base.move_into(places) == sum(parameters[name].numel() for name in others)
    moved = {name for name, place in places.items() if parameters[name].data_ptr() == place.data_ptr()}
    assert moved == set(others)
