"""Every model family with vLLM: what it samples is the trainer's distribution, in full training and
with LoRA. Or the engine refuses when it is opened, with the reason and the alternative. All engines
live in one process, as they do in a run that has several models.
"""

from collections.abc import Iterator
from pathlib import Path

import chz
import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import EngineError, ModelError
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.types import LoraConfig
from posttrain.backend.vllm_refusals import ON_A_CPU
from tests.architectures import NOT_WITH_VLLM, save_random_model
from tests.conftest import SAMPLER_GAP, prompt_of
from tests.every_architecture import OWN, SIZES, random_model, save
from tests.vllm_families import SERVED, families_service, largest_gap, move_every_weight

EXPERTS = [
    "dots1",
    "flex_olmo",
    "gemma4_text+experts",
    "glm4_moe",
    "glm4v_moe",
    "granitemoe",
    "granitemoe_swa",
    "granitemoeshared",
    "hunyuan_v1_moe",
    "mixtral",
    "olmoe",
    "qwen2_moe",
    "solar_open",
]
WIDER = {
    128: "hidden_size",
    256: "intermediate_size",
    64: "moe_intermediate_size moe_shared_expert_intermediate_size shared_expert_intermediate_size",
    32: "head_dim",
}

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


# Trap: experts that transformers holds in one tensor, and vLLM's loaders want one by one.
@pytest.mark.parametrize("kind", EXPERTS)
def test_experts_arrive_in_the_engine(
    service: ServiceClient, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for size, names in WIDER.items():  # vLLM's kernels on a CPU have no narrower ones
        for name in names.split():
            monkeypatch.setitem(SIZES, name, size)
    own = OWN.get(kind, {})
    monkeypatch.setitem(OWN, kind, {**own, "head_dim": 32, **{name: 64 for name in own if name in WIDER[64]}})
    client = service.create_training_client(str(save(random_model(kind), tmp_path / "model")))
    assert largest_gap(client) < SAMPLER_GAP
    move_every_weight(client)
    assert largest_gap(client) < SAMPLER_GAP
    client.close()


@pytest.mark.cpu_only
@pytest.mark.parametrize("kind", ["cohere2_moe", *ON_A_CPU])
def test_a_type_that_vllm_computes_otherwise_is_refused(service: ServiceClient, kind: str, tmp_path: Path) -> None:
    folder = str(save(random_model(kind), tmp_path / "model"))
    with pytest.raises(ModelError, match="vLLM cannot serve this model on a CPU: it.*backend.engine=torch"):
        service.create_training_client(folder).save_weights_and_get_sampling_client()


# Trap: what an engine that failed leaves in the process: a class of transformers that vLLM has changed, and groups of
# processes without one for experts.
def test_after_an_engine_that_failed_others_open(service: ServiceClient, tmp_path: Path) -> None:
    folders = [str(save_random_model(family, tmp_path / family)) for family in ("OLMo 2", "Qwen 3-MoE")]
    config = chz.replace(service.config, sampler_memory_gb=1e-5)
    with ServiceClient(config, tmp_path) as small, pytest.raises(EngineError, match="too little memory"):
        small.create_sampling_client(base_model=folders[0])
    for folder in reversed(folders):
        with service.create_training_client(folder) as client:
            assert largest_gap(client) < SAMPLER_GAP


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
