"""Attention in rows of several sequences, none of which sees another. A token attends to itself and
to the tokens it continues: columns k <= q < ends[k], and within a layer's window. On a CPU by a
dense mask, which is also the reference; on CUDA by FlexAttention, which skips blocks without a
visible pair, and by flash attention of whole sequences where no prefix is shared.
"""

import inspect
import math
import sys
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from posttrain.backend.architectures import heads_of_layers
from posttrain.backend.errors import ConfigError

BLOCK = 128  # columns of a block that FlexAttention computes or skips
FLEX_DEVICES = ("cuda",)  # torch has no backward pass of it on a CPU
Windows = Mapping[str, int | None]  # of each kind of layer; None = all earlier tokens


class TreeMask(BlockMask):
    """A BlockMask, and where its sequences start if none shares a prefix."""

    ndim = 4  # read by GPT-2
    window: int | None = None
    starts_N: torch.Tensor | None = None  # the last entry is the number of columns
    longest: int = 0


def masks_of_layers(make: Callable[[int | None], Any], windows: Windows) -> Any:
    """What a decoder takes as attention_mask: `make(window)`, for each kind of layer if they differ."""
    if len(set(windows.values())) == 1:
        return make(next(iter(windows.values())))
    return {kind: make(window) for kind, window in windows.items()}


def dense_mask(
    ends_BT: torch.Tensor, positions_BT: torch.Tensor, window: int | None, dtype: torch.dtype
) -> torch.Tensor:
    """(B, 1, T, T) to be added to the scores: 0 where a query (row) may attend, else -inf. Of the
    scores' dtype: SDPA would turn a boolean mask into one in each layer, and keep it."""
    column_T = torch.arange(ends_BT.shape[1], device=ends_BT.device)
    visible_BTT = (column_T[:, None] >= column_T) & (column_T[:, None] < ends_BT[:, None, :])
    if window is not None:
        visible_BTT &= positions_BT[:, :, None] - positions_BT[:, None, :] < window
    bias_BTT = torch.zeros(visible_BTT.shape, dtype=dtype, device=ends_BT.device)
    return bias_BTT.masked_fill_(~visible_BTT, -math.inf)[:, None]


