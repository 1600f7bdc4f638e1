"""Models of fake tensors, which have shapes and no numbers: the number of weights, what a pass saves for its backward
pass, and what a sequence has in a sampler's cache. Left out: passes whose code reads numbers, which are estimated.
"""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel

from posttrain.backend.architectures import (
    FULL_ATTENTION,
    WINDOWED_ATTENTION,
    decoder_of,
    experts_per_token,
    heads_of_layers,
    with_cache,
)
from posttrain.backend.lora_layers import add_lora
from posttrain.backend.merged_lora import compute_merged
from posttrain.backend.models import cast_weights, new_model
from posttrain.backend.types import LoraConfig

PROBE_TOKENS = (32, 64)  # of the passes that save
CACHED_TOKENS = (8, 12)  # of those that cache: within any window


@dataclass(frozen=True)
class ModelSize:
    """Numbers of weights, and of what activations scale with."""

    parameters: int
    trainable: int
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    largest: int  # number of values of a trained weight


_sizes: dict[tuple[str, LoraConfig | None], ModelSize] = {}
_saved: dict[tuple[str, LoraConfig | None, torch.dtype, torch.dtype, bool], tuple[float, float]] = {}
_cached: dict[tuple[str, int], tuple[int, int]] = {}


def model_size(hf_config: PretrainedConfig, lora: LoraConfig | None = None) -> ModelSize:
    key = hf_config.to_json_string(use_diff=False), lora
    if key not in _sizes:
        text: Any = hf_config.get_text_config()
        with _fake_model(hf_config, lora, torch.float32, torch.float32) as (base, model):
            head: Any = base.get_output_embeddings()
            vocabulary, hidden = (head.base_layer if hasattr(head, "base_layer") else head).weight.shape
            parameters = sum(p.numel() for p in model.parameters())
            trained = [p.numel() for p in model.parameters() if p.requires_grad]
        widths = getattr(text, "intermediate_size", None) or 4 * hidden
        widest = max(widths) if isinstance(widths, list) else widths  # Gemma 3n has a width for each layer
        experts, expert = experts_per_token(hf_config), getattr(text, "moe_intermediate_size", None)
        intermediate = max(widest, experts * expert) if isinstance(expert, int) else widest * max(1, experts)
        _sizes[key] = ModelSize(
            parameters, sum(trained), text.num_hidden_layers, hidden, intermediate, vocabulary, max(trained, default=0)
        )
    return _sizes[key]


def saved_bytes(
    hf_config: PretrainedConfig,
    lora: LoraConfig | None,
    compute: torch.dtype,
    weights: torch.dtype = torch.float32,
    merged: bool = True,
) -> tuple[float, float]:
    """Bytes that a forward pass saves for its backward: of each pass, and of each token."""
    key = hf_config.to_json_string(use_diff=False), lora, compute, weights, merged
    if key not in _saved:
        # torch multiplies experts of fake tensors in bf16 alone
        computed, held = (torch.bfloat16, torch.bfloat16) if experts_per_token(hf_config) else (compute, weights)
        wider = compute.itemsize / computed.itemsize
        try:
            # torch logs pages before it raises
            with patch.object(logging.getLogger("torch._subclasses.fake_tensor"), "disabled", True):
                passes = (_saved_by_pass(hf_config, lora, computed, held, merged, tokens) for tokens in PROBE_TOKENS)
                few, many = passes
            per_token = (many - few) / (PROBE_TOKENS[1] - PROBE_TOKENS[0])
            _saved[key] = wider * max(0.0, few - PROBE_TOKENS[0] * per_token), wider * per_token
        except Exception:  # of a model whose code reads numbers: about what a dense model saves
            size = model_size(hf_config, lora)
            _saved[key] = 0.0, compute.itemsize * size.layers * (20 * size.hidden + 5 * size.intermediate)
    return _saved[key]


