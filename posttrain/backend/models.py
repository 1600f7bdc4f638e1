"""Models by name: a preset made from a seed, a local folder, or a hub name (hub.py). Presets are for
tests, demos and benchmarks, without downloads; vLLM and peft know their architectures.
"""

import copy
import difflib
import os
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.utils import logging as transformers_logging

from posttrain.backend.architectures import (
    bound_steps_as_configured,
    context_limit,
    kernel_of_attention,
    scale_queries_in_vllm,
)
from posttrain.backend.checkpoint_files import (
    ADAPTER_CONFIG_FILE,
    SCALAR_HEAD_FILE,
    adapted_model,
    checkpoints_in,
    is_adapter,
    not_pulled,
    other_format,
    why_no_model,
    wrong_model,
)
from posttrain.backend.device_lock import computing
from posttrain.backend.errors import CheckpointError, ModelError, one_line
from posttrain.backend.hub import hub_folder
from posttrain.backend.quantized import ask_for_whole_weights, make_plain
from posttrain.backend.random_state import drawn_from
from posttrain.backend.text_models import (
    PLACE,
    PLACES,
    check_text_only,
    of_text_model,
    place_in,
    text_model_of,
    turn_experts,
)

M = TypeVar("M", bound=PreTrainedModel)

# Longer contexts must be requested: a hub model's limit can be a million tokens, and the KV cache
# is sized for it.
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
        # the usual 0.02 suits models ten times as wide; narrow ones then learn five times slower
        "initializer_range": hidden**-0.5,
    }


# tokenizers.character_tokenizer
_TOKENS = {"vocab_size": 260, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
_GPT2 = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}

PRESETS: dict[str, PretrainedConfig] = {
    # 0.4M parameters, half of tiny's layers
    "micro": Qwen3Config(**_shape(2, 128, 384, 4, 2, 512), head_dim=32, **_TOKENS),
    # 0.8M parameters
    "tiny": Qwen3Config(**_shape(4, 128, 384, 4, 2, 512), head_dim=32, **_TOKENS),
    "small": Qwen3Config(**_shape(6, 384, 1024, 6, 2, 1024), head_dim=64, **_TOKENS),  # 9.5M
    "llama-tiny": LlamaConfig(**_shape(4, 128, 384, 4, 2, 512), head_dim=32, **_TOKENS),
    "gpt2-tiny": GPT2Config(
        n_layer=4, n_embd=128, n_head=4, n_positions=512, initializer_range=128**-0.5, **_GPT2, **_TOKENS
    ),
    # 85M
    "gpt2-small": GPT2Config(n_layer=12, n_embd=768, n_head=12, n_positions=1024, **_GPT2, **_TOKENS),
    # Qwen2.5-0.5B's shape with random weights, for benchmarks/ on a GPU, where nothing
    # can be downloaded.
    "qwen2.5-0.5b-shape": Qwen2Config(**_shape(24, 896, 4864, 14, 2, 32768), **{**_TOKENS, "vocab_size": 151936}),
}


def model_config(model_name: str) -> PretrainedConfig:
    """The Hugging Face config of a name, or of the text model in it (text_models.py). ModelError, with
    the nearest preset, before reading weights."""
    config = whole_config(model_name)
    return text_model_of(config) or config


def whole_config(model_name: str) -> PretrainedConfig:
    """With the parts that read pictures or sound."""
    if model_name in PRESETS:
        return PRESETS[model_name]
    path = model_folder(model_name)
    if not (path / "config.json").exists() and not (path / ADAPTER_CONFIG_FILE).exists():
        raise ModelError(_is_no_model(path))
    if is_adapter(path):
        raise ModelError(why_no_model(model_name, path))
    if (path / ADAPTER_CONFIG_FILE).exists():  # transformers would add the adapter, vLLM would not
        raise ModelError(
            f"{model_name!r} holds a whole model and an adapter, and does not say whether the two are merged already: "
            f"move the adapter's files ({ADAPTER_CONFIG_FILE}, ...) out of the folder, or the model's"
        )
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        is_text = text_model_of(config) is not None or config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    except LOAD_ERRORS as error:
        raise ModelError(f"{model_name!r} cannot be opened: {_reason(error, path)}") from error
    ask_for_whole_weights(model_name, config)
    if not is_text:
        why = "is not a causal language model"
        if config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
            why = "reads pictures besides text, and transformers has its text model only as a part of it"
        raise ModelError(f"{model_name!r} cannot be opened: {config.model_type} {why}")
    return config


