"""The settings of a result, as JSON beside it, compared when the result is requested again:
config.json of a run folder (run_folder.py), NAME.made_with.json of a stage (stages.py).
"""

import json
import numbers
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import is_dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import chz
from chz.util import MISSING

from posttrain.backend.errors import DataError
from posttrain.tracking.jsonl import read_json, write_atomically

Changes = dict[str, tuple[Any, Any]]  # option -> (before, now)

# These affect evaluation, saving, the end and the speed of a run, not its steps.
FREE = {
    *("profile_steps", "log_path", "behavior_if_log_dir_exists", "wandb_project", "wandb_name"),
    *("tensorboard", "trackio_project"),
    *("evaluators", "infrequent_evaluators", "infrequent_eval_every"),
    *("eval_every", "save_every", "save_minutes", "save_tokens", "keep_checkpoints"),
    *("transcript_every", "num_groups_to_log", "concurrent_rollouts"),
}
FREE_OF_BACKEND = (
    *("micro_batch_tokens", "gradient_checkpointing", "max_num_seqs"),
    *("sampler_memory_gb", "gpu_memory_utilization", "enforce_eager", "alarm", "offload_optimizer", "compile"),
    # Where a run computes: it may be resumed with other numbers of processes.
    *("trainer_processes", "trainer_sharding", "sampler_replicas", "replicas_share_gpu", "tensor_parallel", "cluster"),
    *("sync_dir", "sampler_restarts", "trainer_restarts", "call_seconds"),
    "weight_sync",  # of earlier versions
)
MAY_GROW = ("max_steps", "num_epochs", "num_steps")  # of a continued run; None is no limit
SHOWN = 6  # differences shown in a message


def config_to_json(config: Any) -> Any:
    """A configuration as JSON values; a nested object includes its class ("module:Class")."""
    return _to_json(config, top=True)


def with_later_options(saved: Any, config: Any) -> Any:
    """The saved JSON of a configuration of this class, with the options that it lacks at their
    defaults: a newer version has added them."""
    if isinstance(saved, list) and isinstance(config, list | tuple) and len(saved) == len(config):
        return [with_later_options(*pair) for pair in zip(saved, config, strict=True)]
    if not isinstance(saved, dict):
        return saved
    if not chz.is_chz(config):
        values = config if isinstance(config, Mapping) else {}
        return {name: with_later_options(value, values.get(name)) for name, value in saved.items()}
    fields, filled = chz.chz_fields(config), dict(saved)
    for name, field in fields.items():
        if name in saved:
            filled[name] = with_later_options(saved[name], getattr(config, name))
        elif field._default is not MISSING:
            filled[name] = _to_json(field._default)
        elif callable(field._default_factory):
            filled[name] = _to_json(field._default_factory())
    return filled


def _to_json(value: Any, top: bool = False) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value.value if isinstance(value, Enum) else value
    if isinstance(value, float):
        return value if value - value == 0 else str(value)  # inf and nan are not JSON
    if isinstance(value, Enum):
        return _to_json(value.value)
    if isinstance(value, numbers.Real):  # numpy's
        return _to_json(int(value) if isinstance(value, numbers.Integral) else float(value))
    if isinstance(value, partial):
        return {"function": _to_json(value.func), "args": _to_json(value.args), "keywords": _to_json(value.keywords)}
    if isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")):
        return f"{value.__module__}:{value.__qualname__}"
    if chz.is_chz(value) or is_dataclass(value):
        names = chz.chz_fields(value) if chz.is_chz(value) else vars(value)
        # The top class is left out: its module is __main__ or rl.train_cli, depending on the start.
        kind = {} if top else {"class": f"{type(value).__module__}:{type(value).__qualname__}"}
        return kind | {name: _to_json(getattr(value, name)) for name in names}
    if isinstance(value, Mapping):
        return {str(key): _to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_to_json(item) for item in (sorted(value, key=_repr) if isinstance(value, set | frozenset) else value)]
    if type(value).__repr__ is object.__repr__:
        return f"{type(value).__module__}:{type(value).__qualname__}"
    return str(value) if isinstance(value, os.PathLike) else _repr(value)


def _repr(value: Any) -> str:
    """Without addresses, which differ from run to run."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def class_name(settings: Mapping[str, Any], *options: str) -> str:
    """The class of the object that is the first of these options in JSON settings; "" without one."""
    value = next((settings[option] for option in options if option in settings), None)
    return value["class"].partition(":")[2] if isinstance(value, dict) and "class" in value else ""


def changes(before: Any, now: Any, may_grow: Collection[str] = ()) -> Changes:
    """Options that differ between two JSON configurations and affect the result; names in FREE may differ."""
    before_flat, now_flat = _flatten(before), _flatten(now)
    names = [*before_flat, *(name for name in now_flat if name not in before_flat)]
    differing = {n: (before_flat.get(n), now_flat.get(n)) for n in names if before_flat.get(n) != now_flat.get(n)}
    return {
        name: pair for name, pair in differing.items() if not (_is_free(name) or name in may_grow and _grows(*pair))
    }


def _is_free(name: str) -> bool:
    *path, last = name.split(".")
    return last in FREE or (path[-1:] == ["backend"] and last in FREE_OF_BACKEND)


def _grows(before: Any, now: Any) -> bool:
    return now is None or (isinstance(before, int | float) and now >= before)


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        # Folders of version 0.1 have module names without "posttrain.".
        return {prefix: value.removeprefix("posttrain.") if isinstance(value, str) else value}
    parts = [_flatten(item, f"{prefix}.{key}" if prefix else key) for key, item in value.items()]
    return {name: leaf for part in parts for name, leaf in part.items()}


def changes_text(different: Changes) -> str:
    """ "learning_rate=0.001 (now 0.0001), seed=0 (now 1)"."""
    shown = [f"{name}={before} (now {now})" for name, (before, now) in list(different.items())[:SHOWN]]
    return ", ".join(shown) + (f" and {len(different) - SHOWN} more" if len(different) > SHOWN else "")


def read_settings(
    file: Path, remedy: str = "put it back, or delete what lies beside it to make both anew"
) -> dict[str, Any]:
    """The object in a settings file. DataError, with the remedy, if it is unreadable."""
    settings = read_json(file, remedy)
    if not isinstance(settings, dict):
        raise DataError(f"{file}: a {type(settings).__name__}, where an object with settings is needed; {remedy}")
    return settings


def write_settings(file: Path, settings: Any) -> None:
    write_atomically(file, json.dumps(config_to_json(settings), indent=2) + "\n")
