"""Decisions for a GPU that a machine without one can check."""

from pathlib import Path

import pytest
import torch

import benchmarks.report
from posttrain.backend.config import BackendConfig, compute_dtype, training_device
from posttrain.backend.memory import GIB, kv_bytes_per_token, kv_cache_bytes
from posttrain.backend.models import model_config


def test_every_process_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert training_device() == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert training_device() == torch.device("cuda", 3)
    # each process was given one GPU to see
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert training_device() == torch.device("cuda", 0)


def test_dtype_follows_the_device_unless_it_is_asked_for() -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert compute_dtype(cpu) == torch.float32 and compute_dtype(cpu, BackendConfig(dtype="bfloat16")) == torch.bfloat16
    assert compute_dtype(cuda, BackendConfig(dtype="float32")) == torch.float32


def test_engines_are_sized_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    config = model_config("qwen2.5-0.5b-shape")
    # keys and values, layers, heads, width, bytes
    assert kv_bytes_per_token(config, itemsize=2) == 2 * 24 * 2 * 64 * 2
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100 * GIB, 140 * GIB))
    cuda = torch.device("cuda")
    few = BackendConfig(max_num_seqs=16, dtype="bfloat16")
    assert kv_cache_bytes(config, 2048, few, cuda) == 16 * (2048 + 16) * 12_288
    assert kv_cache_bytes(config, 32768, BackendConfig(max_num_seqs=1024), cuda) == int(0.4 * 100 * GIB)
    assert kv_cache_bytes(config, 2048, BackendConfig(sampler_memory_gb=2.5), cuda) == int(2.5 * GIB)
    assert kv_cache_bytes(config, 2048, BackendConfig(), torch.device("cpu")) == GIB


def test_reports_need_no_git(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(benchmarks.report, "RESULTS", tmp_path)
    benchmarks.report.write_report("name", {"a": 1.0}, {}, 0.0, {})
    assert len(list(tmp_path.glob("name-*.json"))) == 1
