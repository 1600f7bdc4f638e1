"""The options of a supervised run (train.py)."""

import chz

from posttrain.backend.ranges import NON_NEGATIVE
from posttrain.tracking.run_config import log_path_field
from supervised.evaluators import EvaluatedRunConfig
from supervised.types import SupervisedDatasetBuilder


@chz.chz
class Config(EvaluatedRunConfig):
    """Supervised fine-tuning of a language model on a dataset."""

    dataset: SupervisedDatasetBuilder = chz.field(doc="the training data and the held-out data")
    stop_at_nll: float | None = chz.field(
        default=None,
        validator=NON_NEGATIVE,
        doc="end when train_mean_nll of a batch (nats per token) is below this; meant for lr_schedule=constant",
    )
    log_path: str = log_path_field("runs/sft")
