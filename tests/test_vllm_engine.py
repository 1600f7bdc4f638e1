"""What only a vLLM engine can get wrong: its noise, the program's random generators, engines beside
each other.
"""

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import posttrain.backend.vllm_engine
from posttrain.backend.config import BackendConfig
from posttrain.backend.engine import Sampled, SequenceRequest
from posttrain.backend.errors import EngineError, ModelError
from posttrain.backend.models import load_model
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.tokenizers import load_tokenizer
from posttrain.backend.training_client import TrainingClient
from posttrain.backend.types import LoraConfig, SamplingParams
from posttrain.backend.vllm_settings import vllm_is_installed
from tests.architectures import FAMILIES
from tests.conftest import NO_VLLM, SAMPLER_GAP, prompt_of
from tests.test_sampling import GREEDY, train_a_little, trainer_logprobs
from tests.test_tokenizer_kinds import KINDS, wrapped


def global_draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def seed_all() -> None:
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)


@pytest.fixture(scope="module")
def unseeded_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceClient]:
    if not vllm_is_installed():
        pytest.skip(NO_VLLM)
    import numba  # noqa: F401  an environment may have imported it (let_modules_be_searched)

    config = BackendConfig(engine="vllm", max_num_seqs=64, reproducible=False, sampler_memory_gb=0.2)
    with ServiceClient(config, tmp_path_factory.mktemp("checkpoints")) as service:
        yield service


# Trap: the engine drawing from the program's generators, or repeating its own noise at every token.
def test_noise_is_new_at_every_token_and_in_every_call_and_not_the_programs(unseeded_service: ServiceClient) -> None:
    """Of a random `micro`, whose distribution is nearly flat. A generator that is put back after
    every step repeats its noise.
    """
    training = unseeded_service.create_training_client("micro")
    seed_all()
    expected = global_draws()
    seed_all()
    client = training.save_weights_and_get_sampling_client()  # opens the engine
    params = SamplingParams(max_tokens=64, temperature=1.0, stop=[])
    calls = [client.sample(prompt_of(10), 16, params).result().sequences for _ in range(2)]
    tokens_G_T = np.array([sequence.tokens for sequence in calls[0]])
    assert (tokens_G_T[:, 1:] == tokens_G_T[:, :-1]).mean() < 0.1
    assert (tokens_G_T != np.array([sequence.tokens for sequence in calls[1]])).mean() > 0.8
    training.save_weights_and_get_sampling_client()
    assert global_draws() == expected


# Trap: vLLM 0.24 on a CPU, whose packed matrices stay those of an earlier sync.
def test_an_old_vllm_is_refused_on_a_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    vllm = pytest.importorskip("vllm", reason=NO_VLLM)
    monkeypatch.setattr(vllm, "__version__", "0.24.0")
    with (
        ServiceClient(BackendConfig(engine="vllm", device="cpu"), tmp_path) as service,
        pytest.raises(ModelError, match=r"vLLM 0\.24\.0 computes with old weights .*install\.sh"),
    ):
        service.create_training_client("micro").save_weights_and_get_sampling_client()


# Trap: engines that compute with one another's batch, or die with one another.
def test_engines_beside_each_other_and_after_the_end_of_one(unseeded_service: ServiceClient, tmp_path: Path) -> None:
    """vLLM has one place in the process for the batch that is computed, and one parallel state for
    all engines.
    """
    other = ServiceClient(BackendConfig(engine="vllm", reproducible=False, sampler_memory_gb=0.2), tmp_path)
    clients = [
        service.create_training_client("micro", seed=seed) for seed, service in enumerate((unseeded_service, other))
    ]
    samplers = [client.save_weights_and_get_sampling_client() for client in clients]
    params = SamplingParams(max_tokens=40, stop=[])

    def sample(which: int) -> None:
        for i in range(8):
            prompt = prompt_of(20 + i)
            for sequence in samplers[which].sample(prompt, 4, params).result().sequences:
                expected = trainer_logprobs(clients[which], prompt, sequence.tokens)[prompt.length - 1 :]
                assert sequence.logprobs == pytest.approx(expected.tolist(), abs=SAMPLER_GAP)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(sample, (0, 1)))
    other.close()
    assert len(samplers[0].sample(prompt_of(5), 1, GREEDY).result().sequences[0].tokens) == 16
    train_a_little(clients[0], 1)
    sampled = clients[0].save_weights_and_get_sampling_client().sample(prompt_of(5), 1, GREEDY).result().sequences[0]
    assert sampled.logprobs == pytest.approx(
        trainer_logprobs(clients[0], prompt_of(5), sampled.tokens)[4:].tolist(), abs=SAMPLER_GAP
    )


