"""A custom loss of logprobs that are computed elsewhere, in ranks: a forward pass, the loss here, and
a second pass whose loss is linear with the gradient of the first. The loss is never sent anywhere.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from posttrain.backend.errors import ConfigError, DataError, NonFiniteError
from posttrain.backend.loss_terms import LossTerm
from posttrain.backend.losses import Tensors
from posttrain.backend.types import Datum, ForwardBackwardOutput

CustomLoss = Callable[[list[Datum], list[torch.Tensor]], tuple[torch.Tensor, Mapping[str, "float | torch.Tensor"]]]
PASSED_ON = ("target_tokens", "temperature")  # arrays that a pass reads


def checked(result: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    """The loss and the metrics, without their graphs, that a user's function returned. ConfigError for anything else,
    NonFiniteError, or DataError for a loss without a gradient."""
    if not isinstance(result, tuple | list) or len(result) != 2 or not isinstance(result[1], Mapping):
        raise ConfigError(
            f"the custom loss returned {result!r:.60}: it must return the loss, and a dict of metrics, {{}} for none"
        )
    loss, metrics = result
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        raise ConfigError(f"the custom loss returned the loss {loss!r:.60}, not a tensor of one number: is it summed?")
    if not torch.isfinite(loss):
        raise NonFiniteError("the custom loss is not finite; no gradient was kept")
    if not loss.requires_grad:
        raise DataError(
            f"the custom loss returned {loss.item()}, which does not depend on the logprobs: was it detached?"
        )
    return loss, {
        name: value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
        for name, value in metrics.items()
    }


def surrogate_loss(logprobs_D: Sequence[torch.Tensor]) -> float:
    """Logprobs times their gradients, summed: the linear loss with the same gradient."""
    return sum((p.detach() * p.grad).sum().item() for p in logprobs_D if p.grad is not None)


def sums(loss: float, surrogate: float) -> dict[str, float]:
    """The metrics beside those of the loss itself, named as in Tinker's SDK."""
    return {"loss:sum": loss, "surrogate_loss:sum": surrogate}


def linear(p_NK: torch.Tensor, inputs: Tensors) -> tuple[torch.Tensor, Tensors]:
    """p times `gradient`, its own gradient."""
    return p_NK * inputs["gradient"], {}


def run_in_two_passes(
    run_terms: Callable[..., list[ForwardBackwardOutput]], data_D: Sequence[Datum], fn: CustomLoss, output_name: str
) -> ForwardBackwardOutput:
    """As Trainer.run_custom, by two calls of `run_terms(terms, backward=...)`."""
    shapes = [np.shape(datum.loss_fn_inputs["target_tokens"].array) if "target_tokens" in datum.loss_fn_inputs
              else (datum.model_input.length,) for datum in data_D]  # fmt: skip
    zeros_D = [np.zeros(shape, np.float32) for shape in shapes]
    (forward,) = run_terms([LossTerm(_with_gradient(data_D, zeros_D), linear)], backward=False)
    logprobs_D = [fields[output_name].to_torch().requires_grad_() for fields in forward.loss_fn_outputs]
    loss, metrics = checked(fn(list(data_D), logprobs_D))
    loss.backward()
    gradients_D = [np.zeros_like(zeros) if p.grad is None else p.grad.numpy()
                   for p, zeros in zip(logprobs_D, zeros_D, strict=True)]  # fmt: skip
    run_terms([LossTerm(_with_gradient(data_D, gradients_D), linear)], backward=True)
    return ForwardBackwardOutput(forward.loss_fn_outputs, metrics | sums(loss.item(), surrogate_loss(logprobs_D)))


def _with_gradient(data_D: Sequence[Datum], gradients_D: Sequence[Any]) -> list[Datum]:
    """All positions carry loss. Other arrays go along under other names, to be checked."""
    return [
        Datum(
            datum.model_input,
            {name if name in PASSED_ON else f"given {name}": array for name, array in datum.loss_fn_inputs.items()}
            | {"gradient": gradient},
        )
        for datum, gradient in zip(data_D, gradients_D, strict=True)
    ]