def model_folder(name: str, weights: bool = False) -> Path:
    """Where a model's files are: a folder, or a hub model's in the local cache (hub.py), without the
    weights unless they are asked for. A preset has no files: Path(name). ModelError, with the
    nearest preset, for a name that the hub does not give."""
    path = Path(name).expanduser()
    if name in PRESETS or path.exists() or looks_like_path(name):
        return path
    near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.75)
    hint = f"; did you mean {near[0]!r}?" if near else f" (presets: {', '.join(PRESETS)})"
    # a misspelling: asking the hub could take half a minute of time-outs
    if near and "/" not in name:
        raise ModelError(f"{name!r} is neither a preset nor a local folder{hint}")
    if path.parent.is_dir():  # a folder's name, rather than the hub's
        folders = [entry.name for entry in path.parent.iterdir() if entry.is_dir()]
        siblings = difflib.get_close_matches(path.name, folders, n=1)
        hint = f"; the folder {path.parent} is here, and has no {path.name} in it" if "/" in name else hint
        hint += f"; did you mean {path.parent / siblings[0]}?" if siblings else ""
    try:
        return hub_folder(name, weights)
    except ModelError as error:
        raise ModelError(f"{error}{hint}") from error


def checkpoint_folder(path: str) -> Path:
    """A folder, or for OWNER/NAME that is none the hub's model or adapter. CheckpointError where the
    hub does not give it; other folders that do not exist are their reader's to refuse."""
    if not isinstance(path, str | os.PathLike):
        raise CheckpointError(f"{path!r:.80} is no checkpoint: give its folder")
    path = str(path)
    if "/" not in path:
        return Path(path).expanduser()
    try:
        return model_folder(path, weights=True)
    except ModelError as error:
        raise CheckpointError(f"there is no checkpoint folder {path}, and as a name of the hub {error}") from error


def looks_like_path(name: str) -> bool:
    """And not like a name of the hub, OWNER/NAME or OWNER/NAME@REVISION."""
    return name.startswith(("/", ".", "~")) or name.partition("@")[0].count("/") > 1


def _is_no_model(path: Path) -> str:
    """Why a path is no model, and what may have been meant."""
    if not path.exists():
        return f"there is no model folder {path}"
    if path.is_file():
        return f"{path} is a file: give a model's folder, with config.json"
    if found := other_format(path):
        return f"{path} has no config.json, and holds {found}"
    # of a trainer's output, a run here, and the hub's cache
    inside = [model for name in (".", "checkpoints", "snapshots") for model in checkpoints_in(path / name)]
    hint = f"; did you mean {inside[-1]}?" if inside else ""
    return f"{path} has no config.json: it is not a Hugging Face model folder{hint}"


# What transformers, safetensors and the hub raise for a model that is damaged, absent or unknown.
LOAD_ERRORS = (
    *(OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError, EOFError),
    *(pickle.UnpicklingError, SafetensorError, StrictDataclassError),
)
# What a model raises in a pass over tokens that it does not support.
PASS_ERRORS = (*LOAD_ERRORS, IndexError, AssertionError)


