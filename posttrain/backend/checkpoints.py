"""Checkpoints of a Trainer: a Hugging Face folder or a peft adapter, and the training state
(checkpoint_files.py). Written whole or not at all (atomic_folder.py). Reading checks everything
first: a checkpoint that does not fit changes nothing. Several ranks gather what they hold and the
first writes it; each reads its part, whatever number of ranks wrote it.
"""

import copy
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from posttrain.backend.adapters import absolute, check_adapter, load_adapter, write_adapter
from posttrain.backend.atomic_folder import atomic_folder
from posttrain.backend.checkpoint_files import (
    OPTIMIZER_FILE,
    REMEDY,
    SCALAR_HEAD_FILE,
    STATE_FOLDER,
    check_readable,
    is_adapter,
    state_file,
    tensor_shapes,
    write_state,
)
from posttrain.backend.data_checks import check_loaded
from posttrain.backend.errors import CheckpointError, ModelError
from posttrain.backend.merged_lora import in_dtype
from posttrain.backend.models import model_config, read_model
from posttrain.backend.optimizer_state import check_optimizer, load_optimizer, optimizer_tensors
from posttrain.backend.ranks import assign, shard_like, whole_on_cpu
from posttrain.backend.trained_model import TrainedModel

transformers_logging.disable_progress_bar()  # "Writing model shards" at every checkpoint


def checkpoint_bytes(trainer: TrainedModel) -> int:
    """Approximate size of save_state: fp32 weights (LoRA: the adapter's) and two moments per
    trained weight."""
    trained = sum(p.numel() for p in trainer.named_trainable.values())
    weights = trained if trainer.lora else sum(p.numel() for p in trainer.base.parameters())
    return 4 * weights + 8 * trained


def save_state(trainer: TrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path, extra: dict[str, Any]) -> None:
    """A collective call of the ranks."""
    weights = _weights(trainer)
    optimizer = optimizer_tensors(trainer.trained.stepped, trainer.trained.optimizer, trainer.writes)
    if not trainer.writes:
        return
    with atomic_folder(path) as folder:
        lora = asdict(trainer.lora) if trainer.lora else None
        state = {"model_name": absolute(trainer.model_name), "seed": trainer.seed, "lora": lora, "extra": extra}
        write_state(folder, state)
        _write_policy(trainer, weights, tokenizer, folder)
        save_file(optimizer, folder / STATE_FOLDER / OPTIMIZER_FILE)


def save_policy(trainer: TrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path, dtype: torch.dtype) -> None:
    """A folder for transformers, peft and vLLM: all weights in `dtype`, or the LoRA adapter. A
    collective call of the ranks."""
    weights = _weights(trainer, None if trainer.lora else dtype)
    if trainer.writes:
        with atomic_folder(path) as folder:
            _write_policy(trainer, weights, tokenizer, folder, dtype)


