"""Models by name: a built-in preset made from a seed, a local folder, or a Hugging Face hub name.

Presets exist because tests, demos and benchmarks must not download anything. Their architectures are ones that vLLM and peft know.
"""

import copy
import difflib
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from backend.checkpoint_files import ADAPTER_CONFIG_FILE, is_adapter, read_json
from backend.device_lock import computing
from backend.errors import ModelError
from backend.random_state import drawn_from

SCALAR_HEAD_FILE = "scalar_head.safetensors"  # beside the trunk of a saved scalar model (scalar_trainer.py)
# Contexts longer than this must be asked for: a hub model's own limit can be a million tokens, and the KV cache is sized for it.
DEFAULT_MAX_LENGTH = 4096


def _shape(layers: int, hidden: int, mlp: int, heads: int, kv_heads: int, context: int) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": context,
        "tie_word_embeddings": True,
        "initializer_range": hidden
        ** -0.5,  # the usual 0.02 suits models ten times as wide; narrow ones then learn five times slower
    }


_TOKENS = {"vocab_size": 260, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}  # tokenizers.character_tokenizer
_GPT2 = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}

PRESETS: dict[str, PretrainedConfig] = {
    "micro": Qwen3Config(**_shape(2, 128, 384, 4, 2, 512), head_dim=32, **_TOKENS),  # 0.4M parameters, half of tiny's layers
    "tiny": Qwen3Config(**_shape(4, 128, 384, 4, 2, 512), head_dim=32, **_TOKENS),  # 0.8M parameters
    "small": Qwen3Config(**_shape(6, 384, 1024, 6, 2, 1024), head_dim=64, **_TOKENS),  # 9.5M
    "llama-tiny": LlamaConfig(**_shape(4, 128, 384, 4, 2, 512), head_dim=32, **_TOKENS),
    "gpt2-tiny": GPT2Config(n_layer=4, n_embd=128, n_head=4, n_positions=512, initializer_range=128**-0.5, **_GPT2, **_TOKENS),
    "gpt2-small": GPT2Config(n_layer=12, n_embd=768, n_head=12, n_positions=1024, **_GPT2, **_TOKENS),  # 85M
    # Qwen2.5-0.5B's shape with random weights: what benchmarks/ measures on a GPU, where nothing can be downloaded.
    "qwen2.5-0.5b-shape": Qwen2Config(**_shape(24, 896, 4864, 14, 2, 32768), **{**_TOKENS, "vocab_size": 151936}),
}


def model_config(model_name: str) -> PretrainedConfig:
    """The Hugging Face config behind a name. Raises ModelError, naming the nearest preset, before any weight is touched."""
    if model_name in PRESETS:
        return PRESETS[model_name]
    path = Path(model_name).expanduser()
    if path.is_dir() and not (path / "config.json").exists() and not (path / "adapter_config.json").exists():
        raise ModelError(f"{path} has no config.json: it is not a Hugging Face model folder")
    if is_adapter(path):
        base = read_json(path / ADAPTER_CONFIG_FILE).get("base_model_name_or_path")
        raise ModelError(
            f"{path} is a LoRA adapter: open its base model {base!r}, and load the adapter with load_checkpoint_path"
        )
    near = difflib.get_close_matches(model_name, PRESETS, n=1, cutoff=0.75)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    unknown = f"{model_name!r} is neither a preset ({', '.join(PRESETS)}), nor a local folder, nor a model the Hugging Face hub could give{hint}"
    if near and "/" not in model_name:  # a slip of the pen: do not ask the hub, whose time-outs take half a minute
        raise ModelError(unknown)
    try:
        return AutoConfig.from_pretrained(path if path.is_dir() else model_name)
    except (OSError, ValueError) as error:
        raise ModelError(unknown) from error


def context_length(model_name: str, max_length: int | None = None) -> int:
    """Tokens of context to use: `max_length`, or the model's own up to DEFAULT_MAX_LENGTH. Raises if the model has less.

    An adapter's folder has the context of its base.
    """
    if is_adapter(folder := Path(model_name).expanduser()):
        model_name = str(read_json(folder / ADAPTER_CONFIG_FILE).get("base_model_name_or_path"))
    limit = int(getattr(model_config(model_name), "max_position_embeddings", DEFAULT_MAX_LENGTH))
    if max_length is not None and max_length > limit:
        raise ModelError(f"max_length={max_length} is more than the {limit} tokens of context that {model_name!r} has")
    return max_length or min(limit, DEFAULT_MAX_LENGTH)


def embedding_rows(model: PreTrainedModel) -> int:
    """The number of token ids a model can read: its tokenizer may have fewer, as where a vocabulary was padded."""
    embedding: Any = model.get_input_embeddings()
    return int(embedding.weight.shape[0])


@computing()
def load_model(model_name: str, seed: int, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The model in evaluation mode (no dropout). A preset's weights depend on `seed` alone; torch's global RNG is left as it was."""
    if (Path(model_name).expanduser() / SCALAR_HEAD_FILE).exists():
        raise ModelError(f"{model_name} is a scalar model and no language model: open it with create_scalar_client_from_state")
    config = model_config(model_name)
    if model_name in PRESETS:
        with drawn_from(seed):
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)
        model.config.architectures = [type(model).__name__]  # vLLM goes by it
    else:
        model = AutoModelForCausalLM.from_pretrained(
            Path(model_name).expanduser() if Path(model_name).is_dir() else model_name, dtype=dtype
        )
    return model.to(device=device, dtype=dtype).eval()  # type: ignore[arg-type]
