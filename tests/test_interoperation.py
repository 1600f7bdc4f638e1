"""Checkpoint folders, as save_state left them, in plain transformers, plain peft and plain vLLM: the
same logprobs everywhere.
"""

# Trap: a checkpoint that other tools cannot load.

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from posttrain.backend.config import BackendConfig
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.types import LoraConfig
from tests.architectures import save_random_model
from tests.conftest import SAMPLER_GAP, prompt_of
from tests.processes import PATIENCE
from tests.test_sampling import trainer_logprobs
from tests.vllm_families import SERVED, move_every_weight

pytestmark = [pytest.mark.slow, pytest.mark.needs_vllm]
PROMPT = prompt_of(40)
TOKENS = PROMPT.to_ints()
FULL = ("tiny", "llama-tiny", "gpt2-tiny", *SERVED)
FOR_SAMPLING_TOO = "Qwen 2.5"  # by save_weights_for_sampler
ADAPTERS = ("llama-tiny", "gpt2-tiny", "Gemma 3")
NO_ADAPTER_IN_VLLM = ("gpt2-tiny",)  # "does not support LoRA yet"


@dataclass(frozen=True)
class Saved:
    name: str
    folder: str
    base: str | None  # of an adapter
    logprobs: list[float]  # the trainer's, of TOKENS
    encoded: list[int]  # "12+3", by the client's tokenizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Saved]]:
    folder, found = tmp_path_factory.mktemp("interoperation"), []
    with ServiceClient(BackendConfig(engine="torch", max_length=128), folder / "checkpoints") as service:
        for name, lora in [(name, None) for name in FULL] + [(name, LoraConfig(4)) for name in ADAPTERS]:
            model = name if "tiny" in name else str(save_random_model(name, folder / f"{name} {lora}"))
            if lora:
                model = service.create_training_client(model).save_weights_for_sampler(f"base {name}").result().path
            client = service.create_training_client(model, lora)
            move_every_weight(client)
            logprobs = trainer_logprobs(client, PROMPT, []).tolist()
            encoded = client.get_tokenizer().encode("12+3")
            for save in (client.save_state, client.save_weights_for_sampler)[: 1 + (name == FOR_SAMPLING_TOO)]:
                path = save(f"{name} {lora} {save.__name__}").result().path
                found.append(Saved(name, path, model if lora else None, logprobs, encoded))
            client.close()
        yield found


def of_torch(model: torch.nn.Module) -> list[float]:
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor([TOKENS])).logits[0].float()
    return logits.log_softmax(-1)[:-1].gather(-1, torch.tensor(TOKENS[1:])[:, None])[:, 0].tolist()


def in_transformers(folder: str) -> PreTrainedModel:
    """By the kernel that knows the softcaps of Gemma 2."""
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")


def test_in_plain_transformers(saved: list[Saved]) -> None:
    """An adapter's folder finds its base."""
    for one in saved:
        assert of_torch(in_transformers(one.folder)) == pytest.approx(one.logprobs, abs=SAMPLER_GAP), one
        assert AutoTokenizer.from_pretrained(one.folder).encode("12+3") == one.encoded, one
        assert (Path(one.folder) / "config.json").exists() == (one.base is None)


def test_adapters_in_plain_peft(saved: list[Saved]) -> None:
    adapters = [(one, one.base) for one in saved if one.base]
    assert len(adapters) == len(ADAPTERS)
    for one, base in adapters:
        model = PeftModel.from_pretrained(in_transformers(base), one.folder)
        assert of_torch(model) == pytest.approx(one.logprobs, abs=SAMPLER_GAP), one


# A process that knows nothing of this project: [folder, adapter or None] pairs in, logprobs of
# TOKENS out. vLLM would look at every architecture in a process of its own, for ten seconds each.
VLLM = """
import gc, json, sys
from unittest.mock import patch
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

gc.freeze()
gc.freeze = gc.unfreeze = lambda: None  # as in heap.py
tokens, settings = json.loads(sys.argv[1]), dict(dtype="float32", enforce_eager=True, max_model_len=128)
with patch("vllm.model_executor.models.registry._run_in_subprocess", lambda fn: fn()):
    for folder, adapter in json.loads(sys.argv[2]):
        llm = LLM(folder, kv_cache_memory_bytes=2**26, enable_lora=bool(adapter), **settings)
        lora = LoRARequest("a", 1, adapter) if adapter else None
        params = SamplingParams(max_tokens=1, prompt_logprobs=0)
        (output,) = llm.generate([{"prompt_token_ids": tokens}], params, use_tqdm=False, lora_request=lora)
        entries = list(zip(tokens, output.prompt_logprobs))[1:]
        print("READ", json.dumps([entry[token].logprob for token, entry in entries]), flush=True)
        llm.llm_engine.engine_core.shutdown()
"""


def test_in_plain_vllm(saved: list[Saved], tmp_path: Path) -> None:
    served = [one for one in saved if not (one.base and one.name in NO_ADAPTER_IN_VLLM)]
    jobs = [(one.base, one.folder) if one.base else (one.folder, None) for one in served]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    command = [sys.executable, "-c", VLLM, json.dumps(TOKENS), json.dumps(jobs)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    read = [json.loads(line[5:]) for line in done.stdout.splitlines() if line.startswith("READ ")]
    assert len(read) == len(jobs), done.stderr[-3000:]
    for one, logprobs in zip(served, read, strict=True):
        assert logprobs == pytest.approx(one.logprobs, abs=SAMPLER_GAP), one
