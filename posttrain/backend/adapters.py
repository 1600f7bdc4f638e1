"""LoRA adapters on disk: peft's files and base_model.json (the base's name, the seed of a preset, a
fingerprint of the weights). A peft adapter from elsewhere lacks the latter; it loads if its tensors
fit. Left out: adapters other than plain LoRA on linear layers.
"""

import hashlib
import json
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from posttrain.backend.base_models import BaseModels, SharedBase
from posttrain.backend.checkpoint_files import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    CLASSIFIER_HEAD,
    IS_CLASSIFIER,
    REMEDY,
    STATE_FILE,
    adapted_model,
    read_json,
    state_file,
    tensor_shapes,
    unlike_peft,
)
from posttrain.backend.data_checks import check_loaded
from posttrain.backend.errors import CheckpointError, ModelError, one_line
from posttrain.backend.merged_lora import base_weights
from posttrain.backend.models import PRESETS, load_model
from posttrain.backend.ranges import RangeError
from posttrain.backend.ranks import shard_like, whole
from posttrain.backend.text_models import PLACE, name_in_text_model
from posttrain.backend.trained_model import TrainedModel
from posttrain.backend.types import LoraConfig

BASE_FILE = "base_model.json"
IN_PEFT = "base_model.model."  # before the name of each tensor
# Settings of peft's LoraConfig under which an adapter is B A alpha / r on linear layers of an unchanged
# base: these with any value, those with some. Any other must be off, also one that a later peft adds.
PLAIN = {"r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
         "fan_in_fan_out", "base_model_name_or_path", "revision", "peft_type", "peft_version", "task_type", "auto_mapping",
         "inference_mode", "megatron_core", "qalora_group_size", "ensure_weight_tying", "eva_config"}  # fmt: skip
DRAWN_ANEW = "pissa_niter_"  # of init_lora_weights, with a number
PLAIN_VALUES = {"bias": ("none",), "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal", "mica")}


@dataclass(frozen=True)
class Base:
    """The base model of an adapter. `seed` is a preset's; None if unknown, like the fingerprint."""

    name: str
    seed: int | None = None
    fingerprint: str | None = None

    def __str__(self) -> str:
        with_seed = self.name in PRESETS and self.seed is not None
        return f"{self.name!r} with seed {self.seed}" if with_seed else repr(self.name)


def fingerprint(weights: Iterable[tuple[str, torch.Tensor]]) -> str:
    """A hash of the base's tensor names, shapes and 32 values of each, whether or not an adapter is on
    it: of the values in fp32, and of them in bf16, which a run may hold them in (`same_weights`)."""
    exact, rounded = hashlib.sha256(), hashlib.sha256()
    for name, tensor in sorted(
        (name.replace(".base_layer.", "."), tensor) for name, tensor in weights if ".lora_" not in name
    ):
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 32)][:32]
        for digest, values in ((exact, sample), (rounded, sample.bfloat16())):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(values.to("cpu", torch.float32).numpy().tobytes())
    return f"{exact.hexdigest()[:32]}-{rounded.hexdigest()[:32]}"


def same_weights(one: str, other: str) -> bool:
    """Of two fingerprints. Those of earlier versions have the part in fp32 alone."""
    (exact, _, rounded), (other_exact, _, other_rounded) = one.partition("-"), other.partition("-")
    return rounded == other_rounded if rounded and other_rounded else exact == other_exact


