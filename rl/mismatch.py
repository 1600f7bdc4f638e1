"""Corrections for a sampler that differs from the trained policy: other kernels, bf16, stale
weights. w = p / q, with p the trainer's probability before the step and q the sampler's, weighs
each token's loss. The loss's ratio then starts at the trainer's logprobs: clipping measures the
update only.

  truncate  min(w, high): truncated importance sampling, Yao et al. 2025
  mask      w where low <= w <= high, else 0 (IcePop)
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import chz
import numpy as np

from posttrain.backend.ranges import NON_NEGATIVE
from rl.data_processing import Row
from rl.metrics import TokenMean, compute_sampling_metrics
from rl.types import Metrics

if TYPE_CHECKING:  # commands answer before torch is imported
    from posttrain.backend.training_client import TrainingClient


@chz.chz
class MismatchCorrection:
    mode: Literal["none", "truncate", "mask"] = chz.field(
        default="none",
        doc="weigh each token by trainer / sampler probability: truncate = at most high; mask = 0 outside low..high",
    )
    low: float = chz.field(default=0.5, validator=NON_NEGATIVE, doc="mask: the smallest weight that is kept")
    high: float = chz.field(
        default=2.0, validator=NON_NEGATIVE, doc="the largest weight: truncate cuts to it, mask drops what is above"
    )


async def corrected(
    client: "TrainingClient", rows: Sequence[Row], correction: MismatchCorrection
) -> tuple[list[Row], Metrics]:
    """The rows with weighted advantages, and the trainer's logprobs in place of the sampler's, by
    one forward pass."""
    data_D = [row.datum() for row in rows]
    output = await client.forward(data_D, "importance_sampling", all_logprobs=False)
    metrics = compute_sampling_metrics(data_D, [out["logprobs"] for out in output.loss_fn_outputs])
    mask = np.concatenate([row.mask_T for row in rows]) > 0
    new_rows, weights = [], []
    for row, out in zip(rows, output.loss_fn_outputs, strict=True):
        trained_T = np.where(row.mask_T > 0, out["logprobs"].array, np.float32(0.0))
        w_T = np.exp(trained_T - row.logprobs_T)
        weight_T = correction_weights(w_T, correction)
        weights.append((w_T, weight_T))
        new_rows.append(replace(row, advantages_T=row.advantages_T * weight_T, logprobs_T=trained_T))
    w, weight = (np.concatenate(arrays)[mask] for arrays in zip(*weights, strict=True))
    effective = float(weight.sum() ** 2 / (len(weight) * np.square(weight).sum())) if weight.any() else 0.0
    return new_rows, metrics | {
        "mismatch/weight_mean": TokenMean(w.mean(), len(w)),
        "mismatch/weight_max": float(w.max()),
        "mismatch/frac_changed": TokenMean((weight != w).mean(), len(w)),
        "mismatch/effective_sample_size": TokenMean(effective, len(w)),
    }


def correction_weights(w_T: np.ndarray, correction: MismatchCorrection) -> np.ndarray:
    if correction.mode == "truncate":
        return np.minimum(w_T, np.float32(correction.high))
    return np.where((w_T >= correction.low) & (w_T <= correction.high), w_T, np.float32(0.0))
