"""The files of a checkpoint folder: a Hugging Face model, or a peft adapter with base_model.json
(adapters.py); the tokenizer; scalar_head.safetensors of a scalar model; training_state/ with
training_state.json (format, the loop's data) and optimizer.safetensors. Format 1, still read, has
the last two in the folder itself. Errors name a file that is missing or damaged.
"""

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from posttrain.backend.errors import CheckpointError, one_line

STATE_FOLDER, STATE_FILE, OPTIMIZER_FILE = "training_state", "training_state.json", "optimizer.safetensors"
ADAPTER_CONFIG_FILE, ADAPTER_FILE = "adapter_config.json", "adapter_model.safetensors"
# beside the trunk of a saved scalar model (scalar_trainer.py)
SCALAR_HEAD_FILE = "scalar_head.safetensors"
INDEX_FILE = "model.safetensors.index.json"
FORMAT = 2
# of transformers' ...ForSequenceClassification and ...ForTokenClassification, as TRL trains reward models
CLASSIFIER_HEAD = re.compile(r"(^|\.)(score|classifier)\.(modules_to_save\.)?(weight|bias)$")
IS_CLASSIFIER = (
    "it is a reward model or a classifier of transformers and no language model, and is not opened as it is: "
    "docs/after_training.md has the lines that make a reward model of one with one label; or train one with "
    "preference/train_reward_model.py, or ask this one in a reward function (docs/rewards.md)"
)
# What a model was wrapped in, by the beginning of its tensors' names, and what to save instead.
WRAPPED = {
    "_orig_mod.": "torch.compile: save model._orig_mod",
    "module.": "DistributedDataParallel: save model.module",
    "_fsdp_wrapped_module.": "FSDP: save it by the trainer, or with FullStateDictConfig",
    "base_model.model.": "peft: save model.merge_and_unload(), or the adapter alone",
    "pretrained_model.": "TRL's value head: save model.pretrained_model",
    "v_head.": "TRL's value head: save model.pretrained_model",
}
# Files of weights in formats that are not read, and what to do.
OTHER_FORMATS = {
    "*.gguf": "quantised weights (GGUF, for llama.cpp): give the model that it was made from",
    "zero_to_fp32.py": "the shards of DeepSpeed: run `python zero_to_fp32.py . . --safe_serialization` in the folder",
    "global_step*": "the shards of DeepSpeed: join them with its zero_to_fp32.py",
    **dict.fromkeys(("*.distcp", "*/*.distcp"), "the shards of FSDP: join them with `accelerate merge-weights`"),
    "latest_checkpointed_iteration.txt": "a checkpoint of Megatron: export it to Hugging Face's format with Megatron-Bridge",
    "model-*-of-*.safetensors": f"shards without {INDEX_FILE}: copy that file, too",
    "consolidated*": "weights in their maker's own format: take those of transformers",
}
# every checkpoint has one of these
MODEL_FILES = {"config.json", ADAPTER_CONFIG_FILE, "belief_state.json"}
REMEDY = "copy it again, or take another checkpoint"


def is_adapter(path: Path) -> bool:
    """Whether the folder holds an adapter without a whole model."""
    weights = [*path.glob("model*.safetensors"), *path.glob("pytorch_model*.bin")]
    return (path / ADAPTER_CONFIG_FILE).exists() and not weights


def adapted_model(path: Path) -> str:
    """The name of the model that a peft adapter adapts; OWNER/NAME@REVISION where it has one."""
    config = read_json(path / ADAPTER_CONFIG_FILE)
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    return f"{name}@{revision}" if revision else str(name)


def unlike_peft(config: dict[str, Any]) -> str:
    """What an adapter is, and what to do, where its adapter_config.json is not peft's or not of LoRA; else ""."""
    if "peft_type" not in config:
        tool = "MLX" if "fine_tune_type" in config else "another tool than peft"
        return (
            f"is an adapter of {tool}, which is not read here: merge it there (mlx_lm.fuse), and give the whole model"
        )
    if config["peft_type"] != "LORA":
        return f"is an adapter of type {config['peft_type']}: only LoRA is supported"
    return ""


def why_no_model(name: str, path: Path) -> str:
    """What to do with an adapter where a whole model is wanted."""
    config = read_json(path / ADAPTER_CONFIG_FILE)
    if reason := unlike_peft(config):
        return f"{name} {reason}"
    return (
        f"{name} is a LoRA adapter and no whole model: to train it on, set model_name={adapted_model(path)} "
        f"lora_rank={config.get('r')} lora_alpha={config.get('lora_alpha')} load_checkpoint_path={name}; to sample "
        "from it, give it as model_path, or to posttrain-chat, posttrain-eval or posttrain-export"
    )


def state_file(path: Path, name: str) -> Path:
    """Path of STATE_FILE or OPTIMIZER_FILE in the current format or format 1."""
    file = path / STATE_FOLDER / name
    return path / name if not file.exists() and (path / name).exists() else file


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """training_state.json. CheckpointError where `state` is not JSON."""
    (folder / STATE_FOLDER).mkdir(exist_ok=True)
    try:
        text = json.dumps({"format": FORMAT, **state}, indent=2)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"the state to be saved with {folder.name} is not JSON ({error}): save numbers and text"
        ) from error
    (folder / STATE_FOLDER / STATE_FILE).write_text(text)


