"""Messages of the Tinker protocol, as its SDK writes them."""

from typing import Any

import numpy as np

from posttrain.serve import wire

TOKENS = [10, 20, 30, 40, 50, 60]


def dense(array: Any) -> Any:
    array = np.asarray(array)
    if array.dtype.kind == "f":
        data, dtype = array.astype("<f4").tobytes(), wire.FLOAT32
    else:
        data, dtype = array.astype("<i8").tobytes(), wire.INT64
    return wire.MESSAGES["Tensor"](dense=data, dtype=dtype, shape=array.shape)


def pass_body(
    model_id: str, seq_id: int, data: list[dict[str, Any]], loss_fn: str = "cross_entropy", forward_only: bool = False
) -> bytes:
    """A ForwardBackwardRequest of data with "tokens" and tensors."""
    message = wire.MESSAGES["ForwardBackwardRequest"](
        model_id=model_id, seq_id=seq_id, loss_fn=loss_fn, forward_only=forward_only
    )
    for fields in data:
        datum = message.data.add()
        datum.model_input.add().encoded_text.tokens = np.asarray(fields["tokens"], "<i4").tobytes()
        for name, value in fields.items():
            if name != "tokens":
                datum.loss_fn_inputs[name].CopyFrom(dense(value))
    return message.SerializeToString()


def datum(weight: float = 1.0) -> dict[str, Any]:
    return {"tokens": TOKENS[:-1], "target_tokens": TOKENS[1:], "weights": [weight] * (len(TOKENS) - 1)}
