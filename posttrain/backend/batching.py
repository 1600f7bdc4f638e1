"""From Datums to padded tensors: micro-batches under a token budget, rows sorted by length. A row
is a sequence, or a tree of sequences with a common prompt (prefix sharing): shared tokens are
computed once, and each token attends to its ancestors. Rows are padded on the right, or packed into
one row. Losses are sums over tokens, so gradients do not depend on this (attention.py).
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from posttrain.backend.types import Datum

# longest shared row with a dense mask: attention costs its square
SHARED_ROW_TOKENS = 1024
PACKED_TREE_TOKENS = 16384  # and where blocks that nobody sees are skipped
# widths of packed rows, and of all that compiled code meets, are multiples of it
WIDTH_BUCKET = 256
# share prefixes where that leaves at most this part of the tokens; the mask it needs is not free
SHARED_ROWS_PAY = 0.8


@dataclass
class Positions:
    """N positions that need logprobs, of which M are computed. `rows_M` are the flat (b * T + t)
    indices whose hidden states predict the targets; one that several data share occurs once in
    `others`, as often as they are in `loss`."""

    rows_M: torch.Tensor
    datum_N: np.ndarray  # the target's datum, and
    position_N: np.ndarray  # its position there
    targets_MK: torch.Tensor
    temperature_M: torch.Tensor | None = None  # None = 1
    computed_N: torch.Tensor | None = None  # where among the M it is; None = they are the N

    def none_of(self) -> "Positions":
        temperature_M = None if self.temperature_M is None else self.temperature_M[:0]
        return Positions(self.rows_M[:0], self.datum_N[:0], self.position_N[:0], self.targets_MK[:0], temperature_M)

    def of_each(self, values_MK: torch.Tensor) -> torch.Tensor:
        """(N, K) from what was computed."""
        return values_MK if self.computed_N is None else values_MK[self.computed_N]


@dataclass
class MicroBatch:
    tokens_BT: torch.Tensor
    loss: Positions  # positions that carry loss
    others: Positions  # positions of weight 0: logprobs without loss
    # with several sequences in a row: position ids, and the column where a column's continuations end
    positions_BT: torch.Tensor | None = None
    ends_BT: torch.Tensor | None = None
    # packed without a shared prefix: where sequences start, and the number of columns
    starts_N: torch.Tensor | None = None
    longest: int = 0

    def without_positions(self) -> "MicroBatch":
        return replace(self, loss=self.loss.none_of(), others=self.others.none_of())


class MicroBatches(Sequence[MicroBatch]):
    """Each is made when it is read: all of a large step would take as much memory as its data.
    `spare`: rows of the last ones, which have no positions."""

    def __init__(
        self,
        make: Callable[[list["_Row"]], MicroBatch],
        batches: list[list["_Row"]],
        spare: list["_Row"],
        num_batches: int,
    ):
        self._make, self._batches, self._spare, self._num_batches = make, batches, spare, num_batches

    def __len__(self) -> int:
        return self._num_batches

    def __getitem__(self, number: int) -> MicroBatch:  # type: ignore[override]
        if not 0 <= number < self._num_batches:
            raise IndexError(number)
        if number < len(self._batches):
            return self._make(self._batches[number])
        return self._make(self._spare).without_positions()


@dataclass
class _Row:
    """The data in a row. `tokens[i]` of datum `data[i]` are at `columns[i]`."""

    data: list[int]
    tokens: list[np.ndarray]
    columns: list[np.ndarray]
    length: int


def on_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A GPU copies it when it gets there; nothing waits. From pinned memory, which torch keeps until then: a GPU that
    reads the memory of the CPU itself (DGX Spark) may read an array that Python has freed."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def micro_batches(
    data_D: Sequence[Datum],
    chosen: Sequence[int],
    token_budget: int,
    device: torch.device,
    share: bool,
    bucket: int = 1,
    rank: int = 0,
    ranks: int = 1,
    packed: bool = False,
    row_tokens: int | None = None,
    others: bool = True,
) -> Sequence[MicroBatch]:
    """The chosen data in batches of at most `token_budget` padded tokens (a longer row goes alone),
    longest rows first, for an early memory peak. `share`: sequences with a common prefix may share
    a row of up to `row_tokens`. Widths are padded to multiples of `bucket`. `packed`: all rows of a
    batch follow each other in one. Without `others` positions of weight 0 get no logprobs.

    Of several ranks each gets its part of the rows, which depends on the data alone, and all get
    the same number of batches: the spare ones have no positions."""
    if not chosen:
        return []
    tokens = {d: data_D[d].model_input.to_ints() for d in chosen}
    carries = {d: carries_loss(data_D[d]) for d in chosen}
    most = row_tokens or (min(PACKED_TREE_TOKENS, token_budget) if packed else SHARED_ROW_TOKENS)
    rows = [row for family in _families(tokens, carries) for row in _trees(family, most)] if share else []
    if not share or sum(row.length for row in rows) > SHARED_ROWS_PAY * sum(map(len, tokens.values())):
        rows = [_Row([d], [np.array(ids)], [np.arange(len(ids))], len(ids)) for d, ids in tokens.items()]
    rows.sort(key=lambda row: -row.length)
    batches_R = [_batches(rows, token_budget, packed) for rows in _cut(rows, ranks)]
    make = partial(_collate, data_D, carries=carries, device=device, bucket=bucket, packed=packed, others=others)
    return MicroBatches(make, batches_R[rank], rows[-1:], max(map(len, batches_R)))


def _cut(rows: list[_Row], ranks: int) -> list[list[_Row]]:
    """Rows of each rank: the longest first onto the rank with the fewest tokens."""
    rows_R: list[list[_Row]] = [[] for _ in range(ranks)]
    tokens_R = [0] * ranks
    for row in rows:
        lightest = tokens_R.index(min(tokens_R))
        rows_R[lightest].append(row)
        tokens_R[lightest] += row.length
    return rows_R


def _batches(rows: list[_Row], token_budget: int, packed: bool) -> list[list[_Row]]:
    batches: list[list[_Row]] = []
    filled = 0
    for row in rows:
        filled += row.length
        columns = filled if packed or not batches else batches[-1][0].length * (len(batches[-1]) + 1)
        if not batches or columns > token_budget:
            batches.append([])
            filled = row.length
        batches[-1].append(row)
    return batches


def _families(tokens: dict[int, list[int]], carries: dict[int, np.ndarray]) -> list[list[tuple[list[int], int]]]:
    """(tokens, d) of the data with a common prompt: their tokens up to the first that carries loss,
    or a prefix of them."""
    prompts = {d: tuple(tokens_T[: int(carries[d].argmax()) + 1]) for d, tokens_T in tokens.items()}
    root, roots = None, {}
    # in sorted order a prompt is followed by its continuations
    for prompt in sorted(set(prompts.values())):
        root = root if root and prompt[: len(root)] == root else prompt
        roots[prompt] = root
    families = defaultdict(list)
    for d, prompt in prompts.items():
        families[roots[prompt]].append((tokens[d], d))
    return list(families.values())


def _trees(family: list[tuple[list[int], int]], most: int) -> list[_Row]:
    """Rows of at most `most` tokens in which a token's continuations follow it directly: a walk
    through the prefix tree."""
    rows, before_T = [], np.empty(0, dtype=np.int64)
    for tokens, d in sorted(family):
        tokens_T = np.array(tokens)
        shared = _common_prefix(before_T, tokens_T)
        if not rows or rows[-1].length + len(tokens) - shared > most:
            rows.append(_Row([], [], [], 0))
            shared = 0
        row, added = rows[-1], len(tokens) - shared
        prefix_T = row.columns[-1][:shared] if shared else before_T[:0]
        row.columns.append(np.concatenate([prefix_T, np.arange(row.length, row.length + added)]))
        row.tokens.append(tokens_T)
        row.data.append(d)
        row.length += added
        before_T = tokens_T
    return rows


def _common_prefix(a_T: np.ndarray, b_T: np.ndarray) -> int:
    differ = a_T[: len(b_T)] != b_T[: len(a_T)]
    return int(differ.argmax()) if differ.any() else len(differ)


def _joined(rows: list[_Row]) -> _Row:
    """One row after the other, in one."""
    starts = np.cumsum([0, *(row.length for row in rows)])
    return _Row(
        [d for row in rows for d in row.data],
        [tokens_T for row in rows for tokens_T in row.tokens],
        [column_T + start for row, start in zip(rows, starts[:-1], strict=True) for column_T in row.columns],
        int(starts[-1]),
    )


def _collate(
    data_D: Sequence[Datum],
    rows: list[_Row],
    carries: dict[int, np.ndarray],
    device: torch.device,
    bucket: int,
    packed: bool,
    others: bool,
) -> MicroBatch:
    shares = any(len(row.data) > 1 for row in rows)
    starts_N = np.cumsum([0, *(row.length for row in rows)])
    rows = [_joined(rows)] if packed else rows
    width, members = -(-max(row.length for row in rows) // bucket) * bucket, [d for row in rows for d in row.data]
    columns = [column_T for row in rows for column_T in row.columns]
    lengths = np.array([len(column_T) for column_T in columns])
    place = np.concatenate(columns) + np.repeat([b * width for b, row in enumerate(rows) for _ in row.data], lengths)
    position = np.arange(len(place)) - np.repeat(lengths.cumsum() - lengths, lengths)
    tokens_BT, positions_BT = np.zeros((len(rows), width), dtype=np.int64), np.zeros((len(rows), width), dtype=np.int64)
    tokens_BT.flat[place] = np.concatenate([tokens_T for row in rows for tokens_T in row.tokens])
    positions_BT.flat[place] = position
    # The columns that continue a column follow it, up to its end: that of its last datum. Padding
    # attends to itself.
    ends_BT = np.tile(np.arange(1, width + 1), (len(rows), 1))
    ends_BT.flat[place] = np.repeat([column_T[-1] + 1 for column_T in columns], lengths)
    datum, carries_N = np.repeat(members, lengths), np.concatenate([carries[d] for d in members])
    targets = np.concatenate([data_D[d].loss_fn_inputs["target_tokens"].array for d in members])
    temperatures = _temperatures([data_D[d] for d in members])

    def positions(index_N: np.ndarray, once: bool = False) -> Positions:
        index_M, computed_N = index_N, None
        if once and len(index_N):
            temperature_N = None if temperatures is None else temperatures[index_N]
            first_N = _first_alike(place[index_N], targets[index_N], temperature_N)
            first_M, computed_N = np.unique(first_N, return_inverse=True)
            index_M = index_N[first_M]
        targets_M = targets[index_M]
        return Positions(
            rows_M=on_device(place[index_M], device),
            datum_N=datum[index_N],
            position_N=position[index_N],
            targets_MK=on_device(targets_M if targets_M.ndim == 2 else targets_M[:, None], device),
            temperature_M=None if temperatures is None else on_device(temperatures[index_M], device),
            computed_N=None if computed_N is None else on_device(computed_N, device),
        )

    if starts_N[-1] < width:  # the padding, as a sequence of its own
        starts_N = np.append(starts_N, width)
    whole = packed and not shares
    return MicroBatch(
        tokens_BT=on_device(tokens_BT, device),
        loss=positions(np.flatnonzero(carries_N)),
        others=positions(np.flatnonzero(~carries_N & others), once=shares),
        positions_BT=on_device(positions_BT, device) if shares or packed else None,
        ends_BT=on_device(ends_BT, device) if shares or packed else None,
        starts_N=on_device(starts_N.astype(np.int32), device) if whole else None,
        longest=int(np.diff(starts_N).max()) if whole else 0,
    )


def _first_alike(place_N: np.ndarray, targets_N: np.ndarray, temperature_N: np.ndarray | None) -> np.ndarray:
    """Of each position the first in its place, if target and temperature are the same, else itself."""
    own_N = np.arange(len(place_N))
    first = np.empty(place_N.max() + 1, dtype=np.int64)
    first[place_N[::-1]] = own_N[::-1]
    first_N = first[place_N]
    same_N = (targets_N == targets_N[first_N]).reshape(len(own_N), -1).all(-1)
    if temperature_N is not None:
        same_N &= temperature_N == temperature_N[first_N]
    return np.where(same_N, first_N, own_N)


def _temperatures(data_D: Sequence[Datum]) -> np.ndarray | None:
    """Of all tokens, 1 where a Datum has no temperatures; None if no Datum has any."""
    if not any("temperature" in datum.loss_fn_inputs for datum in data_D):
        return None
    given_D = [datum.loss_fn_inputs.get("temperature") for datum in data_D]
    lengths_D = [datum.model_input.length for datum in data_D]
    pairs = zip(given_D, lengths_D, strict=True)
    return np.concatenate([np.ones(length, np.float32) if given is None else given.array for given, length in pairs])


def carries_loss(datum: Datum) -> np.ndarray:
    """(T,) tokens that need a logprob: of non-zero weight, else of non-zero mask, else all."""
    for key in ("weights", "mask"):
        if key in datum.loss_fn_inputs:
            array = datum.loss_fn_inputs[key].array
            return array != 0 if array.ndim == 1 else (array != 0).any(-1)
    return np.ones(datum.model_input.length, dtype=bool)
