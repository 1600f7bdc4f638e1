"""Supervised datasets: batches of Datum by index, and their builders."""

from abc import abstractmethod
from typing import Protocol, TypeVar

import chz

from posttrain.backend.choices import check_choices
from posttrain.backend.ranges import COUNT, SEED
from posttrain.backend.types import Datum
from posttrain.renderers.types import Renderer, TrainOnWhat
from posttrain.tracking.datasets import train_and_test

Batch = TypeVar("Batch", covariant=True)


class Dataset(Protocol[Batch]):
    """Addressed by batch index within an epoch: a resume starts at an index.
    posttrain/tracking/datasets.py has two implementations."""

    @abstractmethod
    def get_batch(self, index: int) -> Batch:
        """Batch `index` of the current epoch."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of batches in an epoch."""

    def set_epoch(self, epoch: int) -> None:  # noqa: B027 - a dataset without order has nothing to do
        """Reshuffles as a pure function of the dataset's seed and `epoch`."""


SupervisedDataset = Dataset[list[Datum]]


@chz.chz
class SupervisedDatasetBuilder:
    """Configuration that builds the training set and, where there is one, the held-out set."""

    batch_size: int = chz.field(default=128, validator=COUNT, doc="examples per optimizer step")
    max_length: int | None = chz.field(
        default=None, validator=COUNT, doc="most tokens per example; None = the model's context"
    )
    train_on_what: TrainOnWhat = chz.field(
        default=TrainOnWhat.ALL_ASSISTANT_MESSAGES, doc="which messages are trained on"
    )
    reduction: str = chz.field(
        default="mean", doc="mean = every example has the same weight in the loss; sum = every token has"
    )
    seed: int = chz.field(default=0, validator=SEED, doc="seed of the shuffle and of the train/test split")

    @chz.validate
    def _check_choices(self) -> None:
        check_choices(self)

    def __call__(self, renderer: Renderer) -> tuple[SupervisedDataset, SupervisedDataset | None]:
        raise NotImplementedError


def datasets_of(
    builder: SupervisedDatasetBuilder, renderer: Renderer
) -> tuple[SupervisedDataset, SupervisedDataset | None]:
    """Those that the builder returns; DataError for anything else."""
    return train_and_test(builder, builder(renderer), "get_batch", "set_epoch", "__len__")
