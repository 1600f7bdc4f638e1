"""Policy losses: pure functions of p and q, the trainer's and the sampler's logprob of a token; A
is the advantage, r = exp(p - q). Each returns a loss and diagnostics per token; the trainer sums
the loss and averages the diagnostics, so batching changes no gradient. Formulas: Tinker's
documentation (specs: tinker_semantics 3.3). Left out: stable_reinforce, of which no formula is
published.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

Tensors = dict[str, torch.Tensor]
# (p_N, inputs_N, **loss_fn_config) -> (loss_N, diagnostics_N)
LossFn = Callable[..., tuple[torch.Tensor, Tensors]]


def cross_entropy(p_NK: torch.Tensor, inputs: Tensors) -> tuple[torch.Tensor, Tensors]:
    """-w p. With K targets per position (distillation), p and w are (N, K)."""
    return -(inputs["weights"] * p_NK), {}


def importance_sampling(p_N: torch.Tensor, inputs: Tensors) -> tuple[torch.Tensor, Tensors]:
    """-r A: policy gradient with importance sampling; the ratio is unbounded."""
    ratio_N = (p_N - inputs["logprobs"]).exp()
    return -(ratio_N * inputs["advantages"]), {"ratio": ratio_N}


def reinforce(p_N: torch.Tensor, inputs: Tensors) -> tuple[torch.Tensor, Tensors]:
    """-p A: weighted likelihood (Williams 1992), the policy gradient on-policy only."""
    return -(p_N * inputs["advantages"]), {"ratio": (p_N - inputs["logprobs"]).detach().exp()}


def ppo(
    p_N: torch.Tensor, inputs: Tensors, clip_low_threshold: float = 0.8, clip_high_threshold: float = 1.2
) -> tuple[torch.Tensor, Tensors]:
    """-min(r A, clip(r) A), Schulman et al. 2017 eq. 7. The thresholds bound r; they are no
    epsilons."""
    ratio_N, advantages_N = (p_N - inputs["logprobs"]).exp(), inputs["advantages"]
    return _clipped_objective(ratio_N, advantages_N, inputs, clip_low_threshold, clip_high_threshold)


def gspo(
    p_N: torch.Tensor, inputs: Tensors, clip_low_threshold: float = 0.8, clip_high_threshold: float = 1.2
) -> tuple[torch.Tensor, Tensors]:
    """As ppo, with r = sg(s) exp(p - sg(p)), s = exp(mean of p - q over the Datum's tokens that
    `sequence_ratio_mask` marks): GSPO-token, Zheng et al. 2025 eq. 14. All tokens of a sequence are
    clipped, or none; the paper's thresholds are 1 - 3e-4 and 1 + 4e-4."""
    _, sequence_N = inputs["sequence"].unique(return_inverse=True)
    marked_N = (inputs.get("sequence_ratio_mask", torch.ones_like(p_N)) != 0).to(p_N.dtype)
    log_ratio_N = (p_N.detach() - inputs["logprobs"]) * marked_N
    count_S = p_N.new_zeros(int(sequence_N.max()) + 1).index_add(0, sequence_N, marked_N)
    mean_S = torch.zeros_like(count_S).index_add(0, sequence_N, log_ratio_N) / count_S.clamp(min=1)
    ratio_N = (mean_S[sequence_N] + p_N - p_N.detach()).exp()
    return _clipped_objective(ratio_N, inputs["advantages"], inputs, clip_low_threshold, clip_high_threshold)


def _clipped_objective(
    ratio_N: torch.Tensor, advantages_N: torch.Tensor, inputs: Tensors, low: float, high: float
) -> tuple[torch.Tensor, Tensors]:
    unclipped_N = ratio_N * advantages_N
    clipped_N = _clip(ratio_N, inputs, low, high) * advantages_N
    is_clipped_N = (clipped_N < unclipped_N).float()
    return -torch.minimum(unclipped_N, clipped_N), {"ratio": ratio_N, "clip_fraction": is_clipped_N}


def _clip(ratio_N: torch.Tensor, inputs: Tensors, low: float, high: float) -> torch.Tensor:
    """Thresholds per token, where a Datum has them, precede those of the configuration."""
    low_N, high_N = inputs.get("clip_low_threshold"), inputs.get("clip_high_threshold")
    if low_N is None and high_N is None:
        return ratio_N.clamp(low, high)
    low_N = torch.full_like(ratio_N, low) if low_N is None else low_N
    return ratio_N.clamp(low_N, torch.full_like(ratio_N, high) if high_N is None else high_N)


def cispo(
    p_N: torch.Tensor, inputs: Tensors, clip_low_threshold: float = 0.0, clip_high_threshold: float = 4.0
) -> tuple[torch.Tensor, Tensors]:
    """-stop_gradient(clip(r)) p A, MiniMax-M1 eq. 4: clips a gradient's weight, never the gradient."""
    ratio_N = (p_N - inputs["logprobs"]).exp().detach()
    weight_N = _clip(ratio_N, inputs, clip_low_threshold, clip_high_threshold)
    return -(weight_N * p_N * inputs["advantages"]), {"ratio": ratio_N, "clip_fraction": (weight_N != ratio_N).float()}


def dro(p_N: torch.Tensor, inputs: Tensors, beta: float) -> tuple[torch.Tensor, Tensors]:
    """-[p A - beta / 2 (p - q)^2], Richemond et al. 2024: a quadratic penalty instead of a ratio."""
    gap_N = p_N - inputs["logprobs"]
    return -(p_N * inputs["advantages"] - 0.5 * beta * gap_N.square()), {"ratio": gap_N.detach().exp()}


@dataclass(frozen=True)
class Loss:
    """A loss and the arrays every Datum needs for it besides `target_tokens`."""

    fn: LossFn
    required: tuple[str, ...]
    scales_with_advantage: bool = False  # no advantage, no gradient
    of_sequences: bool = False  # reads inputs["sequence"], the number of a token's Datum


POLICY_INPUTS = ("logprobs", "advantages")
LOSSES: dict[str, Loss] = {
    "cross_entropy": Loss(cross_entropy, ("weights",)),
    "importance_sampling": Loss(importance_sampling, POLICY_INPUTS, scales_with_advantage=True),
    "reinforce": Loss(reinforce, POLICY_INPUTS, scales_with_advantage=True),
    "ppo": Loss(ppo, POLICY_INPUTS, scales_with_advantage=True),
    "cispo": Loss(cispo, POLICY_INPUTS, scales_with_advantage=True),
    "gspo": Loss(gspo, POLICY_INPUTS, scales_with_advantage=True, of_sequences=True),
    "dro": Loss(dro, POLICY_INPUTS),
}
