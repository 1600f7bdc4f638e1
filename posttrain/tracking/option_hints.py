"""What a command says of an option, a name or a class that it does not know: what was probably meant."""

import difflib
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from posttrain.backend.extras import EXTRAS, how_to_install

# of preference/names.py, which other programs take as supervised sets or environments
PREFERENCE_SETS = ("hhh", "ultrafeedback", "helpsteer2", "helpsteer3")
# names of other programs: those of our options
USUAL_NAMES: Mapping[str, tuple[str, ...]] = {
    theirs: tuple(ours.split())
    for names, ours in {
        "lr": "learning_rate",
        "bs batch batch_size train_batch_size per_device_train_batch_size": (
            "batch_size groups_per_batch dataset.batch_size env.batch_size"
        ),
        "num_generations num_rollouts rollouts_per_prompt": "group_size env.group_size",
        "max_completion_length max_response_length max_new_tokens": "max_tokens",
        "kl_penalty_coef kl_coef kl_loss_coef beta": "kl.coef method.beta",
        "kl_reference_config ref_model reference_model": "kl.reference_path",
        "gradient_accumulation_steps micro_batch_size": "backend.micro_batch_tokens",
        "max_grad_norm clip_grad_norm": "grad_clip_norm",
        "lr_scheduler_type scheduler": "lr_schedule",
        "save_steps eval_steps": "save_every eval_every",
        "warmup warmup_ratio": "warmup_steps",
        "bf16 fp16 torch_dtype dtype": "backend.dtype",
        "model base_model model_name_or_path": "model_name",
        "lora lora_r rank r": "lora_rank",
        "steps num_steps n_steps": "max_steps num_steps",
        "epochs num_train_epochs": "num_epochs",
        "output_dir out output": "log_path",
        "data train_file": "dataset env",
        "ctx max_seq_length max_length": "backend.max_length",
        "wandb project report_to": "wandb_project",
        "checkpoint init_from": "load_checkpoint_path",
        "resume overwrite": "behavior_if_log_dir_exists",
        "temp": "temperature",
        "loss_type": "loss_fn method",
        "adv_estimator algorithm.adv_estimator": "algorithm advantage",
        "backend.weight_sync": "backend.sync_dir",  # of earlier versions: files are the only way
    }.items()
    for theirs in names.split()
}
CONFIG_FILES = ("config", "config_file", "config_path", "cfg", "yaml")
# first parts of options, and the commands that have them
OTHER_COMMANDS: Mapping[str, str] = {
    "dataset": "supervised/train_cli.py and preference/train_cli.py",
    "method": "preference/train_cli.py",
    **dict.fromkeys(
        ("env", "group_size", "groups_per_batch", "algorithm", "advantage", "max_tokens"), "rl/train_cli.py"
    ),
}


def did_you_mean(name: str, known: Iterable[str]) -> str:
    by_lower = {one.lower(): one for one in known}  # papers write GRPO
    near = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.5)
    return f"did you mean {by_lower[near[0]]}? " if near else ""


def option_meant(key: str, parameters: Mapping[str, Any]) -> str:
    """The options that are nearly the one given; or the commands that have it."""

    def likeness(path: str) -> float:
        pairs = [(key.strip("."), path), (key.rsplit(".", 1)[-1], path.rsplit(".", 1)[-1])]
        whole, last = (difflib.SequenceMatcher(a=left, b=right).ratio() for left, right in pairs)
        return max(whole, last) + 0.01 * whole  # among equals, the one at the same place

    if key in CONFIG_FILES:
        return "there are no files of options: write them as key=value; "
    if usual := [path for path in USUAL_NAMES.get(key.strip("."), ()) if path in parameters]:
        return f"did you mean {' or '.join(usual)}? "
    best = sorted(parameters, key=likeness, reverse=True)[:3]
    if best := [path for path in best if likeness(path) > max(0.65, likeness(best[0]) - 0.15)]:
        return f"did you mean {' or '.join(best)}? "
    first = key.partition(".")[0]
    elsewhere = None if first in parameters else OTHER_COMMANDS.get(first)
    return f"it is one of {elsewhere}; " if elsewhere else ""


def unknown_name(path: str, value: str, names: Mapping[str, str]) -> str:
    """The error of an option whose value is none of its short names."""
    hint = did_you_mean(value, [name for name in names if "*" not in name])
    module, _, last = value.rpartition(".")
    if last == "py":
        hint = f"in the folder of the file write {path}={Path(value).stem}:CLASS; "
    elif module and last[0:1].isupper():
        hint = f"did you mean {module}:{last}? "
    elif value in PREFERENCE_SETS:
        hint = f"it is a set of preferences: preference/train_cli.py dataset={value}; "
    elif value[:1] in ("'", '"'):
        hint = f"the quotes are part of it: your shell did not take them away; {hint}"
    elif "/" in value and "huggingface" in names:
        hint = f"a data set of the hub is {path}=huggingface {path}.name={value}; "
    fault = "no such name"
    if os.path.exists(value):
        fault = f"a {'folder' if os.path.isdir(value) else 'file'} that no short name reads"
        if "huggingface" in names and last != "py":
            hint = f"{path}=huggingface {path}.name={value} reads folders and tables; "
    return f"{path}={value}: {fault}; {hint}known: {', '.join(names)}, or module:Class"


def class_meant(target: str, error: Exception) -> str:
    """The package that the module lacks; or a name of the module, or a module of the current folder, that is nearly
    the one given."""
    module, _, name = target.partition(":")
    cause = error.__context__
    missing = cause.name or module if isinstance(cause, ModuleNotFoundError) else module
    if not f"{module}.".startswith(f"{missing}."):
        package = missing.partition(".")[0]
        if package in EXTRAS:
            return f"; {package} is not installed: {how_to_install(package)}"
        return f"; {package} is neither installed nor in the current folder"
    loaded = sys.modules.get(module)
    known = dir(loaded) if loaded else [file.stem for file in Path.cwd().glob("*.py")]
    near = difflib.get_close_matches(name if loaded else module, known, n=1)
    if near and near[0] != (name if loaded else module):
        return f"; did you mean {module if loaded else near[0]}:{near[0] if loaded else name}?"
    return "" if loaded else "; is its file in the current folder?"