def tree_mask(ends_BT: torch.Tensor, positions_BT: torch.Tensor, window: int | None) -> TreeMask:
    """The same without a (T, T) tensor: from the extremes of `ends` and positions in each block."""
    rows, columns = ends_BT.shape
    blocks = -(-columns // BLOCK)

    def extreme(values_BT: torch.Tensor, largest: bool) -> torch.Tensor:
        padded = torch.nn.functional.pad(values_BT, (0, blocks * BLOCK - columns), value=0 if largest else 2**30)
        by_block = padded.view(rows, blocks, BLOCK)
        return by_block.amax(-1) if largest else by_block.amin(-1)

    start_N = torch.arange(blocks, device=ends_BT.device) * BLOCK
    query, key = start_N[:, None], start_N
    some = (query == key) | ((query > key) & (extreme(ends_BT, True)[:, None, :] > query))
    last = (query + BLOCK).clamp(max=columns)
    every = (query > key) & (extreme(ends_BT, False)[:, None, :] >= last)
    if window is not None:
        first_BN, final_BN = extreme(positions_BT, False), extreme(positions_BT, True)
        some &= first_BN[:, :, None] - final_BN[:, None, :] < window
        every &= final_BN[:, :, None] - first_BN[:, None, :] < window

    def visible(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        seen = (q >= k) & (q < ends_BT[b, k])
        return seen if window is None else seen & (positions_BT[b, q] - positions_BT[b, k] < window)

    part, full = (_listed(blocks_BNN) for blocks_BNN in (some & ~every, every))
    mask = TreeMask.from_kv_blocks(*part, *full, BLOCK_SIZE=BLOCK, mask_mod=visible, seq_lengths=(columns, columns))
    mask.window = window
    return mask


def _listed(blocks_BNN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each query block the number of key blocks, and their indices first."""
    order = blocks_BNN.int().argsort(dim=-1, descending=True, stable=True)
    return blocks_BNN.sum(-1, dtype=torch.int32)[:, None], order.int()[:, None]


def attend(
    usual: str,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | BlockMask | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **rest: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' interface of an attention kernel: (B, heads, T, D) to (B, T, heads, D). Without
    a TreeMask, as in generation, `usual` computes. `s_aux`: a score per head that takes a share of
    the probability (gpt-oss)."""
    if not isinstance(attention_mask, TreeMask):
        special = {name: x for name, x in (("softcap", softcap), ("s_aux", s_aux)) if x is not None}
        eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        kernel = ALL_ATTENTION_FUNCTIONS.get_interface(usual, eager)
        return kernel(module, query, key, value, attention_mask, scaling=scaling, **special, **rest)
    if rest.get("position_bias") is not None or rest.get("is_causal") is False:
        raise NotImplementedError("attention with a bias of positions, or to later tokens")
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if attention_mask.starts_N is not None and softcap is None and s_aux is None:
        return _of_sequences(query, key, value, attention_mask, attention_mask.starts_N, scaling), None

    def capped(score: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        assert softcap is not None
        return softcap * torch.tanh(score / softcap)

    out_BNTD, aux = _flex(query)(
        query,
        key,
        value,
        score_mod=capped if softcap is not None else None,
        block_mask=attention_mask,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    if s_aux is not None:
        out_BNTD = out_BNTD * torch.sigmoid(aux.lse - s_aux.float()[:, None])[..., None].to(out_BNTD.dtype)
    return out_BNTD.transpose(1, 2).contiguous(), None


for usual in ("sdpa", "eager"):
    AttentionInterface.register(f"posttrain_{usual}", partial(attend, usual))
    AttentionMaskInterface.register(f"posttrain_{usual}", ALL_MASK_ATTENTION_FUNCTIONS[usual])


def packs(attention: str, device: torch.device) -> bool:
    """Whether rows are packed by backend.attention, where nothing fails."""
    return attention != "dense" and (attention != "auto" or device.type == "cuda")


def check_setting(attention: str, device: torch.device, dtype: torch.dtype) -> None:
    """ConfigError for backend.attention that this machine cannot compute."""
    if attention == "flex" and device.type not in FLEX_DEVICES:
        raise ConfigError("backend.attention=flex needs a GPU: FlexAttention has no backward pass on a CPU; take dense")
    if attention == "varlen" and (device.type != "cuda" or dtype != torch.bfloat16):
        raise ConfigError(
            "backend.attention=varlen needs a GPU and backend.dtype=bfloat16: flash attention has no other; take dense"
        )


@cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention)


def _flex(query: torch.Tensor) -> Callable[..., Any]:
    """Compiled on its own, unless a compiled layer contains it: its uncompiled form has all scores."""
    return flex_attention if torch.compiler.is_compiling() or query.device.type == "cpu" else _compiled()


# --- whole sequences ------------------------------------------------------------------------------


def _of_sequences(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: TreeMask,
    starts_N: torch.Tensor,
    scaling: float | None,
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"scale": scaling, "window_size": (-1 if mask.window is None else mask.window - 1, 0)}
    if "enable_gqa" in known:  # torch 2.11 has not
        options["enable_gqa"] = query.shape[1] != key.shape[1]
    else:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    q_TND, k_TND, v_TND = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    out_TND = varlen_attn(q_TND, k_TND, v_TND, starts_N, starts_N, mask.longest, mask.longest, **options)
    return out_TND[None]  # type: ignore[index]


def set_packing(model: PreTrainedModel, on: bool) -> None:
    """Lets the layers take TreeMasks, or takes it back."""
    name = str(model.config._attn_implementation).removeprefix("posttrain_")
    model.set_attn_implementation(f"posttrain_{name}" if on else name)


# --- the check when a model is opened -------------------------------------------------------------


def kernel_gap(
    config: PretrainedConfig,
    windows: Windows,
    device: torch.device,
    dtype: torch.dtype,
    whole: bool,
    trees: bool = True,
) -> float:
    """Largest relative difference of the packed kernels' outputs and gradients from a dense
    computation in fp32, of a model's heads, softcap and windows. `whole`: of flash attention, too.
    Without `trees` no prefix is shared."""
    softcap = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    shapes = set(heads_of_layers(config))
    gaps = [_gap_of_heads(shape, softcap, {*windows.values()}, device, dtype, whole, trees) for shape in shapes]
    return float(np.max(gaps))


def _gap_of_heads(
    shape: tuple[int, int, int],
    softcap: float | None,
    windows: set[int | None],
    device: torch.device,
    dtype: torch.dtype,
    whole: bool,
    trees: bool,
) -> float:
    heads, key_heads, dim = shape
    generator = torch.Generator().manual_seed(0)
    lengths = [BLOCK + 40, 30, 90]  # of whole sequences; of a prompt and two answers
    columns = sum(lengths)
    qkv = query, key, value = [
        torch.randn(1, count, columns, dim, generator=generator).to(device, dtype).requires_grad_()
        for count in (heads, key_heads, key_heads)
    ]
    starts = [sum(lengths[:n]) for n in range(len(lengths) + 1)]
    gaps = []
    for tree in {trees, False}:
        ends = [columns if tree and n == 0 else end for n, end in enumerate(starts[1:])]
        first = [lengths[0] if tree and n else 0 for n in range(len(lengths))]
        ends_BT = torch.tensor([[end for end, length in zip(ends, lengths, strict=True) for _ in range(length)]])
        positions_BT = torch.cat([torch.arange(length) + at for at, length in zip(first, lengths, strict=True)])[None]
        ends_BT, positions_BT = ends_BT.to(device), positions_BT.to(device)
        for window in {None if window is None else min(window, BLOCK // 2) for window in windows}:
            mask = tree_mask(ends_BT, positions_BT, window)
            if whole and not tree:
                mask.starts_N, mask.longest = torch.tensor(starts, dtype=torch.int32, device=device), max(lengths)
            out = attend("sdpa", torch.nn.Module(), query, key, value, mask, softcap=softcap)[0]
            found = [out, *torch.autograd.grad(out, qkv, out.detach())]
            exact = exact_q, exact_k, exact_v = [x.detach().float().requires_grad_() for x in qkv]
            true = _dense(exact_q, exact_k, exact_v, dense_mask(ends_BT, positions_BT, window, torch.float32), softcap)
            expected = [true.detach(), *torch.autograd.grad(true, exact, out.detach().float())]
            gaps += [float((a.detach().float() - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]
    return float(np.max(gaps))  # Python's max forgets NaN


def _dense(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor, softcap: float | None
) -> torch.Tensor:
    """The definition: (B, heads, T, D) to (B, T, heads, D)."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    return ((scores + bias).softmax(-1) @ value).transpose(1, 2)
