"""Saves the data of a loss that is not finite, as JSONL."""

import json
from collections.abc import Sequence

from posttrain.backend.errors import NonFiniteError
from posttrain.backend.types import Datum
from posttrain.tracking.run_folder import RunFolder


def write_offending_data(run: RunFolder, step: int, data_D: Sequence[Datum], error: NonFiniteError) -> NonFiniteError:
    """Writes a failed step's data (the offending ones if known); returns the error with the path."""
    path = run.path / f"nonfinite_{step:06d}.jsonl"
    indices = error.datum_indices or range(len(data_D))
    with path.open("w") as file:
        for d in indices:
            inputs = {key: value.tolist() for key, value in data_D[d].loss_fn_inputs.items()}
            file.write(json.dumps({"datum": d, "tokens": data_D[d].model_input.to_ints(), **inputs}) + "\n")
    return NonFiniteError(
        f"step {step}: {error}. The data are in {path}; nothing was saved over the last checkpoint", error.datum_indices
    )
