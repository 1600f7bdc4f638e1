"""A trained model as a folder to hand on: an adapter merged into its base, another dtype, no
training state, and a model card with the run's figures; pushed to the Hugging Face hub if asked.

  python -m posttrain.tracking.export model=runs/rl out=exported/rl dtype=bfloat16
  python -m posttrain.tracking.export model=runs/rl out=exported/rl evaluation=runs/eval push_to=me/my-model
"""

import json
import shutil
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

import chz
import torch
from safetensors.torch import load_file, save_file

from posttrain.backend.adapters import open_merged, read_base
from posttrain.backend.atomic_folder import atomic_folder
from posttrain.backend.checkpoint_files import (
    INDEX_FILE,
    SCALAR_HEAD_FILE,
    STATE_FILE,
    check_readable,
    is_adapter,
    read_json,
)
from posttrain.backend.choices import check_choices
from posttrain.backend.data_checks import not_finite
from posttrain.backend.errors import ConfigError, CookbookError, one_line
from posttrain.backend.hub import hub_reason
from posttrain.backend.models import end_token_ids, model_config
from posttrain.backend.ranges import SEED
from posttrain.backend.tokenizers import TOKENIZER_FILES, load_tokenizer
from posttrain.renderers import get_renderer
from posttrain.tracking.command_line import run_command
from posttrain.tracking.disk_space import folder_bytes
from posttrain.tracking.model_card import model_card
from posttrain.tracking.model_source import find_model

# beside folders, hidden files and what holds training state, here or of transformers' Trainer
NOT_EXPORTED = ("README.md", ".*", STATE_FILE, "optimizer.*", "scheduler.*", "scaler.*", "rng_state*",
                "trainer_state.json", "training_args.bin", "latest", "zero_to_fp32.py")  # fmt: skip
EXPORTED_FOLDERS = ("additional_chat_templates",)


@chz.chz
class Config:
    """A trained model as a folder for transformers, vLLM and the hub."""

    model: str = chz.field(doc="a run folder (its last checkpoint), a checkpoint, an adapter or a model folder")
    out: str = chz.field(doc="the new folder; it must not exist")
    merge: bool = chz.field(default=True, doc="merge an adapter into its base model; false = the adapter alone")
    dtype: Literal["keep", "float32", "bfloat16", "float16"] = chz.field(
        default="keep", doc="dtype of the exported weights; keep = as saved (float32 for a merged adapter)"
    )
    seed: int = chz.field(
        default=0, validator=SEED, doc="seed of a preset's weights, for an adapter that does not record it"
    )
    evaluation: str | None = chz.field(
        default=None, doc="log_path of a posttrain-eval run, whose figures the model card shows"
    )
    push_to: str | None = chz.field(default=None, doc="OWNER/NAME of a new repository of the Hugging Face hub")
    private: bool = chz.field(default=True, doc="the repository is private")

    @chz.validate
    def _check_choices(self) -> None:
        check_choices(self)


def main(config: Config) -> Path:
    """Returns the new folder. Nothing that exists is overwritten, here or on the hub."""
    source, out = find_model(config.model), Path(config.out).expanduser()
    if source.folder is None:
        raise ConfigError(f"model={config.model} is not a folder: only a saved model can be exported")
    if out.exists():
        raise ConfigError(f"{out} exists already: choose another folder for out, or delete it")
    check_readable(source.folder)
    if config.push_to:
        _check_hub(config.push_to)
    dtype = None if config.dtype == "keep" else getattr(torch, config.dtype)
    out.parent.mkdir(parents=True, exist_ok=True)
    adapter = is_adapter(source.folder)
    merged = adapter and config.merge
    with atomic_folder(out) as folder:
        if merged:
            _write_merged(source.folder, folder, dtype, config.seed)
        else:
            _copy(source.folder, folder, dtype)
        if merged or not adapter:
            _say_ends(folder)
        base = read_base(source.folder).name if adapter else None
        evaluation = Path(config.evaluation) if config.evaluation else None
        card = model_card(source, config.push_to or out.name, base, adapter and not merged, evaluation)
        (folder / "README.md").write_text(card, encoding="utf-8")
    what = f"{'the adapter ' if adapter else ''}{source.folder}"
    if merged:
        what = f"{source.folder}, merged into its base,"
    print(f"exported {what} to {out} ({folder_bytes(out) / 1e6:,.1f} MB)")
    if config.push_to:
        _push(out, config.push_to, config.private)
    return out