def write_adapter(trainer: TrainedModel, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """`weights`: the adapter's, as in the model's state_dict."""
    assert isinstance(trainer.model, PeftModel)
    name = absolute(trainer.model_name)
    config = trainer.model.peft_config["default"]
    repository, _, revision = (name, "", "") if Path(name).exists() else name.partition("@")
    config.base_model_name_or_path, config.revision = repository, revision or None
    # save_embedding_layers="auto" would ask the hub for the base's config
    trainer.model.save_pretrained(str(folder), save_embedding_layers=False, state_dict=weights)
    if (place := getattr(trainer.base, PLACE, "model.")) != "model.":
        _rename(folder, load_file(folder / ADAPTER_FILE), lambda name: name.replace("model.", place, 1))
    base = Base(absolute(trainer.model_name), trainer.seed, trainer.base_fingerprint)
    (folder / BASE_FILE).write_text(json.dumps(asdict(base), indent=2))


def _rename(folder: Path, tensors: Mapping[str, torch.Tensor], new_name: Callable[[str], str]) -> None:
    """Writes an adapter's tensors under other names, and the layers that they adapt into its config."""
    renamed = {IN_PEFT + new_name(name.removeprefix(IN_PEFT)): tensor for name, tensor in tensors.items()}
    save_file(renamed, folder / ADAPTER_FILE, metadata={"format": "pt"})
    layers = {name.removeprefix(IN_PEFT).rpartition(".lora_")[0] for name in renamed if ".lora_" in name}
    config = read_json(folder / ADAPTER_CONFIG_FILE) | {"target_modules": sorted(layers)}
    (folder / ADAPTER_CONFIG_FILE).write_text(json.dumps(config, indent=2))


def _saved_name(name: str) -> str:
    """As in the text model: other tools train adapters on models that also read pictures (text_models.py)."""
    return IN_PEFT + name_in_text_model(name.removeprefix(IN_PEFT))


def saved_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    return {_saved_name(name): shape for name, shape in tensor_shapes(path / ADAPTER_FILE).items()}


def saved_tensors(path: Path) -> dict[str, torch.Tensor]:
    return {_saved_name(name): tensor for name, tensor in load_file(path / ADAPTER_FILE).items()}


@contextmanager
def _of_text_model(path: Path) -> Iterator[Path]:
    """The adapter's folder, or one with its tensors' names in the text model, as peft reads it."""
    if all(_saved_name(name) == name for name in tensor_shapes(path / ADAPTER_FILE)):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="posttrain-adapter-") as name:
        folder = Path(name)
        (folder / ADAPTER_CONFIG_FILE).write_text(json.dumps(adapter_config(path)))
        _rename(folder, load_file(path / ADAPTER_FILE), name_in_text_model)
        yield folder


def absolute(model_name: str) -> str:
    """A folder's absolute path; a preset or a hub name unchanged."""
    folder = Path(model_name).expanduser()
    return str(folder.resolve()) if model_name not in PRESETS and folder.is_dir() else model_name


def read_base(path: Path) -> Base:
    """The base of a saved adapter: this project's, format 1's (name and seed), or peft's (name)."""
    config = adapter_config(path)
    name: Any = config.get("base_model_name_or_path") and adapted_model(path)
    seed, print_ = None, None
    if (path / BASE_FILE).exists():
        saved = read_json(path / BASE_FILE)
        name, seed, print_ = (saved.get(key) for key in ("name", "seed", "fingerprint"))
    elif state_file(path, STATE_FILE).exists():
        seed = read_json(state_file(path, STATE_FILE)).get("seed")
    if not isinstance(name, str) or not name:
        raise CheckpointError(
            f"{path} does not say which model it adapts: set base_model_name_or_path in {ADAPTER_CONFIG_FILE}"
        )
    if not (seed is None or type(seed) is int) or not (print_ is None or isinstance(print_, str)):
        raise CheckpointError(f"{path / BASE_FILE} is damaged (seed {seed!r}, fingerprint {print_!r}): {REMEDY}")
    return Base(name, seed, print_)


def adapter_config(path: Path) -> dict[str, Any]:
    config = read_json(path / ADAPTER_CONFIG_FILE)
    if reason := unlike_peft(config):
        raise CheckpointError(f"{path} {reason}")
    if str(init := config.get("init_lora_weights")).startswith(DRAWN_ANEW):
        raise CheckpointError(
            f"{path} has init_lora_weights={init}: peft takes from the base what it draws anew whenever it opens the "
            "adapter, so no two readings are the same model: save it again where it was trained, with save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...)"
        )
    if not isinstance(config.get("r"), int) or not isinstance(config.get("lora_alpha"), int | float):
        raise CheckpointError(f"{path / ADAPTER_CONFIG_FILE} lacks r or lora_alpha: {REMEDY}")
    return config


