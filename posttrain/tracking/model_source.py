"""A model as a user names it: a run folder (its last checkpoint), a checkpoint, a model folder, an
adapter, a preset, or a name of the Hugging Face hub; and what the run says about it.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.backend.checkpoint_files import check_is_checkpoint
from posttrain.backend.errors import ConfigError
from posttrain.tracking.run_folder import CheckpointRecord, RunFolder
from posttrain.tracking.settings import read_settings

if TYPE_CHECKING:  # commands answer before torch is imported
    from posttrain.backend.sampling_client import SamplingClient
    from posttrain.backend.service_client import ServiceClient

SAMPLED_BYTES, SAMPLES = 4096, 64  # of each weight file, for a fingerprint


@dataclass(frozen=True)
class ModelSource:
    """`folder` is None for a preset or a hub name. `run` is the run that saved the folder,
    `settings` its config.json, {} without one."""

    name: str
    folder: Path | None
    run: Path | None
    settings: dict[str, Any]

    @property
    def label(self) -> str:
        """Short, and a file name: `sft_000200` is runs/sft/checkpoints/000200."""
        if self.folder is None:
            return self.name.replace("/", "--")
        if self.run is None:
            return self.folder.resolve().name
        name = self.folder.name
        return self.run.resolve().name + ("" if name == "final" else f"_{name}")

    @property
    def renderer_name(self) -> str | None:
        """The renderer that the run trained with."""
        return self.settings.get("renderer_name")

    def open(self, service: "ServiceClient", seed: int = 0) -> "SamplingClient":
        """`seed` is that of a preset's weights."""
        if self.folder is None:
            return service.create_sampling_client(base_model=self.name, seed=seed)
        return service.create_sampling_client(model_path=str(self.folder), seed=seed)

    def fingerprint(self) -> str | None:
        """A hash of parts of each weight file; None without a folder."""
        if self.folder is None:
            return None
        digest = hashlib.sha256()
        for file in sorted([*self.folder.glob("*.safetensors"), *self.folder.glob("*.bin")]):
            size = file.stat().st_size
            digest.update(f"{file.name} {size}".encode())
            with file.open("rb") as content:
                for part in range(SAMPLES):
                    content.seek(part * max(0, size - SAMPLED_BYTES) // (SAMPLES - 1))
                    digest.update(content.read(SAMPLED_BYTES))
        return digest.hexdigest()[:32]


def find_model(name: str) -> ModelSource:
    """ConfigError or CheckpointError for a folder that holds no model. A name that is neither a
    preset nor a folder is the hub's, and is looked up when it is opened."""
    from posttrain.backend.models import PRESETS, looks_like_path

    path = Path(name).expanduser()
    if name in PRESETS or not path.exists():
        if name not in PRESETS and looks_like_path(name):
            raise ConfigError(f"there is no model folder {path}")
        return ModelSource(name, None, None, {})
    if (path / "metrics.jsonl").exists():
        return _of_run(name, last_checkpoint(path).path, path)
    check_is_checkpoint(path)
    run = path.resolve().parent.parent
    return _of_run(name, path, run if (run / "metrics.jsonl").exists() else None)


def last_checkpoint(run: Path) -> CheckpointRecord:
    """ConfigError for a run without a checkpoint."""
    record = RunFolder(run).last_checkpoint()
    if record is None:
        raise ConfigError(f"{run} is a run's folder without a checkpoint: give another, or wait for its first")
    return record


def _of_run(name: str, folder: Path, run: Path | None) -> ModelSource:
    file = run / "config.json" if run else None
    return ModelSource(name, folder, run, read_settings(file) if file and file.exists() else {})
