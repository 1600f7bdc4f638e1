"""Checkpoints of the Belief State Transformer and of its baseline: a folder, written whole or not at all (backend/checkpoints.py).

belief_state.json     the kind of model and its configuration
model.safetensors     the weights
optimizer.safetensors, training_state.json    in checkpoints of a run
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from backend.belief_state import BeliefState, BeliefStateConfig, NextToken
from backend.config import training_device
from backend.errors import CheckpointError

CONFIG_FILE, WEIGHTS_FILE, OPTIMIZER_FILE = "belief_state.json", "model.safetensors", "optimizer.safetensors"
Model = BeliefState | NextToken
M = TypeVar("M", BeliefState, NextToken)


def write_model(model: Model, folder: Path) -> None:
    config = {"kind": type(model).__name__, "config": asdict(model.config)}
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2))
    save_file({name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}, folder / WEIGHTS_FILE)


def load_belief_state(path: str | Path, task: str | None = None) -> BeliefState:
    """The model of a checkpoint folder, on the training device. CheckpointError where it is none, or one of another `task`."""
    return _open(BeliefState, Path(path), task)


def load_next_token(path: str | Path, task: str | None = None) -> NextToken:
    return _open(NextToken, Path(path), task)


def _open(kind: type[M], path: Path, task: str | None) -> M:
    config = read_config(path, kind)
    if task is not None and config.task != task:
        raise CheckpointError(
            f"{path} was trained on {config.task or 'another task'}, not on {task}: give the checkpoint of that run"
        )
    with torch.device("meta"):
        model = kind(config, seed=None)
    model.to_empty(device=training_device())
    load_weights(model, path, config.task)
    return model


def read_config(path: Path, kind: type[Model]) -> BeliefStateConfig:
    try:
        saved = json.loads((path / CONFIG_FILE).read_text())
        config = BeliefStateConfig(**saved["config"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is no checkpoint of a Belief State Transformer or its baseline ({CONFIG_FILE}: {error})"
        ) from error
    if saved["kind"] != kind.__name__:
        raise CheckpointError(f"{path} holds a {saved['kind']} model, not a {kind.__name__} one: give the other's checkpoint")
    return config


@torch.no_grad()
def load_weights(model: Model, path: Path, task: str | None) -> None:
    """Copies the weights of a checkpoint of the same sizes, and of the same task unless `task` is None."""
    saved = read_config(path, type(model))
    for key, theirs in asdict(saved).items():
        ours = task if key == "task" else getattr(model.config, key)
        if ours != theirs and ours is not None:
            raise CheckpointError(f"{path} is a checkpoint of another model: its {key} is {theirs!r}, here it is {ours!r}")
    try:
        tensors = load_file(path / WEIGHTS_FILE)
        model.load_state_dict(tensors)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"could not read the weights of {path}: {error}") from error


def write_optimizer(model: Model, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """AdamW's state under the parameters' names."""
    tensors = {
        f"{key}:{name}": value.contiguous()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    save_file(tensors, folder / OPTIMIZER_FILE)


def load_optimizer(model: Model, optimizer: torch.optim.Optimizer, path: Path) -> None:
    try:
        tensors = load_file(path / OPTIMIZER_FILE)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} has no readable {OPTIMIZER_FILE}, so no run can go on from it: {error}") from error
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    for key, tensor in tensors.items():
        slot, name = key.split(":", 1)
        device = parameters[name].device if slot != "step" or parameters[name].is_cuda else "cpu"
        optimizer.state[parameters[name]][slot] = tensor.to(device)
