"""What checkpoints are made from and read into: a Trainer, without importing it."""

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
from peft import PeftModel
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from posttrain.backend.trained_weights import TrainedWeights
from posttrain.backend.types import LoraConfig

T = TypeVar("T")


class TrainedModel(Protocol):
    model_name: str
    seed: int
    lora: LoraConfig | None
    base: PreTrainedModel
    model: PreTrainedModel | PeftModel
    trained: TrainedWeights
    named_trainable: dict[str, nn.Parameter]
    hf_config: PretrainedConfig

    @property
    def scalar_head(self) -> nn.Parameter | None: ...

    @property
    def optimizer(self) -> torch.optim.Optimizer: ...

    @property
    def writes(self) -> bool:
        """Whether this process writes the files; of several ranks, the first."""
        ...

    def read_once(self, read: Callable[[], T]) -> T | None:
        """What `read` returns; None in a rank that gets it from the first."""
        ...

    @property
    def base_fingerprint(self) -> str:
        """adapters.fingerprint of the base's weights."""
        ...
