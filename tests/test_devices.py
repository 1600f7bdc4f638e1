"""Decisions for a GPU that a machine without one can check."""

import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import benchmarks.report
from posttrain.backend import memory
from posttrain.backend.alarms import LIMITS, START_TOKENS
from posttrain.backend.config import BackendConfig, compute_dtype, param_dtype, training_device
from posttrain.backend.errors import ConfigError
from posttrain.backend.memory import GIB, kv_cache_bytes, sequence_bytes
from posttrain.backend.memory_plan import free_bytes, planned
from posttrain.backend.models import model_config
from posttrain.backend.placement import check_placement
from posttrain.backend.random_state import OwnTorchGenerators, drawn_from, seed_of
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.tokenizers import load_tokenizer
from posttrain.backend.vllm_engine import VllmEngine
from posttrain.backend.vllm_process import NO_SPLIT_SUMS, model_folder, set_environment
from posttrain.backend.vllm_settings import engine_args, samples_with_vllm
from posttrain.preflight import STEP_SHARE


def test_every_process_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert training_device() == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert training_device() == torch.device("cuda", 3)
    # each process was given one GPU to see
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert training_device() == torch.device("cuda", 0)


# Trap: a stage's freed activations, which torch keeps, would refuse the next stage, or shrink its sampler's cache.
def test_memory_that_torch_keeps_is_free_and_is_given_back_for_a_waking_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 * GIB, 140 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 110 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 20 * GIB)
    cuda = torch.device("cuda")
    assert free_bytes(cuda) == 100 * GIB
    with monkeypatch.context() as patched:  # Trap: of the memory it has with the CPU, CUDA takes cached files for used
        patched.setattr(torch.cuda, "is_available", lambda: True)
        patched.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(is_integrated=1))
        patched.setattr(memory, "free_on_cpu", lambda: 30 * GIB)
        assert free_bytes(cuda) == 120 * GIB
    assert kv_cache_bytes(model_config("tiny"), 2**17, BackendConfig(max_num_seqs=2**16), cuda) == int(40 * GIB)
    events: list[str] = []
    engine: Any = object.__new__(VllmEngine)
    engine._asleep, engine._engine = True, SimpleNamespace(wake_up=lambda: events.append("wake"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: events.append("give back"))
    engine._wake()
    engine._wake()
    assert events == ["give back", "wake"]


# Trap: torch puts the generators back after it has compiled something, or recomputed a layer, in another thread.
def test_an_engine_has_new_noise_in_every_step() -> None:
    generators, program, noise = OwnTorchGenerators(cuda=False, seed=7), torch.get_rng_state(), []
    with generators:
        first = torch.get_rng_state()
    for _ in range(3):
        with generators:
            noise.append(torch.rand(3))
            torch.set_rng_state(first)
    assert len({tuple(x.tolist()) for x in noise}) == 3
    assert torch.equal(torch.get_rng_state(), program)


# Trap: torch's generator on a CPU reads the low 32 bits of a seed alone.
def test_a_seed_of_several_numbers_differs_in_its_low_bits() -> None:
    seeds = [seed_of(*numbers) for n in range(5000) for numbers in ((n,), (0, n), (n, 0), (n << 32,))]
    assert len({seed % 2**32 for seed in seeds}) > len(seeds) - 10 and max(seeds) < 2**63  # few meet by chance
    assert seed_of(0, 1, 2) == seed_of(0, 1, 2)


def test_weights_of_seeds_that_differ_from_bit_32_on_differ() -> None:
    def drawn(seed: int) -> float:
        with drawn_from(seed):
            return torch.rand(()).item()

    seeds = [7, 7 + 2**32, 7 + 2**40]
    assert len({drawn(seed) for seed in seeds}) == 3
    assert drawn(2**32 - 1) == torch.rand((), generator=torch.Generator().manual_seed(2**32 - 1)).item()


def test_apples_gpu_is_taken_on_request(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = BackendConfig(device="mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"backend.device=mps, but this machine's torch .* has no such device"):
        training_device(config)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    device = training_device(config)
    assert device == torch.device("mps") and training_device() == torch.device("cpu")
    assert compute_dtype(device, config) == param_dtype(device, config) == torch.float32
    monkeypatch.setattr("posttrain.backend.vllm_settings.vllm_is_installed", lambda: True)
    monkeypatch.setattr("posttrain.backend.engines.vllm_is_installed", lambda: True)
    assert samples_with_vllm(BackendConfig()) and not samples_with_vllm(config)
    with pytest.raises(ConfigError, match="backend.engine=vllm samples on cpu, not on backend.device=mps"):
        ServiceClient(BackendConfig(device="mps", engine="vllm"), tmp_path)
    with pytest.raises(ConfigError, match="backend.device=mps is for one process"):
        check_placement(BackendConfig(device="mps", sampler_replicas=1))
    # every table by device knows it
    run = planned("tiny", config, None, samples=True)
    assert "KV cache" in run.plan.sampling and run.device == device and "GiB" in run.plan.table()
    assert START_TOKENS["mps"] and LIMITS["mps", "float32"] and STEP_SHARE["mps"]


def test_a_machine_without_proc_has_half_of_its_memory_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_read", lambda file: "")
    assert GIB // 4 < free_bytes(torch.device("cpu")) < 2**44


def test_dtype_follows_the_device_unless_it_is_asked_for() -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert compute_dtype(cpu) == torch.float32 and compute_dtype(cpu, BackendConfig(dtype="bfloat16")) == torch.bfloat16
    assert compute_dtype(cuda, BackendConfig(dtype="float32")) == torch.float32


def test_engines_are_sized_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    config = model_config("qwen2.5-0.5b-shape")
    # keys and values, layers, heads, width, bytes
    assert sequence_bytes(config, 10, itemsize=2) == 10 * 2 * 24 * 2 * 64 * 2
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100 * GIB, 140 * GIB))
    cuda = torch.device("cuda")
    few = BackendConfig(max_num_seqs=16, dtype="bfloat16")
    assert kv_cache_bytes(config, 2048, few, cuda) == 16 * (2048 + 16) * 12_288
    assert kv_cache_bytes(config, 32768, BackendConfig(max_num_seqs=1024), cuda) == int(0.4 * 100 * GIB)
    assert kv_cache_bytes(config, 2048, BackendConfig(sampler_memory_gb=2.5), cuda) == int(2.5 * GIB)
    assert kv_cache_bytes(config, 2048, BackendConfig(), torch.device("cpu")) == GIB


def test_engine_settings_follow_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    config, cuda = model_config("tiny"), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100 * GIB, 140 * GIB))
    on_cpu = engine_args(config, 512, BackendConfig(), torch.device("cpu"))
    assert on_cpu["enforce_eager"] and not on_cpu["enable_chunked_prefill"]
    assert "max_cudagraph_capture_size" not in on_cpu and "gpu_memory_utilization" not in on_cpu
    on_gpu = engine_args(config, 512, BackendConfig(max_num_seqs=768), cuda)
    assert on_gpu["max_num_batched_tokens"] == 8192 and on_gpu["max_cudagraph_capture_size"] == 768
    assert on_gpu["moe_backend"] == "triton" and "moe_backend" not in on_cpu  # FlashInfer's reorder the experts
    assert not on_gpu["enforce_eager"] and "enable_chunked_prefill" not in on_gpu
    # Trap: vLLM captures 248 rows for 250, 2 for 3, and decodes more without a graph.
    for rows, largest in ((4096, 1024), (1000, 1008), (250, 256), (3, 16)):
        args = engine_args(config, 512, BackendConfig(max_num_seqs=rows), cuda)
        assert args["max_cudagraph_capture_size"] == largest
    assert "max_cudagraph_capture_size" not in engine_args(config, 512, BackendConfig(enforce_eager=True), cuda)


