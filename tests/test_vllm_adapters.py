"""Adapters of every model family beside vLLM's base (backend.lora=unmerged), and with a base that
passes read from vLLM (backend.lora=shared). Or the engine refuses when it is opened.
"""

from collections.abc import Iterator
from pathlib import Path

import chz
import pytest
import torch

from posttrain.backend.errors import ModelError
from posttrain.backend.merged_lora import base_weights
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.types import LoraConfig
from tests.architectures import NOT_UNMERGED, save_random_model
from tests.conftest import BESIDE_VLLM, GAP_BESIDE_VLLM, prompt_of, trainer_of
from tests.vllm_families import SERVED, families_service, largest_gap, move_every_weight

pytestmark = [pytest.mark.slow, pytest.mark.needs_vllm]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceClient]:
    with families_service(tmp_path_factory.mktemp("checkpoints")) as service:
        yield service


@pytest.fixture(scope="module")
def sharing(service: ServiceClient, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceClient]:
    """All adapters of a model unmerged in one engine."""
    config = chz.replace(service.config, lora="unmerged", share_engines=True, **BESIDE_VLLM)
    with ServiceClient(config, tmp_path_factory.mktemp("checkpoints")) as sharing:
        yield sharing


# Trap: adapters that vLLM leaves out, or mixes up.
@pytest.mark.parametrize("family", [family for family in SERVED if family not in NOT_UNMERGED])
def test_unmerged_adapters_are_sampled_as_trained(sharing: ServiceClient, family: str, tmp_path: Path) -> None:
    folder = str(save_random_model(family, tmp_path / "model"))
    clients = [sharing.create_training_client(folder, LoraConfig(rank, alpha=20)) for rank in (3, 5)]
    for client in (*clients, clients[0]):
        move_every_weight(client)
        assert largest_gap(client) < GAP_BESIDE_VLLM
    assert largest_gap(clients[1]) < GAP_BESIDE_VLLM
    logprobs = [c.save_weights_and_get_sampling_client().compute_logprobs(prompt_of(40)).result()[1:] for c in clients]
    assert max(abs(a - b) for a, b in zip(*logprobs, strict=True) if a is not None and b is not None) > 0.05
    for client in clients:
        client.close()


# Trap: a weight that passes read in another place than it is, or with another layout.
@pytest.mark.parametrize("family", ["Llama 3", "Qwen 3", "Gemma 3", "Phi 3", "OLMo 2", "Pythia"])
def test_passes_read_the_weights_that_vllm_has(
    service: ServiceClient, packing_off: None, family: str, tmp_path: Path
) -> None:
    """All of them, as on a GPU; but for one that has another name in vLLM's checkpoints."""
    folder = str(save_random_model(family, tmp_path / "model"))
    with ServiceClient(chz.replace(service.config, lora="shared", **BESIDE_VLLM), tmp_path) as sharing:
        client = sharing.create_training_client(folder, LoraConfig(rank=4))
        before = {name: weight.clone() for name, weight in base_weights(trainer_of(client).base).items()}
        own = {weight.untyped_storage().data_ptr() for weight in base_weights(trainer_of(client).base).values()}
        for _ in range(2):
            assert largest_gap(client) < GAP_BESIDE_VLLM
            move_every_weight(client)
        for name, weight in base_weights(trainer_of(client).base).items():
            assert torch.equal(weight, before[name]), name
            stays = weight.untyped_storage().data_ptr() in own
            assert stays == ((family, name) == ("Pythia", "lm_head.weight")), name


@pytest.mark.cpu_only
@pytest.mark.parametrize("family", NOT_UNMERGED)
def test_a_family_without_adapters_in_vllm_is_refused_when_its_engine_is_opened(
    sharing: ServiceClient, family: str, tmp_path: Path
) -> None:
    client = sharing.create_training_client(str(save_random_model(family, tmp_path / "model")), LoraConfig(rank=4))
    with pytest.raises(ModelError, match=f"{NOT_UNMERGED[family]}.*backend.lora=merged"):
        client.save_weights_and_get_sampling_client()
