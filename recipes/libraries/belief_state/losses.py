"""Forward and backward passes of the Belief State Transformer's objective and the next-token loss.

Loss of a pair: 1/2 [CE(next, x_{i+1}) + CE(prev, x_{j-1})]; the mean over a row's pairs, then over
rows. Differs from the original: it averages the means of unequal chunks, so that its loss depends
on the chunk size.
"""

from collections.abc import Sequence

import torch
from torch.nn.functional import cross_entropy

from posttrain.backend.config import compute_dtype
from recipes.libraries.belief_state.model import BeliefState, NextToken
from recipes.libraries.belief_state.pairs import PairObjective, Pairs, find_pairs

Sums = dict[str, torch.Tensor]


def autocast(device: torch.device) -> torch.autocast:
    """bf16 on CUDA. Entered anew for every forward: cached casts would keep an earlier chunk's
    graph alive.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=compute_dtype(device) == torch.bfloat16)


def pair_pass(
    model: BeliefState,
    tokens_B_T: torch.Tensor,
    objective: PairObjective,
    num_rows: int,
    packed: bool,
    pairs_per_chunk: int,
    seeds_B: Sequence[int] | None = None,
    backward: bool = True,
) -> Sums:
    """The sums "loss", "loss_next" and "loss_prev" in nats over micro-batches of a batch of
    `num_rows` rows, and the numbers of pairs. `backward` accumulates gradients.

    Two stages (section 3.2 of the paper), since O(T^2) pairs share O(T) states: the head runs over
    chunks of pairs, and each chunk is backpropagated into the head and into detached copies of the
    states; then the copies' gradients go through the encoders once. The gradient is that of the
    joint graph, and the memory that of one chunk. States that no pair uses are not computed. The
    head's first matrix is applied to states, not to pairs: W [f ; b] = W_f f + W_b b.
    """
    pairs = find_pairs(tokens_B_T, model.config.eos_id, objective, packed, seeds_B)
    c, first_j = objective.context_length, objective.context_length + objective.min_gap
    with torch.set_grad_enabled(backward), autocast(tokens_B_T.device):
        f_B_T_H = model.forward_states(tokens_B_T[:, : tokens_B_T.shape[1] - objective.min_gap], packed)[:, c:]
        b_B_T_H = model.backward_states(tokens_B_T[:, first_j:], packed)
        computed = (f_B_T_H, b_B_T_H, *model.text_head.parts(f_B_T_H, b_B_T_H))
    leaves = [x.detach().to(_at_least_fp32(x)).flatten(0, 1).requires_grad_(backward) for x in computed]
    f_index_N = pairs.row_N * f_B_T_H.shape[1] + pairs.i_N - c
    b_index_N = pairs.row_N * b_B_T_H.shape[1] + pairs.j_N - first_j
    sums = {name: torch.zeros((), dtype=torch.float64, device=tokens_B_T.device) for name in ("loss_next", "loss_prev")}
    for start in range(0, len(pairs), pairs_per_chunk):
        chunk = slice(start, start + pairs_per_chunk)
        with torch.set_grad_enabled(backward), autocast(tokens_B_T.device):
            indices = (f_index_N[chunk], b_index_N[chunk]) * 2
            f, b, f_part, b_part = (leaf.index_select(0, index) for leaf, index in zip(leaves, indices, strict=True))
            next_logits, prev_logits = model.text_head.of_parts(f, b, f_part + b_part)
        with torch.set_grad_enabled(backward):
            weight = pairs.weight_N[chunk] / num_rows
            loss_next, loss_prev = (
                (_cross_entropy(logits, target[chunk]) * weight.to(_at_least_fp32(logits))).sum()
                for logits, target in ((next_logits, pairs.next_target_N), (prev_logits, pairs.prev_target_N))
            )
            if backward:
                (0.5 * (loss_next + loss_prev)).backward()
        sums["loss_next"] += loss_next.detach()
        sums["loss_prev"] += loss_prev.detach()
    if backward and len(pairs):
        gradients = [
            leaf.grad.view_as(x).to(x.dtype) for leaf, x in zip(leaves, computed, strict=True) if leaf.grad is not None
        ]
        torch.autograd.backward(computed, gradients)
    sums["loss"] = 0.5 * (sums["loss_next"] + sums["loss_prev"])
    return sums | _counts(pairs, tokens_B_T.device)


def next_token_pass(
    model: NextToken,
    tokens_B_T: torch.Tensor,
    loss_mask_B_T: torch.Tensor | None,
    num_targets: int,
    packed: bool,
    backward: bool = True,
) -> Sums:
    """This part's share of "loss", the mean CE in nats over the batch's `num_targets` targets: all
    tokens but each row's first, or those of the mask.
    """
    with torch.set_grad_enabled(backward), autocast(tokens_B_T.device):
        logits_B_T_V = model.logits(tokens_B_T[:, :-1], packed)
    with torch.set_grad_enabled(backward):
        loss_B_T = _cross_entropy(logits_B_T_V.flatten(0, 1), tokens_B_T[:, 1:].flatten()).view(tokens_B_T.shape[0], -1)
        if loss_mask_B_T is not None:
            loss_B_T = loss_B_T * loss_mask_B_T[:, 1:]
        loss = loss_B_T.sum() / num_targets
        if backward:
            loss.backward()
    return {"loss": loss.detach().double()}


@torch.no_grad()
def empty_side_losses(
    model: BeliefState, tokens_B_T: torch.Tensor, objective: PairObjective, packed: bool, pairs_per_chunk: int
) -> Sums:
    """The loss "loss_next_token": mean CE, in nats, of every token after its prefix, with the empty
    suffix; comparable to a next-token model's. "loss_prev_token": the same from the right, with the
    empty prefix; left out with a context_length, where it is not trained. EOS is a target only if
    min_gap is 1, since it is not trained otherwise.
    """
    c, eos = objective.context_length, model.config.eos_id
    with autocast(tokens_B_T.device):
        sides = {
            "loss_next_token": (model.forward_states(tokens_B_T[:, :-1], packed)[:, c:], tokens_B_T[:, c + 1 :], 0)
        }
        if not c:
            sides["loss_prev_token"] = (model.backward_states(tokens_B_T, packed)[:, 1:], tokens_B_T[:, :-1], 1)
        empty_b_H, empty_f_H = model.empty_suffix(), model.empty_prefix()
    means = {}
    for name, (states_B_T_H, targets_B_T, side) in sides.items():
        trained_B_T = targets_B_T != eos if objective.min_gap > 1 else torch.ones_like(targets_B_T, dtype=torch.bool)
        states_N_H, targets_N = states_B_T_H[trained_B_T], targets_B_T[trained_B_T]
        total = torch.zeros((), dtype=torch.float64, device=tokens_B_T.device)
        for start in range(0, len(targets_N), pairs_per_chunk):
            states, targets = states_N_H[start : start + pairs_per_chunk], targets_N[start : start + pairs_per_chunk]
            with autocast(tokens_B_T.device):
                f, b = (states, empty_b_H.expand_as(states)) if side == 0 else (empty_f_H.expand_as(states), states)
                logits = model.text_head(f, b)[side]
            total += _cross_entropy(logits, targets).sum()
        means[name] = total / len(targets_N)
    return means


def _at_least_fp32(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _cross_entropy(logits_N_V: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    return cross_entropy(logits_N_V.to(_at_least_fp32(logits_N_V)), targets_N, reduction="none")


def _counts(pairs: Pairs, device: torch.device) -> Sums:
    counts = {"num_pairs": len(pairs), "num_valid_pairs": pairs.num_valid}
    return {name: torch.tensor(float(value), dtype=torch.float64, device=device) for name, value in counts.items()}
