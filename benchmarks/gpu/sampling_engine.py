"""One engine of the sampling matrix, in a process that sampling.py starts and talks to.

    python -m benchmarks.gpu.sampling_engine llm|raw|plain|ours|ours-v2|replicas-2|replicas-4

Says `@@{"start": seconds}` once the engine is up and has sampled one warm round; then, for each
JSON line {"mode", "rows"} that it is sent, samples one round and answers `@@` and a JSON object.
Times in it are of the clock that all processes of the machine share.

`llm` is vLLM's LLM class with its own defaults, `raw` with the settings of our engine, `plain` with
its own and half of the rows; `ours` is SamplingClient; `v2` is vLLM's newer model runner; `replicas` are
those of a policy in training, beside it on its GPU.
"""

import cProfile
import json
import os
import pstats
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import chz
import numpy as np
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from benchmarks.gpu.data import FIRST, VOCABULARY
from benchmarks.rollouts_vs_vllm import Size, fixed_groups, our_rollouts
from posttrain.backend.config import BackendConfig, compute_dtype, training_device
from posttrain.backend.models import model_config
from posttrain.backend.sampling_client import SamplingClient
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.tokenizers import load_tokenizer
from posttrain.backend.types import ModelInput, SamplingParams
from posttrain.backend.vllm_process import set_environment
from posttrain.backend.vllm_settings import engine_args
from posttrain.renderers import get_renderer
from posttrain.tracking.step_profile import is_kernel

ON_GPU = training_device().type == "cuda"
MODEL, ROWS, PROMPT, NEW = ("qwen2.5-0.5b-shape", 1024, 128, 256) if ON_GPU else ("tiny", 64, 16, 48)
GROUP_SIZE, MAX_LENGTH = 8, 512
CACHE_GB = 4.75 if ON_GPU else 0.25  # of 1,024 x 384 tokens of 12 KiB; `plain` has half
CONFIG = BackendConfig(
    engine="vllm", max_length=MAX_LENGTH, max_num_seqs=ROWS, reproducible=False, sampler_memory_gb=CACHE_GB
)
# Decode steps of the profiled round: not profiled, under cProfile, recording kernels.
MIDDLE = {"plain": range(100, 120), "python": range(120, 160), "kernels": range(180, 190)}
if not ON_GPU:
    MIDDLE = {"plain": range(5, 10), "python": range(10, 20), "kernels": range(0)}
BUSY_SECONDS, SHORT_INTERVAL = 20.0, 3e-4

Round = dict[str, Any]


def new_seed() -> int:
    """Of a round's prompts: no round finds another's prefixes in the cache."""
    return time.time_ns() % 2**32


