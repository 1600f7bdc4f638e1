"""Corrections for a sampler that is not exactly the trained policy: other kernels, bf16, or older weights.

w = p / q with p the trainer's probability of a token before the step and q the sampler's. The correction weighs each token's loss, and the
loss's own ratio then starts from the trainer's logprobs, so that clipping measures the update and not the mismatch.

    truncate    min(w, high): truncated importance sampling, Yao et al. 2025
    mask        w where low <= w <= high, else 0 (IcePop)
"""

from typing import Literal

import chz
import numpy as np

from posttrain.backend.ranges import NON_NEGATIVE
from posttrain.backend.training_client import TrainingClient
from posttrain.backend.types import Datum, TensorData
from rl.metrics import compute_sampling_metrics
from rl.types import Metrics


@chz.chz
class MismatchCorrection:
    mode: Literal["none", "truncate", "mask"] = chz.field(
        default="none", doc="what becomes of tokens whose weight is off; see mismatch.py"
    )
    low: float = chz.field(default=0.5, validator=NON_NEGATIVE, doc="mask: smallest weight that is kept")
    high: float = chz.field(default=2.0, validator=NON_NEGATIVE, doc="largest weight")


async def correct_mismatch(client: TrainingClient, data_D: list[Datum], correction: MismatchCorrection) -> Metrics:
    """One forward pass of the policy; then, in place, weighs `advantages` and replaces `logprobs` by the trainer's."""
    output = await client.forward(data_D, "importance_sampling")
    metrics = compute_sampling_metrics(
        data_D, [out["logprobs"] for out in output.loss_fn_outputs]
    )  # while `logprobs` are the sampler's
    mask = np.concatenate([datum.loss_fn_inputs["mask"].array for datum in data_D]) > 0
    weights = []
    for datum, out in zip(data_D, output.loss_fn_outputs, strict=True):
        inputs = datum.loss_fn_inputs
        trained_T, sampled_T = out["logprobs"].array, inputs["logprobs"].array
        w_T = np.exp(trained_T - sampled_T)
        weight_T = correction_weights(w_T, correction)
        inputs["advantages"] = TensorData(inputs["advantages"].array * weight_T)
        inputs["logprobs"] = TensorData(trained_T * inputs["mask"].array)
        weights.append((w_T, weight_T))
    w, weight = (np.concatenate(arrays)[mask] for arrays in zip(*weights, strict=True))
    return metrics | {
        "mismatch/weight_mean": float(w.mean()),
        "mismatch/weight_max": float(w.max()),
        "mismatch/frac_changed": float((weight != w).mean()),
        "mismatch/effective_sample_size": float(weight.sum() ** 2 / (len(weight) * np.square(weight).sum()))
        if weight.any()
        else 0.0,
    }


def correction_weights(w_T: np.ndarray, correction: MismatchCorrection) -> np.ndarray:
    if correction.mode == "truncate":
        return np.minimum(w_T, np.float32(correction.high))
    return np.where((w_T >= correction.low) & (w_T <= correction.high), w_T, np.float32(0.0))
