"""The two datasets of supervised training, preferences and RL: a list reshuffled every epoch, and
batches drawn anew. Batches are addressed by index: a resume starts at an index. Index 0 is the
first batch of the current epoch; indices past the end are later epochs. A batch's randomness
depends only on (seed, epoch, index); seeds.py has the streams.
"""

from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Generic, TypeVar

import numpy as np

from posttrain.backend.errors import DataError

T = TypeVar("T")


class DrawnDataset(Generic[T]):
    """`n_batches` per epoch: batch `index` of `epoch` is `draw(epoch, index)`, a pure function."""

    def __init__(self, draw: Callable[[int, int], Sequence[T]], n_batches: int):
        self.draw, self.n_batches, self.epoch = draw, n_batches, 0

    def __len__(self) -> int:
        return self.n_batches

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def get_batch(self, index: int) -> list[T]:
        later, batch = divmod(index, self.n_batches)
        return list(self.draw(self.epoch + later, batch))


class ListDataset(DrawnDataset[T]):
    """Batches of a list in the order of (seed, epoch), or the list's without `shuffle`. The last
    batch of an epoch may be short. A `batch_size` above the length makes each batch the whole list,
    which is printed if shuffled. `noun` names the items in messages. DataError for an empty list.
    """

    def __init__(
        self, items: Sequence[T], batch_size: int, seed: int = 0, *, shuffle: bool = True, noun: str = "examples"
    ):
        self.items, self.seed, self.shuffle = items, seed, shuffle
        self._order = (0, self.order(0))
        length = len(self._order[1])
        if batch_size < 1 or not length:
            raise DataError(f"batch_size={batch_size} and {len(items):,} {noun}: a batch needs at least one")
        if shuffle and batch_size > length:
            print(
                f"batch_size={batch_size} is more than the {length:,} {noun}: every batch holds all of them", flush=True
            )
        self.batch_size = min(batch_size, length)
        super().__init__(self.batch, -(-length // self.batch_size))

    def order(self, epoch: int) -> np.ndarray:
        """Indices into `items`, in an epoch's order."""
        count = len(self.items)
        return np.random.default_rng([self.seed, epoch]).permutation(count) if self.shuffle else np.arange(count)

    def batch(self, epoch: int, index: int) -> list[T]:
        if self._order[0] != epoch:
            self._order = (epoch, self.order(epoch))
        return [self.items[i] for i in self._order[1][index * self.batch_size : (index + 1) * self.batch_size]]


def held_out(items: Sequence[T], batch_size: int) -> ListDataset[T] | None:
    """In their order; None without items."""
    return ListDataset(items, batch_size, shuffle=False) if items else None


def train_and_test(builder: object, result: object, *methods: str) -> tuple[Any, Any]:
    """What a user's builder returned: a training set, and a held-out set or None, with `methods`.
    DataError for anything else."""
    name = type(builder).__name__
    if isinstance(result, Coroutine):
        result.close()
        raise DataError(f"{name}.__call__ is an `async def`: here it is to be a plain `def`")
    if not isinstance(result, tuple | list) or len(result) != 2:
        raise DataError(f"{name} returned {result!r:.100}, not a training set and a held-out set (which may be None)")
    train, test = result
    for dataset in (train, *(() if test is None else (test,))):
        for method in methods:
            if not callable(getattr(dataset, method, None)):
                raise DataError(f"{name} returned {dataset!r:.100}, which is not a data set: it has no {method}")
        try:
            _ = len(dataset) if hasattr(dataset, "__len__") else 0
        except (TypeError, ValueError) as error:
            raise DataError(f"{name} returned {dataset!r:.100}, whose length cannot be taken: {error}") from error
    return train, test
