"""Out of memory ends a step with the data's sizes and the setting to lower."""

from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import OutOfMemoryError
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.types import AdamParams
from posttrain.tracking.step_profile import kernel_class, kernel_table
from tests.conftest import policy_data, trainer_of

ON_GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
IN_NUMPY = MemoryError("Unable to allocate 745. GiB for an array with shape (100000000000,) and data type float64")


def torchs_own() -> RuntimeError:
    """Of this machine's CPU, for more memory than any has."""
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    return raised.value


@pytest.mark.parametrize("error", [ON_GPU, torchs_own(), IN_NUMPY], ids=["gpu", "cpu", "numpy"])
def test_a_pass_that_runs_out_of_memory_names_the_setting(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ServiceClient(BackendConfig(engine="torch", micro_batch_tokens=256), tmp_path) as service:
        client, data = service.create_training_client("micro"), policy_data(4)
        before = {name: tensor.clone() for name, tensor in trainer_of(client).sampler_weights()}
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
        assert all(torch.equal(before[name], tensor) for name, tensor in trainer_of(client).sampler_weights())
        client.load_state_with_optimizer(saved).result()
        monkeypatch.setattr(trainer_of(client).optimizer, "step", fail)
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
