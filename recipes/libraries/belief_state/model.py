"""The Belief State Transformer (Hu et al. 2025, arXiv 2410.23506) and its GPT baseline,
`NextToken`.

    f_i = F(x_1 .. x_i)     b_j = B(x_j .. x_T)     text_head(f_i, b_j) -> logits of x_{i+1} and of x_{j-1}

The encoders share the embedding, the head's halves the unembedding; the two are not tied. Left out:
the original's LayerNorm variant (bias=true), dropout.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import linear

from posttrain.backend.errors import ConfigError
from recipes.libraries.belief_state.blocks import NORM_EPS, Encoder, KVCache, SwiGLU


@dataclass(frozen=True)
class BeliefStateConfig:
    """Sizes of either model. In the paper: 6 layers (star graphs) or 8 (TinyStories), 8 heads,
    768.
    """

    vocab_size: int
    eos_id: int  # ends each document, and begins the next in packed rows
    num_layers: int = 6
    num_heads: int = 8
    hidden: int = 768
    init_std: float = 0.02  # of every matrix; small models need more, about 0.5 / sqrt(hidden)
    task: str = ""  # name of the training data ("G(2,3) N=12"); checkpoints of another are refused

    def __post_init__(self) -> None:
        if self.hidden % (2 * self.num_heads):
            raise ConfigError(
                f"hidden={self.hidden} is not a multiple of 2 num_heads={2 * self.num_heads}: rotary positions need "
                "pairs of dimensions"
            )
        if not 0 <= self.eos_id < self.vocab_size:
            raise ConfigError(f"eos_id={self.eos_id} is not one of the vocab_size={self.vocab_size} tokens")


def documents(tokens_B_T: torch.Tensor, eos_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Document number and position in the document, (B, T) each. EOS begins a document at position
    0; a document without it starts at 1. In flipped tokens an EOS belongs to the document it ends.
    """
    is_eos_B_T = tokens_B_T == eos_id
    index_T = torch.arange(tokens_B_T.shape[1], device=tokens_B_T.device)
    last_eos_B_T = torch.where(is_eos_B_T, index_T, -1).cummax(1).values
    return is_eos_B_T.cumsum(1), index_T - last_eos_B_T


class TextHead(nn.Module):
    def __init__(self, hidden: int, vocab_size: int):
        super().__init__()
        self.mlp = SwiGLU(2 * hidden)
        self.norm = nn.RMSNorm(2 * hidden, eps=NORM_EPS)
        self.unembedding = nn.Linear(hidden, vocab_size, bias=False)

    def forward(self, f: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (..., V) of the token after f and of the token before b, from states (..., H)."""
        f_part, b_part = self.parts(f, b)
        return self.of_parts(f, b, f_part + b_part)

    def parts(self, f: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Each state's term of the hidden layer, which is linear in [f ; b]: once per state, not
        per pair.
        """
        weight_f, weight_b = self.mlp.gate_up.weight.chunk(2, dim=1)
        return linear(f, weight_f), linear(b, weight_b)

    def of_parts(self, f: torch.Tensor, b: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        u = self.norm(torch.cat([f, b], dim=-1) + self.mlp.after(hidden))
        u_next, u_prev = u.chunk(2, dim=-1)
        return self.unembedding(u_next), self.unembedding(u_prev)


class _Stack(nn.Module):
    """The embedding and the forward encoder, shared by both models."""

    def __init__(self, config: BeliefStateConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden)
        self.forward_encoder = Encoder(config.num_layers, config.hidden, config.num_heads)

    def forward_states(self, tokens_B_T: torch.Tensor, packed: bool = True) -> torch.Tensor:
        """f_B_T_H. `packed=False` is faster, for rows without an EOS between other tokens; the
        state of a final EOS is then not that of an empty prefix.
        """
        return self._states(self.forward_encoder, tokens_B_T, packed)

    def _states(self, encoder: Encoder, tokens_B_T: torch.Tensor, packed: bool) -> torch.Tensor:
        document_B_T, position_B_T = documents(tokens_B_T, self.config.eos_id)
        return encoder(self.embedding(tokens_B_T), position_B_T, document_B_T if packed else None)

    def extend(self, encoder: Encoder, tokens_B_T: torch.Tensor, position: int, cache: KVCache) -> torch.Tensor:
        """States (B, T, H) of tokens that continue the cache, the first at `position` in its
        document.
        """
        position_B_T = torch.arange(position, position + tokens_B_T.shape[1], device=tokens_B_T.device).expand(
            tokens_B_T.shape
        )
        return encoder(self.embedding(tokens_B_T), position_B_T, None, cache)

    def initialise(self, seed: int | None) -> None:
        """Matrices normal with deviation init_std, gains 1; the same on every device. None: no
        change.
        """
        if seed is None:
            return
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.ndim > 1:
                    parameter.copy_(torch.empty(parameter.shape).normal_(std=self.config.init_std, generator=generator))


class BeliefState(_Stack):
    def __init__(self, config: BeliefStateConfig, seed: int | None = 0):
        super().__init__(config)
        self.backward_encoder = Encoder(config.num_layers, config.hidden, config.num_heads)
        self.text_head = TextHead(config.hidden, config.vocab_size)
        self.initialise(seed)

    def backward_states(self, tokens_B_T: torch.Tensor, packed: bool = True) -> torch.Tensor:
        """b_B_T_H. `packed` as in forward_states, with an EOS at the start in place of the end."""
        return self._states(self.backward_encoder, tokens_B_T.flip(1), packed).flip(1)

    def empty_suffix(self) -> torch.Tensor:
        """(H,): the backward state of EOS alone."""
        return self._empty(self.backward_encoder)

    def empty_prefix(self) -> torch.Tensor:
        return self._empty(self.forward_encoder)

    def _empty(self, encoder: Encoder) -> torch.Tensor:
        eos = torch.tensor([[self.config.eos_id]], device=self.embedding.weight.device)
        return self._states(encoder, eos, packed=False)[0, 0]


class NextToken(_Stack):
    """The GPT baseline on the same blocks."""

    def __init__(self, config: BeliefStateConfig, seed: int | None = 0):
        super().__init__(config)
        self.unembedding = nn.Linear(config.hidden, config.vocab_size, bias=False)
        self.initialise(seed)

    def logits(self, tokens_B_T: torch.Tensor, packed: bool = True) -> torch.Tensor:
        return self.unembedding(self.forward_states(tokens_B_T, packed))
