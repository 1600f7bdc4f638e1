"""LoRA in bf16: the trainer scores with the very weights that the sampler gets."""

from pathlib import Path
from types import MethodType

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from posttrain.backend.checkpoints import save_policy
from posttrain.backend.config import BackendConfig
from posttrain.backend.merged_lora import base_weights, compute_merged, merged_weights
from posttrain.backend.tokenizers import character_tokenizer
from posttrain.backend.trainer import Trainer
from posttrain.backend.types import LoraConfig
from tests.architectures import CONTEXT
from tests.conftest import gradients, policy_data, rounded
from tests.every_architecture import random_model, save


def adapted(dtype: str, name: str = "micro") -> Trainer:
    """An adapter whose update is far below the weights, on a base that lies on the bf16 grid, as
    hub models do.
    """
    trainer = Trainer(name, BackendConfig(engine="torch", dtype=dtype), lora=LoraConfig(rank=4))  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter_name, parameter in trainer.base.named_parameters():
            if not parameter.requires_grad:
                if parameter_name.endswith(".bias"):  # a preset's are 0
                    parameter.copy_(torch.linspace(-1, 1, len(parameter)))
                parameter.copy_(parameter.bfloat16())
        for parameter_name, parameter in trainer.named_trainable.items():
            if "lora_B" in parameter_name:
                drawn = torch.empty(parameter.shape).normal_(0, 1e-4, generator=torch.Generator().manual_seed(0))
                parameter.copy_(drawn)
    return trainer


def lora_layers(trainer: Trainer) -> dict[str, nn.Module]:
    return {name: module for name, module in trainer.base.named_modules() if hasattr(module, "lora_A")}


@pytest.mark.parametrize("name", ["micro", "gpt2-tiny"])
def test_a_layer_computes_with_the_samplers_weights(name: str) -> None:
    trainer = adapted("bfloat16", name)
    sampled = dict(trainer.sampled.sampler_weights())
    for layer_name, layer in lora_layers(trainer).items():
        weight = sampled[f"{layer_name}.weight"]
        weight_OI = weight.T if name.startswith("gpt2") else weight
        x = torch.randn(3, 5, weight_OI.shape[1], generator=torch.Generator().manual_seed(0)).to(
            trainer.device, torch.bfloat16
        )
        y = F.linear(x, weight_OI)
        bias = layer.get_submodule("base_layer")._parameters.get("bias")
        assert torch.equal(layer(x), y if bias is None else y + bias.to(y.dtype))


@pytest.mark.parametrize("name", ["micro", "gpt2-tiny"])
def test_gradients_are_those_of_the_separate_adapter(name: str) -> None:
    separate, merged = adapted("float32", name), adapted("float32", name)
    compute_merged(merged.model, torch.float32)
    for trainer in (separate, merged):
        trainer.run(policy_data(4), "importance_sampling")
    for ours, theirs in zip(gradients(merged).values(), gradients(separate).values(), strict=True):
        assert (ours - theirs).norm() <= rounded(1e-4) * theirs.norm()


# Trap: a LoRA update that bf16 rounds away in the sampler alone.
def test_the_model_is_the_one_with_merged_weights() -> None:
    """Of the update, the separate adapter sees all, and the rounded sum of weights hardly
    anything.
    """
    trainer, data = adapted("bfloat16"), policy_data(8)
    full = Trainer("micro", BackendConfig(engine="torch", dtype="bfloat16"))
    separate = adapted("bfloat16")
    for layer in lora_layers(separate).values():
        layer.forward = MethodType(type(layer).forward, layer)
    full.base.load_state_dict(dict(trainer.sampled.sampler_weights()))
    ours, theirs, others = (
        np.concatenate(
            [
                output["logprobs"].array
                for output in model.run(data, "importance_sampling", backward=False).loss_fn_outputs
            ]
        )
        for model in (trainer, full, separate)
    )
    assert np.abs(ours - theirs).max() < rounded(1e-6)
    assert np.abs(others - theirs).mean() > 1e-4


# Trap: a hash's factors or a router's biases, rounded on their way to the sampler (Qwen 4, DeepSeek V3 and V4).
def test_what_is_no_weight_reaches_the_sampler_and_files_as_it_is() -> None:
    numbers, biases = torch.tensor([257, 2**40 + 1]), torch.tensor([0.1, 1 + 2**-20])
    model = torch.nn.Linear(2, 2, bias=False)
    model.register_buffer("factors", numbers)
    model.register_buffer("biases", biases)
    sent = dict(merged_weights(base_weights(model), {}, torch.bfloat16))
    assert sent["weight"].dtype == torch.bfloat16
    for name, expected in (("factors", numbers), ("biases", biases)):
        assert sent[name].dtype == expected.dtype and torch.equal(sent[name], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_routers_biases_reach_a_bf16_sampler_and_a_bf16_export_whole(dtype: torch.dtype, tmp_path: Path) -> None:
    folder, name = (
        save(random_model("deepseek_v3"), tmp_path / "model"),
        "model.layers.1.mlp.gate.e_score_correction_bias",
    )
    trainer = Trainer(str(folder), BackendConfig(dtype=str(dtype).removeprefix("torch.")))  # type: ignore[arg-type]
    exact = trainer.model.state_dict()[name].clone()
    assert exact.dtype == torch.float32 and not torch.equal(exact.bfloat16().float(), exact)
    sent = dict(trainer.sampled.sampler_weights())
    assert sent["lm_head.weight"].dtype == dtype and torch.equal(sent[name], exact)
    save_policy(trainer, character_tokenizer(CONTEXT), tmp_path / "saved", torch.bfloat16)
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved["lm_head.weight"].dtype == torch.bfloat16 and torch.equal(saved[name], exact.cpu())
