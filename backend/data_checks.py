"""Checks before a pass: what would otherwise fail deep in torch, or train on something silently wrong."""

import difflib
import inspect
from collections.abc import Sequence

import numpy as np

from backend.errors import ConfigError, ContextLengthError, DataError, NonFiniteError
from backend.losses import LOSSES, Loss, LossFn
from backend.types import Datum


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


def check_data(data_D: Sequence[Datum], required: Sequence[str], vocabulary: int, max_length: int, first: int = 0) -> None:
    """Raises where a Datum would otherwise fail deep in torch, or be trained on silently wrong. `first`: the number of the first one."""
    if not data_D:
        raise DataError("no data: forward and forward_backward need at least one Datum")
    for d, datum in enumerate(data_D, start=first):
        tokens, inputs = datum.model_input.to_ints(), datum.loss_fn_inputs
        if not tokens:
            raise DataError(f"datum {d} has an empty model_input")
        if len(tokens) > max_length:
            raise ContextLengthError(f"datum {d} has {len(tokens)} tokens; the context is {max_length} (backend.max_length)")
        if missing := [key for key in ("target_tokens", *required) if key not in inputs]:
            raise DataError(f"datum {d} lacks loss_fn_inputs {missing}; it has {sorted(inputs)}")
        if inputs.keys() != data_D[0].loss_fn_inputs.keys():
            raise DataError(
                f"datum {d} has loss_fn_inputs {sorted(inputs)}, datum {first} has {sorted(data_D[0].loss_fn_inputs)}"
            )
        targets = inputs["target_tokens"].array
        for key, value in inputs.items():
            if value.array.shape[:1] != (len(tokens),):
                raise DataError(f"datum {d}: {key} has shape {value.shape}, model_input has {len(tokens)} tokens")
            if value.array.dtype == np.float32 and not np.isfinite(value.array).all():
                raise NonFiniteError(f"datum {d}: {key} is not finite", [d])
        if max(tokens) >= vocabulary or min(tokens) < 0 or targets.max() >= vocabulary or targets.min() < 0:
            raise DataError(f"datum {d} has a token outside the vocabulary of {vocabulary}: was it made with another tokenizer?")
