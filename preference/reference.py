"""Sequence logprobs under the reference, the frozen policy that the run starts from. Computed once
per answer and kept in `reference_logprobs.jsonl`: the first line names the reference, each other
line has an answer's logprob under the hash of its tokens. A resumed run recomputes the first lines
to check that the reference is unchanged.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.backend.errors import CheckpointError, DataError
from posttrain.backend.training_client import TrainingClient
from posttrain.backend.types import Datum
from posttrain.tracking.jsonl import append_jsonl, drop_torn_line, read_jsonl
from posttrain.tracking.progress import counted
from preference.pairs import Pair, Referenced, as_data, sequence_logprobs, weighted_logprobs

CHUNK = 256  # answers per forward call, and per append to the file
TOLERANCE = 1e-4  # relative: other threads or another machine change the last digits


def answer_key(datum: Datum) -> str:
    """Hash of the tokens and of the mask of the answer."""
    arrays = (
        np.asarray(datum.model_input.to_ints()),
        *(datum.loss_fn_inputs[name].array for name in ("target_tokens", "weights")),
    )
    return hashlib.sha256(b"|".join(array.tobytes() for array in arrays)).hexdigest()[:32]


async def with_reference(
    pairs: Sequence[Pair], client: TrainingClient, file: Path, reference: dict[str, Any]
) -> Sequence[Pair]:
    """The pairs with their reference logprobs. `client` must hold the weights that `reference`
    names. CheckpointError if the file belongs to another reference, by name or by value."""
    keys_D = [answer_key(datum) for pair in pairs for datum in as_data([pair])]
    places = {key: place for place, key in enumerate(keys_D)}
    known = read_reference(file, reference)
    answers = list(places)
    chunks = [answers[start : start + CHUNK] for start in range(0, len(answers), CHUNK)]
    # Chunks are always computed whole: the answers in a batch decide the last digits of a logprob.
    needed = [keys for i, keys in enumerate(chunks) if i == 0 or not known.keys() >= set(keys)]
    for keys in counted(needed, f"computing the reference's logprobs, {CHUNK} answers at a time"):
        data_D = [as_data([pairs[places[key] // 2]])[places[key] % 2] for key in keys]
        computed = zip(keys, await answer_logprobs(client, data_D), strict=True)
        new = [(key, logprob) for key, logprob in computed if _is_new(known, key, logprob, file)]
        known |= new
        with file.open("a") as lines:
            lines.writelines(json.dumps({"key": key, "logprob": logprob}) + "\n" for key, logprob in new)
    return Referenced(pairs, np.array([known[key] for key in keys_D]).reshape(-1, 2))


async def answer_logprobs(client: TrainingClient, data_D: Sequence[Datum]) -> list[float]:
    """Sums over the answers' tokens, by one forward pass without gradient."""
    return sequence_logprobs(data_D, await weighted_logprobs(client, data_D)).tolist()


def read_reference(file: Path, reference: dict[str, Any]) -> dict[str, float]:
    """Logprobs in the file by key; a new file is begun with the name of the reference."""
    drop_torn_line(file)
    header, *answers = read_jsonl(file) or [{}]
    if not header:
        append_jsonl(file, {"reference": reference})
    elif header.get("reference") != reference:
        raise CheckpointError(
            f"{file} holds logprobs of {header.get('reference')}, but this run starts from {reference}"
        )
    for number, answer in enumerate(answers, start=2):
        if not isinstance(answer.get("key"), str) or not isinstance(answer.get("logprob"), float):
            raise DataError(
                f"{file}:{number}: no key or no logprob; delete the file, and the logprobs are computed again"
            )
    return {answer["key"]: answer["logprob"] for answer in answers}


def _is_new(known: dict[str, float], key: str, logprob: float, file: Path) -> bool:
    """Whether the file lacks the key. CheckpointError if it has another value."""
    if key in known and not math.isclose(known[key], logprob, rel_tol=TOLERANCE, abs_tol=TOLERANCE):
        raise CheckpointError(
            f"{file}: an answer's logprob is {known[key]:.6g} there and {logprob:.6g} now: the weights that the run "
            "started from have changed; put them back, or start another run"
        )
    return key not in known
