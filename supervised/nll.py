"""Negative log-likelihood: of a training batch from its own forward pass, and of a held-out set."""

from collections.abc import Sequence

import numpy as np

from backend.training_client import TrainingClient
from backend.types import Datum, TensorData
from supervised.types import SupervisedDataset


def weighted_sums(data_D: Sequence[Datum], logprobs_D: Sequence[TensorData]) -> tuple[float, float]:
    """(sum of -w log p, sum of w) over all tokens, where every token that carries loss weighs 1 whatever the reduction made of w."""
    pairs = list(zip(data_D, logprobs_D, strict=True))
    counted = np.concatenate([datum.loss_fn_inputs["weights"].array > 0 for datum, _ in pairs])
    logprobs = np.concatenate([logprobs.array for _, logprobs in pairs]).astype(np.float64)
    return float(-logprobs[counted].sum()), float(counted.sum())


class NLLEvaluator:
    """`test/nll` in nats per token that carries loss: one forward pass over the held-out set, no gradient."""

    def __init__(self, dataset: SupervisedDataset, name: str = "test"):
        self._batches = [dataset.get_batch(i) for i in range(len(dataset))]
        self._name = name

    async def __call__(self, client: TrainingClient) -> dict[str, float]:
        submitted = [(batch, client.forward(batch, "cross_entropy")) for batch in self._batches]
        sums = [weighted_sums(batch, [out["logprobs"] for out in (await future).loss_fn_outputs]) for batch, future in submitted]
        total, count = map(sum, zip(*sums, strict=True))
        return {f"{self._name}/nll": total / count}