# Trap: beside a stop string vLLM 0.32 spells out each token that it lists, and ends at an id in a model's padding.
def test_ids_that_the_tokenizer_has_not_are_listed_beside_stop_strings(
    vllm_service: ServiceClient, torch_service: ServiceClient, tmp_path: Path
) -> None:
    tokenizer = wrapped(KINDS["Mistral"]())
    config = FAMILIES["Llama 3"]()
    config.vocab_size = len(tokenizer) + 6
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    prompt, params = prompt_of(9), SamplingParams(max_tokens=8, temperature=0.0, stop=["never"])
    answers = []
    for service in (vllm_service, torch_service):
        with service.create_sampling_client(base_model=str(tmp_path)) as sampler:
            response = sampler.sample(prompt, 1, params, True, config.vocab_size, config.vocab_size).result()
            prompt_rows, sampled_rows = response.topk_prompt_logprobs, response.sequences[0].topk_logprobs
            assert prompt_rows and sampled_rows
            answers.append([*prompt_rows[1:], *sampled_rows])
    for ours, theirs in zip(*answers, strict=True):
        assert len(ours) == config.vocab_size and dict(ours) == pytest.approx(dict(theirs), abs=SAMPLER_GAP)


def test_a_sequence_that_vllm_gives_up_is_no_answer(
    vllm_client: TrainingClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anything but "stop" and "length" is an error of the call, and the others go on."""
    sampler = vllm_client.save_weights_and_get_sampling_client()
    prompt, whole = prompt_of(5), posttrain.backend.vllm_engine.read_answer

    def gives_up_eights(request: Any, output: Any, vocabulary: int) -> Sampled:
        if len(output.outputs[0].token_ids) == 8:
            output.outputs[0].finish_reason = "error"
        return whole(request, output, vocabulary)

    monkeypatch.setattr(posttrain.backend.vllm_engine, "read_answer", gives_up_eights)
    futures = [sampler.sample(prompt, 2, SamplingParams(max_tokens=length, stop=[])) for length in (8, 9)]
    with pytest.raises(EngineError, match="finished it with 'error'"):
        futures[0].result()
    assert [len(sequence.tokens) for sequence in futures[1].result().sequences] == [9, 9]


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4)], ids=["full", "lora"])
def test_global_generators_are_untouched_by_models(
    torch_service: ServiceClient, lora: LoraConfig | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed_all()
    expected = global_draws()
    seed_all()
    # torch.manual_seed also reseeds every GPU, which nothing puts back.
    monkeypatch.setattr(torch, "manual_seed", lambda seed: pytest.fail("reseeds the GPUs"))
    torch_service.create_training_client("micro", lora).save_weights_and_get_sampling_client()
    torch_service.create_scalar_client("micro", lora)
    torch_service.create_sampling_client(base_model="micro")
    assert global_draws() == expected


# Trap: on a GPU vLLM plans a step while the one before is computed, and a sync between the two dropped what came of it:
# with a prompt's logprobs, which nobody computes again, that ended the engine.
@pytest.mark.needs_vllm
def test_a_sync_beside_a_step_in_flight_drops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.engine.arg_utils import EngineArgs

    create = EngineArgs.create_engine_config

    def as_on_a_gpu(self: Any) -> Any:
        vllm_config = create(self)
        vllm_config.scheduler_config.async_scheduling = True
        return vllm_config

    monkeypatch.setattr(EngineArgs, "create_engine_config", as_on_a_gpu)
    cpu, config = torch.device("cpu"), BackendConfig(engine="vllm", max_num_seqs=8, sampler_memory_gb=0.1)
    model = load_model("micro", 0, cpu, torch.float32)
    engine = posttrain.backend.vllm_engine.VllmEngine(
        model.config, load_tokenizer("micro", 256), 256, config, cpu, True
    )

    def asked(max_tokens: int) -> SequenceRequest:
        request = SequenceRequest(prompt_of(20).to_ints(), SamplingParams(stop=[]), max_tokens, seed=1, topk_prompt=0)
        engine.add(request)
        return request

    def answered(request: SequenceRequest, steps_before_a_sync: int | None) -> Sampled:
        found = []
        for step in range(20):
            if step == steps_before_a_sync:
                engine.load_weights(model.state_dict().items())
            found += engine.step()
        ((finished, sampled),) = found
        assert finished is request
        return sampled

    try:
        engine.load_weights(model.state_dict().items())
        alone = answered(asked(4), None)
        for steps in range(4):
            disturbed = answered(asked(4), steps)
            assert disturbed.sequence.tokens == alone.sequence.tokens
            assert disturbed.prompt_logprobs and alone.prompt_logprobs
            assert disturbed.prompt_logprobs[1:] == pytest.approx(alone.prompt_logprobs[1:], abs=SAMPLER_GAP)
        cancelled = asked(1)
        engine.step()
        engine.load_weights(model.state_dict().items())  # which waits for its only token
        engine.drop([cancelled])
        assert engine.step() == []
    finally:
        engine.close()
