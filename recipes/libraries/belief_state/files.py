"""Checkpoint folders of the Belief State Transformer and its baseline, written whole or not at all.

belief_state.json     kind of model and its configuration
model.safetensors     weights
training_state/       optimizer and step of a run (posttrain/backend/checkpoint_files.py)
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file

from posttrain.backend.atomic_folder import atomic_folder
from posttrain.backend.checkpoint_files import (
    OPTIMIZER_FILE,
    REMEDY,
    STATE_FOLDER,
    check_is_checkpoint,
    read_json,
    state_file,
    tensor_shapes,
    write_state,
)
from posttrain.backend.config import training_device
from posttrain.backend.data_checks import check_finite
from posttrain.backend.errors import CheckpointError
from posttrain.backend.optimizer_state import check_optimizer, load_optimizer, write_optimizer
from recipes.libraries.belief_state.model import BeliefState, BeliefStateConfig, NextToken

CONFIG_FILE, WEIGHTS_FILE = "belief_state.json", "model.safetensors"
Model = BeliefState | NextToken
M = TypeVar("M", BeliefState, NextToken)


def write_model(model: Model, folder: Path) -> None:
    config = {"kind": type(model).__name__, "config": asdict(model.config)}
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2))
    save_file(
        {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}, folder / WEIGHTS_FILE
    )


def save_state(model: Model, optimizer: torch.optim.Optimizer, path: Path, extra: dict[str, Any]) -> None:
    check_finite(dict(model.named_parameters()), optimizer)
    with atomic_folder(path) as folder:
        write_model(model, folder)
        write_state(folder, {"extra": extra})
        write_optimizer(dict(model.named_parameters()), optimizer, folder / STATE_FOLDER / OPTIMIZER_FILE)


def load_state(model: Model, optimizer: torch.optim.Optimizer, path: Path, with_optimizer: bool) -> None:
    """With the optimizer, the checkpoint must be of the same task; weights alone may be of another
    task. CheckpointError for other sizes; everything is checked before anything is changed.
    """
    parameters, file = dict(model.named_parameters()), state_file(path, OPTIMIZER_FILE)
    check_weights(model, path, model.config.task if with_optimizer else None)
    if with_optimizer:
        check_optimizer(parameters, optimizer, file)
    _copy_weights(model, path)
    optimizer.state.clear()
    if with_optimizer:
        load_optimizer(parameters, optimizer, file)


def load_belief_state(path: str | Path, task: str | None = None) -> BeliefState:
    """The model of a checkpoint folder, on the training device. CheckpointError if the folder holds
    none, or a model of another `task`.
    """
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
    check_weights(model, path, config.task)
    model.to_empty(device=training_device())
    _copy_weights(model, path)
    return model


def read_config(path: Path, kind: type[Model]) -> BeliefStateConfig:
    if not (path / CONFIG_FILE).exists():
        check_is_checkpoint(path)
        raise CheckpointError(
            f"{path} is not a checkpoint of a Belief State Transformer or its baseline: it has no {CONFIG_FILE}"
        )
    saved = read_json(path / CONFIG_FILE)
    try:
        config = BeliefStateConfig(**saved["config"])
        name = saved["kind"]
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(f"{path / CONFIG_FILE} is damaged ({type(error).__name__}: {error}): {REMEDY}") from error
    if name != kind.__name__:
        raise CheckpointError(f"{path} holds a {name} model, not a {kind.__name__}: give a checkpoint of that model")
    return config


def check_weights(model: Model, path: Path, task: str | None) -> None:
    """CheckpointError unless the checkpoint has the model's sizes and tensors, and `task` if
    given.
    """
    saved = read_config(path, type(model))
    for key, value in asdict(saved).items():
        expected_value = task if key == "task" else getattr(model.config, key)
        if expected_value not in (value, None):
            raise CheckpointError(
                f"{path} is a checkpoint of another model: its {key} is {value!r}, here it is {expected_value!r}"
            )
    shapes = tensor_shapes(path / WEIGHTS_FILE)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    names = sorted(expected.keys() | shapes.keys())
    if name := next((name for name in names if expected.get(name) != shapes.get(name)), None):
        raise CheckpointError(
            f"{path / WEIGHTS_FILE}: {name} has shape {shapes.get(name)}, this model's has {expected.get(name)}: "
            f"{REMEDY}"
        )


def _copy_weights(model: Model, path: Path) -> None:
    model.load_state_dict(load_file(path / WEIGHTS_FILE))
