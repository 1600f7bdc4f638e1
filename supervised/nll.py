"""Negative log-likelihood of a training batch (from its own forward pass) and of a held-out set, as
two means over the tokens with loss: `nll` weighs tokens equally, as papers report; `weighted_nll`
uses the training weights. With reduction="mean" (the default) the latter is the mean over examples
of each example's mean; with "sum" it equals `nll`. Bits per byte of a held-out set compare models
with different tokenizers:

    bits_per_byte = sum of -log p over the tokens with loss / (log 2 * UTF-8 bytes of their text)
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import chz
import numpy as np

from posttrain.backend.errors import DataError
from posttrain.backend.types import Datum, TensorData
from posttrain.renderers.types import Renderer, Tokenizer
from supervised.evaluators import CustomEvaluator, Evaluated, EvaluatorBuilder
from supervised.names import DATASETS
from supervised.types import SupervisedDataset, SupervisedDatasetBuilder, datasets_of

if TYPE_CHECKING:  # commands answer before torch is imported
    from posttrain.backend.training_client import TrainingClient


def nll_sums(data_D: Sequence[Datum], logprobs_D: Sequence[TensorData]) -> np.ndarray:
    """(4,) over the tokens with loss: sum of -log p, their number, sum of -w log p, sum of w."""
    weights = np.concatenate([datum.loss_fn_inputs["weights"].array for datum in data_D]).astype(np.float64)
    nll = -np.concatenate([logprobs.array for logprobs in logprobs_D]).astype(np.float64)
    counted = weights > 0
    return np.array([nll[counted].sum(), counted.sum(), (weights * nll)[counted].sum(), weights[counted].sum()])


def nll_means(sums: np.ndarray) -> tuple[float, float]:
    """`nll` and `weighted_nll` from the sums of nll_sums. DataError without a token that carries loss."""
    nll, count, weighted_nll, weight = sums.tolist()
    if not count:
        raise DataError("no token carries loss: every weight of these examples is 0")
    return nll / count, weighted_nll / weight


def trained_bytes(data_D: Sequence[Datum], tokenizer: Tokenizer) -> int:
    """UTF-8 bytes of the text of the tokens with loss; special tokens, such as a stop, have none."""
    counted = [
        datum.loss_fn_inputs["target_tokens"].array[datum.loss_fn_inputs["weights"].array > 0].tolist()
        for datum in data_D
    ]
    return sum(len(text.encode()) for text in tokenizer.batch_decode(counted, skip_special_tokens=True))


class NLLEvaluator:
    """`test/nll` and `test/weighted_nll` in nats per token, and `test/bits_per_byte` where the tokens
    are text: one forward pass, no gradient."""

    def __init__(self, dataset: SupervisedDataset, name: str = "test"):
        self._batches = [dataset.get_batch(i) for i in range(len(dataset))]
        self._name, self._bytes = name, -1

    async def __call__(self, client: "TrainingClient") -> dict[str, float]:
        submitted = [(batch, client.forward(batch, "cross_entropy", all_logprobs=False)) for batch in self._batches]
        sums = [
            nll_sums(batch, [out["logprobs"] for out in (await future).loss_fn_outputs]) for batch, future in submitted
        ]
        nll, weighted_nll = nll_means(np.sum(sums, axis=0))
        metrics = {f"{self._name}/nll": nll, f"{self._name}/weighted_nll": weighted_nll}
        if self._bytes < 0:
            tokenizer = client.get_tokenizer()
            self._bytes = sum(trained_bytes(batch, tokenizer) for batch in self._batches)
        if self._bytes:
            metrics[f"{self._name}/bits_per_byte"] = float(np.sum(sums, axis=0)[0]) / (math.log(2) * self._bytes)
        return metrics


@chz.chz
class DatasetNLL(EvaluatorBuilder):
    """`NAME/nll` of another data set: its held-out examples, or all where it holds none out."""

    short_names = {"dataset": DATASETS}
    dataset: SupervisedDatasetBuilder = chz.field(doc="builder of the data")
    name: str = chz.field(default="nll", doc="the metrics are NAME/nll and NAME/weighted_nll")

    async def __call__(self, renderer: Renderer) -> CustomEvaluator:
        train, test = datasets_of(self.dataset, renderer)
        evaluator = NLLEvaluator(test if test is not None else train, self.name)

        async def evaluate(model: Evaluated) -> dict[str, float]:
            return await evaluator(model.training_client)

        return evaluate
