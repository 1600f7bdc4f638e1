"""KL penalty against a frozen reference, per sampled token ("advantage") or per member ("reward"),
on d_t = log q(token) - log ref(token), whose mean estimates KL(policy || reference) ("k1").

  advantage  A_t += coef * (mean of d over the minibatch - d_t) (tinker_semantics 2.2), or with a discount
             A_t -= coef * discounted sum of d over this sampled token and the later ones of the rollout
             (REINFORCE++)
  reward     R   -= coef * sum of d_t over the trajectory (RLOO, LaTRO), before the baseline
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import chz
import numpy as np

from posttrain.backend.errors import ConfigError
from posttrain.backend.ranges import NON_NEGATIVE, SHARE
from posttrain.backend.tokenizers import check_vocabulary
from posttrain.backend.types import Datum, LoraConfig
from posttrain.renderers.types import Tokenizer
from rl.data_processing import Row, sampled_in_time, split_by_row
from rl.metrics import TokenMean
from rl.types import Metrics, TrajectoryGroup

if TYPE_CHECKING:  # commands answer before torch is imported
    from posttrain.backend.service_client import ServiceClient
    from posttrain.backend.training_client import TrainingClient


@chz.chz
class KLPenalty:
    coef: float = chz.field(
        default=0.0, validator=NON_NEGATIVE, doc="weight of the penalty; 0 = no penalty, and no reference is loaded"
    )
    where: Literal["advantage", "reward"] = chz.field(
        default="advantage", doc="subtract the penalty from each token's advantage, or its sum from the reward"
    )
    discount: float = chz.field(
        default=0.0,
        validator=SHARE,
        doc="for kl.where=advantage: discount per token of the penalties of later tokens of the rollout; 0 = own penalty only",
    )
    reference_path: str | None = chz.field(
        default=None,
        munger=lambda _, path: path and str(Path(path).expanduser()),
        doc="the reference: a checkpoint or a model with the policy's tokenizer; None = the weights the run began with",
    )

    def check(self, tokenizer: Tokenizer) -> None:
        """ConfigError for a reference with another vocabulary, before any model is loaded."""
        if self.coef and self.reference_path:
            check_vocabulary(f"kl.reference_path={self.reference_path}", self.reference_path, tokenizer)


class Reference:
    """The frozen policy, computed by torch like the trained one: equal weights, equal logprobs.
    `without_adapter`: the client is the policy's own, and the reference its base."""

    def __init__(self, client: "TrainingClient", without_adapter: bool = False):
        self._client, self._without_adapter = client, without_adapter

    async def logprobs(self, data_D: Sequence[Datum]) -> list[np.ndarray]:
        """(T,) per datum, at each token's sampling temperature; NaN at tokens that were not sampled."""
        output = await self._client.forward(
            data_D, "importance_sampling", without_adapter=self._without_adapter, all_logprobs=False
        )
        return [out["logprobs"].array for out in output.loss_fn_outputs]


def starting_weights(
    service: "ServiceClient", model_name: str, path: str | None, lora: LoraConfig | None, seed: int
) -> "TrainingClient":
    """A second copy of the starting weights. An adapter that is still zero is left out."""
    client = service.create_training_client(model_name, lora if path else None, seed)
    if path:
        client.load_state(path).result()
    return client


def other_model(
    service: "ServiceClient", path: str, policy: "TrainingClient", option: str = "kl.reference_path"
) -> "TrainingClient":
    """A checkpoint of any architecture, full or LoRA, or a model by folder or name. ConfigError if
    its context is shorter than the policy's."""
    folder = Path(path).expanduser()
    client = (
        service.create_training_client_from_state(path) if folder.is_dir() else service.create_training_client(path)
    )
    policy_length, reference_length = policy.get_info().max_length, client.get_info().max_length
    if reference_length < policy_length:
        raise ConfigError(
            f"{option}={path}: it reads {reference_length} tokens, the policy {policy_length}: give "
            f"backend.max_length={reference_length}, or another model"
        )
    return client


def sampled_minus_reference(rows: Sequence[Row], reference_logprobs_D: Sequence[np.ndarray]) -> list[np.ndarray]:
    """d, (T,) per row, 0 outside the mask."""
    return [
        np.where(row.mask_T > 0, row.logprobs_T - reference_T, 0)
        for row, reference_T in zip(rows, reference_logprobs_D, strict=True)
    ]


def kl_metrics(rows: Sequence[Row], difference_D: Sequence[np.ndarray]) -> Metrics:
    """Per sampled token: `kl_policy_base`, the mean of d; `kl_policy_base_k3`, the mean of exp(-d)
    - 1 + d, never negative."""
    mask = np.concatenate([row.mask_T for row in rows]) > 0
    d = np.concatenate(difference_D)[mask].astype(np.float64)
    means = {"kl_policy_base": d.mean(), "kl_policy_base_k3": (np.expm1(-d) + d).mean()}
    return {name: TokenMean(mean, len(d)) for name, mean in means.items()}


def mean_difference(rows: Sequence[Row], difference_D: Sequence[np.ndarray]) -> TokenMean:
    """The mean of d per sampled token."""
    tokens = sum(int(row.mask_T.sum()) for row in rows)
    return TokenMean(sum(float(d_T.sum(dtype=np.float64)) for d_T in difference_D) / tokens, tokens)


def penalized_advantages(
    rows: Sequence[Row], difference_D: Sequence[np.ndarray], coef: float, discount: float, centre: bool = True
) -> list[Row]:
    """Advantages outside the mask do not change, whatever the discount. `centre`: subtract the mean
    of d per sampled token, without a discount only."""
    # A discounted sum would hold the mean once for each later token: a reward for length, not a baseline.
    # a float itself: numpy would compute with its subclass in float64
    mean = float(mean_difference(rows, difference_D)) if centre and not discount else 0.0
    gain_D = [(mean - d_T) * row.mask_T for row, d_T in zip(rows, difference_D, strict=True)]
    if discount:
        gain_D = _with_later(rows, gain_D, discount)
    return [
        replace(row, advantages_T=row.advantages_T + np.float32(coef) * row.mask_T * gain_T)
        for row, gain_T in zip(rows, gain_D, strict=True)
    ]


def _with_later(rows: Sequence[Row], x_D: Sequence[np.ndarray], discount: float) -> list[np.ndarray]:
    """Discounted sums over the sampled tokens of a trajectory, in whichever rows they are; 0 elsewhere."""
    flat = np.concatenate(x_D)
    out = np.zeros_like(flat)
    for place_N in sampled_in_time(rows).values():
        out[place_N] = discounted(flat[place_N], discount)
    return split_by_row(rows, out)


def discounted(x_N: np.ndarray, discount: float) -> np.ndarray:
    """y_n = sum over k >= 0 of discount^k x_{n+k}."""
    y_N, running = np.zeros_like(x_N), 0.0
    for n in reversed(range(len(x_N))):
        running = float(x_N[n]) + discount * running
        y_N[n] = running
    return y_N


def penalized_rewards(
    groups_P: Sequence[TrajectoryGroup], rows: Sequence[Row], difference_D: Sequence[np.ndarray], coef: float
) -> list[TrajectoryGroup]:
    """New groups, with each member's reward lower by coef * the sum of d over its rows."""
    rewards_P_G = [list(group.final_rewards_G) for group in groups_P]
    for row, d_T in zip(rows, difference_D, strict=True):
        p, g = row.origin
        rewards_P_G[p][g] -= coef * float(d_T.sum(dtype=np.float64))
    return [replace(group, final_rewards_G=rewards_G) for group, rewards_G in zip(groups_P, rewards_P_G, strict=True)]