@contextmanager
def fails_as(model_name: str, does: str) -> Iterator[None]:
    """ModelError with one line in place of what a model raises in a pass."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except PASS_ERRORS as error:
        text = f"transformers {transformers.__version__} {does} with {_reason(error)}"
        raise ModelError(f"{model_name!r} cannot be used: {text}") from error


def _reason(error: BaseException, path: Path | None = None) -> str:
    """One line with the reason why a folder cannot be read, or a model not used."""
    text = str(error)
    if path and (pointer := not_pulled(path)):
        return pointer
    if path and "no file named model.safetensors" in text and (found := other_format(path)):
        return f"it has no file named model.safetensors, and holds {found}"
    if isinstance(error, (EOFError, pickle.UnpicklingError)):
        return "its pytorch_model.bin is damaged, or holds something other than tensors, which is not loaded"
    if "trust_remote_code" in text:
        return "it needs code of its own from its repository, which this project does not run"
    if "model type" in text or "Unrecognized model" in text:
        kind = re.search(r"model type `?([\w.-]+)`? but", text)
        if not kind and path and (inside := checkpoints_in(path / "checkpoints")):
            return f"it is the folder of a run; did you mean {inside[-1]}?"
        named = f"its architecture {kind[1]!r}" if kind else "its architecture (model_type in config.json)"
        return f"{named} is unknown to transformers {transformers.__version__}: a newer version may have it"
    if "conversion of the weights" in text:  # of some quantised experts
        return f"transformers {transformers.__version__} cannot convert its tensors to those of the model"
    if "Unrecognized configuration class" in text:
        return "it is not a causal language model"
    return f"{type(error).__name__}: {one_line(text, 300)}"


def context_length(model_name: str, max_length: int | None = None) -> int:
    """Tokens of context: `max_length`, or the model's up to DEFAULT_MAX_LENGTH. Raises if the model
    has less; some have no end (Mamba). An adapter's folder has its base's context."""
    if is_adapter(folder := model_folder(model_name)):
        model_name = adapted_model(folder)
    limit, why, further = context_limit(model_config(model_name))
    if limit is not None and max_length is not None and max_length > limit:
        raise ModelError(
            f"max_length={max_length} is more than the {limit} tokens of context that {model_name!r} has{why}{further}"
        )
    return max_length or min(limit or DEFAULT_MAX_LENGTH, DEFAULT_MAX_LENGTH)


def new_model(config: PretrainedConfig) -> PreTrainedModel:
    """Of random fp32 weights. transformers would write its kernel into `config`, where an opened model of this
    config reads its own (attention.set_packing)."""
    kernel = kernel_of_attention(config)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32, attn_implementation=kernel)
    bound_steps_as_configured(model)
    return model


@computing()
def load_model(
    model_name: str, seed: int, device: torch.device, dtype: torch.dtype, trunk: bool = False
) -> PreTrainedModel:
    """The model without dropout. A preset's weights depend on `seed` only; torch's RNG does not
    change. `trunk`: also that of a scalar model, without its head."""
    if not trunk:
        check_has_vocabulary(model_name)
    config = model_config(model_name)
    if model_name in PRESETS:
        with drawn_from(seed):
            model = new_model(config)
        model.config.architectures = [type(model).__name__]  # read by vLLM
    else:
        check_text_only(model_name, config)
        model = read_model(model_name, dtype)
    return cast_weights(model.to(device), dtype).eval()  # type: ignore[arg-type]


def scalar_head_file(model_name: str) -> Path | None:
    """The head of a saved scalar model; None of other models."""
    file = model_folder(model_name, weights=True) / SCALAR_HEAD_FILE
    return file if model_name not in PRESETS and file.exists() else None


def check_has_vocabulary(model_name: str) -> None:
    """ModelError for a scalar model, or an adapter of one."""
    if scalar_head_file(model_name):
        raise ModelError(
            f"{model_name} is a scalar model and no language model: open it with create_scalar_client_from_state"
        )


def cast_weights(model: M, dtype: torch.dtype) -> M:
    """In place, and weights only: rotations in bf16 would be off from the tenth position on."""
    for p in model.parameters():
        p.data = p.data.to(dtype)
    return model


def read_model(model_name: str, dtype: torch.dtype) -> PreTrainedModel:
    """A folder or hub model with exactly the tensors of its config. ModelError otherwise: random
    layers train, but mean nothing."""
    path, verbosity = model_folder(model_name, weights=True), transformers_logging.get_verbosity()
    whole = whole_config(model_name)
    config = text_model_of(whole) or whole
    has_more = config is not whole  # than a text model
    # its report of the tensors that do not fit is a page long
    transformers_logging.set_verbosity_error()
    try:
        opened: Any = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            key_mapping=PLACES if has_more else None,
            dtype=dtype,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            attn_implementation=kernel_of_attention(config),
        )
    except LOAD_ERRORS as error:
        raise ModelError(f"{model_name!r} cannot be opened: {_reason(error, path)}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    model, report = opened
    if has_more:
        report["unexpected_keys"] = of_text_model(report["unexpected_keys"], model.state_dict())
        report["mismatched_keys"] = turn_experts(model, path, _names(report["mismatched_keys"]))
        model._weight_conversions = None  # it is saved as a text model
        setattr(model, PLACE, place_in(whole))
    for kind, fault in (
        ("missing_keys", "its weights lack tensors that its config.json asks for"),
        ("unexpected_keys", "its weights hold tensors that its config.json does not ask for"),
        ("mismatched_keys", "its weights and its config.json differ in shapes"),
    ):
        if names := _names(report[kind]):
            other = _names(report["unexpected_keys"]) if kind == "missing_keys" else []
            beside = f"; they hold others, such as {other[0]}" if other else ""
            found = f"{fault} ({len(names)}, such as {names[0]}{beside})"
            if mistaken := wrong_model(_names(report["unexpected_keys"])):
                found += f": {mistaken}"
            raise ModelError(f"{model_name!r} cannot be opened: {found}")
    make_plain(model)
    bound_steps_as_configured(model)
    scale_queries_in_vllm(model.config)
    _say_untied(model)
    _join_end_tokens(model)
    _make_savable(model_name, model)
    return model


def _names(report: Any) -> list[str]:
    return sorted(name if isinstance(name, str) else name[0] for name in report)


def _say_untied(model: PreTrainedModel) -> None:
    """transformers does not tie an output layer that the weights have with values of its own, whatever the config
    says; samplers and savers go by the config."""
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    if head is not None and head.weight is not embedding.weight:
        model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False


def _make_savable(model_name: str, model: PreTrainedModel) -> None:
    """transformers reads a generation_config.json with a temperature and without do_sample, and refuses to write
    it, which would end a run at its first checkpoint."""
    settings: Any = model.generation_config
    if settings is None or _is_savable(settings):
        return
    settings.do_sample = True
    if not _is_savable(settings):
        print(f"{model_name}: transformers does not accept its generation_config.json: its token ids alone are kept")
        ids = {name: getattr(settings, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        model.generation_config = type(settings)(**ids)


def _is_savable(settings: Any) -> bool:
    try:
        settings.validate(strict=True)
    except ValueError:
        return False
    return True


def _join_end_tokens(model: PreTrainedModel) -> None:
    """Adds generation_config.json's end tokens to the config, which both samplers read."""
    generation = model.generation_config
    of_generation = _as_list(generation.eos_token_id if generation else None)
    ids = dict.fromkeys([*_as_list(model.config.eos_token_id), *of_generation])
    if len(ids) > 1:
        model.config.eos_token_id = list(ids)


def end_token_ids(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The token ids that end an answer."""
    return {*_as_list(config.get_text_config().eos_token_id), *_as_list(tokenizer.eos_token_id)}


def _as_list(ids: Any) -> list[int]:
    return [] if ids is None else ids if isinstance(ids, list) else [ids]
