"""Checkpoints: complete or absent, exact, readable by transformers, peft and vLLM, and refused by another model."""

import resource
import signal
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from backend.checkpoint_files import read_state
from backend.errors import CheckpointError, NonFiniteError
from backend.models import load_model
from backend.service_client import ServiceClient
from backend.training_client import TrainingClient
from backend.types import AdamParams
from tests.conftest import policy_data

CPU = torch.device("cpu")


def train(client: TrainingClient, seeds: range) -> None:
    for seed in seeds:
        client.forward_backward(policy_data(4, seed), "importance_sampling")
        client.optim_step(AdamParams(1e-3)).result()


def weights(client: TrainingClient) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in client._trainer.sampler_weights()}


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("rank", [0, 4])
def test_resuming_is_bit_identical(torch_service: ServiceClient, rank: int) -> None:
    def fresh() -> TrainingClient:
        return torch_service.create_lora_training_client("tiny", rank) if rank else torch_service.create_training_client("tiny")

    uninterrupted, first = fresh(), fresh()
    train(uninterrupted, range(6))
    train(first, range(3))
    path = first.save_state("middle", extra={"cursor": 3}).result().path
    resumed = torch_service.create_training_client_from_state_with_optimizer(path)
    train(resumed, range(3, 6))
    assert_equal(weights(resumed), weights(uninterrupted))
    assert read_state(Path(path))["extra"] == {"cursor": 3}
    weights_only = torch_service.create_training_client_from_state(path)
    train(weights_only, range(3, 6))
    assert any(not torch.equal(t, weights(uninterrupted)[name]) for name, t in weights(weights_only).items())


def test_saved_policies_load_elsewhere(torch_service: ServiceClient) -> None:
    full, lora = torch_service.create_training_client("tiny"), torch_service.create_lora_training_client("tiny", 4)
    for client in (full, lora):
        train(client, range(2))
    tokens = torch.tensor([[5, 6, 7, 8]])
    full_path, lora_path = (
        client.save_weights_for_sampler("policy" + str(i)).result().path for i, client in enumerate((full, lora))
    )
    loaded = AutoModelForCausalLM.from_pretrained(full_path)
    assert torch.allclose(loaded(tokens).logits, full._trainer.base(tokens).logits, atol=1e-5)
    assert AutoTokenizer.from_pretrained(full_path).encode("12+3") == full.get_tokenizer().encode("12+3")
    adapted = PeftModel.from_pretrained(load_model("tiny", 0, CPU, torch.float32), lora_path)
    assert torch.allclose(adapted(input_ids=tokens).logits, lora._trainer.model(input_ids=tokens).logits, atol=1e-5)


def test_vllm_loads_a_saved_policy_by_path(torch_service: ServiceClient, vllm_client: TrainingClient) -> None:
    vllm_client.save_weights_and_get_sampling_client()  # its engine is in this process, and so will be the next
    from vllm import LLM, SamplingParams

    client = torch_service.create_training_client("llama-tiny")
    train(client, range(3))
    path = client.save_weights_for_sampler("for-vllm").result().path
    llm = LLM(path, dtype="float32", max_model_len=64, max_num_seqs=4, disable_log_stats=True)
    output = llm.generate(
        [{"prompt_token_ids": [5, 6, 7]}], SamplingParams(max_tokens=8, temperature=0, ignore_eos=True), use_tqdm=False
    )
    tokens = list(output[0].outputs[0].token_ids)
    greedy = client._trainer.base.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=8, min_new_tokens=8, do_sample=False)[0, 3:]  # type: ignore
    assert tokens == greedy.tolist()
    llm.llm_engine.engine_core.shutdown()


def test_a_full_disk_leaves_the_previous_checkpoint_valid(torch_service: ServiceClient) -> None:
    client = torch_service.create_training_client("tiny")
    path = Path(client.save_state("last").result().path)
    before = weights(client)
    train(client, range(1))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # no file may grow past 100 kB: what a full disk looks like
    try:
        with pytest.raises(CheckpointError, match="untouched"):
            client.save_state("last").result()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in path.parent.iterdir()] == ["last"], "no half-written folder may stay"
    assert_equal(weights(torch_service.create_training_client_from_state_with_optimizer(str(path))), before)


def test_checkpoints_of_another_model_are_refused(torch_service: ServiceClient, tmp_path: Path) -> None:
    tiny = torch_service.create_training_client("tiny")
    full = tiny.save_state("tiny").result().path
    adapter = torch_service.create_lora_training_client("tiny", 4).save_state("adapter").result().path
    cases = [
        (torch_service.create_training_client("llama-tiny"), full, "another model: its model_type is qwen3"),
        (torch_service.create_training_client("small"), full, "hidden_size is 128"),
        (tiny, adapter, "LoRA adapter"),
        (torch_service.create_lora_training_client("tiny", 8), adapter, "rank"),
        (tiny, str(tmp_path / "nothing"), "no checkpoint folder"),
    ]
    for client, path, says in cases:
        with pytest.raises(CheckpointError, match=says):
            client.load_state(path).result()
    with pytest.raises(CheckpointError, match="weights only"):
        tiny.load_state_with_optimizer(tiny.save_weights_for_sampler("sampler").result().path).result()


def test_failed_forward_backward_cancels_the_queued_step(torch_service: ServiceClient) -> None:
    client = torch_service.create_training_client("tiny")
    before, data = weights(client), policy_data(3)
    data[0].loss_fn_inputs["logprobs"].array[:] = -1e30
    futures = [client.forward_backward(data, "importance_sampling"), client.optim_step(AdamParams(1e-2))]
    for future in futures:
        with pytest.raises(NonFiniteError):
            future.result()
    assert_equal(weights(client), before)
    train(client, range(1))
    assert any(not torch.equal(tensor, before[name]) for name, tensor in weights(client).items())
