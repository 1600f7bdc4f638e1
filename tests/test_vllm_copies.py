"""A sync in one copy gives a model of vLLM what its loaders would give it."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from posttrain.backend import vllm_copies, vllm_weights
from posttrain.backend.config import BackendConfig
from posttrain.backend.engine import Weights
from posttrain.backend.models import load_model
from posttrain.backend.tokenizers import character_tokenizer
from posttrain.backend.vllm_copies import record
from tests.architectures import save_random_model

LOADERS_COMPUTE = {"Qwen 3-MoE"}
CPU = torch.device("cpu")
SHAPES = {"embed": (10, 4), "q": (4, 4), "k": (2, 4), "up": (4, 6), "norm": (4,), "lm_head": (10, 4)}


class Loaded(nn.Module):
    """Loads as vLLM's models do: stacked matrices, a padded vocabulary, a transposed one, a tied
    head that is left out."""

    def __init__(self, scale: float = 1.0, skipped: str = ""):
        super().__init__()
        self.embed, self.qk = nn.Parameter(torch.empty(16, 4)), nn.Parameter(torch.empty(6, 4))
        self.up, self.norm = nn.Parameter(torch.empty(6, 4)), nn.Parameter(torch.empty(4).bfloat16())
        self.scale, self.skipped = scale, skipped

    def load_weights(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            if name == self.skipped:
                continue
            if name == "embed":
                self.embed.data[:10].copy_(tensor)
                self.embed.data[10:].fill_(0)
            elif name in ("q", "k"):
                self.qk.data.narrow(0, 0 if name == "q" else 4, len(tensor)).copy_(tensor)
            elif name == "up":
                self.up.data.copy_(tensor.T)
            elif name == "norm":
                self.norm.data.copy_(tensor * self.scale if self.scale != 1 else tensor)


def random(seed: int) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    return [(name, torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()]


def check_equal(found: nn.Module, expected: nn.Module) -> None:
    for (name, a), (_, b) in zip(found.named_parameters(), expected.named_parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("group_bytes", [2**28, 1])
def test_the_copies_are_those_of_the_loaders(group_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_copies, "GROUP_BYTES", group_bytes)
    model, loaded = Loaded(), Loaded()
    names, copies = record(model, lambda: random(0))
    assert not names and copies
    for seed in (1, 2):
        copies(random(seed))
        loaded.load_weights(iter(random(seed)))
        check_equal(model, loaded)
    # parts of larger tensors, in one piece or laid out otherwise, as a trainer may have them
    for axis in (0, -1):
        others = [(name, torch.stack([-tensor, tensor], axis).select(axis, 1)) for name, tensor in random(3)]
        copies(others)
        loaded.load_weights(iter(others))
        check_equal(model, loaded)
    with pytest.raises(KeyError, match="'k'"):
        copies([(name, tensor) for name, tensor in random(1) if name != "k"])


def test_loaders_that_compute_are_called_in_each_sync() -> None:
    assert record(Loaded(scale=2.0), lambda: random(0)) == ([], None)


def test_weights_that_the_loaders_skip_are_named() -> None:
    assert record(Loaded(skipped="k"), lambda: random(0)) == (["qk"], None)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_the_worker_of_a_gpu_syncs_by_copies_or_loaders(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    class Form:
        def __call__(self, weights: Weights) -> Weights:
            return weights

        def random(self, dtype: torch.dtype, device: torch.device) -> Weights:
            return random(0)

    monkeypatch.setattr(vllm_weights, "_is_on_cpu", lambda model: False)
    model, loaded, form = Loaded(scale), Loaded(scale), cast(Any, Form())
    worker: Any = SimpleNamespace(get_model=lambda: model)
    assert vllm_weights.parameters_left_out(worker, form, torch.float32) == []
    assert bool(worker.recorded_copies) == (scale == 1)
    vllm_weights.load_all(worker, form, random(1))
    loaded.load_weights(iter(random(1)))
    check_equal(model, loaded)


@pytest.mark.slow
@pytest.mark.needs_vllm
@pytest.mark.parametrize("family", ["Qwen 2.5", "Llama 3", "GPT-2", "Gemma 3", "Qwen 3-MoE"])
def test_the_copies_of_vllms_models(family: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where linears are not packed: of a second model, made beside an engine's."""
    import vllm.model_executor.models.registry as registry
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.utils import initialize_model

    from posttrain.backend.vllm_engine import VllmEngine

    monkeypatch.setattr(registry, "_run_in_subprocess", lambda fn: fn())
    source = load_model(str(save_random_model(family, tmp_path / "model")), 0, CPU, torch.float32)
    config = BackendConfig(engine="vllm", max_num_seqs=8, sampler_memory_gb=0.1)
    engine = VllmEngine(source.config, character_tokenizer(256), 256, config, CPU, True)
    try:
        vllm_config: Any = engine._engine.vllm_config
        vllm_config.compilation_config.static_forward_context = {}  # layers are registered by name, once
        with set_current_vllm_config(vllm_config):
            model: Any = initialize_model(vllm_config)
            vllm_config.compilation_config.static_forward_context = {}
            loaded: Any = initialize_model(vllm_config)
        form = engine._checkpoint_form
        names, copies = record(model, lambda: form(form.random(torch.float32, CPU)))
        assert not names
        if copies is None:  # its loaders do more than copy, and are called in each sync
            assert family in LOADERS_COMPUTE
            return
        copies(form(source.state_dict().items()))
        loaded.load_weights(iter(form(source.state_dict().items())))
        check_equal(model, loaded)
        # what a trainer with backend.lora=shared reads: all but transposed matrices, and experts in one tensor
        parameters = dict(source.named_parameters())
        places = copies.places({name: parameter.shape for name, parameter in parameters.items()})
        for name, place in places.items():
            assert torch.equal(place, parameters[name]), name
        left = {parameters[name].ndim for name in parameters.keys() - places.keys()}
        assert left == {"GPT-2": {2}, "Qwen 3-MoE": {3}}.get(family, set())
    finally:
        engine.close()