def _write_merged(adapter: Path, folder: Path, dtype: torch.dtype | None, seed: int) -> None:
    model = open_merged(adapter, seed).to(dtype=dtype or torch.float32)  # type: ignore[arg-type]
    _check_fits(dict(model.named_parameters()), dtype or torch.float32)
    model.save_pretrained(folder)
    files = [file for pattern in (*TOKENIZER_FILES, "merges.txt", "chat_template*") for file in adapter.glob(pattern)]
    for file in files:
        shutil.copy(file, folder)
    if not files:
        load_tokenizer(str(adapter)).save_pretrained(folder)
    if (adapter / SCALAR_HEAD_FILE).exists():
        shutil.copy(adapter / SCALAR_HEAD_FILE, folder)


def _copy(source: Path, folder: Path, dtype: torch.dtype | None) -> None:
    """All but the training state, weights in `dtype`."""
    if dtype is not None and [*source.glob("pytorch_model*.bin")]:
        raise ConfigError("the weights are pytorch_model.bin, not safetensors: only dtype=keep copies them")
    num_bytes = 0
    for path in sorted(source.iterdir()):
        if any(fnmatch(path.name, left_out) for left_out in NOT_EXPORTED):
            continue
        if path.is_dir() and path.name not in EXPORTED_FOLDERS:
            continue
        if path.suffix == ".safetensors" and path.name != SCALAR_HEAD_FILE and dtype is not None:
            tensors = {name: _cast(tensor, dtype) for name, tensor in load_file(path).items()}
            _check_fits(tensors, dtype)
            save_file(tensors, folder / path.name, metadata={"format": "pt"})
            num_bytes += sum(tensor.nbytes for tensor in tensors.values())
        elif path.is_dir():
            shutil.copytree(path, folder / path.name)
        else:
            shutil.copy(path, folder / path.name)
    if dtype is not None:
        _say_dtype(folder, dtype, num_bytes)


def _say_ends(folder: Path) -> None:
    """All tokens at which an answer ends here, in generation_config.json, by which other tools stop. A model that
    was made for texts, and then trained on chats, has there the end of a text alone: vLLM and transformers would
    write on after the end of a turn."""
    try:
        tokenizer = load_tokenizer(str(folder))
        turns = get_renderer("chat_template", tokenizer).get_stop_sequences() if tokenizer.chat_template else []
    except CookbookError:  # a folder without a tokenizer, or a template in which no end is found
        return
    file = folder / "generation_config.json"
    settings = read_json(file) if file.exists() else {}
    said = settings.get("eos_token_id")
    said = said if isinstance(said, list) else [] if said is None else [said]
    ends = list(dict.fromkeys([*said, *sorted(end_token_ids(model_config(str(folder)), tokenizer)), *turns]))
    if ends != said:
        settings.pop("_from_model_config", None)  # with it, transformers goes by config.json
        _write_json(file, settings | {"eos_token_id": ends})


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _check_fits(weights: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
    if bad := not_finite(weights):
        short, most = str(dtype).removeprefix("torch."), torch.finfo(dtype).max
        remedy = "; dtype=bfloat16 has room to 3e38" if dtype is torch.float16 else ""
        raise ConfigError(
            f"{len(bad)} tensors of the weights, such as {bad[0]}, are not finite in {short}, which ends at {most:.3g}{remedy}"
        )


def _say_dtype(folder: Path, dtype: torch.dtype, num_bytes: int) -> None:
    """In config.json, and the new size in the index of a sharded model."""
    if (folder / "config.json").exists():
        config = read_json(folder / "config.json")
        config.pop("torch_dtype", None)
        _write_json(folder / "config.json", config | {"dtype": str(dtype).removeprefix("torch.")})
    if (folder / INDEX_FILE).exists():
        index = read_json(folder / INDEX_FILE)
        _write_json(folder / INDEX_FILE, index | {"metadata": {**index.get("metadata", {}), "total_size": num_bytes}})


def _write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# --- the hub ------------------------------------------------------------------------------------


def _check_hub(name: str) -> None:
    """ConfigError, before anything is written, for a bad name, a missing login or a name that is
    taken."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(f"push_to={name} is not a repository name: {one_line(error)}") from error
    try:
        api = HfApi()
        api.whoami()
        taken = api.repo_exists(name)
    except Exception as error:  # the hub's own, and those of three HTTP libraries
        raise ConfigError(f"push_to={name}: {hub_reason(error, reading=False)}; nothing was written") from error
    if taken:
        raise ConfigError(f"push_to={name}: the repository exists already, and nothing is overwritten; choose another")


def _push(folder: Path, name: str, private: bool) -> None:
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        address = api.create_repo(name, private=private)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Exported by posttrain-export")
    except Exception as error:
        raise ConfigError(
            f"{folder} is written, but could not be pushed to {name}: {hub_reason(error, reading=False)}. Later: "
            f"hf upload {name} {folder}"
        ) from error
    print(f"pushed to {address}{' (private)' if private else ''}")


def command() -> None:
    run_command(main, Config)


if __name__ == "__main__":
    command()
