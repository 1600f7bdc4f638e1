"""Block `large_models`: tokens/s and peak memory of training 1.5B, 3B and 8B shapes: LoRA, and all
weights with and without fp32 copies. Random weights, made on the card.
"""

import copy
from typing import Any
from unittest.mock import patch

import chz
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel, Qwen2Config

from benchmarks.gpu.checks import Record
from benchmarks.gpu.timing import attempt
from benchmarks.gpu.train_step import random_data, speed, train_step
from posttrain.backend.config import BackendConfig, training_device
from posttrain.backend.models import PRESETS, _shape
from posttrain.backend.trainer import Trainer
from posttrain.backend.types import LoraConfig


def shapes(cuda: bool) -> dict[str, PretrainedConfig]:
    if not cuda:
        small: dict[str, Any] = {"vocab_size": 260, "eos_token_id": 1}
        return {name: LlamaConfig(**_shape(2, 64, 128, 4, 2, 256), **small) for name in ("8b", "1.5b", "3b")}
    llama: dict[str, Any] = {**_shape(32, 4096, 14336, 32, 8, 8192), "tie_word_embeddings": False, "vocab_size": 128256}
    return {
        "8b": LlamaConfig(**llama),
        "1.5b": Qwen2Config(**_shape(28, 1536, 8960, 12, 2, 32768), vocab_size=151936),
        "3b": Qwen2Config(**_shape(36, 2048, 11008, 16, 2, 32768), vocab_size=151936),
    }


def on_card(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    with training_device():
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype).eval()


CHECKPOINTING = BackendConfig(gradient_checkpointing=True, micro_batch_tokens=8192)
CASES = {
    "8B, LoRA, checkpointing": ("8b", CHECKPOINTING, LoraConfig(rank=32)),
    "8B, 8-bit moments, no copies, checkpointing": (
        "8b",
        chz.replace(CHECKPOINTING, dtype="bfloat16", moments="8bit", master_weights=False),
        None,
    ),
    "8B, 8-bit moments, fp32 copies, checkpointing": ("8b", chz.replace(CHECKPOINTING, moments="8bit"), None),
    "1.5B": ("1.5b", chz.replace(CHECKPOINTING, gradient_checkpointing=False), None),
    "3B, checkpointing": ("3b", CHECKPOINTING, None),
}


def our_trainer(
    name: str, config: PretrainedConfig, rows: int, length: int, lora: LoraConfig | None, backend: BackendConfig
) -> Any:
    def load(name: str, seed: int, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
        return on_card(config, dtype)

    with patch.dict(PRESETS, {name: config}), patch("posttrain.backend.trainer.load_model", load):
        trainer = Trainer(name, backend, lora=lora)
    data = random_data(rows, length, trainer.vocabulary)
    return speed(lambda: train_step(trainer, data), rows * length, 2)


def main() -> None:
    record, cuda = Record(), training_device().type == "cuda"
    configs, (rows, length) = shapes(cuda), (8, 1024) if cuda else (2, 64)
    for title, (name, backend, lora) in CASES.items():
        case = (name, configs[name], rows, length, lora, backend)
        attempt(record, title, lambda case=case: our_trainer(*case))
    record.print()


if __name__ == "__main__":
    main()
