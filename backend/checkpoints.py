"""Checkpoints on disk: a normal Hugging Face folder (or peft adapter) with the optimizer beside it.

A checkpoint is written under a temporary name, synced, and renamed; a crash or a full disk at any moment leaves the previous one valid.
Files: what save_pretrained writes, the tokenizer, optimizer.safetensors, and training_state.json with what the loop wants back.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from backend.errors import CheckpointError
from backend.models import SCALAR_HEAD_FILE
from backend.trainer import Trainer

transformers_logging.disable_progress_bar()  # "Writing model shards" at every checkpoint

STATE_FILE, OPTIMIZER_FILE, ADAPTER_FILE = "training_state.json", "optimizer.safetensors", "adapter_model.safetensors"


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A fresh temporary folder that becomes `path` if the block succeeds, and vanishes if it does not."""
    temporary, old = path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.old")
    try:
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        for file in [*temporary.rglob("*"), temporary]:
            _fsync(file)
        if path.exists():
            path.rename(old)
        temporary.rename(path)
        _fsync(path.parent)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"could not write {path}: {error}. Checkpoints written before it are untouched") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_policy(trainer: Trainer, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: torch.dtype | None = None) -> None:
    """What transformers, peft and vLLM load by path: all weights, or the adapter of a LoRA run."""
    if dtype is None or trainer.lora:
        trainer.model.save_pretrained(str(folder))
    else:
        trainer.base.save_pretrained(str(folder), state_dict={k: v.to(dtype) for k, v in trainer.base.state_dict().items()})
    if trainer.scalar_head is not None:
        save_file({"weight": trainer.scalar_head.detach()}, folder / SCALAR_HEAD_FILE)
    trainer.hf_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_state(trainer: Trainer, tokenizer: PreTrainedTokenizerBase, path: Path, extra: dict[str, Any]) -> None:
    with atomic_folder(path) as folder:
        save_policy(trainer, tokenizer, folder)
        save_file(_optimizer_tensors(trainer), folder / OPTIMIZER_FILE)
        lora = asdict(trainer.lora) if trainer.lora else None
        state = {"model_name": trainer.model_name, "seed": trainer.seed, "lora": lora, "extra": extra}
        (folder / STATE_FILE).write_text(json.dumps(state, indent=2))


def read_state(path: Path) -> dict[str, Any]:
    """training_state.json: model_name, seed, lora and the loop's `extra`. Raises CheckpointError if `path` is not a saved state."""
    try:
        return json.loads((path / STATE_FILE).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not a training state of this project ({STATE_FILE}: {error})") from error


def load_weights(trainer: Trainer, path: Path) -> None:
    """Copies the checkpoint's weights into the trainer's tensors. Another architecture, size or kind of fine-tuning raises.

    A scalar model may begin with the trunk of a language model; its head is then zero.
    """
    if not path.is_dir():
        raise CheckpointError(f"there is no checkpoint folder {path}")
    is_adapter = (path / ADAPTER_FILE).exists()
    if is_adapter != (trainer.lora is not None):
        kinds = ("a LoRA adapter", "trained in full") if is_adapter else ("a full model", "trained with LoRA")
        raise CheckpointError(
            f"{path} holds {kinds[0]}, but {trainer.model_name!r} is being {kinds[1]}: change lora_rank or the checkpoint"
        )
    if trainer.scalar_head is None and (path / SCALAR_HEAD_FILE).exists():
        raise CheckpointError(f"{path} holds a scalar model: open it with create_scalar_client_from_state")
    _check_same_model(trainer, path)
    trainer.kept = None
    try:
        if is_adapter:
            _load_adapter(trainer, path)
        else:
            saved = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict()
            _copy(dict(trainer.base.state_dict()), saved, path)
        _load_scalar_head(trainer, path / SCALAR_HEAD_FILE)
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"could not read the checkpoint {path}: {error}") from error


def _check_same_model(trainer: Trainer, path: Path) -> None:
    config = AutoConfig.from_pretrained(path)
    for key in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads"):
        ours, theirs = getattr(trainer.hf_config, key, None), getattr(config, key, None)
        if ours != theirs:
            raise CheckpointError(
                f"{path} is a checkpoint of another model: its {key} is {theirs}, that of {trainer.model_name!r} is {ours}"
            )


@torch.no_grad()
def _load_scalar_head(trainer: Trainer, file: Path) -> None:
    if trainer.scalar_head is not None:
        trainer.scalar_head.copy_(load_file(file)["weight"] if file.exists() else torch.zeros_like(trainer.scalar_head))


def _load_adapter(trainer: Trainer, path: Path) -> None:
    assert isinstance(trainer.model, PeftModel) and trainer.lora
    saved = load_file(path / ADAPTER_FILE)
    ranks = {tensor.shape[0] for name, tensor in saved.items() if "lora_A" in name}
    if ranks != {trainer.lora.rank}:
        raise CheckpointError(f"{path} has LoRA rank {sorted(ranks)}, this run has {trainer.lora.rank}")
    outcome = set_peft_model_state_dict(trainer.model, saved)
    missing = [name for name in outcome.missing_keys if ".lora_" in name]
    if missing or outcome.unexpected_keys:
        raise CheckpointError(f"{path} adapts other layers than this run: {[*missing, *outcome.unexpected_keys][:3]}")


@torch.no_grad()
def _copy(ours: dict[str, torch.Tensor], saved: dict[str, torch.Tensor], path: Path) -> None:
    if differing := sorted(name for name in ours.keys() ^ saved.keys()):
        raise CheckpointError(f"{path} is a checkpoint of another model: {differing[:3]} in only one of the two")
    for name, tensor in ours.items():
        if tensor.shape != saved[name].shape:
            raise CheckpointError(f"{path}: {name} has shape {tuple(saved[name].shape)}, this model has {tuple(tensor.shape)}")
        tensor.copy_(saved[name])


def _optimizer_tensors(trainer: Trainer) -> dict[str, torch.Tensor]:
    """AdamW's state under the parameters' names: independent of their order."""
    return {
        f"{key}:{name}": value.contiguous()
        for name, parameter in trainer.named_trainable.items()
        for key, value in trainer.optimizer.state.get(parameter, {}).items()
    }


def load_optimizer(trainer: Trainer, path: Path) -> None:
    file = path / OPTIMIZER_FILE
    if not file.exists():
        raise CheckpointError(
            f"{path} has no {OPTIMIZER_FILE}: it holds weights only. Load it with load_checkpoint_path, not by resuming"
        )
    if trainer.scalar_head is not None and not (path / SCALAR_HEAD_FILE).exists():
        raise CheckpointError(
            f"{path} has no {SCALAR_HEAD_FILE}: load a language model's weights with load_state, without optimizer"
        )
    trainer.optimizer.state.clear()
    for key, tensor in load_file(file).items():
        slot, name = key.split(":", 1)
        if name not in trainer.named_trainable:
            raise CheckpointError(f"{file} belongs to another model or LoRA setting: this run does not train {name!r}")
        parameter = trainer.named_trainable[name]
        device = parameter.device if slot != "step" or parameter.is_cuda else "cpu"
        trainer.optimizer.state[parameter][slot] = tensor.to(device)