def read_lora(path: Path) -> LoraConfig:
    """The settings to continue an adapter's training. Layers that it lacks begin at zero."""
    config = adapter_config(path)
    try:
        return LoraConfig(config["r"], alpha=float(config["lora_alpha"]), train_unembed=not adapts_inner_layers(path))
    except RangeError as error:
        raise CheckpointError(f"{path / ADAPTER_CONFIG_FILE} says {error}: {REMEDY}") from error


def _check_is_of_language_model(path: Path, saved: Iterable[str]) -> None:
    if heads := [name for name in saved if CLASSIFIER_HEAD.search(name)]:
        raise CheckpointError(f"{path} holds {heads[0]}: {IS_CLASSIFIER}")


def check_adapter(trainer: TrainedModel, path: Path) -> None:
    """CheckpointError if the trainer would compute another function from the adapter."""
    assert trainer.lora and isinstance(trainer.model, PeftModel)
    config, saved = adapter_config(path), saved_shapes(path)
    _check_is_of_language_model(path, saved)
    _check_same_base(trainer, path)
    if unusual := _unusual_setting(config):
        raise CheckpointError(
            f"{path} is a LoRA adapter with {unusual}, which cannot be trained here: train the model that "
            "posttrain-export makes of it"
        )
    live: Any = trainer.model.peft_config["default"]
    for option, before, now in (("rank", config["r"], live.r), ("alpha", config["lora_alpha"], live.lora_alpha)):
        if before != now:
            raise CheckpointError(f"{path} has LoRA {option} {before}, this run has {now}: set lora_{option}={before}")
    expected = {name: tuple(tensor.shape) for name, tensor in _tensors(trainer.model).items()}
    copies = _copies_of_base(path, base_weights(trainer.base))
    saved = {name: shape for name, shape in saved.items() if name not in copies}
    if unexpected := sorted(saved.keys() - expected.keys()):
        if ".lora_" not in unexpected[0]:
            raise CheckpointError(_says_changed(path, unexpected[0]))
        raise CheckpointError(f"{path} adapts layers that this run does not train: {', '.join(unexpected[:3])}")
    for name, shape in saved.items():
        if shape != expected[name]:
            raise CheckpointError(
                f"{path}: {name} has shape {shape}, this run's has {expected[name]}: another rank or base model"
            )
    if not saved:
        raise CheckpointError(f"{path / ADAPTER_FILE} holds no tensor: {REMEDY}")


def _check_same_base(trainer: TrainedModel, path: Path) -> None:
    saved, live = read_base(path), Base(absolute(trainer.model_name), trainer.seed)
    if saved.fingerprint:
        same = same_weights(saved.fingerprint, trainer.base_fingerprint)
    else:
        same = saved.name not in PRESETS or live.name not in PRESETS or saved.seed is None or saved == live
        if Path(saved.name).name != Path(live.name).name:
            print(f"warning: the adapter {path} says that it was trained on {saved}; it is put on {live}")
    if not same:
        raise CheckpointError(
            f"{path} was trained on the base model {saved}, and this run's is {live}, with other weights: "
            "give the same model_name and seed"
        )


def load_adapter(trainer: TrainedModel, path: Path) -> None:
    """Loads the adapter's tensors. Layers without one begin at an update of zero and are printed."""
    assert isinstance(trainer.model, PeftModel)
    saved = saved_tensors(path)
    check_loaded(str(path), saved, CheckpointError)
    live = trainer.trained.exact(_tensors(trainer.model))  # else what the optimizer steps would replace it
    missing = sorted(live.keys() - saved.keys())
    if missing:
        print(f"{path} has no adapter for {len(missing) // 2} of the layers ({missing[0]}, ...): they begin at zero")
    with torch.no_grad():
        for name, tensor in saved.items():
            if name in live:
                live[name].copy_(shard_like(tensor, live[name]))
        for name in missing:
            if ".lora_B" in name:
                live[name].zero_()


def is_plain(path: Path) -> bool:
    """Whether a saved adapter is B A alpha / r on each of some linear layers, and nothing else. Only then does peft
    leave the base's tensors as they are when it opens the adapter."""
    return _unusual_setting(adapter_config(path)) is None and all(
        name.endswith((".lora_A.weight", ".lora_B.weight")) and len(shape) == 2
        for name, shape in tensor_shapes(path / ADAPTER_FILE).items()
    )


