"""From Datums to padded tensors: checks first, then micro-batches cut by a token budget from sequences sorted by length.

Sequences are padded on the right, so that causal attention needs no mask: a real token never sees a pad. Only the rows that carry
loss are looked up in the vocabulary.
"""

import difflib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from backend.errors import ConfigError, ContextLengthError, DataError, NonFiniteError
from backend.losses import LOSSES, Loss, LossFn
from backend.types import Datum


@dataclass
class MicroBatch:
    """`rows` are the flat (b * T + t) positions that carry loss; targets and inputs have one entry for each of them, (N,) or (N, K)."""

    datum_indices_B: list[int]
    tokens_BT: torch.Tensor
    rows_N: torch.Tensor
    datum_N: np.ndarray  # which datum a row belongs to, and
    position_N: np.ndarray  # where in it
    targets_NK: torch.Tensor
    inputs: dict[str, torch.Tensor]


def resolve_loss(loss_fn: str | LossFn, loss_fn_config: dict | None) -> Loss:
    """The loss by name, or a callable with the same signature. Unknown names and options raise."""
    if not isinstance(loss_fn, str):
        return Loss(loss_fn, ())
    if loss_fn not in LOSSES:
        near = difflib.get_close_matches(loss_fn, LOSSES, n=1)
        raise ConfigError(
            f"loss_fn {loss_fn!r} is not one of {', '.join(LOSSES)}" + (f"; did you mean {near[0]!r}?" if near else "")
        )
    loss = LOSSES[loss_fn]
    options = list(inspect.signature(loss.fn).parameters.values())[2:]
    given = set(loss_fn_config or {})
    if unknown := given - {option.name for option in options}:
        raise ConfigError(f"loss_fn_config {sorted(unknown)} is not an option of {loss_fn}: it has {[o.name for o in options]}")
    if missing := {o.name for o in options if o.default is inspect.Parameter.empty} - given:
        raise ConfigError(f"loss_fn {loss_fn} needs loss_fn_config with {sorted(missing)}")
    return loss


def check_data(data_D: Sequence[Datum], required: Sequence[str], vocabulary: int, max_length: int) -> None:
    """Raises where a Datum would otherwise fail deep in torch, or be trained on silently wrong."""
    if not data_D:
        raise DataError("no data: forward and forward_backward need at least one Datum")
    for d, datum in enumerate(data_D):
        tokens, inputs = datum.model_input.to_ints(), datum.loss_fn_inputs
        if not tokens:
            raise DataError(f"datum {d} has an empty model_input")
        if len(tokens) > max_length:
            raise ContextLengthError(f"datum {d} has {len(tokens)} tokens; the context is {max_length} (backend.max_length)")
        if missing := [key for key in ("target_tokens", *required) if key not in inputs]:
            raise DataError(f"datum {d} lacks loss_fn_inputs {missing}; it has {sorted(inputs)}")
        if inputs.keys() != data_D[0].loss_fn_inputs.keys():
            raise DataError(f"datum {d} has loss_fn_inputs {sorted(inputs)}, datum 0 has {sorted(data_D[0].loss_fn_inputs)}")
        targets = inputs["target_tokens"].array
        for key, value in inputs.items():
            if value.array.shape[:1] != (len(tokens),):
                raise DataError(f"datum {d}: {key} has shape {value.shape}, model_input has {len(tokens)} tokens")
            if value.array.dtype == np.float32 and not np.isfinite(value.array).all():
                raise NonFiniteError(f"datum {d}: {key} is not finite", [d])
        if max(tokens) >= vocabulary or min(tokens) < 0 or targets.max() >= vocabulary or targets.min() < 0:
            raise DataError(f"datum {d} has a token outside the vocabulary of {vocabulary}: was it made with another tokenizer?")


def micro_batches(data_D: Sequence[Datum], token_budget: int, device: torch.device) -> list[MicroBatch]:
    """Cuts the data, sorted by length, into batches of at most `token_budget` padded tokens (a longer sequence goes alone)."""
    order = sorted(range(len(data_D)), key=lambda d: -data_D[d].model_input.length)  # longest first: memory peaks at once
    groups: list[list[int]] = [[]]
    for d in order:
        if groups[-1] and data_D[groups[-1][0]].model_input.length * (len(groups[-1]) + 1) > token_budget:
            groups.append([])
        groups[-1].append(d)
    return [_collate(data_D, group, device) for group in groups]


def _collate(data_D: Sequence[Datum], indices_B: list[int], device: torch.device) -> MicroBatch:
    batch = [data_D[d] for d in indices_B]
    lengths_B = np.array([datum.model_input.length for datum in batch])
    width = int(lengths_B.max())
    tokens_BT = np.zeros((len(batch), width), dtype=np.int64)
    for b, datum in enumerate(batch):
        tokens_BT[b, : lengths_B[b]] = datum.model_input.to_ints()
    flat = {key: np.concatenate([datum.loss_fn_inputs[key].array for datum in batch]) for key in batch[0].loss_fn_inputs}
    chosen = _carries_loss(flat)
    b_N = np.repeat(np.arange(len(batch)), lengths_B)[chosen]
    position_N = np.concatenate([np.arange(length) for length in lengths_B])[chosen]
    targets = flat.pop("target_tokens")[chosen]

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    return MicroBatch(
        datum_indices_B=indices_B,
        tokens_BT=tensor(tokens_BT),
        rows_N=tensor(b_N * width + position_N),
        datum_N=np.array(indices_B)[b_N],
        position_N=position_N,
        targets_NK=tensor(targets if targets.ndim == 2 else targets[:, None]),
        inputs={key: tensor(array[chosen]) for key, array in flat.items()},
    )


def _carries_loss(flat: dict[str, np.ndarray]) -> np.ndarray:
    """Which tokens need a logprob: a non-zero weight, else a non-zero mask, else all."""
    for key in ("weights", "mask"):
        if key in flat:
            return flat[key] != 0 if flat[key].ndim == 1 else (flat[key] != 0).any(-1)
    return np.ones(len(flat["target_tokens"]), dtype=bool)
