"""Adapters as other tools write them are merged to what peft computes with them, or refused by name."""

# Trap: settings that change what an adapter computes (rsLoRA's scale, DoRA's magnitudes, ranks by layer, tokens and
# whole layers beside it), and layers that share their weights, which a merged adapter would change twice.

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from posttrain.backend.adapters import is_plain, open_merged
from posttrain.backend.errors import CheckpointError, ModelError
from posttrain.backend.models import load_model, model_config
from tests.architectures import save_random_model
from tests.test_architectures import full_logprobs

CPU = torch.device("cpu")
TOKENS = list(range(20, 60))
Q = ["q_proj"]
PLAIN = {
    "all-linear": {"target_modules": "all-linear"},
    "an expression": {"target_modules": r".*self_attn\.(q|v)_proj"},
    "some layers": {"target_modules": Q, "layers_to_transform": [1]},
    "a pattern of layers": {"target_modules": Q, "layers_to_transform": 1, "layers_pattern": "layers"},
    "all but some": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["v_proj"]},
    "dropout": {"target_modules": Q, "lora_dropout": 0.3},
}
UNUSUAL = {
    "the output layer, and the base's beside it": {"target_modules": ["q_proj", "lm_head"]},
    "rsLoRA": {"target_modules": Q, "use_rslora": True},
    "DoRA": {"target_modules": Q, "use_dora": True},
    "ranks": {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 8}},
    "scales": {"target_modules": ["q_proj", "v_proj"], "alpha_pattern": {"v_proj": 64}},
    "biases": {"target_modules": Q, "bias": "all"},
    "a whole layer": {"target_modules": Q, "modules_to_save": ["lm_head"]},
    "two whole layers": {"target_modules": Q, "modules_to_save": ["embed_tokens", "lm_head"]},
    "new tokens": {"target_modules": Q, "trainable_token_indices": [3, 4]},
    "parameters": {"target_modules": Q, "target_parameters": ["up_proj.weight"]},
    "PiSSA": {"target_modules": Q, "init_lora_weights": "pissa"},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model("Llama 3", tmp_path_factory.mktemp("base"))


def of_peft(base: Path, folder: Path, settings: dict[str, Any]) -> torch.Tensor:
    """Saves an adapter; the logprobs that peft computes with it."""
    given: dict[str, Any] = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, **settings}
    with torch.random.fork_rng(devices=[]), torch.no_grad(), warnings.catch_warnings(action="ignore"):
        torch.manual_seed(0)
        adapted: Any = get_peft_model(load_model(str(base), 0, CPU, torch.float32), LoraConfig(**given)).eval()
        for parameter in (parameter for parameter in adapted.parameters() if parameter.requires_grad):
            parameter.add_(0.05 * torch.randn_like(parameter))
        adapted.peft_config["default"].base_model_name_or_path = str(base)
        logprobs = full_logprobs(adapted, TOKENS)
        adapted.save_pretrained(folder)
    return logprobs


@pytest.mark.parametrize("name", [*PLAIN, *UNUSUAL])
def test_an_adapter_is_merged_to_what_peft_computes(name: str, base: Path, tmp_path: Path) -> None:
    expected = of_peft(base, tmp_path / "adapter", {**PLAIN, **UNUSUAL}[name])
    with warnings.catch_warnings(action="ignore"):
        found = full_logprobs(open_merged(tmp_path / "adapter", 0), TOKENS)
    assert (found - expected).abs().max() < 1e-4
    assert (full_logprobs(load_model(str(base), 0, CPU, torch.float32), TOKENS) - expected).abs().max() > 1e-2
    assert is_plain(tmp_path / "adapter") == (name in PLAIN)


def test_layers_that_share_their_weights_are_refused(base: Path, tmp_path: Path) -> None:
    of_peft(base, tmp_path / "adapter", {"target_modules": Q, "layer_replication": [[0, 2], [1, 2]]})
    with pytest.raises(CheckpointError, match="with layer_replication: layers share their weights"):
        open_merged(tmp_path / "adapter", 0)


# Trap: peft's fast PiSSA takes a random part from the base, another one each time an adapter is opened.
def test_an_adapter_whose_base_is_drawn_anew_is_refused(base: Path, tmp_path: Path) -> None:
    of_peft(base, tmp_path / "adapter", {"target_modules": Q, "init_lora_weights": "pissa_niter_4"})
    with pytest.raises(CheckpointError, match="init_lora_weights=pissa_niter_4.*path_initial_model_for_weight_conv"):
        open_merged(tmp_path / "adapter", 0)


def test_an_adapter_of_a_reward_model_is_named(base: Path, tmp_path: Path) -> None:
    scored: Any = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    adapted = get_peft_model(scored, LoraConfig(r=4, task_type="SEQ_CLS", target_modules=Q))
    adapted.save_pretrained(str(tmp_path))
    with pytest.raises(CheckpointError, match="score.weight: it is a reward model or a classifier of transformers"):
        open_merged(tmp_path, 0)


def test_an_adapter_beside_an_embedding_with_added_tokens_is_named(base: Path, tmp_path: Path) -> None:
    of_peft(base, tmp_path / "adapter", {"target_modules": Q, "modules_to_save": ["embed_tokens"]})
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    name = next(name for name in tensors if "embed_tokens" in name)
    tensors[name] = torch.cat([tensors[name], tensors[name][:4]])
    save_file(tensors, tmp_path / "adapter/adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="of shape .264, 128., .* one of .260, 128.* resize the base"):
        open_merged(tmp_path / "adapter", 0)


def test_an_adapter_of_the_tinker_service_is_named(base: Path, tmp_path: Path) -> None:
    of_peft(base, tmp_path / "adapter", {"target_modules": [*Q, "lm_head"]})
    file = tmp_path / "adapter/adapter_model.safetensors"
    of_service = {
        name.replace(".lm_head.", ".model.unembed_tokens."): tensor for name, tensor in load_file(file).items()
    }
    save_file(of_service, file)
    with pytest.raises(CheckpointError, match="of the Tinker service.*build_hf_model"):
        open_merged(tmp_path / "adapter", 0)


def test_an_adapter_of_mlx_is_named(base: Path, tmp_path: Path) -> None:
    config = {"fine_tune_type": "lora", "model": str(base), "lora_parameters": {"rank": 8, "scale": 20.0}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file({"model.layers.0.self_attn.q_proj.lora_a": torch.zeros(128, 8)}, tmp_path / "adapters.safetensors")
    with pytest.raises(CheckpointError, match="is an adapter of MLX.*merge it there"):
        open_merged(tmp_path, 0)
    with pytest.raises(ModelError, match="is an adapter of MLX.*merge it there"):
        model_config(str(tmp_path))


# Trap: peft takes a setting away that it does not know, with a warning that nobody sees; of one within another it
# takes nothing away, and begins anew until the stack is full.
def test_settings_that_this_peft_does_not_know(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    of_peft(base, tmp_path, {"target_modules": Q})
    file = tmp_path / "adapter_config.json"
    plain = json.loads(file.read_text())
    file.write_text(json.dumps(plain | {"of_later": {"a": 1}, "off": None}))
    open_merged(tmp_path, 0)
    assert "has of_later={'a': 1}, which the installed peft does not know and leaves out" in capsys.readouterr().out
    file.write_text(json.dumps(plain | {"monteclora_config": {"of_later": 1}}))
    with pytest.raises(CheckpointError, match=r"adapter_config\.json has a setting in monteclora_config that"):
        open_merged(tmp_path, 0)