def _unusual_setting(config: dict[str, Any]) -> str | None:
    """The first setting under which an adapter is not plain."""
    for name, value in config.items():
        usual = value in PLAIN_VALUES[name] if value and name in PLAIN_VALUES else name in PLAIN or not value
        if not usual:
            return f"{name}={value}"
    return None


def _copies_of_base(path: Path, base: Mapping[str, torch.Tensor]) -> set[str]:
    """Names of a saved adapter's tensors that are the base's own: peft writes the embedding and the output layer
    beside an adapter of one of them."""
    found = set()
    with safe_open(path / ADAPTER_FILE, "pt") as saved:
        for name in saved.keys():  # noqa: SIM118
            own = base.get(_saved_name(name).removeprefix(IN_PEFT).replace(".base_layer.", "."))
            if ".lora_" not in name and own is not None and _same_values(saved.get_tensor(name), whole(own)):
                found.add(_saved_name(name))
    return found


def _same_values(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Or the rounded ones, where one of the two is held in bf16."""
    other = other.cpu()
    return torch.equal(one.to(other.dtype), other) or torch.equal(one, other.to(one.dtype))


def _says_changed(path: Path, name: str) -> str:
    return (
        f"{path} holds {name}, a layer of the base model with other values than there: merge it into its base with "
        "peft, and give the merged folder as the model"
    )


def adapts_inner_layers(path: Path) -> bool:
    """Whether a saved adapter leaves the output layer as it is."""
    return not any("lm_head.lora_" in name for name in tensor_shapes(path / ADAPTER_FILE))


def open_merged(path: Path, seed: int) -> PreTrainedModel:
    """A saved adapter merged into its base, on the CPU in fp32. `seed` is a preset's, where the
    adapter has none."""
    adapted = open_adapter(path, lambda base: load_model(*_preset_seed(base, seed), torch.device("cpu"), torch.float32))
    try:
        return adapted.merge_and_unload()  # type: ignore[operator]
    except (NotImplementedError, RuntimeError, ValueError) as error:  # as of aLoRA, which depends on the tokens
        raise CheckpointError(
            f"the adapter {path} cannot be merged into its base model: {one_line(error, 300)}"
        ) from error


def open_on_shared(path: Path, seed: int, bases: BaseModels) -> tuple[PreTrainedModel, SharedBase]:
    """A saved plain adapter on shared tensors of its base: the base with adapted layers, and the
    owner of the tensors."""
    owners: list[SharedBase] = []

    def view(base: Base) -> PreTrainedModel:
        model, owner = bases.view(*_preset_seed(base, seed), torch.device("cpu"), torch.float32)
        owners.append(owner)
        return model

    return open_adapter(path, view).get_base_model(), owners[0]  # type: ignore[return-value]


def _preset_seed(base: Base, seed: int) -> tuple[str, int]:
    return base.name, seed if base.seed is None else base.seed


def open_adapter(path: Path, load: Callable[[Base], PreTrainedModel]) -> PeftModel:
    """A saved adapter on its base, which `load` opens."""
    base, saved, config = read_base(path), saved_shapes(path), adapter_config(path)
    _check_is_of_language_model(path, saved)
    try:
        model = load(base)
    except ModelError as error:
        raise CheckpointError(f"the base model of the adapter {path} cannot be opened: {error}") from error
    own = model.state_dict()
    _check_base(path, base, own, config, saved)
    copies = _copies_of_base(path, own)
    head: Any = model.get_output_embeddings()
    tied = head.weight if head is not None and head.weight is model.get_input_embeddings().weight else None
    adapted = _opened_by_peft(path, base, model, config)
    layers = (getattr(module, "base_layer", None) for module in adapted.modules())
    if tied is not None and any(layer is not None and layer.weight is tied for layer in layers):
        raise CheckpointError(
            f"{path} adapts the embedding or the output layer of {base}, which are one matrix there: merged, the "
            "adapter would change both"
        )
    _check_biases(path, config.get("bias") or "none", saved, adapted)
    live = _tensors(adapted)
    _check_same_layers(path, base, saved, live, copies)
    with torch.no_grad():  # peft leaves out those whose names it converts wrongly
        for name, tensor in saved_tensors(path).items():
            if name in live:
                live[name].copy_(tensor)
    return adapted


def _check_base(
    path: Path,
    base: Base,
    own: Mapping[str, torch.Tensor],
    config: dict[str, Any],
    saved: Mapping[str, tuple[int, ...]],
) -> None:
    """That the adapter was trained on these tensors, and that merging it changes no others. A setting that peft does
    not know is printed."""
    if base.fingerprint and not same_weights(base.fingerprint, fingerprint(own.items())):
        raise CheckpointError(
            f"{path} was trained on the base model {base}, whose weights have changed since: restore them"
        )
    if config.get("layer_replication"):
        raise CheckpointError(
            f"{path} is a LoRA adapter with layer_replication: layers share their weights, and merged it would change each"
        )
    for name, shape in saved.items():
        layer = own.get(name.removeprefix(IN_PEFT))
        if ".lora_" not in name and layer is not None and tuple(layer.shape) != shape:
            raise CheckpointError(
                f"{path} holds {name} of shape {shape}, and its base model {base} has one of {tuple(layer.shape)}, as where "
                "tokens were added: resize the base (resize_token_embeddings), merge the adapter into it with peft, and "
                "give the merged folder as the model"
            )
    unknown = [name for name, value in config.items() if value and name not in PeftConfig.__dataclass_fields__]
    if unknown:
        print(
            f"warning: {path} has {unknown[0]}={config[unknown[0]]}, which the installed peft does not know and leaves out"
        )


def _opened_by_peft(path: Path, base: Base, model: PreTrainedModel, config: dict[str, Any]) -> PeftModel:
    try:
        # missing tensors are warned of, which _check_same_layers makes an error
        with warnings.catch_warnings(action="ignore"), _of_text_model(path) as folder:
            return PeftModel.from_pretrained(model, str(folder))
    except RecursionError as error:
        # peft takes an unknown setting away and begins anew; one within another setting stays, for ever
        within = ", ".join(
            name for name, value in config.items() if isinstance(value, dict) and value and name not in PLAIN
        )
        raise CheckpointError(
            f"{path / ADAPTER_CONFIG_FILE} has a setting in {within} that the installed peft does not know: update peft, or "
            "take the setting away if it changes nothing"
        ) from error
    except Exception as error:
        raise CheckpointError(
            f"the adapter {path} does not fit its base model {base}: {one_line(error, 300)}"
        ) from error


def _check_same_layers(
    path: Path, base: Base, saved: Collection[str], live: Mapping[str, torch.Tensor], copies: set[str]
) -> None:
    """That the files hold each tensor of the opened adapter, and but for `copies` no other."""
    different = sorted(live.keys() ^ (set(saved) - (copies - live.keys())))
    if not different:
        return
    if ".lora_" not in different[0] and different[0] in saved:
        raise CheckpointError(_says_changed(path, different[0]))
    if any(".unembed_tokens." in name for name in saved):
        raise CheckpointError(
            f"{path} is an adapter of the Tinker service, whose layers have names of their own (unembed_tokens): make "
            "a whole model of it with tinker_cookbook.weights.build_hf_model, and give that"
        )
    raise CheckpointError(
        f"the adapter {path} does not fit its base model {base}: {different[0]} is in only one of the two"
    )


def _check_biases(path: Path, bias: str, saved: Iterable[str], adapted: PeftModel) -> None:
    layers = (getattr(module, "base_layer", None) for module in adapted.modules())
    has_biases = any(getattr(layer, "bias", None) is not None for layer in layers)
    if bias != "none" and has_biases and not any(name.endswith(".bias") for name in saved):
        raise CheckpointError(
            f"{path} was trained with bias={bias} and holds no bias: peft before 0.21 does not write them. Save the adapter "
            "again with peft 0.21 or later, from the program that trained it"
        )


def _tensors(model: PeftModel) -> dict[str, torch.Tensor]:
    return get_peft_model_state_dict(model, save_embedding_layers=False)
