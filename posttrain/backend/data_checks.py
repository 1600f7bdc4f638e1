"""Checks of data before a pass: faults that would fail deep in torch, or train silently wrong."""

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cache

import numpy as np
import torch
from torch.nn.utils import get_total_norm

from posttrain.backend.errors import (
    CheckpointError,
    ConfigError,
    ContextLengthError,
    DataError,
    ModelError,
    NonFiniteError,
)
from posttrain.backend.loss_terms import LossTerm
from posttrain.backend.losses import LOSSES, Loss, LossFn
from posttrain.backend.ranks import local
from posttrain.backend.types import Datum, ModelInput

ROUNDED = 0.01  # above 0: by which rounding may move the logprob of a certain token
# What a named loss may read besides the arrays that it needs: of another shape, torch would multiply each with each.
THRESHOLDS = ("clip_low_threshold", "clip_high_threshold")
PER_TARGET = (*THRESHOLDS, "sequence_ratio_mask")


def resolve_loss(loss_fn: str | LossFn, loss_fn_config: dict | None) -> Loss:
    """The loss by name, or a callable of the same signature. ConfigError for unknown options."""
    if not isinstance(loss_fn, str):
        check_callable(loss_fn)
        _check_signature(loss_fn, loss_fn_config or {})
        return Loss(loss_fn, ())
    if loss_fn not in LOSSES:
        near = difflib.get_close_matches(loss_fn, LOSSES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        if ":" in loss_fn:
            hint = ", nor a function of a module that is here: is module:function right?"
        raise ConfigError(f"loss_fn {loss_fn!r} is not one of {', '.join(LOSSES)}{hint}")
    loss = LOSSES[loss_fn]
    options = list(inspect.signature(loss.fn).parameters.values())[2:]
    given = set(loss_fn_config or {})
    if unknown := given - {option.name for option in options}:
        raise ConfigError(
            f"loss_fn_config {sorted(unknown)} is not an option of {loss_fn}: it has {[o.name for o in options]}"
        )
    if missing := {o.name for o in options if o.default is inspect.Parameter.empty} - given:
        raise ConfigError(f"loss_fn {loss_fn} needs loss_fn_config with {sorted(missing)}")
    for name, value in (loss_fn_config or {}).items():
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
            raise ConfigError(f"loss_fn_config.{name}={value!r}: a number is needed")
        if value < 0:  # a bound of a ratio, or the weight of a penalty, which would become a reward
            raise ConfigError(f"loss_fn_config.{name}={value!r} must be at least 0")
    return loss


def _check_signature(loss_fn: LossFn, options: dict) -> None:
    """ConfigError for a function that cannot be called as losses are: the model would be loaded first."""
    try:
        inspect.signature(loss_fn).bind(None, None, **options)
    except TypeError as error:
        raise ConfigError(
            f"loss_fn={getattr(loss_fn, '__name__', loss_fn)}: {error}; it is called with the logprobs, the other "
            f"arrays by name, and loss_fn_config ({', '.join(options) or 'none here'})"
        ) from None
    except ValueError:  # a function without a signature, as some of C
        return


def check_term(term: LossTerm, vocabulary: int, max_length: int, first: int) -> Loss:
    """The loss of a term. ConfigError, or DataError for data, numbered from `first`, that it cannot be taken of."""
    loss = resolve_loss(term.loss_fn, term.loss_fn_config)
    check_data(term.data_D, loss.required, vocabulary, max_length, first)
    check_thresholds(loss, term.loss_fn_config, term.data_D, first)
    if loss.of_sequences:
        check_sequences(term.data_D, first)
    return loss


def check_thresholds(loss: Loss, loss_fn_config: dict | None, data_D: Sequence[Datum], first: int) -> None:
    """ConfigError, or DataError for a Datum, where a ratio's lower bound is above its upper: torch would take
    the upper for every ratio."""
    options = inspect.signature(loss.fn).parameters
    if not loss.required or not options.keys() >= set(THRESHOLDS):
        return
    low, high = bounds = [(loss_fn_config or {}).get(name, options[name].default) for name in THRESHOLDS]
    about = "they bound the ratio of probabilities: for an epsilon of 0.2 give 0.8 and 1.2"
    if low > high:
        raise ConfigError(f"clip_low_threshold={low} is above clip_high_threshold={high}: {about}")
    if not any(name in data_D[0].loss_fn_inputs for name in THRESHOLDS):
        return
    for d, datum in enumerate(data_D, start=first):
        given = [datum.loss_fn_inputs.get(name) for name in THRESHOLDS]
        low_T, high_T = (bound if at is None else at.array for bound, at in zip(bounds, given, strict=True))
        if np.any(low_T > high_T):
            raise DataError(f"datum {d}: clip_low_threshold is above clip_high_threshold at some token: {about}")


def check_callable(loss_fn: object) -> None:
    if not callable(loss_fn):
        raise ConfigError(f"loss_fn={loss_fn!r:.80} is neither a function nor one of {', '.join(LOSSES)}")


def check_kinds(data_D: object) -> None:
    """DataError for anything but a sequence of Datum."""
    if not isinstance(data_D, Sequence) or isinstance(data_D, str):
        raise DataError(f"the data are {data_D!r:.100}, not a list of Datum")
    for d, datum in enumerate(data_D):
        if not isinstance(datum, Datum):
            raise DataError(f"datum {d} is {datum!r:.100}, not a Datum")
        if not isinstance(datum.model_input, ModelInput):
            raise DataError(
                f"datum {d}: model_input is {datum.model_input!r:.100}, not a ModelInput: "
                "ModelInput.from_ints(tokens) makes one"
            )


def check_data(
    data_D: Sequence[Datum], required: Sequence[str], vocabulary: int, max_length: int, first: int = 0
) -> None:
    """DataError and the like for a bad Datum. `first` is the number of the first Datum."""
    check_kinds(data_D)
    if not data_D:
        raise DataError("no data: forward and forward_backward need at least one Datum")
    keys = data_D[0].loss_fn_inputs.keys()
    for name in keys - {*required, *PER_TARGET} if required else ():
        if near := difflib.get_close_matches(name, PER_TARGET, n=1, cutoff=0.85):
            raise DataError(
                f"datum {first}: loss_fn_inputs has {name!r}, which no loss reads; did you mean {near[0]!r}?"
            )
    for d, datum in enumerate(data_D, start=first):
        length, inputs = datum.model_input.length, datum.loss_fn_inputs
        if not length:
            raise DataError(f"datum {d} has an empty model_input")
        if length > max_length:
            raise ContextLengthError(f"datum {d} has {length} tokens; the context is {max_length} (backend.max_length)")
        if missing := [key for key in ("target_tokens", *required) if key not in inputs]:
            raise DataError(f"datum {d} lacks loss_fn_inputs {missing}; it has {sorted(inputs)}")
        if inputs.keys() != keys:
            raise DataError(f"datum {d} has loss_fn_inputs {sorted(inputs)}, datum {first} has {sorted(keys)}")
        _check_shapes(d, datum, required)
    _check_values(data_D, required, vocabulary, first)


def _check_shapes(d: int, datum: Datum, required: Sequence[str]) -> None:
    length, inputs = datum.model_input.length, datum.loss_fn_inputs
    for key, value in inputs.items():
        if value.array.shape[:1] != (length,):
            raise DataError(f"datum {d}: {key} has shape {value.shape}, model_input has {length} tokens")
    targets = inputs["target_tokens"]
    if targets.dtype != "int64" or targets.array.ndim > 2:
        raise DataError(
            f"datum {d}: target_tokens is {targets.dtype} of shape {targets.shape}: int64 of shape (T,) or (T, K) is needed"
        )
    for key in (*required, *PER_TARGET) if required else ():
        shape = inputs[key].shape if key in inputs else targets.shape
        # weights of one number per token are those of the first of several targets
        if shape != targets.shape and (key, len(shape)) != ("weights", 1):
            raise DataError(f"datum {d}: {key} has shape {shape}, target_tokens {targets.shape}")


def _check_values(data_D: Sequence[Datum], required: Sequence[str], vocabulary: int, first: int) -> None:
    arrays = {key: [datum.loss_fn_inputs[key].array for datum in data_D] for key in data_D[0].loss_fn_inputs}
    for key, arrays_D in arrays.items():
        if (d := _first(arrays_D, lambda array: ~np.isfinite(array))) is not None:
            raise NonFiniteError(f"datum {first + d}: {key} is not finite", [first + d])
    if "logprobs" in required and (d := _first(arrays["logprobs"], lambda array: array > ROUNDED)) is not None:
        raise DataError(
            f"datum {first + d}: logprobs above 0, which no probability has: give natural logarithms, neither "
            "probabilities nor negative log-likelihoods"
        )
    # a negative temperature would turn the distribution over, in silence
    if "temperature" in arrays and (d := _first(arrays["temperature"], lambda array: array <= 0)) is not None:
        raise DataError(
            f"datum {first + d}: temperature must be above 0 at every token; 1 for tokens that were sampled greedily"
        )
    inputs_D = [np.array(datum.model_input.to_ints()) for datum in data_D]
    if floats := [d for d, tokens_T in enumerate(inputs_D, start=first) if tokens_T.dtype.kind not in "iu"]:
        raise DataError(f"datum {floats[0]}: model_input has tokens that are not whole numbers")
    for tokens_D in (arrays["target_tokens"], inputs_D):
        if (d := _first(tokens_D, lambda array: (array < 0) | (array >= vocabulary))) is not None:
            negative = bool((tokens_D[d] < 0).any())
            other = "was it made with another tokenizer, or sampled by a model with more ids?"
            hint = "weights of 0 leave tokens out, not -100" if negative else other
            raise DataError(f"datum {first + d} has a token outside the vocabulary of {vocabulary}: {hint}")
    if np.array_equal(arrays["target_tokens"][0], inputs_D[0]) and len(set(inputs_D[0])) > 1:
        _say_unshifted()


@cache
def _say_unshifted() -> None:
    print(
        "WARNING the target_tokens of a Datum are those of its model_input: the model learns to repeat each token. Give "
        "model_input=tokens[:-1] and target_tokens=tokens[1:]",
        flush=True,
    )


def check_sequences(data_D: Sequence[Datum], first: int) -> None:
    """DataError unless each Datum with an advantage says over which tokens its ratio is taken."""
    for d, datum in enumerate(data_D, start=first):
        inputs = datum.loss_fn_inputs
        marks = inputs.get("sequence_ratio_mask", inputs.get("mask"))
        if marks is None:
            raise DataError(
                f"datum {d} lacks sequence_ratio_mask, 1 at the tokens of the sequence's ratio, 0 elsewhere"
            )
        if inputs["advantages"].array.any() and not marks.array.any():
            raise DataError(f"datum {d} has advantages, and its sequence_ratio_mask marks no token")


def _first(arrays_D: Sequence[np.ndarray], bad: Callable[[np.ndarray], np.ndarray]) -> int | None:
    """The first datum whose array has a bad entry. One check on the concatenation: a batch has
    hundreds of short arrays."""
    bad_N = bad(np.concatenate([array.reshape(-1) for array in arrays_D]))
    if not bad_N.any():
        return None
    return int(np.searchsorted(np.cumsum([array.size for array in arrays_D]), bad_N.argmax(), side="right"))


def not_finite(named: Mapping[str, torch.Tensor]) -> list[str]:
    """The names of tensors with a value that is NaN or infinite: of the floating-point ones, as some models save
    integers beside their weights."""
    parts = {name: local(tensor.detach()) for name, tensor in named.items() if tensor.is_floating_point()}
    tensors = {name: part for name, part in parts.items() if part.numel()}
    # On a CPU the norm takes 1/15 of the time of the largest value. It overflows at finite values, too.
    if torch.isfinite(get_total_norm(list(tensors.values()))):
        return []
    return [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]


def check_loaded(
    name: str, weights: Mapping[str, torch.Tensor], error: type[ModelError] | type[CheckpointError]
) -> None:
    """`error` if weights that were read from `name` are NaN or infinite: no run could begin with them."""
    if bad := not_finite(weights):
        raise error(f"{name} has weights that are NaN or infinite ({len(bad)} tensors, such as {bad[0]})")


def check_finite(named: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer | None = None) -> None:
    """NonFiniteError if a weight of `named`, or its state in `optimizer`, is NaN or infinite; one pass. Of
    sharded tensors, this rank's part."""
    tensors = dict(named)
    states = optimizer.state if optimizer else {}
    for name, parameter in named.items():
        tensors |= {
            f"{key} of {name}": state
            for key, state in states.get(parameter, {}).items()
            if state.ndim and state.is_floating_point()
        }
    if bad := not_finite(tensors):
        raise NonFiniteError(
            f"{len(bad)} of {len(tensors)} tensors are not finite, first {bad[0]!r}: an optimizer step went too far, "
            "and nothing was saved. Go back to the last checkpoint with a lower learning rate, or clip the gradient"
        )