def read_state(path: Path) -> dict[str, Any]:
    """training_state.json: format, the loop's `extra`, a TrainingClient's model_name, seed and
    lora."""
    if not state_file(path, STATE_FILE).exists():
        check_is_checkpoint(path)
        raise CheckpointError(
            f"{path} has no {STATE_FILE}: it holds weights only, so no run can resume from it. "
            "Start from its weights with load_checkpoint_path, or load_state"
        )
    file = state_file(path, STATE_FILE)
    state = {"format": 1, "extra": {}} | read_json(file)
    if not isinstance(state["format"], int) or not isinstance(state["extra"], dict):
        raise CheckpointError(f"{file} is damaged (format {state['format']!r}, extra {state['extra']!r}): {REMEDY}")
    if state["format"] > FORMAT:
        raise CheckpointError(
            f"{path} was written by a newer version of this project (format {state['format']}, this one reads up to "
            f"{FORMAT}): update the project"
        )
    return state


def wrong_model(tensors: Collection[str]) -> str:
    """What a model is, by tensors of its files that a language model lacks, and what to do; "" if unknown."""
    if any(CLASSIFIER_HEAD.search(name) for name in tensors):
        return IS_CLASSIFIER
    wrapped = next((part for part in WRAPPED if any(name.startswith(part) for name in tensors)), None)
    return f"it was saved inside {WRAPPED[wrapped]}" if wrapped else ""


def other_format(folder: Path) -> str:
    """Which weights a folder without safetensors has, and what to do; "" if unknown."""
    return next((says for pattern, says in OTHER_FORMATS.items() if any(folder.glob(pattern))), "")


def not_pulled(folder: Path) -> str:
    """What to do where a file of the folder is the pointer that Git LFS leaves for it; "" without one."""
    for file in sorted(folder.glob("*")):
        if file.is_file() and file.stat().st_size < 1024 and file.read_bytes().startswith(b"version https://git-lfs"):
            return f"{file.name} is a pointer of Git LFS and not the file itself: run `git lfs pull` in its folder"
    return ""


def read_json(file: Path) -> dict[str, Any]:
    """The object in a file. CheckpointError, with the file's name, if it is missing or damaged."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file} cannot be read ({_reason(error)}): {not_pulled(file.parent) or REMEDY}"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds {type(content).__name__} where an object is expected: {REMEDY}")
    return content


def tensor_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a safetensors file's tensors. CheckpointError for a bad file."""
    if not file.exists() and (old := file.with_suffix(".bin")).exists():
        raise CheckpointError(
            f"{old} is in torch's own format, which is not read here: open it with peft or transformers, and save it "
            f"again, as {file.name}"
        )
    try:
        if not file.is_file():
            raise FileNotFoundError("no such file" if not file.exists() else "not a file")
        with safe_open(file, "pt") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{file} cannot be read ({_reason(error)}): {not_pulled(file.parent) or REMEDY}"
        ) from error


def check_readable(path: Path) -> None:
    """CheckpointError, with the file's name, if a file that a loader reads is damaged."""
    check_is_checkpoint(path)
    for name in ("config.json", ADAPTER_CONFIG_FILE, "generation_config.json", INDEX_FILE):
        if name in _names(path):
            read_json(path / name)
    files = {name for name in _names(path) if name.endswith(".safetensors")}
    if (path / INDEX_FILE).exists():
        files |= set(map(str, read_json(path / INDEX_FILE).get("weight_map", {}).values()))
    for name in sorted(files):
        tensor_shapes(path / name)


def check_is_checkpoint(path: Path) -> None:
    """CheckpointError if `path` is no model folder; names the checkpoint of a run's folder."""
    if _is_checkpoint(path):
        return
    if not path.exists():
        raise CheckpointError(f"there is no checkpoint folder {path}")
    for parent, says in ((path / "checkpoints", "a run's folder"), (path, "a folder of checkpoints")):
        if checkpoints := checkpoints_in(parent):
            raise CheckpointError(f"{path} is {says}, not a checkpoint: give its last one, {checkpoints[-1]}")
    if path.is_file() and not _is_checkpoint(path.parent):
        raise CheckpointError(f"{path} is a file: give the folder of a checkpoint")
    if path.is_file() or path.name == STATE_FOLDER:
        raise CheckpointError(f"{path} is a part of a checkpoint: give its folder, {path.parent}")
    kind = f"not a checkpoint (it has none of {', '.join(sorted(MODEL_FILES))})"
    if found := other_format(path):
        raise CheckpointError(f"{path} is {kind}, and holds {found}")
    if _is_run(path):
        kind = "a run's folder without a checkpoint"
    raise CheckpointError(f"{path} is {kind}: give a folder that save_state, transformers or peft wrote")


def _is_checkpoint(path: Path) -> bool:
    return bool(MODEL_FILES & _names(path)) and not _is_run(path)


def _is_run(path: Path) -> bool:
    return (path / "metrics.jsonl").exists()


def checkpoints_in(parent: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    checkpoints = [parent / name for name in _names(parent) if name[0] != "." and _is_checkpoint(parent / name)]
    return sorted(checkpoints, key=lambda child: child.stat().st_mtime)


def _names(path: Path) -> set[str]:
    return {child.name for child in path.iterdir()} if path.is_dir() else set()


def _reason(error: Exception) -> str:
    """One line, without the path, which the message has."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return one_line(error, 200) or type(error).__name__
