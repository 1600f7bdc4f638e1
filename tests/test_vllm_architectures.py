"""Every model family with vLLM: what it samples is the trainer's distribution, in full training and
with LoRA, and plain vLLM reads what is saved. Or the engine refuses when it is opened, with the
reason and the alternative. All engines live in one process, as they do in a run that has several
models.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import chz
import numpy as np
import pytest
import torch

from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import ModelError
from posttrain.backend.merged_lora import base_weights
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.training_client import TrainingClient
from posttrain.backend.types import AdamParams, Datum, LoraConfig, ModelInput, SamplingParams
from tests.architectures import FAMILIES, NOT_UNMERGED, NOT_WITH_VLLM, save_random_model
from tests.conftest import trainer_of
from tests.test_sampling import prompt_of, trainer_logprobs

pytestmark = [pytest.mark.slow, pytest.mark.needs_vllm]

SERVED = [family for family in FAMILIES if family not in NOT_WITH_VLLM]
ROUNDING = 1e-4  # fp32, through logits of a few nats


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceClient]:
    with pytest.MonkeyPatch.context() as patch:
        import vllm.model_executor.models.registry as registry

        # vLLM looks at every new architecture in a process of its own, for ten seconds each.
        patch.setattr(registry, "_run_in_subprocess", lambda fn: fn())
        config = BackendConfig(engine="vllm", max_num_seqs=8, sampler_memory_gb=0.1)
        with ServiceClient(config, tmp_path_factory.mktemp("checkpoints")) as service:
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
        params = SamplingParams(max_tokens=16, seed=1, temperature=0.7, stop=[])
        for sequence in sampler.sample(prompt, 2, params).result().sequences:
            trained = trainer_logprobs(client, prompt, sequence.tokens, temperature=0.7)[prompt.length - 1 :]
            gaps.append(float(np.abs(trained - np.array(sequence.logprobs)).max()))
    return max(gaps)


# Trap: weights that vLLM's loader skips.
@pytest.mark.parametrize("family", SERVED)
def test_sampled_logprobs_are_the_trainers(service: ServiceClient, family: str, tmp_path: Path) -> None:
    folder = str(save_random_model(family, tmp_path / "model"))
    for lora in (None, LoraConfig(rank=4)):
        client = service.create_training_client(folder, lora)
        assert largest_gap(client) < ROUNDING
        before = client.save_weights_and_get_sampling_client().compute_logprobs(prompt_of(40)).result()[1:]
        move_every_weight(client)
        assert largest_gap(client) < ROUNDING
        after = client.save_weights_and_get_sampling_client().compute_logprobs(prompt_of(40)).result()[1:]
        assert max(abs(a - b) for a, b in zip(after, before, strict=True) if a is not None and b is not None) > 0.05
        client.close()


@pytest.fixture(scope="module")
def sharing(service: ServiceClient, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceClient]:
    """All adapters of a model unmerged in one engine."""
    config = chz.replace(service.config, lora="unmerged", share_engines=True)
    with ServiceClient(config, tmp_path_factory.mktemp("checkpoints")) as sharing:
        yield sharing


# Trap: adapters that vLLM leaves out, or mixes up.
@pytest.mark.parametrize("family", [family for family in SERVED if family not in NOT_UNMERGED])
def test_unmerged_adapters_are_sampled_as_trained(sharing: ServiceClient, family: str, tmp_path: Path) -> None:
    folder = str(save_random_model(family, tmp_path / "model"))
    clients = [sharing.create_training_client(folder, LoraConfig(rank, alpha=20)) for rank in (3, 5)]
    for client in (*clients, clients[0]):
        move_every_weight(client)
        assert largest_gap(client) < ROUNDING
    assert largest_gap(clients[1]) < ROUNDING
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
    with ServiceClient(chz.replace(service.config, lora="shared"), tmp_path) as sharing:
        client = sharing.create_training_client(folder, LoraConfig(rank=4))
        before = {name: weight.clone() for name, weight in base_weights(trainer_of(client).base).items()}
        own = {weight.untyped_storage().data_ptr() for weight in base_weights(trainer_of(client).base).values()}
        for _ in range(2):
            assert largest_gap(client) < ROUNDING
            move_every_weight(client)
        for name, weight in base_weights(trainer_of(client).base).items():
            assert torch.equal(weight, before[name]), name
            stays = weight.untyped_storage().data_ptr() in own
            assert stays == ((family, name) == ("Pythia", "lm_head.weight")), name


@pytest.mark.parametrize("family", NOT_UNMERGED)
def test_a_family_without_adapters_in_vllm_is_refused_when_its_engine_is_opened(
    sharing: ServiceClient, family: str, tmp_path: Path
) -> None:
    client = sharing.create_training_client(str(save_random_model(family, tmp_path / "model")), LoraConfig(rank=4))
    with pytest.raises(ModelError, match=f"{NOT_UNMERGED[family]}.*backend.lora=merged"):
        client.save_weights_and_get_sampling_client()


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


PLAIN_VLLM = """
import json, sys
from unittest.mock import patch
from vllm import LLM, SamplingParams

prompt, folders = json.loads(sys.argv[1]), sys.argv[2:]
with patch("vllm.model_executor.models.registry._run_in_subprocess", lambda fn: fn()):
    for folder in folders:
        llm = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=128, kv_cache_memory_bytes=2**26)
        prompts = [{"prompt_token_ids": prompt}]
        (output,) = llm.generate(prompts, SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
        entries = list(zip(prompt, output.prompt_logprobs))[1:]
        print("READ", json.dumps([entry[token].logprob for token, entry in entries]), flush=True)
        llm.llm_engine.engine_core.shutdown()
"""


def test_plain_vllm_reads_what_is_saved(tmp_path: Path) -> None:
    prompt = prompt_of(40)
    expected, folders = [], []
    with ServiceClient(BackendConfig(engine="torch"), tmp_path) as service:
        for family in SERVED:
            client = service.create_training_client(str(save_random_model(family, tmp_path / "model" / family)))
            move_every_weight(client)
            saves = (
                [client.save_state] if family != "Qwen 2.5" else [client.save_state, client.save_weights_for_sampler]
            )
            for save in saves:
                folders.append(save(f"{family} {save.__name__}").result().path)
                expected.append(trainer_logprobs(client, prompt, []).tolist())
            client.close()
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    command = [sys.executable, "-c", PLAIN_VLLM, json.dumps(prompt.to_ints()), *folders]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    read = [json.loads(line[5:]) for line in done.stdout.splitlines() if line.startswith("READ ")]
    assert len(read) == len(folders), done.stderr[-3000:]
    for folder, ours, theirs in zip(folders, expected, read, strict=True):
        assert theirs == pytest.approx(ours, abs=ROUNDING), folder
