"""A checkpoint folder, as save_state left it, in plain transformers, plain peft and plain vLLM: the
same logprobs everywhere.
"""

# Trap: a checkpoint that other tools cannot load.

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.backend.config import BackendConfig
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.training_client import TrainingClient
from posttrain.backend.types import AdamParams, LoraConfig, ModelInput
from tests.architectures import save_random_model
from tests.conftest import policy_data

pytestmark = [pytest.mark.slow, pytest.mark.needs_vllm]
TOKENS = [5, 6, 7, 8, 9, 30, 31, 12]
FULL = ("tiny", "llama-tiny", "gpt2-tiny", "Gemma 3", "Qwen 3-MoE")
ADAPTERS = ("llama-tiny", "gpt2-tiny", "Gemma 3")
NO_ADAPTER_IN_VLLM = ("gpt2-tiny",)  # "does not support LoRA yet"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceClient]:
    with ServiceClient(
        BackendConfig(engine="torch", max_length=128), tmp_path_factory.mktemp("interoperation")
    ) as service:
        yield service


def train(client: TrainingClient) -> None:
    for seed in range(2):
        client.forward_backward(policy_data(4, seed), "importance_sampling")
        client.optim_step(AdamParams(1e-3)).result()


def ours(client: TrainingClient) -> list[float]:
    logprobs = client.save_weights_and_get_sampling_client().compute_logprobs(ModelInput.from_ints(TOKENS)).result()
    return [p for p in logprobs if p is not None]


def of_torch(model: torch.nn.Module) -> list[float]:
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor([TOKENS])).logits[0].float()
    return logits.log_softmax(-1)[:-1].gather(-1, torch.tensor(TOKENS[1:])[:, None])[:, 0].tolist()


# A process that knows nothing of this project: [folder, adapter or None] pairs in, logprobs of
# TOKENS out.
VLLM = """
import gc, json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
gc.freeze()
gc.freeze = gc.unfreeze = lambda: None  # as in heap.py
tokens, found = json.loads(sys.argv[1]), []
for folder, adapter in json.loads(sys.argv[2]):
    llm = LLM(folder, dtype="float32", max_model_len=64, max_num_seqs=2, enforce_eager=True, enable_lora=bool(adapter))
    lora = LoRARequest("a", 1, adapter) if adapter else None
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    output = llm.generate([{"prompt_token_ids": tokens}], params, use_tqdm=False, lora_request=lora)[0]
    found.append([entry[token].logprob for token, entry in zip(tokens[1:], output.prompt_logprobs[1:])])
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
print("FOUND" + json.dumps(found))
"""


def of_vllm(folders: list[tuple[str, str | None]], tmp_path: Path) -> list[list[float]]:
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    script = tmp_path / "plain_vllm.py"
    script.write_text(VLLM)
    command = [sys.executable, str(script), json.dumps(TOKENS), json.dumps(folders)]
    run = subprocess.run(command, cwd=tmp_path, env=os.environ | settings, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.split("FOUND")[1])


def model_name(service: ServiceClient, name: str) -> str:
    if "tiny" in name:
        return name
    return str(save_random_model(name, service.checkpoint_path(f"model of {name}")))


def test_full_checkpoints_load_everywhere(service: ServiceClient, tmp_path: Path) -> None:
    expected, folders = [], []
    for name in FULL:
        client = service.create_training_client(model_name(service, name))
        train(client)
        folders.append(client.save_state(f"full {name}").result().path)
        expected.append(ours(client))
        assert of_torch(AutoModelForCausalLM.from_pretrained(folders[-1])) == pytest.approx(expected[-1], abs=1e-4), (
            name
        )
        assert AutoTokenizer.from_pretrained(folders[-1]).encode("12+3") == client.get_tokenizer().encode("12+3")
        if name == FULL[-1]:  # what save_weights_for_sampler writes
            folders.append(client.save_weights_for_sampler("for sampling").result().path)
            expected.append(expected[-1])
        client.close()
    for name, found, wanted in zip(
        [*FULL, "for sampling"], of_vllm([(folder, None) for folder in folders], tmp_path), expected, strict=True
    ):
        assert found == pytest.approx(wanted, abs=2e-4), name


def test_adapter_checkpoints_load_everywhere(service: ServiceClient, tmp_path: Path) -> None:
    in_vllm, expected = [], []
    for name in ADAPTERS:
        base = (
            service.create_training_client(model_name(service, name))
            .save_weights_for_sampler(f"base {name}")
            .result()
            .path
        )
        client = service.create_training_client(base, LoraConfig(4))
        train(client)
        path, wanted = client.save_state(f"adapter {name}").result().path, ours(client)
        assert not (Path(path) / "config.json").exists()
        by_folder = AutoModelForCausalLM.from_pretrained(path)  # finds the base through the adapter
        by_peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), path)
        for model in (by_folder, by_peft):
            assert of_torch(model) == pytest.approx(wanted, abs=1e-4), name
        assert AutoTokenizer.from_pretrained(path).encode("12+3") == client.get_tokenizer().encode("12+3")
        if name not in NO_ADAPTER_IN_VLLM:
            in_vllm.append((base, path))
            expected.append(wanted)
        client.close()
    for pair, found, wanted in zip(in_vllm, of_vllm(in_vllm, tmp_path), expected, strict=True):
        assert found == pytest.approx(wanted, abs=2e-4), pair
