"""The options of a DPO run (train_dpo.py)."""

from typing import Literal

import chz

from posttrain.backend.ranges import COUNT, LEARNING_RATE, SEED
from posttrain.tracking.run_config import log_path_field
from preference.losses import DPO, PreferenceLoss
from preference.types import ComparisonDatasetBuilder, Ties
from supervised.evaluators import EvaluatedRunConfig


@chz.chz
class Config(EvaluatedRunConfig):
    """Direct preference optimisation of a language model on pairs of answers."""

    dataset: ComparisonDatasetBuilder = chz.field(doc="training and held-out comparisons")
    method: PreferenceLoss = chz.field(default_factory=DPO, doc="the preference loss and its settings")
    batch_size: int = chz.field(default=64, validator=COUNT, doc="pairs per optimizer step")
    data_seed: int = chz.field(default=0, validator=SEED, doc="seed of the order of the pairs")
    max_length: int | None = chz.field(
        default=None, validator=COUNT, doc="most tokens of prompt and answer; None = the model's context"
    )
    overlong: Literal["drop", "raise"] = chz.field(
        default="drop", doc="what to do with pairs that have an answer longer than max_length; the number is printed"
    )
    ties: Ties = chz.field(
        default="drop",
        doc="what to do with ties: drop; both = train in both orders, towards equal rewards; raise = an error",
    )
    learning_rate: float = chz.field(default=1e-5, validator=LEARNING_RATE, doc="the peak rate, after the warm-up")
    log_path: str = log_path_field("runs/dpo")
