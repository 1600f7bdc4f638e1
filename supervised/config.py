"""The options of a supervised run (train.py)."""

import chz

from posttrain.backend.ranges import NON_NEGATIVE
from posttrain.tracking.run_config import log_path_field
from supervised.evaluators import EvaluatedRunConfig
from supervised.types import SupervisedDatasetBuilder


@chz.chz
class Config(EvaluatedRunConfig):
    """Supervised fine-tuning of a language model on a dataset."""

    dataset: SupervisedDatasetBuilder = chz.field(doc="builder of the training and held-out data")
    stop_at_nll: float | None = chz.field(
        default=None,
        validator=NON_NEGATIVE,
        doc="end once a batch's train_mean_nll, a mean over tokens, is below this (with a constant lr_schedule)",
    )
    log_path: str = log_path_field("runs/sft")
