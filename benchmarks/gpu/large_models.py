"""Block `large_models`: LoRA of an 8B shape with a bf16 base (a mock), and what our Trainer does
with 1.5B, 3B and 8B. Random weights, made on the card.
"""

import copy
from typing import Any
from unittest.mock import patch

import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel, Qwen2Config

from benchmarks.gpu.checks import Record
from benchmarks.gpu.timing import attempt, peak_gib
from benchmarks.gpu.train_step import random_data, speed, train_step
from posttrain.backend.config import BackendConfig, compute_dtype, training_device
from posttrain.backend.logprobs import target_logprobs
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


def bf16_lora(config: PretrainedConfig, rows: int, length: int) -> dict[str, Any]:
    """fp32 adapters of rank 32 on all linear layers, checkpointing, our chunked logprobs."""
    device = training_device()
    dtype = compute_dtype(device)
    base = on_card(config, dtype)
    loaded = peak_gib()
    model = get_peft_model(base, PeftConfig(r=32, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    base.enable_input_require_grads()
    model.train()
    adapters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=1e-4, fused=True)
    tokens_BT = torch.randint(4, config.vocab_size, (rows, length), device=device)
    head: Any = base.get_output_embeddings()

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            hidden = base.get_decoder()(input_ids=tokens_BT, use_cache=False).last_hidden_state
        p_NK = target_logprobs(hidden.flatten(0, 1).to(dtype), head.weight, tokens_BT.roll(-1, 1).flatten()[:, None])
        (-p_NK.mean()).backward()
        optimizer.step()
        optimizer.zero_grad()

    dtypes = sorted({str(p.dtype) for p in adapters})
    return {
        **speed(step, rows * length, 2),
        "GiB loaded": loaded,
        "adapters": sum(p.numel() for p in adapters),
        "of": dtypes,
    }


def our_trainer(
    name: str, config: PretrainedConfig, rows: int, length: int, lora: LoraConfig | None, checkpointing: bool
) -> Any:
    def load(name: str, seed: int, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
        return on_card(config, dtype)

    backend = BackendConfig(gradient_checkpointing=checkpointing, micro_batch_tokens=8192)
    with patch.dict(PRESETS, {name: config}), patch("posttrain.backend.trainer.load_model", load):
        trainer = Trainer(name, backend, lora=lora)
    data = random_data(rows, length, trainer.vocabulary)
    return speed(lambda: train_step(trainer, data), rows * length, 2)


def main() -> None:
    record, cuda = Record(), training_device().type == "cuda"
    found, (rows, length) = shapes(cuda), (8, 1024) if cuda else (2, 64)
    attempt(record, "mock: 8B, LoRA on a bf16 base, checkpointing", lambda: bf16_lora(found["8b"], rows, length))
    for title, name, lora, checkpointing in (
        ("ours: 1.5B, all weights", "1.5b", None, False),
        ("ours: 3B, all weights, checkpointing", "3b", None, True),
        ("ours: 3B, all weights", "3b", None, False),
        ("ours: 8B, LoRA, checkpointing", "8b", LoraConfig(rank=32), True),
    ):
        case = (name, found[name], rows, length, lora, checkpointing)
        attempt(record, title, lambda case=case: our_trainer(*case))
    record.print()


if __name__ == "__main__":
    main()
