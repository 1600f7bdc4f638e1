"""Out of memory ends a step with the data's sizes and the setting to lower."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._C._autograd import DeviceType
from torch.autograd.profiler_util import EventList, FunctionEvent

from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import OutOfMemoryError
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.types import AdamParams
from posttrain.tracking.step_profile import StepProfile, kernel_class, kernel_table
from tests.conftest import policy_data, trainer_of

ON_GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
IN_CUBLAS = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
IN_TRITON = RuntimeError("Triton Error [CUDA]: out of memory")
IN_NUMPY = MemoryError("Unable to allocate 745. GiB for an array with shape (100000000000,) and data type float64")


def torchs_own() -> RuntimeError:
    """Of this machine's CPU, for more memory than any has."""
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    return raised.value


@pytest.mark.parametrize(
    "error",
    [ON_GPU, torchs_own(), IN_NUMPY, IN_CUBLAS, IN_TRITON],
    ids=["gpu", "cpu", "numpy", "cublas", "triton"],
)
def test_a_pass_that_runs_out_of_memory_names_the_setting(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ServiceClient(BackendConfig(engine="torch", micro_batch_tokens=256), tmp_path) as service:
        client, data = service.create_training_client("micro"), policy_data(4)
        before = {name: tensor.clone() for name, tensor in trainer_of(client).sampled.sampler_weights()}
        saved = client.save_state("last").result().path

        def fail(*_: Any) -> Any:
            raise error

        with monkeypatch.context() as patched:
            patched.setattr(trainer_of(client), "_logprobs", fail)
            client.forward_backward(data, "importance_sampling")
            with pytest.raises(OutOfMemoryError) as raised:
                client.optim_step(AdamParams(1e-3)).result()
        tokens = sum(datum.model_input.length for datum in data)
        says = str(raised.value)
        assert f"4 data of {tokens} tokens" in says and "lower backend.micro_batch_tokens to 128" in says
        assert all(torch.equal(before[name], tensor) for name, tensor in trainer_of(client).sampled.sampler_weights())
        client.load_state_with_optimizer(saved).result()
        monkeypatch.setattr(trainer_of(client).trained.optimizer, "step", fail)
        client.forward_backward(data, "importance_sampling")
        with pytest.raises(OutOfMemoryError, match=r"backend\.moments=8bit or backend\.offload_optimizer=true"):
            client.optim_step(AdamParams(1e-3)).result()


def test_other_errors_pass_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ServiceClient(BackendConfig(engine="torch"), tmp_path) as service:
        client = service.create_training_client("micro")

        def fail(*_: Any) -> Any:
            raise RuntimeError("a bug")

        monkeypatch.setattr(trainer_of(client), "_logprobs", fail)
        with pytest.raises(RuntimeError, match="a bug"):
            client.forward(policy_data(2), "importance_sampling").result()


def test_the_table_of_a_profile_by_hand() -> None:
    assert kernel_class("void pytorch_flash::flash_fwd_kernel") == "attention"
    assert kernel_class("nvjet_tst_128x256") == kernel_class("aten::mm") == "matrix products"
    assert kernel_class("aten::_fused_adamw_") == "optimizer, norm" and kernel_class("aten::mul") == "element-wise"
    table = kernel_table({"aten::mm": (6000.0, 4), "aten::mul": (2000.0, 2)}, steps=2)
    assert [line.split() for line in table.splitlines()[1:3]] == [
        ["matrix", "products", "3.00", "75.0%", "2"],
        ["element-wise", "1.00", "25.0%", "1"],
    ]


# Trap: torch gives a kernel's time to its operation as well, and to the compiled graph around it.
def test_a_gpus_time_is_that_of_its_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    operation = FunctionEvent(1, "aten::mm", 0, 0, 9, use_device="cuda", stack=[])
    operation.append_kernel("nvjet_tst", 0, 6000)
    on_gpu: dict[str, Any] = {"use_device": "cuda", "device_type": DeviceType.CUDA, "stack": []}
    kernels = [FunctionEvent(n, "nvjet_tst", 7, 9000 * n, 9000 * n + 3000, **on_gpu) for n in range(2)]
    graph = FunctionEvent(4, "## Call CompiledFxGraph x ##", 7, 0, 12000, is_user_annotation=True, **on_gpu)
    events = EventList([operation, *kernels, graph], use_device="cuda")
    events._build_tree()
    averages = events.key_averages()
    recorded = SimpleNamespace(start=print, stop=print, export_chrome_trace=print, key_averages=lambda: averages)
    monkeypatch.setattr(torch.profiler, "profile", lambda **_: recorded)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with StepProfile(tmp_path / "profile", 1, 1).step(1):
        pass
    table = (tmp_path / "profile" / "kernels.txt").read_text().splitlines()
    assert [line.split() for line in table[1:] if line and not line.startswith("kernel ")] == [
        ["matrix", "products", "6.00", "100.0%", "2"],
        ["nvjet_tst", "6.00", "100.0%", "2"],
    ]