def _saved_by_pass(
    hf_config: PretrainedConfig,
    lora: LoraConfig | None,
    compute: torch.dtype,
    dtype: torch.dtype,
    merged: bool,
    tokens: int,
) -> int:
    saved: dict[int, int] = {}
    with _fake_model(hf_config, lora, dtype, compute if merged else torch.float32) as (base, model):
        weights = {p.untyped_storage()._cdata for p in model.parameters()}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                saved[storage._cdata] = storage.nbytes()
            return tensor

        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=compute == torch.bfloat16),
        ):
            output = decoder_of(base)(input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
        del output  # kept until here: freed storages would give their addresses to others
    return sum(saved.values())


def cached_bytes(hf_config: PretrainedConfig, itemsize: int) -> tuple[int, int]:
    """Bytes that a sequence has in a sampler's cache: in states that do not grow, and of each token, as if layers had
    no windows."""
    text: Any = hf_config.get_text_config()
    plain = text.model_type in f"{FULL_ATTENTION} {WINDOWED_ATTENTION}".split() and not getattr(text, "multi_query", 0)
    key = hf_config.to_json_string(use_diff=False), itemsize
    if key not in _cached:
        try:
            if plain:
                raise NotImplementedError("its heads say it, without a pass of a second or two")
            with patch.object(logging.getLogger("torch._subclasses.fake_tensor"), "disabled", True):
                few, many = _cached_by_passes(hf_config, itemsize)
            per_token = (many - few) // (CACHED_TOKENS[1] - CACHED_TOKENS[0])
            _cached[key] = max(0, few - CACHED_TOKENS[0] * per_token), per_token
        except Exception:
            layers = heads_of_layers(hf_config)[: -(getattr(text, "num_kv_shared_layers", None) or 0) or None]
            _cached[key] = 0, 2 * itemsize * sum(heads * dim for _, heads, dim in layers)
    return _cached[key]


def _cached_by_passes(hf_config: PretrainedConfig, itemsize: int) -> list[int]:
    """After each of CACHED_TOKENS."""
    config, dtype = copy.deepcopy(hf_config), {2: torch.bfloat16, 4: torch.float32}[itemsize]
    config.get_text_config()._experts_implementation = "batched_mm"  # whose shapes depend on no numbers
    found = []
    with _fake_model(config, None, dtype, torch.float32) as (base, _), torch.no_grad():
        for tokens in CACHED_TOKENS:
            decoder, cache, tokens_BT = decoder_of(base), DynamicCache(config=base.config), torch.arange(tokens)[None]
            decoder(
                input_ids=torch.zeros_like(tokens_BT),
                attention_mask=torch.ones_like(tokens_BT),
                position_ids=tokens_BT,
                **with_cache(decoder, cache),
            )
            held = [tensor for layer in cache.layers for tensor in _tensors(vars(layer)) if tensor.ndim]
            found.append(sum(tensor.nbytes for tensor in held))
    return found


def _tensors(part: Any) -> Iterator[torch.Tensor]:
    if isinstance(part, torch.Tensor):
        yield part
    elif isinstance(part, dict | list | tuple):
        for inner in part.values() if isinstance(part, dict) else part:
            yield from _tensors(inner)


@contextmanager
def _fake_model(
    hf_config: PretrainedConfig, lora: LoraConfig | None, dtype: torch.dtype, merged: torch.dtype
) -> Iterator[tuple[PreTrainedModel, torch.nn.Module]]:
    """The base, and the model that is trained: shapes that take no memory. `merged`: other than fp32,
    adapters are merged in it."""
    with torch.device("meta"):
        base = new_model(hf_config)
        cast_weights(base, dtype)
        model = add_lora(base, "", lora, 0) if lora else base
    with FakeTensorMode():
        fakes: dict[int, Any] = {}  # tied weights stay tied
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        tensors[name] = fakes.setdefault(id(tensor), _fake(tensor))
        if lora and merged != torch.float32:
            compute_merged(model, merged)
        yield base, model


def _fake(meta: torch.Tensor) -> Any:
    fake = torch.empty(meta.shape, dtype=meta.dtype)
    return torch.nn.Parameter(fake, meta.requires_grad) if isinstance(meta, torch.nn.Parameter) else fake
