"""Tokenized examples of a data set: flat arrays of 8 bytes a token, of which a Datum is made when a
batch asks for it; and several processes that tokenize the rows of a large set, in their order.
"""

import ctypes
import gc
import os
import signal
import sys
from array import array
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import accumulate, pairwise
from multiprocessing import get_context
from typing import Any, TypeVar

import numpy as np

from posttrain.backend.errors import ConfigError, DataError
from posttrain.backend.types import Datum, ModelInput, TensorData
from posttrain.tracking.progress import Count

T = TypeVar("T")
R = TypeVar("R")

SERIAL_ROWS = 10_000  # up to which one process tokenizes: seconds
CHUNK_ROWS = 500
AHEAD = 4  # chunks of each process that are read before their turn
PR_SET_PDEATHSIG = 1
MOST_PROCESSES = 16  # each may remember 130 MB of texts (renderers/encoding.py)


def datum_from_tokens_weights(
    tokens: Sequence[int], weights: Sequence[float], max_length: int | None = None, reduction: str = "mean"
) -> Datum:
    """Predicts token t+1 from the tokens up to t, with the weight of token t+1; the first token's
    weight is not used. Keeps the first `max_length` tokens. `reduction="mean"` divides by the sum
    of the kept weights, "sum" does not. DataError if all kept weights are 0."""
    tokens_T, weights_T = _checked(tokens, weights, max_length, reduction)
    weights_T = weights_T[1:]
    if reduction == "mean":
        weights_T = weights_T / float(weights_T.sum())
    model_input = ModelInput.kept(tokens_T[:-1].tolist())
    return Datum(model_input, {"target_tokens": TensorData(tokens_T[1:]), "weights": TensorData(weights_T)})


def _checked(
    tokens: Sequence[int], weights: Sequence[float], max_length: int | None, reduction: str
) -> tuple[np.ndarray, np.ndarray]:
    """(T,) int64 and (T,) float32"""
    if reduction not in ("mean", "sum"):
        raise ConfigError(
            f"reduction={reduction!r}: it is 'mean' (each example weighs the same) or 'sum' (each token does)"
        )
    if len(tokens) != len(weights):
        raise DataError(f"{len(tokens)} tokens with {len(weights)} weights")
    tokens_T = np.asarray(tokens[:max_length], dtype=np.int64)
    weights_T = np.asarray(weights[:max_length], dtype=np.float32)
    if not float(weights_T[1:].sum()) > 0:
        raise DataError(
            f"nothing to train on: the {len(tokens_T)} tokens have no weight (the first token's does not count)"
        )
    return tokens_T, weights_T


class Examples(Sequence[Datum]):
    """What `datum_from_tokens_weights` makes of the appended tokens and weights."""

    def __init__(self, reduction: str = "mean"):
        self.reduction = reduction
        self._tokens, self._weights, self._ends = array("i"), array("f"), array("q", [0])

    def append(self, tokens: Sequence[int], weights: Sequence[float], max_length: int | None = None) -> None:
        """DataError as of the Datum."""
        tokens_T, weights_T = _checked(tokens, weights, max_length, self.reduction)
        self._tokens.frombytes(tokens_T.astype(np.int32).tobytes())
        self._weights.frombytes(weights_T.tobytes())
        self._ends.append(len(self._tokens))

    def extend(self, others: "Examples") -> None:
        before = len(self._tokens)
        self._tokens += others._tokens
        self._weights += others._weights
        self._ends.extend(before + end for end in others._ends[1:])

    def count_in(self, others: "Examples") -> int:
        """How many examples are among the `others`, by their tokens."""
        own = Counter(self._keys())
        found = {key for key in others._keys() if key in own}  # no second copy of a large set
        return sum(own[key] for key in found)

    def _keys(self) -> Iterator[bytes]:
        """The tokens of each example."""
        return (self._tokens[start:end].tobytes() for start, end in pairwise(self._ends))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: Any) -> Any:
        place = range(len(self))[index]
        start, end = self._ends[place], self._ends[place + 1]
        return datum_from_tokens_weights(self._tokens[start:end], self._weights[start:end], None, self.reduction)


class Joined(Sequence[T]):
    """Sequences one after another, without a copy of their items."""

    def __init__(self, parts: Sequence[Sequence[T]]):
        self._parts, self._ends = parts, [0, *accumulate(map(len, parts))]

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: Any) -> Any:
        place = range(len(self))[index]
        part = bisect_right(self._ends, place) - 1
        return self._parts[part][place - self._ends[part]]


class Ordered(Sequence[T]):
    """A sequence in another order, without a copy of its items."""

    def __init__(self, items: Sequence[T], order: np.ndarray):
        self._items, self._order = items, order

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: Any) -> Any:
        return self._items[int(self._order[index])]


def by_processes(work: Callable[[Sequence[T]], R], rows: Sequence[T], activity: str) -> Iterator[R]:
    """`work` of the rows, chunk by chunk in their order: in this process, or where there are more than
    SERIAL_ROWS in a process per core. Then it must be a function of its rows alone. Raises what it
    raises. Prints now and then how many are done."""
    chunks = (rows[start : start + CHUNK_ROWS] for start in range(0, len(rows), CHUNK_ROWS))
    count, processes = Count(len(rows), activity), min(_cores(), MOST_PROCESSES)
    if len(rows) <= SERIAL_ROWS or processes == 1:
        for chunk in chunks:
            yield work(chunk)
            count.add(len(chunk))
        return
    # forked: a renderer and a user's builder are there as they are, and a script is not run again
    pool = ProcessPoolExecutor(processes, get_context("fork"), _begin, (work,))
    waiting: deque[tuple[int, Future[R]]] = deque()
    try:
        for chunk in chunks:
            waiting.append((len(chunk), pool.submit(_call, chunk)))
            if len(waiting) > AHEAD * processes:
                number, result = waiting.popleft()
                yield result.result()
                count.add(number)
        for number, result in waiting:
            yield result.result()
            count.add(number)
    except BrokenProcessPool as error:
        raise DataError(
            f"{activity}: a process was killed, perhaps for want of memory: free some, or use fewer examples"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _cores() -> int:
    """On which processes can be forked."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1


_work: Callable[[Any], Any]


def _begin(work: Callable[[Any], Any]) -> None:
    global _work
    _work = work
    gc.freeze()  # a collection would touch, and so copy, all that the parent has
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the pool
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # a pool waits for ever for a parent killed


def _call(chunk: Any) -> Any:
    return _work(chunk)