def test_equal_models_have_one_folder_for_vllms_compiled_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    names = []
    for model in ("tiny", "tiny", "micro"):
        with model_folder(model_config(model), load_tokenizer(model), keep=True) as folder:
            assert (Path(folder) / "config.json").exists()
            names.append(folder)
    assert names[0] == names[1] != names[2] and str(tmp_path) in names[0]
    assert len(list((tmp_path / "posttrain" / "engines").iterdir())) == 2
    with model_folder(model_config("tiny"), load_tokenizer("tiny"), keep=False) as folder:
        assert str(tmp_path) not in folder
    assert not Path(folder).exists()
    rename = os.rename

    def second(source: str, target: str) -> None:
        shutil.copytree(source, target)
        rename(source, target)

    monkeypatch.setattr(os, "rename", second)
    with model_folder(model_config("small"), load_tokenizer("small"), keep=True) as folder:
        assert (Path(folder) / "config.json").exists()
    assert len(list((tmp_path / "posttrain" / "engines").iterdir())) == 3, "what comes second leaves nothing"


def test_reports_need_no_git(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(benchmarks.report, "RESULTS", tmp_path)
    benchmarks.report.write_report("name", {"a": 1.0}, {}, 0.0, {})
    assert len(list(tmp_path.glob("name-*.json"))) == 1


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], bf16: bool = True) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)


def test_a_gpu_without_bfloat16_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_gpu(monkeypatch, (7, 5), bf16=False)
    with pytest.raises(ConfigError, match="Tesla T4 does not compute in bfloat16.*set backend.dtype=float32"):
        compute_dtype(torch.device("cuda"), BackendConfig(dtype="bfloat16"))
    assert compute_dtype(torch.device("cuda"), BackendConfig(dtype="float32")) == torch.float32


def test_reproducible_sampling_needs_batch_invariant_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM has them from Ampere on, and reads the variable once, when it is imported."""
    cuda = torch.device("cuda")
    monkeypatch.delenv("VLLM_BATCH_INVARIANT", raising=False)
    monkeypatch.delitem(sys.modules, "vllm.v1.engine.llm_engine", raising=False)
    on_a_gpu(monkeypatch, (9, 0))
    set_environment(cuda, reproducible=False)
    assert "VLLM_BATCH_INVARIANT" not in os.environ
    monkeypatch.setitem(sys.modules, "vllm.v1.engine.llm_engine", sys)
    with pytest.raises(ConfigError, match="has loaded vLLM without it"):
        set_environment(cuda, reproducible=True)
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "0")
    with pytest.raises(ConfigError, match="the environment sets it to '0'"):
        set_environment(cuda, reproducible=True)
    for variable in NO_SPLIT_SUMS:
        monkeypatch.setenv(variable, "as it was")
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    set_environment(cuda, reproducible=True)
    assert {variable: os.environ[variable] for variable in NO_SPLIT_SUMS} == NO_SPLIT_SUMS
    on_a_gpu(monkeypatch, (7, 5))
    with pytest.raises(ConfigError, match="compute capability 8.0 or more, not for Tesla T4"):
        set_environment(cuda, reproducible=True)
