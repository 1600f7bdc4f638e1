"""LoRA in bf16: the trainer scores with the very weights that the sampler gets."""

from types import MethodType

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from posttrain.backend.config import BackendConfig
from posttrain.backend.merged_lora import compute_merged, merged_weights
from posttrain.backend.trainer import Trainer
from posttrain.backend.types import LoraConfig
from tests.conftest import gradients, policy_data


def adapted(dtype: str, name: str = "micro") -> Trainer:
    """An adapter whose update is far below the weights, on a base that lies on the bf16 grid, as
    hub models do.
    """
    trainer = Trainer(name, BackendConfig(engine="torch", dtype=dtype), lora=LoraConfig(rank=4))  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in trainer.base.parameters():
            if not parameter.requires_grad:
                parameter.copy_(parameter.bfloat16())
        for parameter_name, parameter in trainer.named_trainable.items():
            if "lora_B" in parameter_name:
                parameter.normal_(0, 1e-4, generator=torch.Generator().manual_seed(0))
    return trainer


def lora_layers(trainer: Trainer) -> dict[str, nn.Module]:
    return {name: module for name, module in trainer.base.named_modules() if hasattr(module, "lora_A")}


@pytest.mark.parametrize("name", ["micro", "gpt2-tiny"])
def test_a_layer_computes_with_the_samplers_weights(name: str) -> None:
    trainer = adapted("bfloat16", name)
    sampled = dict(trainer.sampler_weights())
    for layer_name, layer in lora_layers(trainer).items():
        weight = sampled[f"{layer_name}.weight"]
        weight_OI = weight.T if name.startswith("gpt2") else weight
        x = torch.randn(3, 5, weight_OI.shape[1], generator=torch.Generator().manual_seed(0)).bfloat16()
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
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


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
    full.base.load_state_dict(dict(trainer.sampler_weights()))
    ours, theirs, others = (
        np.concatenate(
            [
                output["logprobs"].array
                for output in model.run(data, "importance_sampling", backward=False).loss_fn_outputs
            ]
        )
        for model in (trainer, full, separate)
    )
    assert np.abs(ours - theirs).max() < 1e-6
    assert np.abs(others - theirs).mean() > 1e-4


# Trap: a hash's factors, or experts by token, rounded on their way to the sampler (Qwen 4, DeepSeek V4).
def test_integers_reach_the_sampler_as_they_are() -> None:
    numbers = torch.tensor([257, 2**40 + 1])
    (_, weight), (_, sent) = merged_weights({"weight": torch.ones(2), "factors": numbers}, {}, torch.bfloat16)
    assert weight.dtype == torch.bfloat16 and torch.equal(sent, numbers) and sent.dtype == numbers.dtype
