"""The pairs of a prefix and a suffix that train the Belief State Transformer, with their targets
and weights (section 3 of the paper).

    pair (i, j) of states f_i, b_j     targets x_{i+1} and x_{j-1}; of a pair with j - i = 1: EOS, EOS
    valid if     i >= context_length,  min_gap <= j - i <= max_gap,  no EOS strictly between i and j

Differs from the original: its max_gap is exclusive, and its subsampling gives all kept pairs one
weight, which favours EOS.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import chz
import torch

from posttrain.backend.errors import ConfigError, DataError
from posttrain.backend.ranges import COUNT, POSITIVE_SHARE, WHOLE


@chz.chz
class PairObjective:
    """Which pairs are trained on."""

    context_length: int = chz.field(
        default=0, validator=WHOLE, doc="first position a prefix may end at; tokens before it are context only"
    )
    min_gap: int = chz.field(
        default=1,
        validator=COUNT,
        doc="smallest j - i; 2 leaves out the pairs with no token in between, whose target is EOS",
    )
    max_gap: int | None = chz.field(default=None, validator=COUNT, doc="largest j - i, inclusive; None = no limit")
    single_gap: Literal["eos", "next_token"] = chz.field(
        default="eos", doc="targets of a pair with no token in between: EOS, or the tokens x_j and x_i"
    )
    subsample: float = chz.field(
        default=1.0,
        validator=POSITIVE_SHARE,
        doc="share of the pairs without EOS that is kept, drawn anew at every step",
    )

    @chz.validate
    def _check(self) -> None:
        if self.max_gap is not None and self.max_gap < self.min_gap:
            raise ConfigError(f"min_gap={self.min_gap} is above max_gap={self.max_gap}: no pair fits")


@dataclass(frozen=True)
class Pairs:
    """N pairs of a batch. `weight_N` (fp64) sums to 1 over a row, in expectation if subsampled."""

    row_N: torch.Tensor
    i_N: torch.Tensor
    j_N: torch.Tensor
    next_target_N: torch.Tensor
    prev_target_N: torch.Tensor
    weight_N: torch.Tensor
    num_valid: int  # before subsampling

    def __len__(self) -> int:
        return len(self.row_N)


def find_pairs(
    tokens_B_T: torch.Tensor, eos_id: int, objective: PairObjective, packed: bool, seeds_B: Sequence[int] | None = None
) -> Pairs:
    """All pairs of all rows, or a subsample drawn with `seeds_B`, a seed per row. `packed=False`: a
    row is one document. An EOS at j is the empty suffix, an EOS at i the empty prefix.

    Rows weigh the same, and so do the pairs of a row. Subsampling keeps every pair with an EOS, and
    any other with probability `subsample` and weight 1 / subsample: the expected loss is unchanged.
    DataError if no pair fits into rows of this length.
    """
    B, T = tokens_B_T.shape
    index_T = torch.arange(T, device=tokens_B_T.device)
    gap_T_T = index_T - index_T[:, None]
    allowed_T_T = (gap_T_T >= objective.min_gap) & (index_T[:, None] >= objective.context_length)
    if objective.max_gap is not None:
        allowed_T_T &= gap_T_T <= objective.max_gap
    if not bool(allowed_T_T.any()):
        raise DataError(
            f"rows of {T} tokens have no pair with i >= {objective.context_length} and {objective.min_gap} <= j - i"
            f"{f' <= {objective.max_gap}' if objective.max_gap else ''}: give longer rows, or change the objective"
        )
    is_eos_B_T = tokens_B_T == eos_id
    valid_B_T_T = allowed_T_T.expand(B, T, T)
    if packed:
        up_to_B_T = is_eos_B_T.cumsum(1)
        before_B_T = up_to_B_T - is_eos_B_T.long()
        valid_B_T_T = valid_B_T_T & (up_to_B_T[:, :, None] == before_B_T[:, None, :])
    count_B = valid_B_T_T.sum((1, 2))
    chosen_B_T_T = valid_B_T_T
    if objective.subsample < 1:
        if seeds_B is None:
            raise ConfigError("subsample is less than 1: pairs are drawn from a seed per row, and none was given")
        touches_eos_B_T_T = is_eos_B_T[:, :, None] | is_eos_B_T[:, None, :]
        chosen_B_T_T = valid_B_T_T & (
            touches_eos_B_T_T | (_uniform(seeds_B, T, tokens_B_T.device) < objective.subsample)
        )
    row_N, i_N, j_N = chosen_B_T_T.nonzero(as_tuple=True)
    weight_N = 1 / count_B[row_N].double()
    if objective.subsample < 1:
        always_N = is_eos_B_T[row_N, i_N] | is_eos_B_T[row_N, j_N]
        weight_N = torch.where(always_N, weight_N, weight_N / objective.subsample)
    next_N, prev_N = tokens_B_T[row_N, i_N + 1], tokens_B_T[row_N, j_N - 1]
    if objective.single_gap == "eos":
        adjacent_N = j_N - i_N == 1
        next_N, prev_N = next_N.masked_fill(adjacent_N, eos_id), prev_N.masked_fill(adjacent_N, eos_id)
    return Pairs(row_N, i_N, j_N, next_N, prev_N, weight_N, int(count_B.sum()))


def _uniform(seeds_B: Sequence[int], T: int, device: torch.device) -> torch.Tensor:
    """(B, T, T), each row from its own seed: draws do not depend on the micro-batches."""
    out_B_T_T = torch.empty(len(seeds_B), T, T, device=device)
    for row, seed in zip(out_B_T_T, seeds_B, strict=True):
        row.uniform_(generator=torch.Generator(device).manual_seed(seed))
    return out_B_T_T
