"""Several losses in one forward and one backward pass; common prefixes are computed once. LaTRO
trains a sampled rationale by policy gradient and the answer after it by cross-entropy. Here: the
terms, their part of a micro-batch, and a forward pass kept for a later backward.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from posttrain.backend.batching import MicroBatch, Positions, on_device
from posttrain.backend.config import in_float64
from posttrain.backend.errors import ConfigError
from posttrain.backend.losses import Loss, LossFn
from posttrain.backend.types import Datum, ForwardBackwardOutput, KeptRow, TensorData


@dataclass(frozen=True)
class LossTerm:
    """Data and their loss. In one pass, all terms have the same number of targets per token.

    `kept_D` are the rows of these data in a kept forward pass (the output's `kept_D`), with the
    same tokens, targets, temperatures and loss positions: a backward pass continues from there, if
    the weights have not changed. Without `all_logprobs`, where any term wants them, positions
    without loss get NaN, and save the output layer's work there.
    """

    data_D: Sequence[Datum]
    loss_fn: str | LossFn
    loss_fn_config: dict[str, Any] | None = None
    kept_D: Sequence[KeptRow | None] | None = None
    all_logprobs: bool = True


@dataclass(frozen=True)
class TermResults:
    """Of one rank's micro-batches: logprobs and losses, with their places among the term's tokens,
    and sums of the diagnostics."""

    places: list[np.ndarray]
    logprobs: list[torch.Tensor]
    loss_places: list[np.ndarray]
    losses: list[torch.Tensor]
    sums: dict[str, float]


def with_gradient(losses: list[torch.Tensor]) -> list[torch.Tensor]:
    """The losses. ConfigError where none of them can be differentiated."""
    if losses and not any(loss.requires_grad for loss in losses):
        raise ConfigError("the loss does not depend on the logprobs it is given: was it detached?")
    return losses


class RunningTerm:
    """A term while the micro-batches run. Its data are numbered from `first`."""

    def __init__(self, term: LossTerm, loss: Loss, first: int):
        self.term, self.loss, self.first = term, loss, first
        self._offsets_D = np.cumsum([0, *(datum.model_input.length for datum in term.data_D)])
        keys = term.data_D[0].loss_fn_inputs.keys() - {"target_tokens"}
        self._inputs = {key: np.concatenate([datum.loss_fn_inputs[key].array for datum in term.data_D]) for key in keys}
        several = term.data_D[0].loss_fn_inputs["target_tokens"].array.ndim == 2
        self._several_targets = several and (term.loss_fn != "cross_entropy" or self._inputs["weights"].ndim == 2)
        self._places, self._logprobs, self._losses = [], [], []
        self._sums: dict[str, Any] = {}
        self._loss_places: list[np.ndarray] = []

    def __call__(self, batch: MicroBatch, p_NK: torch.Tensor) -> torch.Tensor | None:
        """The loss, summed over this term's rows of the batch; None without rows."""
        row_N, place_N = self._targets_in(batch.loss)
        if not len(row_N):
            return None
        device = p_NK.device
        p = self._keep(place_N, p_NK[on_device(row_N, device)])
        inputs = {key: on_device(array[place_N], device) for key, array in self._inputs.items()}
        if self.loss.of_sequences:
            inputs["sequence"] = on_device(batch.loss.datum_N[row_N], device)
        result: object = self.loss.fn(p, inputs, **(self.term.loss_fn_config or {}))
        loss_N, diagnostics_N = self._checked(result, p)
        self._loss_places.append(place_N)
        self._losses.append(loss_N.detach().reshape(len(loss_N), -1).sum(-1))
        for name, value_N in diagnostics_N.items():
            self._sums[name] = self._sums.get(name, 0.0) + in_float64(value_N.detach()).sum()
        return loss_N.sum()

    def _checked(self, result: Any, p: torch.Tensor) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        """The loss and the diagnostics that a loss function, which may be a user's, returned. ConfigError for
        anything else."""
        function = getattr(self.loss.fn, "__name__", self.loss.fn)
        if not isinstance(result, tuple | list) or len(result) != 2 or not isinstance(result[1], Mapping):
            raise ConfigError(
                f"{function} returned {result!r:.60}: it must return the loss of each token, and a dict of "
                "diagnostics, {} for none"
            )
        for name, value in {"a loss": result[0], **result[1]}.items():
            if not isinstance(value, torch.Tensor):
                raise ConfigError(
                    f"{function} returned {name} {value!r:.80}, not a tensor with a number for each token"
                )
            if value.shape not in (p.shape, p.shape[:1]):
                raise ConfigError(
                    f"{function} returned {name} of shape {tuple(value.shape)} for {len(p)} tokens: one number for "
                    f"each is needed, {tuple(p.shape[:1])}"
                )
        return result[0], result[1]

    def keep_others(self, batch: MicroBatch, p_NK: torch.Tensor) -> None:
        """Records the logprobs of positions without loss."""
        row_N, place_N = self._targets_in(batch.others)
        if len(row_N):
            self._keep(place_N, p_NK[on_device(row_N, p_NK.device)])

    def _targets_in(self, positions: Positions) -> tuple[np.ndarray, np.ndarray]:
        """This term's positions, and their indices among its tokens."""
        row_N = np.flatnonzero(
            (positions.datum_N >= self.first) & (positions.datum_N < self.first + len(self.term.data_D))
        )
        return row_N, self._offsets_D[positions.datum_N[row_N] - self.first] + positions.position_N[row_N]

    def _keep(self, place_N: np.ndarray, p_NK: torch.Tensor) -> torch.Tensor:
        p = p_NK if self._several_targets else p_NK[:, 0]
        self._places.append(place_N)
        self._logprobs.append(p.detach())
        return p

    def results(self) -> "TermResults":
        """What the passes left so far, on the CPU."""
        logprobs, losses = ([tensor.cpu() for tensor in tensors] for tensors in (self._logprobs, self._losses))
        sums = {name: float(value) for name, value in self._sums.items()}
        return TermResults(self._places, logprobs, self._loss_places, losses, sums)

    def replace_results(self, parts: Sequence["TermResults"]) -> None:
        """By those of all ranks, this one's among them."""
        self._places = [place_N for part in parts for place_N in part.places]
        self._logprobs = [p for part in parts for p in part.logprobs]
        self._loss_places = [place_N for part in parts for place_N in part.loss_places]
        self._losses = [loss_N for part in parts for loss_N in part.losses]
        names = dict.fromkeys(name for part in parts for name in part.sums)
        self._sums = {name: sum(part.sums.get(name, 0.0) for part in parts) for name in names}

    def not_finite(self) -> list[int]:
        """Indices of the data whose loss is not finite."""
        if not self._losses:
            return []
        bad_N = ~torch.isfinite(torch.cat(self._losses)).cpu().numpy()
        places = np.concatenate(self._loss_places)[bad_N]
        return sorted(set((self.first + np.searchsorted(self._offsets_D, places, side="right") - 1).tolist()))

    def output(self, name: str) -> ForwardBackwardOutput:
        """`name` of every token, and the metrics; data without loss positions have a sum of 0."""
        loss_N = in_float64(torch.cat(self._losses)).cpu() if self._losses else torch.zeros(0)
        targets = self.term.data_D[0].loss_fn_inputs["target_tokens"].array
        shape = targets.shape[1:] if self._several_targets else ()
        flat = np.full((int(self._offsets_D[-1]), *shape), np.nan, dtype=np.float32)
        for place_N, p in zip(self._places, self._logprobs, strict=True):
            flat[place_N] = p.float().cpu().numpy()
        metrics = {"loss:sum": float(loss_N.sum()), "num_loss_tokens:sum": float(len(loss_N))}
        metrics |= {f"{key}:mean": float(value) / max(len(loss_N), 1) for key, value in self._sums.items()}
        return ForwardBackwardOutput(
            [{name: TensorData(array)} for array in np.split(flat, self._offsets_D[1:-1])], metrics
        )

    def needs_backward(self) -> list[bool]:
        """False where the advantage is 0 (equal rewards in the group): the gradient is 0."""
        if not self.loss.scales_with_advantage:
            return [True] * len(self.term.data_D)
        return [bool(datum.loss_fn_inputs["advantages"].array.any()) for datum in self.term.data_D]


def by_width(data_D: Sequence[Datum]) -> list[list[int]]:
    """Indices of the data, by their number of targets per token."""
    widths: dict[tuple[int, ...], list[int]] = {}
    for d, datum in enumerate(data_D):
        targets = datum.loss_fn_inputs.get("target_tokens")
        widths.setdefault(targets.array.shape[1:] if targets else (), []).append(d)
    return [*widths.values()]


def in_order(outputs: Sequence[ForwardBackwardOutput], index_D: Sequence[Sequence[int]]) -> ForwardBackwardOutput:
    """One output of several passes, whose data had the indices `index_D`."""
    fields: dict[int, dict[str, TensorData]] = {}
    metrics: dict[str, float] = {}
    counts = [output.metrics["num_loss_tokens:sum"] for output in outputs]
    for output, indices, count in zip(outputs, index_D, counts, strict=True):
        fields |= zip(indices, output.loss_fn_outputs, strict=True)
        for name, value in output.metrics.items():
            share = count / max(sum(counts), 1) if name.endswith(":mean") else 1
            metrics[name] = metrics.get(name, 0.0) + share * value
    return ForwardBackwardOutput([fields[d] for d in sorted(fields)], metrics)


@dataclass
class KeptForward:
    """A forward pass whose graph waits for its backward."""

    number: int
    batch: MicroBatch
    p_NK: torch.Tensor
    others_NK: torch.Tensor

    def of(self, kept_D: Sequence[KeptRow | None]) -> tuple[MicroBatch, torch.Tensor, torch.Tensor] | None:
        """The part of these rows, renumbered; None if it does not hold them all."""
        numbers_D = [kept[1] for kept in kept_D if kept and kept[0] == self.number]
        if len(numbers_D) < len(kept_D):
            return None
        loss, p_NK = _part(self.batch.loss, self.p_NK, numbers_D)
        others, others_NK = _part(self.batch.others, self.others_NK, numbers_D)
        return replace(self.batch, loss=loss, others=others), p_NK, others_NK


def _part(positions: Positions, p_NK: torch.Tensor, numbers_D: Sequence[int]) -> tuple[Positions, torch.Tensor]:
    """Positions of the data `numbers_D`, which become data 0, 1, ..."""
    rows_D = [np.flatnonzero(positions.datum_N == d) for d in numbers_D]
    row_N = np.concatenate(rows_D)
    datum_N = np.repeat(np.arange(len(numbers_D)), [len(rows) for rows in rows_D])
    part = replace(positions, datum_N=datum_N, position_N=positions.position_N[row_N])
    return part, p_NK[on_device(row_N, p_NK.device)]