def new_prompts(rows: int) -> list[list[int]]:
    """Each is sampled from GROUP_SIZE times."""
    return np.random.default_rng(new_seed()).integers(FIRST, VOCABULARY, (rows // GROUP_SIZE, PROMPT)).tolist()


def timed(run: Callable[[], int]) -> Round:
    start = time.monotonic()
    tokens = run()
    return {"tokens": tokens, "from": start, "to": time.monotonic()}


# --- vLLM's LLM class ---------------------------------------------------------------------------


def llm_args(name: str, hf_config: PretrainedConfig) -> dict[str, Any]:
    if name == "raw":
        return engine_args(hf_config, MAX_LENGTH, CONFIG, training_device())
    args: dict[str, Any] = {
        "load_format": "dummy",
        "dtype": str(compute_dtype(training_device())).removeprefix("torch."),
        "max_model_len": MAX_LENGTH,
        "kv_cache_memory_bytes": int(CACHE_GB * 2**30 / (2 if name == "plain" else 1)),
        "gpu_memory_utilization": 0.01,  # other engines have the rest
        "enforce_eager": not ON_GPU,
    }
    return args | ({"max_num_seqs": ROWS // 2, "max_num_batched_tokens": 8192} if name == "plain" else {})


def open_llm(name: str) -> Callable[..., Round]:
    set_environment(training_device(), reproducible=False)
    from vllm import LLM
    from vllm import SamplingParams as VllmParams

    config = model_config(MODEL)
    with torch.device("meta"):
        config.architectures = [type(AutoModelForCausalLM.from_config(config)).__name__]
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        load_tokenizer(MODEL, MAX_LENGTH).save_pretrained(folder)
        llm = LLM(model=folder, **llm_args(name, config))

    def sample(mode: str, rows: int, new: int = NEW) -> Round:
        logprobs = 0 if mode == "logprobs" else None
        flat = name == "raw"
        params = VllmParams(max_tokens=new, ignore_eos=True, detokenize=False, logprobs=logprobs, flat_logprobs=flat)
        asked = [{"prompt_token_ids": prompt} for prompt in new_prompts(rows) for _ in range(GROUP_SIZE)]
        return timed(lambda: sum(len(o.outputs[0].token_ids) for o in llm.generate(asked, params, use_tqdm=False)))  # type: ignore[arg-type]

    return sample


# --- our engine ---------------------------------------------------------------------------------


def open_ours(name: str, stack: ExitStack) -> Callable[..., Round]:
    if "v2" in name:
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    if name.startswith("replicas"):
        config = beside_the_trainer(int(name.rpartition("-")[2]))
        trainer = stack.enter_context(ServiceClient(config)).create_lora_training_client(MODEL, rank=8)
        client = trainer.save_weights_and_get_sampling_client()
    else:
        client = stack.enter_context(ServiceClient(CONFIG)).create_sampling_client(base_model=MODEL)

    def sample(mode: str, rows: int, new: int = NEW) -> Round:
        if mode == "rollouts":
            return rollouts(client, rows, new)
        found: Round = {}
        asked = new_prompts(rows)
        with (
            busy_thread(found, mode)
            if "busy" in mode
            else middle_profiled(client, found)
            if mode == "profile"
            else ExitStack()
        ):
            found |= timed(lambda: sampled_tokens(client, asked, new))
        return found

    return sample


def beside_the_trainer(replicas: int) -> BackendConfig:
    return chz.replace(
        CONFIG,
        sampler_replicas=replicas,
        replicas_share_gpu=True,
        max_num_seqs=ROWS // replicas,
        sampler_memory_gb=CACHE_GB / replicas,
    )


def sampled_tokens(client: SamplingClient, prompts: list[list[int]], new: int) -> int:
    params = SamplingParams(max_tokens=new, stop=[])
    futures = [client.sample(ModelInput.from_ints(prompt), GROUP_SIZE, params) for prompt in prompts]
    return sum(len(sequence.tokens) for future in futures for sequence in future.result().sequences)


def rollouts(client: SamplingClient, rows: int, new: int) -> Round:
    size = Size(MODEL, rows // GROUP_SIZE, GROUP_SIZE, PROMPT, new, CONFIG)
    groups = fixed_groups(size, get_renderer("plain", client.get_tokenizer()), new_seed())
    start, tokens = time.monotonic(), rows * new
    return {"tokens": tokens, "from": start, "to": start + tokens / our_rollouts(client, groups, size)}


@contextmanager
def busy_thread(found: Round, mode: str) -> Iterator[None]:
    """One spins, but no longer than BUSY_SECONDS: the engine may have to wait for the interpreter's
    lock at every call of torch.
    """
    stop, start, interval = threading.Event(), time.monotonic(), sys.getswitchinterval()

    def spin() -> None:
        while not stop.is_set() and time.monotonic() < start + BUSY_SECONDS:
            sum(range(100))
        found["busy, s"] = round(time.monotonic() - start, 1)

    thread = threading.Thread(target=spin)
    sys.setswitchinterval(SHORT_INTERVAL if mode == "busy-short" else interval)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(interval)


# --- where a decode step's time goes ------------------------------------------------------------


@contextmanager
def middle_profiled(client: SamplingClient, found: Round) -> Iterator[None]:
    """Fills `found` with ms per step: of the wall, of Python functions' own time, of kernels."""
    thread: Any = client._engine
    engine, python = thread._engine, cProfile.Profile()
    kernels = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) if MIDDLE["kernels"] else None
    step, count, walls = engine.step, 0, {"plain": 0.0, "python": 0.0, "kernels": 0.0}

    def counted_step() -> Any:
        nonlocal count
        part = next((name for name, steps in MIDDLE.items() if count in steps), "")
        if part == "kernels" and kernels is not None and count == MIDDLE[part].start:
            kernels.start()
        start = time.perf_counter()
        if part == "python":
            python.enable()
        outputs = step()
        python.disable()
        if part:
            walls[part] += 1e3 * (time.perf_counter() - start) / len(MIDDLE[part])
        if part == "kernels" and kernels is not None and count == MIDDLE[part].stop - 1:
            torch.cuda.synchronize()
            kernels.stop()
        count += 1
        return outputs

    with patch.object(engine, "step", counted_step):
        yield
    found["steps"], found["ms per step"] = count, rounded(walls)
    stats: Any = pstats.Stats(python)
    own = {f"{os.path.basename(f)}:{line} {name}": row[2] for (f, line, name), row in stats.stats.items()}
    found["functions, ms per step"] = top(own, 1e3 / len(MIDDLE["python"]))
    if kernels is not None:
        spent: dict[str, float] = {}
        for event in filter(is_kernel, kernels.key_averages()):
            name = event.key[:80]  # of several kernels: theirs differ later
            spent[name] = spent.get(name, 0.0) + event.self_device_time_total
        found["kernels, ms per step"] = top(spent, 1e-3 / len(MIDDLE["kernels"]))
        found["GPU ms per step"] = sum(spent.values()) * 1e-3 / len(MIDDLE["kernels"])


def top(spent: dict[str, float], scale: float) -> dict[str, float]:
    return rounded({name: spent[name] * scale for name in sorted(spent, key=lambda name: -spent[name])[:15]})


def rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.3g}") for name, value in values.items()}


# --- the process --------------------------------------------------------------------------------


def say(answer: Round) -> None:
    # on a line of its own, whatever vLLM has printed
    print("\n@@" + json.dumps(answer), flush=True)


def main() -> None:
    name = sys.argv[1]
    with ExitStack() as stack:
        start = time.monotonic()
        sample = open_ours(name, stack) if name.startswith(("ours", "replicas")) else open_llm(name)
        started = time.monotonic() - start
        # what the first call of any mode compiles, imports and allocates
        sample("rollouts" if name == "ours" else "logprobs", ROWS // 2 if name == "plain" else ROWS, NEW // 4)
        say({"start": started})
        for line in sys.stdin:
            request = json.loads(line)
            say(sample(request["mode"], request["rows"]))


if __name__ == "__main__":
    main()
