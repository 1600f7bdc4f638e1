"""From Datums to padded tensors: micro-batches cut by a token budget from rows sorted by length.

A row is one sequence, or several that begin with the same prompt: the members of an RL group. The prompt is then computed once, and the
continuations lie side by side behind it, each seeing the prompt and itself. Rows are padded on the right. Only positions that carry loss
are looked up in the vocabulary. None of this can change a gradient, since losses are sums over tokens.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from backend.types import Datum

SHARED_ROW_TOKENS = 1024  # continuations are laid behind a shared prompt up to this length of row: attention costs its square
SHARED_ROWS_PAY = 0.8  # share prompts where that leaves at most this part of the tokens; the mask it needs is not free


@dataclass
class MicroBatch:
    """`rows_N` are the flat (b * T + t) positions whose hidden states predict the targets; a shared position is there several times."""

    tokens_BT: torch.Tensor
    rows_N: torch.Tensor
    datum_N: np.ndarray  # which datum a target belongs to, and
    position_N: np.ndarray  # where in it
    targets_NK: torch.Tensor
    inputs: dict[str, torch.Tensor]
    positions_BT: torch.Tensor | None = None  # with shared prompts: position ids, and who sees whom
    mask_B1TT: torch.Tensor | None = None


@dataclass
class _Row:
    """`datum_indices` share their first `shared` tokens; each one's other tokens begin at its `start`."""

    datum_indices: list[int]
    starts: list[int]
    shared: int
    length: int


def micro_batches(data_D: Sequence[Datum], chosen: Sequence[int], token_budget: int, device: torch.device) -> list[MicroBatch]:
    """The chosen data in batches of at most `token_budget` padded tokens (a longer row goes alone), longest rows first: memory peaks at once."""
    if not chosen:
        return []
    alone = [_Row([d], [0], 0, data_D[d].model_input.length) for d in chosen]
    shared = _share_prompts(data_D, chosen)
    pays = sum(row.length for row in shared) <= SHARED_ROWS_PAY * sum(row.length for row in alone)
    batches: list[list[_Row]] = [[]]
    for row in sorted(shared if pays else alone, key=lambda row: -row.length):
        if batches[-1] and batches[-1][0].length * (len(batches[-1]) + 1) > token_budget:
            batches.append([])
        batches[-1].append(row)
    return [_collate(data_D, rows, device) for rows in batches]


def _share_prompts(data_D: Sequence[Datum], chosen: Sequence[int]) -> list[_Row]:
    """Data with the same tokens up to the first that carries loss, laid into common rows."""
    families: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for d in chosen:
        carries = carries_loss({key: value.array for key, value in data_D[d].loss_fn_inputs.items()})
        families[tuple(data_D[d].model_input.to_ints()[: int(carries.argmax()) + 1])].append(d)
    rows = []
    for prompt, members in families.items():
        row = None
        for d in members:
            own = data_D[d].model_input.length - len(prompt)
            if row is None or row.length + own > SHARED_ROW_TOKENS:
                row = _Row([], [], len(prompt), len(prompt))
                rows.append(row)
            row.datum_indices.append(d)
            row.starts.append(row.length)
            row.length += own
    return rows


def _collate(data_D: Sequence[Datum], rows: list[_Row], device: torch.device) -> MicroBatch:
    width, members = max(row.length for row in rows), [d for row in rows for d in row.datum_indices]
    tokens_BT, positions_BT = np.zeros((len(rows), width), dtype=np.int64), np.zeros((len(rows), width), dtype=np.int64)
    segments_BT = np.full((len(rows), width), -1)  # 0 the prompt, then a number for each continuation, -1 padding
    flat_positions, positions = [], []
    for b, row in enumerate(rows):
        for number, (d, start) in enumerate(zip(row.datum_indices, row.starts, strict=True), start=1):
            tokens = data_D[d].model_input.to_ints()
            position_T = np.arange(len(tokens))
            column_T = np.where(position_T < row.shared, position_T, position_T + start - row.shared)
            tokens_BT[b, column_T], positions_BT[b, column_T], segments_BT[b, column_T] = tokens, position_T, number
            flat_positions.append(b * width + column_T)
            positions.append(position_T)
        segments_BT[b, : row.shared] = 0
    flat = {
        key: np.concatenate([data_D[d].loss_fn_inputs[key].array for d in members]) for key in data_D[members[0]].loss_fn_inputs
    }
    chosen = carries_loss(flat)
    targets = flat.pop("target_tokens")[chosen]

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    shares = any(len(row.datum_indices) > 1 for row in rows)
    return MicroBatch(
        tokens_BT=tensor(tokens_BT),
        rows_N=tensor(np.concatenate(flat_positions)[chosen]),
        datum_N=np.repeat(members, [len(position_T) for position_T in positions])[chosen],
        position_N=np.concatenate(positions)[chosen],
        targets_NK=tensor(targets if targets.ndim == 2 else targets[:, None]),
        inputs={key: tensor(array[chosen]) for key, array in flat.items()},
        positions_BT=tensor(positions_BT) if shares else None,
        mask_B1TT=_mask(tensor(segments_BT)) if shares else None,
    )


def _mask(segments_BT: torch.Tensor) -> torch.Tensor:
    """True where a token may look: backwards, at the prompt and at its own continuation."""
    own = segments_BT[:, :, None] == segments_BT[:, None, :]
    visible = own | (segments_BT == 0)[:, None, :]
    return (visible & torch.ones_like(visible[0]).tril())[:, None]


def carries_loss(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Which tokens need a logprob: those of a non-zero weight, else of a non-zero mask, else all."""
    for key in ("weights", "mask"):
        if key in arrays:
            return arrays[key] != 0 if arrays[key].ndim == 1 else (arrays[key] != 0).any(-1)
    return np.ones(len(arrays["target_tokens"]), dtype=bool)
