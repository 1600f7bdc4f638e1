"""Checkpoints of quantised weights are opened with whole ones, also where there is a GPU, or refused by name."""

# Trap: weights without their scales; layers that go on to round their inputs, as they did over quantised weights.

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from posttrain.backend.errors import ModelError
from posttrain.backend.models import load_model, model_config
from tests.architectures import save_random_model
from tests.conftest import rounded
from tests.every_architecture import save
from tests.test_architectures import full_logprobs

CPU = torch.device("cpu")
TOKENS = list(range(20, 60))


def opened(folder: Path) -> PreTrainedModel:
    return load_model(str(folder), 0, CPU, torch.float32)


def quantize(folder: Path, settings: dict[str, Any], how: Any) -> PreTrainedModel:
    """In place. `how`: from a matrix to its tensors by the ending of their names, and to the matrix that they stand
    for, in the model that is returned."""
    model = opened(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        stored, whole = how(tensors.pop(name))
        tensors |= {name.removesuffix("weight") + ending: tensor for ending, tensor in stored.items()}
        if ".experts." in name:  # which are one tensor in the model
            layer, _, rest = name.partition("experts.")
            number, kind, _ = rest.split(".")
            experts = model.get_parameter(
                layer + ("experts.down_proj" if kind == "down_proj" else "experts.gate_up_proj")
            )
            rows = experts.data[int(number)]
            half = len(rows) // 2
            whole = (
                whole.bfloat16() if "weight" in stored else whole
            )  # transformers rounds FP8 ones, and not packed ones
            (rows if kind == "down_proj" else rows[:half] if kind == "gate_proj" else rows[half:]).copy_(whole)
        else:
            model.get_parameter(name).data = whole
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return model


def in_blocks(matrix: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    blocks = [block.split(128, 1) for block in matrix.split(128, 0)]
    scale = torch.stack([torch.stack([block.abs().max() / 448 for block in row]) for row in blocks])
    wide = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[: matrix.shape[0], : matrix.shape[1]]
    stored = (matrix / wide).to(torch.float8_e4m3fn)
    return {"weight": stored, "weight_scale_inv": scale}, stored.float() * wide


@pytest.mark.parametrize("gpu", [False, True])
def test_fp8_checkpoints_are_opened_with_whole_weights(gpu: bool, tmp_path: Path, monkeypatch: Any) -> None:
    """On a GPU transformers would keep the layers' weights in FP8, and their scales apart."""
    folder = save(load_model("llama-tiny", 0, CPU, torch.float32), tmp_path / "model")
    fp8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128], "fmt": "e4m3"}
    model = quantize(folder, fp8, in_blocks)
    if gpu:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    whole = opened(folder)
    assert type(whole.model.layers[0].mlp.up_proj) is torch.nn.Linear  # type: ignore[union-attr,index]
    assert (full_logprobs(whole, TOKENS) - full_logprobs(model, TOKENS)).abs().max() < rounded(1e-4)
    assert getattr(whole.config, "quantization_config", None) is None


def fp8(matrix: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    scale = matrix.abs().amax(1, keepdim=True) / 448
    stored = (matrix / scale).to(torch.float8_e4m3fn)
    return {"weight": stored, "weight_scale": scale}, stored.float() * scale


def int8(matrix: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    scale = matrix.abs().amax(1, keepdim=True) / 127
    stored = (matrix / scale).round().to(torch.int8)
    return {"weight": stored, "weight_scale": scale}, stored.float() * scale


def int4(matrix: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    groups = matrix.reshape(len(matrix), -1, 128 if matrix.shape[1] % 128 == 0 else 64)
    scale = groups.abs().amax(2) / 7
    stored = (groups / scale[..., None]).round()
    shape = torch.tensor(matrix.shape)
    packed = {"weight_packed": pack_to_int32(stored.reshape(matrix.shape).to(torch.int8), 4), "weight_shape": shape}
    return packed | {"weight_scale": scale}, (stored * scale[..., None]).reshape(matrix.shape)


FORMS = {
    "FP8_DYNAMIC": ("float-quantized", fp8),
    "W8A8": ("int-quantized", int8),
    "W4A16": ("pack-quantized", int4),
}


def settings_of(preset: str) -> dict[str, Any]:
    from compressed_tensors.quantization import QuantizationConfig

    form = {"format": FORMS[preset][0], "quantization_status": "compressed", "ignore": ["lm_head", "re:.*mlp.gate$"]}
    made = QuantizationConfig(config_groups={preset: ["Linear"]}, **form)  # type: ignore[arg-type]
    return json.loads(made.model_dump_json())


@pytest.mark.needs_vllm  # which brings the package compressed-tensors
@pytest.mark.parametrize("family", ["Llama 3", "Qwen 3-MoE"])
@pytest.mark.parametrize("preset", FORMS)
def test_compressed_tensors_are_opened_with_whole_weights(preset: str, family: str, tmp_path: Path) -> None:
    folder = save_random_model(family, tmp_path / "model")
    model = quantize(folder, settings_of(preset), FORMS[preset][1])
    if (preset, family) == ("W8A8", "Qwen 3-MoE"):
        with pytest.raises(ModelError, match="cannot convert its tensors to those of the model"):
            opened(folder)
        return
    whole = opened(folder)
    assert {name: tensor.shape for name, tensor in whole.state_dict().items()} == {
        name: tensor.shape for name, tensor in model.state_dict().items()
    }
    assert (full_logprobs(whole, TOKENS) - full_logprobs(model, TOKENS)).abs().max() < rounded(1e-4)
    whole.save_pretrained(saved := save(whole, tmp_path / "saved"))
    assert "quantization_config" not in json.loads((saved / "config.json").read_text())
    assert torch.equal(full_logprobs(opened(saved), TOKENS), full_logprobs(whole, TOKENS))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        *(({"quant_method": method}, method) for method in ("awq", "gptq", "torchao", "modelopt")),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "compressed-tensors", "kv_cache_scheme": {"num_bits": 8}}, "a scheme for the cache"),
        ({"bits": 4}, "of an unnamed method"),
    ],
)
@pytest.mark.parametrize("where", ["model", "text model"])
def test_others_are_refused_by_name(settings: dict[str, Any], says: str, where: str, tmp_path: Path) -> None:
    folder = save_random_model("Llama 3", tmp_path)
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": settings}
    if where == "text model":
        config = {"model_type": "llava", "text_config": config}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=f"has quantised weights .*{says}.*give the model that it was made from"):
        model_config(str(folder))
