"""Pairs of a right and a sampled wrong path, in the JSONL of Q#'s collect_rollouts.py.

    x                              prefix                        global_idx                        row of the prompt
    y_pred_chosen                  prefix and right path         y_pred_reject                     prefix and wrong path
    y_pred_chosen_correct          1.0 for each target token     y_pred_reject_correct             0.0 or 1.0 for each
    y_pred_chosen_completely_correct   1.0                       y_pred_reject_completely_correct  0.0
    n_try                          right samples before the wrong sample; ids are the policy's tokenizer's

Left out: rows of other lengths, which Q#'s loaders drop too (here the count is printed).
"""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np

from envs.star_graph_tokens import Layout
from posttrain.backend.errors import DataError
from posttrain.backend.sampling_client import SamplingClient
from posttrain.backend.types import Datum, ModelInput, SamplingParams
from posttrain.tracking.jsonl import parse_json, read_bytes, write_jsonl
from preference.pairs import Pair

WAVE = 2048  # prompts sampled at once


async def collect_pairs(
    sampler: SamplingClient, ids_B_T: np.ndarray, layout: Layout, path: str | Path, max_tries: int = 1000, seed: int = 0
) -> int:
    """Writes the file and returns the number of pairs. Each prompt is sampled at temperature 1
    until a path is wrong; prompts without a wrong path in `max_tries` are dropped. Try k of row b
    is seeded by (seed, b, k).
    """
    records: dict[int, dict[str, Any]] = {}
    for first in range(0, len(ids_B_T), WAVE):
        active_B = list(range(first, min(first + WAVE, len(ids_B_T))))
        for n_try in range(max_tries):
            drawn = await asyncio.gather(*(_sample(sampler, ids_B_T[b], layout, (seed, b, n_try)) for b in active_B))
            wrong = {
                b: tokens for b, tokens in zip(active_B, drawn, strict=True) if tokens != _target(ids_B_T[b], layout)
            }
            records |= {b: _record(ids_B_T[b], tokens, layout, b, n_try) for b, tokens in wrong.items()}
            active_B = [b for b in active_B if b not in wrong]
            if not active_B:
                break
    print(
        f"{path}: {len(records):,} pairs; {len(ids_B_T) - len(records):,} prompts had no wrong path in {max_tries} "
        "tries",
        flush=True,
    )
    write_jsonl(Path(path), (records[b] for b in sorted(records)))
    return len(records)


async def _sample(sampler: SamplingClient, ids_T: np.ndarray, layout: Layout, seed: tuple[int, int, int]) -> list[int]:
    number = int(np.random.SeedSequence(seed).generate_state(1)[0])
    params = SamplingParams(max_tokens=layout.target_length, temperature=1.0, stop=[], seed=number)
    response = await sampler.sample_async(ModelInput.from_ints(ids_T[: layout.prefix_length].tolist()), 1, params)
    return response.sequences[0].tokens


def _target(ids_T: np.ndarray, layout: Layout) -> list[int]:
    return ids_T[layout.prefix_length :].tolist()


def _record(ids_T: np.ndarray, wrong: list[int], layout: Layout, index: int, n_try: int) -> dict[str, Any]:
    prefix, target = ids_T[: layout.prefix_length].tolist(), _target(ids_T, layout)
    return {
        "x": prefix,
        "y_pred_chosen": prefix + target,
        "y_pred_chosen_correct": [1.0] * len(target),
        "y_pred_chosen_completely_correct": 1.0,
        "n_try": n_try,
        "y_pred_reject": prefix + wrong,
        "y_pred_reject_correct": [float(a == b) for a, b in zip(wrong, target, strict=True)],
        "y_pred_reject_completely_correct": 0.0,
        "global_idx": index,
    }


def read_pairs(path: str | Path, layout: Layout) -> list[Pair]:
    """Pairs for preference/, weight 1 on the paths' tokens. DataError names a line of another form
    or size.
    """
    lines = read_bytes(path).splitlines()
    pairs, dropped = [], 0
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        try:
            record = parse_json(line, where)
            chosen, rejected = list(map(int, record["y_pred_chosen"])), list(map(int, record["y_pred_reject"]))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{where}: not a pair as collect_rollouts.py writes it ({error})") from error
        if len(chosen) != layout.length:
            raise DataError(f"{where}: {len(chosen)} tokens; {layout.graph.name} has {layout.length} in this tokenizer")
        if len(rejected) != layout.length:
            dropped += 1
        elif chosen[: layout.prefix_length] != rejected[: layout.prefix_length] or chosen == rejected:
            raise DataError(f"{where}: the two paths must differ and follow the same prefix")
        else:
            pairs.append(Pair(path_datum(chosen, layout), path_datum(rejected, layout)))
    if not pairs:
        raise DataError(f"{path} has no pair of {layout.length} tokens each")
    if dropped:
        print(f"{path}: {dropped:,} pairs dropped whose wrong path has another length")
    return pairs


def path_datum(ids_T: list[int], layout: Layout) -> Datum:
    """Weight 1 on each token of the path, 0 on the prompt."""
    weights_T = [0.0] * (layout.prefix_length - 1) + [1.0] * layout.target_length
    return Datum(
        ModelInput.from_ints(ids_T[:-1]), {"target_tokens": ids_T[1:], "weights": np.array(weights_T, dtype=np.float32)}
    )
