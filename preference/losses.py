"""Pairwise preference losses: DPO, RPO, IPO and SimPO of the logprobs of whole answers. s is the
sum of an answer's token logprobs under the policy, s_ref under the reference, |y| its number of
tokens; c is the chosen, r the rejected answer. Arrays are (P,), an entry per pair. Left out: losses
on unpaired answers (KTO), on-policy pairs.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import chz

from posttrain.backend.ranges import NON_NEGATIVE, POSITIVE, Range

if TYPE_CHECKING:  # commands answer before torch is imported
    import torch

Pairwise = tuple["torch.Tensor", "torch.Tensor"]  # chosen answers, rejected answers


@dataclass(frozen=True)
class PairLogprobs:
    """Sums over the tokens of each answer, and their numbers. SimPO reads no reference."""

    policy_chosen_P: "torch.Tensor"
    policy_rejected_P: "torch.Tensor"
    ref_chosen_P: "torch.Tensor"
    ref_rejected_P: "torch.Tensor"
    chosen_tokens_P: "torch.Tensor"
    rejected_tokens_P: "torch.Tensor"

    def log_ratios(self, length_normalised: bool) -> Pairwise:
        """s - s_ref of the chosen and the rejected answers; per token with `length_normalised`."""
        chosen_P, rejected_P = self.policy_chosen_P - self.ref_chosen_P, self.policy_rejected_P - self.ref_rejected_P
        return (
            (chosen_P / self.chosen_tokens_P, rejected_P / self.rejected_tokens_P)
            if length_normalised
            else (chosen_P, rejected_P)
        )


@chz.chz
class PreferenceLoss:
    needs_reference = True  # a class constant: whether s_ref is read

    beta: float = chz.field(
        default=0.1,
        validator=POSITIVE,
        doc="KL strength: the implicit reward is beta * (s - s_ref); higher stays nearer to the reference",
    )

    def __call__(self, logprobs: PairLogprobs) -> "torch.Tensor":
        """The loss of each pair."""
        raise NotImplementedError

    def rewards(self, logprobs: PairLogprobs) -> Pairwise:
        """Implicit rewards of the chosen and the rejected answers; accuracy compares them."""
        raise NotImplementedError


@chz.chz
class DPO(PreferenceLoss):
    """-(1 - e) log sigmoid(m) - e log sigmoid(-m), where m = beta ((s_c - s_ref_c) - (s_r -
    s_ref_r)): Rafailov et al. 2023, equation 7.

    e > 0 is the conservative DPO of Mitchell 2023; length_normalised divides s and s_ref by |y|
    (Lambert et al. 2024, Tulu 3, section 5).
    """

    label_smoothing: float = chz.field(
        default=0.0, validator=Range(0, 0.5, below=True), doc="share of labels assumed to be wrong; 0 = none"
    )
    length_normalised: bool = chz.field(
        default=False, doc="logprobs per token instead of summed (then with a beta of 2 to 10)"
    )

    def rewards(self, logprobs: PairLogprobs) -> Pairwise:
        chosen_P, rejected_P = logprobs.log_ratios(self.length_normalised)
        return self.beta * chosen_P, self.beta * rejected_P

    def __call__(self, logprobs: PairLogprobs) -> "torch.Tensor":
        from torch.nn.functional import logsigmoid

        chosen_P, rejected_P = self.rewards(logprobs)
        right_P, wrong_P = logsigmoid(chosen_P - rejected_P), logsigmoid(rejected_P - chosen_P)
        return -(1 - self.label_smoothing) * right_P - self.label_smoothing * wrong_P


@chz.chz
class RPO(DPO):
    """DPO - a s_c: adds the likelihood of the chosen answer. The sum over its tokens is the
    star-graph paper's; nll_per_token, a s_c / |y_c|, is iterative RPO (Pang et al. 2024, equation
    1)."""

    nll_coef: float = chz.field(
        default=1.0, validator=NON_NEGATIVE, doc="weight of the chosen answer's negative log-likelihood"
    )
    nll_per_token: bool = chz.field(default=False, doc="divide that likelihood by the answer's length")

    def __call__(self, logprobs: PairLogprobs) -> "torch.Tensor":
        nll_P = -logprobs.policy_chosen_P / (logprobs.chosen_tokens_P if self.nll_per_token else 1)
        return DPO.__call__(self, logprobs) + self.nll_coef * nll_P


@chz.chz
class IPO(PreferenceLoss):
    """(h - 1 / (2 beta))^2, where h = (s_c - s_ref_c) - (s_r - s_ref_r). Azar et al. 2023, equation
    17, with tau = beta."""

    length_normalised: bool = chz.field(default=False, doc="logprobs per token instead of summed")

    def rewards(self, logprobs: PairLogprobs) -> Pairwise:
        chosen_P, rejected_P = logprobs.log_ratios(self.length_normalised)
        return self.beta * chosen_P, self.beta * rejected_P

    def __call__(self, logprobs: PairLogprobs) -> "torch.Tensor":
        chosen_P, rejected_P = logprobs.log_ratios(self.length_normalised)
        return (chosen_P - rejected_P - 1 / (2 * self.beta)) ** 2


@chz.chz
class SimPO(PreferenceLoss):
    """-log sigmoid(beta s_c / |y_c| - beta s_r / |y_r| - gamma), no reference. Meng et al. 2024,
    eq. 6."""

    needs_reference = False

    beta: float = chz.field(default=2.0, validator=POSITIVE, doc="scale of the reward, the logprob per token")
    gamma: float = chz.field(
        default=1.0, validator=NON_NEGATIVE, doc="target margin between the chosen and the rejected reward"
    )

    def rewards(self, logprobs: PairLogprobs) -> Pairwise:
        chosen_P = self.beta * logprobs.policy_chosen_P / logprobs.chosen_tokens_P
        return chosen_P, self.beta * logprobs.policy_rejected_P / logprobs.rejected_tokens_P

    def __call__(self, logprobs: PairLogprobs) -> "torch.Tensor":
        from torch.nn.functional import logsigmoid

        chosen_P, rejected_P = self.rewards(logprobs)
        return -logsigmoid(chosen_P - rejected_P - self.gamma)


def pair_metrics(loss: PreferenceLoss, logprobs: PairLogprobs) -> dict[str, float]:
    """Means over pairs. `dpo_loss` is any method's loss. Equal rewards are wrong in `accuracy`."""
    chosen_P, rejected_P = loss.rewards(logprobs)
    means = {
        "dpo_loss": loss(logprobs),
        "accuracy": (chosen_P > rejected_P).double(),
        "margin": chosen_P - rejected_P,
        "chosen_reward": chosen_P,
        "rejected_reward": rejected_P,
        "chosen_logprob": logprobs.policy_chosen_P,
        "rejected_logprob": logprobs.policy_rejected_P,
    }
    return {name: value_P.mean().item() for name, value_P in means.items()}
