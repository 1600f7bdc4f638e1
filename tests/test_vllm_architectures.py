"""Every model family with vLLM: what it samples is the trainer's distribution, in full training and
with LoRA. Or the engine refuses when it is opened, with the reason and the alternative. All engines
live in one process, as they do in a run that has several models.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import ModelError
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.types import LoraConfig
from tests.architectures import NOT_WITH_VLLM, save_random_model
from tests.conftest import SAMPLER_GAP, prompt_of
from tests.vllm_families import SERVED, families_service, largest_gap, move_every_weight

pytestmark = [pytest.mark.slow, pytest.mark.needs_vllm]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceClient]:
    with families_service(tmp_path_factory.mktemp("checkpoints")) as service:
        yield service


# Trap: weights that vLLM's loader skips.
@pytest.mark.parametrize("family", SERVED)
def test_sampled_logprobs_are_the_trainers(service: ServiceClient, family: str, tmp_path: Path) -> None:
    folder = str(save_random_model(family, tmp_path / "model"))
    for lora in (None, LoraConfig(rank=4)):
        client = service.create_training_client(folder, lora)
        assert largest_gap(client) < SAMPLER_GAP
        before = client.save_weights_and_get_sampling_client().compute_logprobs(prompt_of(40)).result()[1:]
        move_every_weight(client)
        assert largest_gap(client) < SAMPLER_GAP
        after = client.save_weights_and_get_sampling_client().compute_logprobs(prompt_of(40)).result()[1:]
        assert max(abs(a - b) for a, b in zip(after, before, strict=True) if a is not None and b is not None) > 0.05
        client.close()


@pytest.mark.cpu_only
@pytest.mark.parametrize("family", NOT_WITH_VLLM)
def test_a_family_that_vllm_cannot_serve_is_refused_when_its_engine_is_opened(
    service: ServiceClient, family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(save_random_model(family, tmp_path / "model"))
    with pytest.raises(ModelError, match=f"{NOT_WITH_VLLM[family]}.*backend.engine=torch"):
        service.create_training_client(folder).save_weights_and_get_sampling_client()
    with ServiceClient(BackendConfig(engine="auto"), tmp_path) as auto:
        auto.create_sampling_client(base_model=folder)
    lines = [line for line in capsys.readouterr().out.splitlines() if "sampling with torch" in line]
    assert len(lines) == 1 and NOT_WITH_VLLM[family] in lines[0]


# Trap: vLLM opens an engine for heads of any size, and its kernels fail in the first step.
@pytest.mark.cpu_only
def test_a_size_that_kernels_lack_is_refused_when_the_engine_is_opened(service: ServiceClient, tmp_path: Path) -> None:
    folder = save_random_model("Llama 3", tmp_path / "model")
    config = AutoConfig.from_pretrained(folder)
    config.head_dim = 120  # as in H2O Danube 3 4B
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    with pytest.raises(ModelError, match="head_dim=120.*backend.engine=torch"):
        service.create_training_client(str(folder)).save_weights_and_get_sampling_client()
    with ServiceClient(BackendConfig(engine="auto"), tmp_path) as auto:
        assert largest_gap(auto.create_training_client(str(folder))) < SAMPLER_GAP
