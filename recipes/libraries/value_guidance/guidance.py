"""Value guidance: a classifier of the return Z in [0, 1] of (state s, token a) shifts the logits of
the reference policy. Objective: E[Z] - kl_coef KL(pi || pi_ref).

    q_sharp   pi(a|s) ~ pi_ref(a|s) E[exp(Z / kl_coef)]   Q# (Zhou et al. 2025, arXiv 2502.20548): its optimum
    cd        pi(a|s) ~ pi_ref(a|s) exp(E[Z] / kl_coef)   controlled decoding (Mudgal et al. 2024)
    cd_code   pi(a|s) ~ pi_ref(a|s) P(Z = 1)              "CD" in Q#'s star-graph code; FUDGE (Yang and Klein 2021)

`kl_coef` is `eta` of Q#'s star-graph code (0.1), and 1 / `--eta` of its math code (10). Left out: V
heads, offsets from an MSE head.
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
        doc="weight of the KL to the reference: a smaller weight trusts the classifier more; cd_code has none",
    )
    top_k: int | None = chz.field(
        default=10,
        validator=COUNT,
        doc="number of the reference's likeliest tokens that the classifier scores; None = all",
    )
    others: Literal["dropped", "kept"] = chz.field(
        default="dropped", doc="the other tokens: never sampled, or their logits unchanged (Q#'s math code)"
    )
    temperature: float = chz.field(default=1.0, validator=POSITIVE, doc="of the reference's logits, before the shift")

    def offsets(self, values_B_C_K: torch.Tensor) -> torch.Tensor:
        """offsets_B_C of the candidates' logits, from the classifier's outputs (see `log_pmf`)."""
        match self.method:
            case "q_sharp":
                return q_sharp(values_B_C_K, self.kl_coef)
            case "cd":
                return cd(values_B_C_K, self.kl_coef)
            case "cd_code":
                return cd_code(values_B_C_K)


def log_pmf(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities (..., A) of the returns, and the A returns, from a classifier's outputs
    (..., K). K = 1: the logit of a Bernoulli return; K >= 2: logits of K returns, evenly spaced
    from 0 to 1. At least fp32: bf16 would lose small probabilities.
    """
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    if values.shape[-1] == 1:
        values = torch.cat([torch.zeros_like(values), values], dim=-1)
    return values.log_softmax(-1), atoms(values.shape[-1]).to(values)


def atoms(num_atoms: int) -> torch.Tensor:
    return torch.linspace(0, 1, num_atoms, dtype=torch.float64)


def q_sharp(values: torch.Tensor, kl_coef: float) -> torch.Tensor:
    """log E[exp(Z / kl_coef)]: (..., K) to (...). Times kl_coef it is the soft value Q*."""
    log_pmf_A, returns_A = log_pmf(values)
    return (log_pmf_A + returns_A / kl_coef).logsumexp(-1)


def cd(values: torch.Tensor, kl_coef: float) -> torch.Tensor:
    """E[Z] / kl_coef: (..., K) to (...)."""
    log_pmf_A, returns_A = log_pmf(values)
    return (log_pmf_A.exp() * returns_A).sum(-1) / kl_coef


def cd_code(values: torch.Tensor) -> torch.Tensor:
    """log E[Z], of a Bernoulli return log P(Z = 1): (..., K) to (...). Finite for finite logits."""
    log_pmf_A, returns_A = log_pmf(values)
    return (log_pmf_A + returns_A.log()).logsumexp(-1)


def candidates(logits_B_V: torch.Tensor, top_k: int | None) -> torch.Tensor:
    """ids_B_C of the tokens to score, likeliest first."""
    return logits_B_V.topk(min(top_k or logits_B_V.shape[-1], logits_B_V.shape[-1]), dim=-1).indices


def guided_logits(
    logits_B_V: torch.Tensor,
    candidates_B_C: torch.Tensor,
    offsets_B_C: torch.Tensor,
    others: Literal["dropped", "kept"],
) -> torch.Tensor:
    """(B, V), not normalised. With others="kept" the smallest offset is subtracted from all, so
    that the worst candidate's logit is unchanged too.
    """
    shifted_B_C = logits_B_V.gather(-1, candidates_B_C) + offsets_B_C
    if others == "dropped":
        return torch.full_like(logits_B_V, -torch.inf).scatter(-1, candidates_B_C, shifted_B_C)
    return logits_B_V.scatter(-1, candidates_B_C, shifted_B_C - offsets_B_C.min(-1, keepdim=True).values)
