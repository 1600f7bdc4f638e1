"""Value guidance: how a classifier of candidate next tokens shifts the reference policy's logits
while decoding. Formulas only.

Z is the return, in [0, 1], of what the reference policy makes of state s and action a; a classifier
gives its distribution. With `kl_coef`, the weight of the KL to the reference in the objective E[Z]
- kl_coef KL(pi || pi_ref),

    q_sharp   pi(a|s) ~ pi_ref(a|s) E[exp(Z / kl_coef)]     Q# (Zhou et al. 2025, arXiv 2502.20548): the optimum of that objective where,
                                                            as in a language model, an action leads
                                                            to one state
    cd        pi(a|s) ~ pi_ref(a|s) exp(E[Z] / kl_coef)     controlled decoding (Mudgal et al. 2024), as that paper compares with it
    cd_code   pi(a|s) ~ pi_ref(a|s) P(Z = 1)                what Q#'s star-graph code calls CD. It adds log(p / eta), in which eta cancels;
                                                            so does `kl_coef` here. FUDGE (Yang and
                                                            Klein 2021) by another name

All return log-space offsets of the reference's logits. For a Bernoulli return with logit z, the
first is softplus(z + 1/kl_coef) - softplus(z); it is computed as a logsumexp, which has no
difference of large numbers.

A trap: `kl_coef` is `eta` of Q#'s star-graph code (0.1), and 1 / `--eta` of its math code (10).
Left out: V heads, which would need a second classifier's pass, and offsets from an MSE head.
"""

from typing import Literal

import chz
import torch

from posttrain.backend.ranges import COUNT, POSITIVE

Method = Literal["q_sharp", "cd", "cd_code"]


@chz.chz
class Guidance:
    method: Method = chz.field(default="q_sharp", doc="q_sharp, cd (expectation / kl_coef) or cd_code (log P(right))")
    kl_coef: float = chz.field(
        default=0.1,
        validator=POSITIVE,
        doc="weight of the KL to the reference: smaller trusts the classifier more; cd_code has none",
    )
    top_k: int | None = chz.field(
        default=10,
        validator=COUNT,
        doc="the reference's likeliest tokens that the classifier is asked about; None = all",
    )
    others: Literal["dropped", "kept"] = chz.field(
        default="dropped", doc="the other tokens: never sampled, or (Q#'s math code) with their logits as they are"
    )
    temperature: float = chz.field(
        default=1.0, validator=POSITIVE, doc="of the reference's logits, before they are shifted"
    )

    def offsets(self, values_B_C_K: torch.Tensor) -> torch.Tensor:
        """offsets_B_C of the candidates, from the classifier's outputs for them (see `log_pmf`)."""
        match self.method:
            case "q_sharp":
                return q_sharp(values_B_C_K, self.kl_coef)
            case "cd":
                return cd(values_B_C_K, self.kl_coef)
            case "cd_code":
                return cd_code(values_B_C_K)


def log_pmf(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(..., A) log-probabilities of the returns and the A returns themselves, from (..., K) outputs
    of a classifier.

    One output is the logit of a return of 1 rather than 0; K >= 2 are the logits of K atoms, evenly
    from 0 to 1. In fp32 at least: bf16 would lose small probabilities and differences alike.
    """
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    if values.shape[-1] == 1:
        values = torch.cat([torch.zeros_like(values), values], dim=-1)
    return values.log_softmax(-1), atoms(values.shape[-1]).to(values)


def atoms(num_atoms: int) -> torch.Tensor:
    return torch.linspace(0, 1, num_atoms, dtype=torch.float64)


def q_sharp(values: torch.Tensor, kl_coef: float) -> torch.Tensor:
    """log E[exp(Z / kl_coef)]: (..., K) to (...). Times kl_coef it is Q*, the soft value."""
    log_pmf_A, returns_A = log_pmf(values)
    return (log_pmf_A + returns_A / kl_coef).logsumexp(-1)


def cd(values: torch.Tensor, kl_coef: float) -> torch.Tensor:
    """E[Z] / kl_coef: (..., K) to (...)."""
    log_pmf_A, returns_A = log_pmf(values)
    return (log_pmf_A.exp() * returns_A).sum(-1) / kl_coef


def cd_code(values: torch.Tensor) -> torch.Tensor:
    """log E[Z], for a Bernoulli return log P(Z = 1): (..., K) to (...). -inf for no p that a finite
    logit can give.
    """
    log_pmf_A, returns_A = log_pmf(values)
    return (log_pmf_A + returns_A.log()).logsumexp(-1)


def candidates(logits_B_V: torch.Tensor, top_k: int | None) -> torch.Tensor:
    """ids_B_C of the tokens to be judged, likeliest first."""
    return logits_B_V.topk(min(top_k or logits_B_V.shape[-1], logits_B_V.shape[-1]), dim=-1).indices


def guided_logits(
    logits_B_V: torch.Tensor,
    candidates_B_C: torch.Tensor,
    offsets_B_C: torch.Tensor,
    others: Literal["dropped", "kept"],
) -> torch.Tensor:
    """(B, V), not normalised. Where others are kept, the worst candidate is too: the offsets are
    those above the least of them.
    """
    shifted_B_C = logits_B_V.gather(-1, candidates_B_C) + offsets_B_C
    if others == "dropped":
        return torch.full_like(logits_B_V, -torch.inf).scatter(-1, candidates_B_C, shifted_B_C)
    return logits_B_V.scatter(-1, candidates_B_C, shifted_B_C - offsets_B_C.min(-1, keepdim=True).values)
