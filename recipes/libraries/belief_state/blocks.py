"""Transformer stack of the Belief State Transformer and its GPT baseline: pre-norm blocks with
RMSNorm, rotary positions and SwiGLU; causal attention, packed rows, KV cache.

A backward encoder flips its tokens. Left out: dropout, biases.
"""

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention, silu

ROPE_BASE = 1e4
NORM_EPS = 1e-5

# Keys and values (B, heads, T, D) of each layer. Never written in place: caches share tensors.
KVCache = list[tuple[torch.Tensor, torch.Tensor]]


def swiglu_width(width: int) -> int:
    """8/3 of the width, to the nearest multiple of 128."""
    return max(128, 128 * round(8 * width / 3 / 128))


class SwiGLU(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        hidden = swiglu_width(width)
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(self.gate_up(x))

    def after(self, hidden: torch.Tensor) -> torch.Tensor:
        gate, up = hidden.chunk(2, dim=-1)
        return self.down(silu(gate) * up)


class Attention(nn.Module):
    def __init__(self, hidden: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)

    def forward(
        self,
        x_B_T_H: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor | None,
        cache: KVCache | None,
        layer: int,
    ) -> torch.Tensor:
        B, T, H = x_B_T_H.shape
        q, k, v = self.qkv(x_B_T_H).view(B, T, 3, self.num_heads, H // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k = _rotate(q, *rope), _rotate(k, *rope)
        if cache is not None:
            if layer < len(cache):
                k, v = (torch.cat([past, new], dim=2) for past, new in zip(cache[layer], (k, v), strict=True))
                cache[layer] = (k, v)
            else:
                cache.append((k, v))
        # no mask: whole rows use the kernels' causal fast path; a single token attends to all keys
        attended = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and k.shape[2] == T)
        return self.out(attended.transpose(1, 2).reshape(B, T, H))


class Block(nn.Module):
    def __init__(self, hidden: int, num_heads: int):
        super().__init__()
        self.attention_norm = nn.RMSNorm(hidden, eps=NORM_EPS)
        self.attention = Attention(hidden, num_heads)
        self.mlp_norm = nn.RMSNorm(hidden, eps=NORM_EPS)
        self.mlp = SwiGLU(hidden)

    def forward(
        self,
        x_B_T_H: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor | None,
        cache: KVCache | None,
        layer: int,
    ) -> torch.Tensor:
        x_B_T_H = x_B_T_H + self.attention(self.attention_norm(x_B_T_H), rope, mask, cache, layer)
        return x_B_T_H + self.mlp(self.mlp_norm(x_B_T_H))


class Encoder(nn.Module):
    """Blocks and a final norm: embedded tokens to a state per position."""

    def __init__(self, num_layers: int, hidden: int, num_heads: int):
        super().__init__()
        self.blocks = nn.ModuleList(Block(hidden, num_heads) for _ in range(num_layers))
        self.norm = nn.RMSNorm(hidden, eps=NORM_EPS)
        self.head_dim = hidden // num_heads

    def forward(
        self,
        x_B_T_H: torch.Tensor,
        position_B_T: torch.Tensor,
        document_B_T: torch.Tensor | None = None,
        cache: KVCache | None = None,
    ) -> torch.Tensor:
        """`document_B_T`: document numbers in packed rows; None: a row is one document. With
        `cache`, the tokens continue the cached ones.
        """
        rope = _rope(position_B_T, self.head_dim)
        past = cache[0][0].shape[2] if cache else 0
        mask = None if document_B_T is None else _document_mask(document_B_T)
        if past and x_B_T_H.shape[1] > 1:
            mask = torch.ones(x_B_T_H.shape[1], past + x_B_T_H.shape[1], dtype=torch.bool, device=x_B_T_H.device).tril(
                past
            )
        for layer, block in enumerate(self.blocks):
            x_B_T_H = block(x_B_T_H, rope, mask, cache, layer)
        return self.norm(x_B_T_H)


def _document_mask(document_B_T: torch.Tensor) -> torch.Tensor:
    """(B, 1, T, T): each position attends to its own document, up to itself."""
    same_B_T_T = document_B_T[:, :, None] == document_B_T[:, None, :]
    return same_B_T_T.tril()[:, None]


def _rope(position_B_T: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines (B, 1, T, D); dimensions d and d + D/2 rotate together."""
    frequency = ROPE_BASE ** (-torch.arange(0, head_dim, 2, device=position_B_T.device, dtype=torch.float32) / head_dim)
    angle = position_B_T[:, None, :, None].float() * frequency
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos(), angle.sin()


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    left, right = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-right, left], dim=-1) * sin).to(x.dtype)