def _weights(trainer: TrainedModel, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """The whole tensors of the model's state_dict, or of its adapter's, and a scalar head; where
    nothing is written, empty. On the CPU, where they were gathered."""
    model = trainer.model if trainer.lora else trainer.base
    tensors = trainer.trained.exact(model.state_dict(keep_vars=True))  # a tied head is the embedding itself
    buffers = {id(tensor) for tensor in model.buffers()}
    gathered: dict[int, torch.Tensor] = {}
    weights: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if trainer.lora and ".lora_" not in name:
            continue
        if id(tensor) not in gathered:
            saved_as = tensor.dtype if dtype is None or id(tensor) in buffers else dtype
            gathered[id(tensor)] = in_dtype(whole_on_cpu(tensor, trainer.writes), saved_as)
        weights[name] = gathered[id(tensor)]
    if trainer.scalar_head is not None:
        weights[SCALAR_HEAD_FILE] = whole_on_cpu(trainer.scalar_head, trainer.writes)
    return weights


def _write_policy(
    trainer: TrainedModel,
    weights: dict[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    dtype: torch.dtype | None = None,
) -> None:
    if trainer.scalar_head is not None:
        save_file({"weight": weights.pop(SCALAR_HEAD_FILE)}, folder / SCALAR_HEAD_FILE)
    if trainer.lora:
        write_adapter(trainer, weights, folder)
    else:
        trainer.base.save_pretrained(str(folder), state_dict=weights)
        if dtype is None and trainer.trained.masters:
            dtype = torch.float32
        if dtype is not None:
            config = copy.deepcopy(trainer.hf_config)
            config.dtype = dtype
            config.save_pretrained(folder)
    _save_tokenizer(trainer, tokenizer, folder)


def _save_tokenizer(trainer: TrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """`model_max_length` is the model's; load_tokenizer has set the run's context."""
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # the tokenizers library raises a plain one for a full disk
        raise OSError(f"the tokenizer: {error}") from error
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    of_model = getattr(trainer.hf_config.get_text_config(), "max_position_embeddings", None) or 0
    config["model_max_length"] = max(of_model, tokenizer.init_kwargs.get("model_max_length") or 0)
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load_state(trainer: TrainedModel, path: Path, with_optimizer: bool) -> None:
    """Copies weights, and with `with_optimizer` the optimizer's state, into the trainer's tensors.
    CheckpointError, before any change, for another architecture, size, base or kind of fine-tuning.
    A scalar model may begin with a language model's trunk; its head is then zero."""
    check_readable(path)
    adapter = is_adapter(path)
    if adapter != (trainer.lora is not None):
        kinds = ("a LoRA adapter", "trained in full") if adapter else ("a full model", "trained with LoRA")
        remedy = "set lora_rank to its rank" if adapter else f"give it as model_name={path}, or leave out lora_rank"
        raise CheckpointError(f"{path} holds {kinds[0]}, but {trainer.model_name!r} is being {kinds[1]}: {remedy}")
    if trainer.scalar_head is None and (path / SCALAR_HEAD_FILE).exists():
        raise CheckpointError(f"{path} holds a scalar model: open it with create_scalar_client_from_state")
    optimizer_file = state_file(path, OPTIMIZER_FILE)
    if with_optimizer:
        _check_optimizer(trainer, path, optimizer_file)
    head = _read_scalar_head(trainer, path / SCALAR_HEAD_FILE)
    if adapter:
        check_adapter(trainer, path)
        load_adapter(trainer, path)
    else:
        live = trainer.trained.exact(trainer.base.state_dict())
        saved = trainer.read_once(lambda: _read_weights(trainer, live, path))
        for name, tensor in live.items():
            assign(tensor, None if saved is None else saved[name])
    if head is not None and trainer.scalar_head is not None:
        trainer.scalar_head.data.copy_(shard_like(head, trainer.scalar_head.data))
    trainer.trained.masters_to_weights()
    trainer.trained.optimizer.state.clear()
    if with_optimizer:
        load_optimizer(trainer.trained.stepped, trainer.trained.optimizer, optimizer_file)


def _check_optimizer(trainer: TrainedModel, path: Path, file: Path) -> None:
    if not file.exists():
        raise CheckpointError(
            f"{path} has no {OPTIMIZER_FILE}: it holds weights only. Load it with load_checkpoint_path, not by resuming"
        )
    if trainer.scalar_head is not None and not (path / SCALAR_HEAD_FILE).exists():
        raise CheckpointError(
            f"{path} has no {SCALAR_HEAD_FILE}: load a language model's weights with load_state, without optimizer"
        )
    check_optimizer(trainer.trained.stepped, trainer.trained.optimizer, file)


def _read_scalar_head(trainer: TrainedModel, file: Path) -> torch.Tensor | None:
    if trainer.scalar_head is None:
        return None
    if not file.exists():
        return torch.zeros(trainer.scalar_head.shape)
    if (shape := tensor_shapes(file).get("weight")) != tuple(trainer.scalar_head.shape):
        raise CheckpointError(
            f"{file} holds a head of shape {shape}, this model's has {tuple(trainer.scalar_head.shape)}"
        )
    head = load_file(file)
    check_loaded(str(file), head, CheckpointError)
    return head["weight"]


def _read_weights(trainer: TrainedModel, live: dict[str, torch.Tensor], path: Path) -> dict[str, torch.Tensor]:
    """A full checkpoint's weights: exactly the tensors of its config.json, and those of `live`."""
    try:
        _check_same_model(trainer, model_config(str(path)), path)
        model = read_model(str(path), torch.float32)
    except ModelError as error:
        raise CheckpointError(f"{error}: {REMEDY}") from error
    if trainer.hf_config.tie_word_embeddings and not model.config.tie_word_embeddings:
        raise CheckpointError(
            f"{path} has an output layer of its own, and that of {trainer.model_name!r} is its embedding: give it as "
            f"model_name={path}"
        )
    saved = model.state_dict()
    if differing := sorted(live.keys() ^ saved.keys()):
        raise CheckpointError(f"{path} is a checkpoint of another model: {differing[:3]} in only one of the two")
    for name, tensor in live.items():
        if tensor.shape != saved[name].shape:
            raise CheckpointError(
                f"{path}: {name} has shape {tuple(saved[name].shape)}, this model has {tuple(tensor.shape)}"
            )
    check_loaded(str(path), saved, CheckpointError)
    return saved


def _check_same_model(trainer: TrainedModel, config: PretrainedConfig, path: Path) -> None:
    for key in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads"):
        live, saved = getattr(trainer.hf_config, key, None), getattr(config, key, None)
        if live != saved:
            raise CheckpointError(
                f"{path} is a checkpoint of another model: its {key} is {saved}, that of {trainer.model_name!r} is "
                f"{live}"
            )
