"""Comparisons as tokens: pairs of a chosen and a rejected Datum, their batches and sequence
logprobs. Rendered once, when the data are built. Left out: truncating answers, which could make
them equal.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from posttrain.backend.config import in_float64
from posttrain.backend.errors import DataError
from posttrain.backend.types import Datum
from posttrain.renderers.types import Message, Renderer, TrainOnWhat
from preference.losses import PairLogprobs
from preference.types import LabeledComparison, Ties
from supervised.data import offering
from supervised.examples import Examples, by_processes

if TYPE_CHECKING:  # commands answer before the clients are imported
    from posttrain.backend.training_client import TrainingClient


@dataclass(frozen=True)
class Pair:
    """`weights` of the two Datums are 1 on the answer's tokens. `reference` is (s_ref chosen, s_ref
    rejected) after with_reference."""

    chosen: Datum
    rejected: Datum
    reference: tuple[float, float] = (float("nan"), float("nan"))

    @property
    def length(self) -> int:
        """Tokens of the longer Datum."""
        return max(self.chosen.model_input.length, self.rejected.model_input.length)


class Pairs(Sequence[Pair]):
    """Of examples side by side: chosen, rejected, chosen, rejected, ..."""

    def __init__(self, examples: Examples):
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples) // 2

    def __getitem__(self, index: Any) -> Any:
        place = range(len(self))[index]
        return Pair(self._examples[2 * place], self._examples[2 * place + 1])


class Referenced(Sequence[Pair]):
    """Pairs with their reference, (P, 2) float64."""

    def __init__(self, pairs: Sequence[Pair], reference_P2: np.ndarray):
        self._pairs, self._reference_P2 = pairs, reference_P2

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: Any) -> Any:
        place = range(len(self))[index]
        chosen, rejected = self._reference_P2[place].tolist()
        return replace(self._pairs[place], reference=(chosen, rejected))


def render_pairs(
    comparisons: Sequence[LabeledComparison],
    renderer: Renderer,
    max_length: int | None = None,
    ties: Ties = "drop",
    overlong: Literal["drop", "raise"] = "drop",
    kind: str = "training",
) -> Sequence[Pair]:
    """Prints one line with the counts. A tie is dropped, an error, or ("both") a pair in each
    order, which asks for equal rewards."""
    limit = int(max_length or min(renderer.tokenizer.model_max_length, 1 << 30))
    examples, dropped = Examples("sum"), Counter[str]()
    render = partial(_rendered, renderer, limit, ties, overlong)
    for part, faults in by_processes(render, comparisons, f"tokenizing {kind} comparisons"):
        examples.extend(part)
        dropped.update(faults)
    pairs = Pairs(examples)
    line = f"{len(pairs):,} {kind} pairs" + "".join(f"; {count:,} {fault} dropped" for fault, count in dropped.items())
    if not pairs:
        raise DataError(f"{line}: none is left; raise max_length or check the data")
    print(line, flush=True)
    return pairs


def _rendered(
    renderer: Renderer, limit: int, ties: Ties, overlong: str, comparisons: Sequence[LabeledComparison]
) -> tuple[Examples, Counter[str]]:
    """The examples of the pairs, and a count of the dropped."""
    examples, dropped = Examples("sum"), Counter[str]()
    for labeled in comparisons:
        if labeled.label == "Tie" and ties != "both":
            if ties == "raise":
                raise DataError(f"{labeled.where}: a tie; ties=drop leaves ties out, ties=both asks for equal rewards")
            dropped["ties"] += 1
            continue
        pairs = Pairs(sides := Examples("sum"))
        for answers in _orders(labeled):
            _append(sides, labeled, answers, renderer)
        pair = pairs[0]
        if (length := pair.length + 1) > limit:
            if overlong == "raise":
                raise DataError(
                    f"{labeled.where}: {length} tokens, more than max_length={limit}; overlong=drop leaves it out"
                )
            dropped[f"longer than {limit} tokens"] += 1
        elif _targets(pair.chosen) == _targets(pair.rejected):
            dropped["of the same tokens"] += 1
        else:
            examples.extend(sides)
    return examples, dropped


def _orders(labeled: LabeledComparison) -> list[tuple[Sequence[Message], Sequence[Message]]]:
    """(better, worse), or both orders for a tie."""
    sides = labeled.comparison
    both = [(sides.completion_A, sides.completion_B), (sides.completion_B, sides.completion_A)]
    return both if labeled.label == "Tie" else [labeled.chosen_and_rejected()]


def _append(
    examples: Examples, labeled: LabeledComparison, answers: Sequence[Sequence[Message]], renderer: Renderer
) -> None:
    prompt = [_marked(message, False) for message in labeled.comparison.prompt_conversation]
    renderer = offering({"tools": list(labeled.comparison.tools)}, renderer)
    for answer in answers:
        marked = [_marked(message, message["role"] == "assistant") for message in answer]
        try:
            examples.append(*renderer.build_supervised_example([*prompt, *marked], TrainOnWhat.CUSTOMIZED))
        except DataError as error:
            raise DataError(f"{labeled.where}: {error}") from error


def _marked(message: Message, trainable: bool) -> Message:
    return {**message, "trainable": trainable}


def _targets(datum: Datum) -> list[int]:
    return datum.loss_fn_inputs["target_tokens"].tolist()


def as_data(pairs: Sequence[Pair]) -> list[Datum]:
    """Chosen, rejected, chosen, rejected, ..."""
    return [datum for pair in pairs for datum in (pair.chosen, pair.rejected)]


def micro_batches_of_pairs(pairs: Sequence[Pair], token_budget: int) -> list[list[Pair]]:
    """Pairs sorted by length, cut so that both answers of each, padded, fit the budget. A pair
    longer than the budget goes alone."""
    batches: list[list[Pair]] = [[]]
    for pair in sorted(pairs, key=lambda pair: -pair.length):
        if batches[-1] and 2 * batches[-1][0].length * (len(batches[-1]) + 1) > token_budget:
            batches.append([])
        batches[-1].append(pair)
    return batches


async def weighted_logprobs(client: "TrainingClient", data_D: Sequence[Datum]) -> list[torch.Tensor]:
    """(T,) token logprobs by one forward pass without gradient, 0 at tokens of weight 0."""
    output = await client.forward(data_D, "cross_entropy", all_logprobs=False)
    return [out["logprobs"].to_torch().nan_to_num() for out in output.loss_fn_outputs]


def sequence_logprobs(data_D: Sequence[Datum], logprobs_D: Sequence[torch.Tensor]) -> torch.Tensor:
    """(D,) sums of the answers' token logprobs, differentiable, in float64 for subtraction."""
    weights_DT = torch.from_numpy(np.concatenate([datum.loss_fn_inputs["weights"].array for datum in data_D]))
    owner_DT = torch.repeat_interleave(torch.tensor([len(logprobs) for logprobs in logprobs_D]))
    logprobs_DT = in_float64(torch.cat(list(logprobs_D)))
    weighted_DT = logprobs_DT * weights_DT.to(logprobs_DT.device)
    return weighted_DT.new_zeros(len(data_D)).index_add(0, owner_DT.to(logprobs_DT.device), weighted_DT)


def pair_logprobs(pairs: Sequence[Pair], sequence_logprobs_D: torch.Tensor) -> PairLogprobs:
    """From the sequence logprobs of `as_data(pairs)`."""
    reference_P2 = sequence_logprobs_D.new_tensor([pair.reference for pair in pairs])
    tokens_P2 = sequence_logprobs_D.new_tensor(
        [[_num_tokens(pair.chosen), _num_tokens(pair.rejected)] for pair in pairs]
    )
    return PairLogprobs(*sequence_logprobs_D.view(-1, 2).T, *reference_P2.T, *tokens_P2.T)


def _num_tokens(datum: Datum) -> float:
    return float(datum.loss_fn_inputs["weights"].array.sum())
