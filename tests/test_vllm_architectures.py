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

import pytest

from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import ModelError
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.types import LoraConfig
from tests.architectures import NOT_WITH_VLLM, save_random_model
from tests.test_sampling import prompt_of, trainer_logprobs
from tests.vllm_families import ROUNDING, SERVED, families_service, largest_gap, move_every_weight

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
        assert largest_gap(client) < ROUNDING
        before = client.save_weights_and_get_sampling_client().compute_logprobs(prompt_of(40)).result()[1:]
        move_every_weight(client)
        assert largest_gap(client) < ROUNDING
        after = client.save_weights_and_get_sampling_client().compute_logprobs(prompt_of(40)).result()[1:]
        assert max(abs(a - b) for a, b in zip(after, before, strict=True) if a is not None and b is not None) > 0.05
        client.close()


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
import gc, json, sys
from unittest.mock import patch
from vllm import LLM, SamplingParams

gc.freeze()
gc.freeze = gc.unfreeze = lambda: None  # as in heap.py
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
