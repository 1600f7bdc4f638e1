"""Block `large_models`: tokens/s and peak memory of training an 8B shape: LoRA, and all weights with and without
fp32 copies. `large_models_more`: with vLLM beside LoRA (merged, unmerged, and of one base, this of 32B, too),
3B, 1.5B. Random weights, made on the card.
"""

import copy
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal
from unittest.mock import patch

import chz
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel, Qwen2Config

from benchmarks.gpu.checks import Record
from benchmarks.gpu.memory import peak_gib
from benchmarks.gpu.small_engines import mean_gap
from benchmarks.gpu.timing import attempt
from benchmarks.gpu.train_step import random_data, speed, train_step
from posttrain.backend.config import BackendConfig, training_device
from posttrain.backend.models import PRESETS, _shape
from posttrain.backend.service_client import ServiceClient
from posttrain.backend.trainer import Trainer
from posttrain.backend.types import AdamParams, LoraConfig

Lora = Literal["merged", "unmerged", "shared"]
CUDA = training_device().type == "cuda"
BATCH = (8, 1024) if CUDA else (2, 64)  # rows, tokens of each


def shapes(cuda: bool) -> dict[str, PretrainedConfig]:
    if not cuda:
        small: dict[str, Any] = {"vocab_size": 260, "eos_token_id": 1}
        return {name: LlamaConfig(**_shape(2, 128, 256, 4, 2, 256), **small) for name in ("8b", "1.5b", "3b")}
    llama: dict[str, Any] = {**_shape(32, 4096, 14336, 32, 8, 8192), "tie_word_embeddings": False, "vocab_size": 128256}
    return {
        "8b": LlamaConfig(**llama),
        "1.5b": Qwen2Config(**_shape(28, 1536, 8960, 12, 2, 32768), vocab_size=151936),
        "3b": Qwen2Config(**_shape(36, 2048, 11008, 16, 2, 32768), vocab_size=151936),
        "32b": Qwen2Config(
            **{**_shape(64, 5120, 27648, 40, 8, 32768), "tie_word_embeddings": False}, vocab_size=152064
        ),
    }


def on_card(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    with training_device():
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype).eval()
    model.config.architectures = [type(model).__name__]  # read by vLLM
    return model


CHECKPOINTING = BackendConfig(gradient_checkpointing=True, micro_batch_tokens=8192)
EIGHT_B = {
    "8B, LoRA, checkpointing": ("8b", CHECKPOINTING, LoraConfig(rank=32)),
    "8B, all weights, 8-bit moments, no copies, checkpointing": (
        "8b",
        chz.replace(CHECKPOINTING, dtype="bfloat16", moments="8bit", master_weights=False),
        None,
    ),
    "8B, all weights, 8-bit moments, fp32 copies, checkpointing": (
        "8b",
        chz.replace(CHECKPOINTING, moments="8bit"),
        None,
    ),
}
SMALLER = {
    "1.5B": ("1.5b", chz.replace(CHECKPOINTING, gradient_checkpointing=False), None),
    "3B, checkpointing": ("3b", CHECKPOINTING, None),
}


BESIDE = chz.replace(CHECKPOINTING, engine="vllm", max_num_seqs=64, enforce_eager=True)
AIMS = ("8B, LoRA", "8B, all weights")  # of the cases that begin so, the fastest that fits


@contextmanager
def preset(name: str, config: PretrainedConfig) -> Iterator[None]:
    """`name` is a preset of this shape, whose weights are made on the card."""

    def load(name: str, seed: int, device: torch.device, dtype: torch.dtype, trunk: bool = False) -> PreTrainedModel:
        return on_card(config, dtype)

    with ExitStack() as stack:
        stack.enter_context(patch.dict(PRESETS, {name: config}))
        for module in ("trainer", "base_models"):
            stack.enter_context(patch(f"posttrain.backend.{module}.load_model", load))
        yield


def trained_alone(
    name: str, config: PretrainedConfig, rows: int, length: int, lora: LoraConfig | None, backend: BackendConfig
) -> dict[str, float]:
    with preset(name, config):
        trainer = Trainer(name, backend, lora=lora)
    data = random_data(rows, length, trainer.vocabulary)
    found = speed(lambda: train_step(trainer, data), rows * length, 3)
    return found | {"GiB of the card": peak_gib()}


def lora_beside_an_engine(
    name: str,
    config: PretrainedConfig,
    rows: int,
    length: int,
    cuda: bool,
    lora: Lora,
) -> dict[str, float]:
    """Eager, which starts sooner; a sync merges the adapter, or moves it alone."""
    backend = chz.replace(BESIDE, max_length=1024 if cuda else 256, sampler_memory_gb=16 if cuda else 0.25, lora=lora)
    with preset(name, config), ServiceClient(backend) as service:
        client = service.create_training_client(name, LoraConfig(rank=32))
        start = time.perf_counter()
        sampler = client.save_weights_and_get_sampling_client()
        started = time.perf_counter() - start
        trainer: Any = client._trainer
        data = random_data(rows, length, trainer.vocabulary)

        def step() -> None:
            client.forward_backward(data, "cross_entropy")
            client.optim_step(AdamParams(1e-5)).result()

        found, syncs = speed(step, rows * length, 3), []
        for _ in range(3):
            step()
            start = time.perf_counter()
            sampler = client.save_weights_and_get_sampling_client()
            syncs.append(1e3 * (time.perf_counter() - start))
        gap = mean_gap(client, sampler)
        return found | {"start, s": started, "sync, ms": min(syncs), "|dlogp|": gap, "GiB of the card": peak_gib()}


def measured(record: Record, title: str, name: str, backend: BackendConfig, lora: LoraConfig | None) -> Any:
    config, (rows, length) = shapes(CUDA)[name], BATCH
    return attempt(record, title, lambda: trained_alone(name, config, rows, length, lora, backend))


def main() -> None:
    record, found = Record(), {}
    for title, (name, backend, lora) in EIGHT_B.items():
        found[title] = measured(record, title, name, backend, lora)
        for aim in AIMS:
            fit = [case for title, case in found.items() if title.startswith(aim) and isinstance(case, dict)]
            for key in ("tokens/s", "GiB of the card"):
                record.figure(f"{aim}: {key}", max(fit, key=lambda case: case["tokens/s"])[key] if fit else None)
    record.print()


def main_of_more() -> None:
    record = Record()

    def beside(title: str, name: str, lora: Lora) -> None:
        attempt(record, title, partial(lora_beside_an_engine, name, shapes(CUDA)[name], *BATCH, CUDA, lora))

    beside("8B, LoRA, with vLLM beside it", "8b", "merged")
    for title, (name, backend, lora) in SMALLER.items():
        measured(record, title, name, backend, lora)
    beside("8B, LoRA unmerged, with vLLM beside it", "8b", "unmerged")
    if CUDA:  # on a CPU vLLM shares no weights
        beside("8B, LoRA, one base for passes and vLLM", "8b", "shared")
        beside("32B, LoRA, one base for passes and vLLM", "32b", "shared")  # two copies are 122 GiB
    record.print()


if __name__ == "__main__":
    main()
