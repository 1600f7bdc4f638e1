"""A Trainer as its checks and its checkpoints know it, without importing it."""

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import torch
from peft import PeftModel
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from posttrain.backend.batching import MicroBatch
from posttrain.backend.config import BackendConfig
from posttrain.backend.trained_weights import TrainedWeights
from posttrain.backend.types import Datum, LoraConfig

T = TypeVar("T")


class TrainedModel(Protocol):
    model_name: str
    config: BackendConfig
    seed: int
    lora: LoraConfig | None
    device: torch.device
    compute_dtype: torch.dtype
    max_length: int
    vocabulary: int
    hf_config: PretrainedConfig
    base: PreTrainedModel
    model: PreTrainedModel | PeftModel
    trained: TrainedWeights
    named_trainable: dict[str, nn.Parameter]
    # how sequences share a row (attention.py)
    windows: dict[str, int | None] | None
    shares_prefixes: bool
    packs: bool
    whole_sequences: bool

    @property
    def scalar_head(self) -> nn.Parameter | None: ...

    @property
    def writes(self) -> bool:
        """Whether this process writes the files; of several ranks, the first."""
        ...

    def read_once(self, read: Callable[[], T]) -> T | None:
        """What `read` returns; None in a rank that gets it from the first."""
        ...

    def _flat_logprobs(self, data_D: Sequence[Datum], batches: Sequence[MicroBatch]) -> torch.Tensor: ...

    @property
    def base_fingerprint(self) -> str:
        """adapters.fingerprint of the base's weights."""
        ...
