"""backend.sleep_while_training: the engine sleeps while a pass runs, unless it has something to sample;
it is refused where there is no GPU, before a model is opened.
"""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from posttrain.backend import vllm_engine, vllm_process
from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import ConfigError
from posttrain.backend.memory_plan import PlannedRun
from posttrain.backend.models import PRESETS
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.torch_sampler import TorchSampler
from posttrain.backend.types import AdamParams, ModelInput, SamplingParams
from posttrain.backend.vllm_engine import VllmEngine
from posttrain.backend.vllm_refusals import refusal
from tests.conftest import policy_data

CONFIG = BackendConfig(engine="torch", sleep_while_training=True)


def test_it_is_refused_by_name_without_a_gpu() -> None:
    with pytest.raises(ConfigError, match=r"backend\.sleep_while_training=true .* needs backend\.engine=vllm on a GPU"):
        ServiceClient(CONFIG)


def test_the_engine_sleeps_in_a_pass_and_wakes_for_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("posttrain.backend.engines.check_sleep", lambda config: None)
    events: list[str] = []
    load = TorchSampler.load_weights

    def loaded(self: TorchSampler, weights: Any) -> None:
        events.append("load")
        load(self, weights)

    monkeypatch.setattr(TorchSampler, "load_weights", loaded)
    monkeypatch.setattr(TorchSampler, "sleep", lambda self: events.append("sleep"))
    with ServiceClient(CONFIG, tmp_path) as service:
        client, data = service.create_training_client("micro"), policy_data(2)
        client.forward_backward(data, "importance_sampling").result()
        assert not events  # no engine yet
        for _ in range(2):
            client.optim_step(AdamParams(1e-3)).result()
            sampler = client.save_weights_and_get_sampling_client()
            sampler.sample(ModelInput.from_ints([5, 6]), 1, SamplingParams(max_tokens=2)).result()
            client.forward_backward(data, "importance_sampling").result()
        assert events == ["load", "sleep", "load", "sleep"]
        # a call in flight keeps it awake: nothing sleeps before the call's end
        future = sampler.sample(ModelInput.from_ints([5, 6]), 4, SamplingParams(max_tokens=200, stop=[]))
        client.forward_backward(data, "importance_sampling").result()
        assert events[4:] in ([], ["sleep"]) and (events[4:] == [] or future.done())
        future.result()


def test_the_plan_of_a_gpu_leaves_the_engine_out_of_passes() -> None:
    def run(sleeps: bool) -> PlannedRun:
        config = BackendConfig(engine="vllm", sampler_memory_gb=30, sleep_while_training=sleeps)
        return PlannedRun(PRESETS["qwen2.5-0.5b-shape"], config, None, torch.device("cuda"), 512, samples=True)

    awake, asleep = run(False).plan, run(True).plan
    engine = awake.always.keys() - asleep.always.keys()
    assert "KV cache" in engine and len(engine) == 2 and engine <= asleep.sampling.keys()
    assert sum(asleep.training.values()) == sum(awake.training.values()) and asleep.peak < awake.peak


# Trap: vLLM 0.24 keeps the memory of a closed engine, and torch asks an allocator for it that is gone.
@pytest.mark.needs_vllm
@pytest.mark.parametrize("in_a_list", [False, True], ids=["0.24", "0.32"])
def test_a_closed_engine_gives_back_memory_that_sleeps_unless_another_has_it(
    in_a_list: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("vllm")
    pair, events = ("pool", "allocator"), list[str]()
    pools: dict[str, Any] = {"weights": [pair] if in_a_list else pair}
    cumem = SimpleNamespace(CuMemAllocator=SimpleNamespace(instance=SimpleNamespace(allocator_and_pools=pools)))
    monkeypatch.setitem(sys.modules, "vllm.device_allocator.cumem", cumem)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: events.append(f"empty, pools: {len(pools)}"))
    allocators, live = list[Any](), set[Any]()
    monkeypatch.setattr(vllm_process, "_allocators", allocators)
    monkeypatch.setattr(vllm_engine, "_live_engines", live)

    def engine(asleep: bool = False) -> Any:
        made: Any = VllmEngine.__new__(VllmEngine)
        core = SimpleNamespace(shutdown=lambda: events.append("shut down"))
        made._engine = SimpleNamespace(engine_core=core, wake_up=lambda: events.append("wake"))
        made._sleeps, made._asleep, made._device = True, asleep, torch.device("cuda")
        return made

    live.add(engine())
    engine().close()  # as one that vLLM refuses, beside the first
    assert pools and events == ["shut down", "empty, pools: 1"]
    events.clear()
    live.clear()
    engine(asleep=True).close()
    assert events == ["empty, pools: 1", "wake", "shut down", "empty, pools: 0"] and "allocator" in allocators


def test_a_second_engine_that_sleeps_is_refused_by_the_settings_name() -> None:
    error = AssertionError("CuMem allocator can only be used for one instance per process.")
    refused = refusal(error, PRESETS["micro"])
    assert isinstance(refused, ConfigError) and "backend.sleep_while_training=true is for one" in str(refused)
