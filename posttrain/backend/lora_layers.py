"""LoRA adapters on a transformers model: which layers get them, by peft."""

import warnings

import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from posttrain.backend.errors import ConfigError, ModelError
from posttrain.backend.models import model_config
from posttrain.backend.random_state import drawn_from
from posttrain.backend.types import LoraConfig

# peft asks transformers by a name that 5.24 deprecates
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")

# Names of linear layers with adapters: Llama and its relatives; Inkling 2; GPT-2; Pythia; BLOOM and Falcon;
# Qwen 3.5 and Qwen 3-Next; LFM 2 and OPT; DeepSeek.
ATTENTION_LAYERS = (
    *("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj"),
    *("q_proj.linear", "k_proj.linear", "v_proj.linear", "o_proj.linear"),
    *("c_attn", "attn.c_proj"),
    *("query_key_value", "attention.dense", "self_attention.dense"),
    *("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "in_proj_qkvz", "in_proj_ba", "linear_attn.out_proj"),
    *("self_attn.out_proj", "conv.in_proj", "conv.out_proj"),
    *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"),
)
MLP_LAYERS = (
    *("gate_proj", "up_proj", "down_proj", "gate_up_proj"),
    *("c_fc", "mlp.c_proj"),
    *("dense_h_to_4h", "dense_4h_to_h"),
    *("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
    *("fc1", "fc2"),
)
DEFAULT_LORA_ALPHA = 32.0


def check_rank(model_name: str, lora: LoraConfig) -> None:
    """Refuses, before any weight is made, an adapter larger than the layers it adapts."""
    hidden = int(getattr(model_config(model_name).get_text_config(), "hidden_size", 2**31))
    if lora.rank > hidden:
        raise ConfigError(
            f"lora_rank={lora.rank} is more than the hidden size of {model_name!r}, {hidden}: it would have more "
            "weights than it adapts; choose 8 to 64, or lora_rank=0 to train all weights"
        )


def _kept_by_peft(hf_model: PreTrainedModel, names: list[str]) -> list[str]:
    """Without dense layers whose names peft takes for those of experts (GLM 4 MoE, DeepSeek, Ernie 4.5): it would
    put the adapters on the experts, here and wherever the saved adapter is opened. And without layers whose
    names it does not find again (shared experts of Laguna): it would leave out their adapters."""
    try:
        from peft.utils import transformers_weight_conversion as conversion
    except ImportError:  # an earlier peft, which moves no adapter
        return names
    config = PeftConfig(target_modules=names)
    keys = {f"base_model.model.{name}.lora_A.weight": name for name in names}
    read = conversion.convert_peft_adapter_state_dict_for_transformers(
        hf_model, config, {key: torch.zeros(1, 1) for key in keys}
    )
    found = {keys.get(key.replace(".default.", ".")) for key in read}
    conversion.convert_peft_config_for_transformers(config, model=hf_model, conversions=None)
    return [name for name in names if name in (config.target_modules or ()) and name in found]


def _left_out(hf_model: PreTrainedModel, targets: set[str]) -> list[str]:
    """Last names of the linear layers without an adapter, but for the output layer."""
    head, modules = hf_model.get_output_embeddings(), hf_model.named_modules()
    linear = [name for name, module in modules if isinstance(module, nn.Linear) and module is not head]
    return sorted({name.rpartition(".")[2] for name in linear if name not in targets})


def add_lora(hf_model: PreTrainedModel, model_name: str, lora: LoraConfig, seed: int) -> PeftModel:
    """Without a name nothing is printed."""
    suffixes = (ATTENTION_LAYERS if lora.train_attn else ()) + (MLP_LAYERS if lora.train_mlp else ())
    linear = {name: layer for name, layer in hf_model.named_modules() if isinstance(layer, nn.Linear | Conv1D)}
    named = [name for name in linear if any(f".{name}".endswith(f".{suffix}") for suffix in suffixes)]
    if len({id(linear[name].weight) for name in named}) < len(named):
        raise ModelError(
            f"{hf_model.config.model_type} has layers that share their weights (as in Zamba), on which adapters would "
            "differ: train all weights instead"
        )
    targets = _kept_by_peft(hf_model, named)
    if lora.train_unembed:
        if hf_model.config.tie_word_embeddings:
            raise ModelError(
                "train_unembed: this model's lm_head is its embedding, and vLLM would ignore an adapter on it"
            )
        targets.append("lm_head")
    experts = any(".experts." in name for name, _ in hf_model.named_parameters())
    if not targets:
        where = "outside its experts, which get no adapter" if experts else "that LoRA is put on"
        raise ModelError(
            f"{hf_model.config.model_type} has none of the requested layers {where}: train all weights instead"
        )
    if lora.train_mlp and experts and model_name:
        adapted = {name for name in targets if any(f".{name}".endswith(f".{suffix}") for suffix in MLP_LAYERS)}
        shared = "layers all tokens share" if targets == named else "dense layers" if adapted else "no other layer"
        print(
            f"LoRA on {model_name}: its attention, and {shared}; experts and their router stay as they are", flush=True
        )
    if lora.train_attn and lora.train_mlp and model_name and (others := _left_out(hf_model, {*targets})):
        print(f"LoRA on {model_name}: no adapter on the linear layers {', '.join(others)}", flush=True)
    alpha = DEFAULT_LORA_ALPHA if lora.alpha is None else lora.alpha
    config = PeftConfig(
        r=lora.rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        target_modules=targets,
        lora_dropout=0.0,
        fan_in_fan_out=any(isinstance(linear[name], Conv1D) for name in named),
        task_type="CAUSAL_LM",
    )
    with drawn_from(seed if lora.seed is None else lora.seed):
        model = get_peft_model(hf_model, config)
    if getattr(model.peft_config["default"], "target_parameters", None):
        raise ModelError(
            f"peft puts adapters on the experts of {hf_model.config.model_type}: leave them out with train_mlp=False"
        )
    model.peft_config["default"].base_model_name_or_path = model_name
    return model  # type: ignore[return-value]
