"""Checkpoints under tinker:// paths, in a folder that survives the server. Each training run has a
folder with run.json; each checkpoint a folder that the backend's own loops can load, and a record
beside it. A checkpoint exists when its record does.
"""

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from posttrain.backend.atomic_folder import recover_folders
from posttrain.backend.errors import CheckpointError
from posttrain.tracking.disk_space import folder_bytes
from posttrain.tracking.jsonl import as_dataclass, read_json, write_atomically


class UnknownPathError(CheckpointError):
    """There is no such run or checkpoint."""


NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
KINDS = {"weights": "training", "sampler_weights": "sampler", "external_weights": "external"}
RUN_FILE = "run.json"
MOST_TTL_SECONDS = 10 * 365 * 24 * 3600


@dataclass
class Run:
    """A training run. `base_model` is the public name."""

    training_run_id: str
    base_model: str
    is_lora: bool
    lora_rank: int | None
    train_mlp: bool
    train_attn: bool
    last_request_time: str
    user_metadata: dict[str, str] | None = None
    session_id: str = ""


@dataclass
class Checkpoint:
    run: Run
    kind: str
    name: str
    time: str
    size_bytes: int
    folder: Path
    public: bool = False
    user_metadata: dict[str, str] | None = None
    expires_at: str | None = None

    @property
    def path(self) -> str:
        return f"tinker://{self.run.training_run_id}/{self.kind}/{self.name}"

    @property
    def is_expired(self) -> bool:
        return self.expires_at is not None and datetime.fromisoformat(self.expires_at) <= datetime.now(UTC)

    def record(self) -> dict[str, Any]:
        """As the protocol lists it."""
        return {
            "checkpoint_id": f"{self.kind}/{self.name}",
            "checkpoint_type": KINDS[self.kind],
            "time": self.time,
            "tinker_path": self.path,
            "size_bytes": self.size_bytes,
            "public": self.public,
            "user_metadata": self.user_metadata,
            "expires_at": self.expires_at,
        }


def now() -> str:
    return datetime.now(UTC).isoformat()


def expiry(ttl_seconds: int | None) -> str | None:
    if ttl_seconds is None:
        return None
    if isinstance(ttl_seconds, bool) or not isinstance(ttl_seconds, int) or not 0 < ttl_seconds <= MOST_TTL_SECONDS:
        raise CheckpointError(
            f"ttl_seconds={ttl_seconds!r}: a whole number of seconds from 1 to {MOST_TTL_SECONDS} is needed, or null"
        )
    return (datetime.now(UTC) + timedelta(seconds=ttl_seconds)).isoformat()


def check_name(name: object) -> str:
    # NAME.json is the record of the checkpoint NAME
    if not isinstance(name, str) or not NAME.fullmatch(name) or name.lower().endswith(".json"):
        raise CheckpointError(
            f"checkpoint name {str(name)[:80]!r}: letters, digits, '.', '_' and '-' are allowed, at most 128, a "
            "letter or digit first, and not .json at the end"
        )
    return name


@dataclass
class Store:
    """Reads what earlier servers left. One server writes to a folder at a time."""

    root: Path
    runs: dict[str, Run] = field(default_factory=dict)
    _checkpoints: dict[tuple[str, str, str], Checkpoint] = field(default_factory=dict)
    _writing: set[tuple[str, str, str]] = field(default_factory=set)
    _reading: Counter[Path] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.root = Path(os.path.abspath(self.root.expanduser()))
        self.root.mkdir(parents=True, exist_ok=True)
        for file in sorted(self.root.glob(f"*/{RUN_FILE}")):
            run = as_dataclass(read_json(file), Run, str(file))
            self.runs[run.training_run_id] = run
            for kind in KINDS:
                self._read(run, kind)

    def _read(self, run: Run, kind: str) -> None:
        parent = self.folder(run.training_run_id) / kind
        if not parent.is_dir():
            return
        recover_folders(parent)
        for file in sorted(parent.glob("*.json")):
            folder = parent / file.stem
            if folder.is_dir() and not folder.is_symlink():
                record = read_json(file)
                if isinstance(record, dict):
                    record |= {"run": run, "kind": kind, "name": file.stem, "folder": folder}
                checkpoint = as_dataclass(record, Checkpoint, str(file))
                self._checkpoints[run.training_run_id, kind, file.stem] = checkpoint

    def folder(self, run_id: str) -> Path:
        """Run ids hold ":", which not all file systems take in names. They are this server's own."""
        return self.root / run_id.replace(":", "_")

    # --- runs ------------------------------------------------------------------------------------

    def add_run(self, run: Run) -> None:
        """Written with its first checkpoint."""
        self.runs[run.training_run_id] = run

    def _write_run(self, run: Run) -> None:
        self.folder(run.training_run_id).mkdir(exist_ok=True)
        write_atomically(self.folder(run.training_run_id) / RUN_FILE, json.dumps(asdict(run), indent=2))

    def run(self, run_id: str) -> Run:
        if run_id not in self.runs:
            raise UnknownPathError(f"there is no training run {run_id[:200]!r}")
        return self.runs[run_id]

    # --- checkpoints -----------------------------------------------------------------------------

    def find(self, path: object, kinds: tuple[str, ...] = tuple(KINDS)) -> Checkpoint:
        """The checkpoint of a tinker:// path. CheckpointError if there is none, or it has expired."""
        parts = path.removeprefix("tinker://").split("/") if isinstance(path, str) else []
        if len(parts) != 3 or not str(path).startswith("tinker://"):
            raise CheckpointError(f"{str(path)[:200]!r} is not a path of the form tinker://RUN/weights/NAME")
        run_id, kind, name = parts
        checkpoint = self._checkpoints.get((run_id, kind, name))
        if checkpoint is None or checkpoint.is_expired:
            raise UnknownPathError(
                f"there is no checkpoint {str(path)[:200]}: it was never saved, deleted, or has expired"
            )
        if kind not in kinds:
            raise CheckpointError(f"{path} holds {KINDS[kind]} weights; a path with {' or '.join(kinds)} is needed")
        return checkpoint

    def of_run(self, run_id: str) -> list[Checkpoint]:
        """Oldest first."""
        return [c for c in self.all() if c.run.training_run_id == run_id]

    def all(self) -> list[Checkpoint]:
        """Oldest first."""
        kept = (checkpoint for checkpoint in self._checkpoints.values() if not checkpoint.is_expired)
        return sorted(kept, key=lambda checkpoint: checkpoint.time)

    @contextmanager
    def writing(
        self,
        run_id: str,
        kind: str,
        name: str,
        ttl_seconds: int | None,
        user_metadata: dict[str, str] | None,
        overwrite: bool,
    ) -> Iterator[Path]:
        """The folder to write a checkpoint to, which exists for others when the block has succeeded.
        CheckpointError for a name that is taken, without `overwrite`."""
        run, key = self.run(run_id), (run_id, kind, check_name(name))
        expiry(ttl_seconds)
        existing = self._checkpoints.get(key)
        if existing and existing.is_expired:
            self.delete(existing)
        elif key in self._writing or (existing and not overwrite):
            raise CheckpointError(
                f"tinker://{run_id}/{kind}/{name} exists: choose another name, delete it, or save with overwrite=True"
            )
        checkpoint = Checkpoint(run, kind, name, now(), 0, self.folder(run_id) / kind / name)
        self._writing.add(key)
        try:
            yield checkpoint.folder
            checkpoint.time, checkpoint.size_bytes = now(), folder_bytes(checkpoint.folder)
            checkpoint.user_metadata, checkpoint.expires_at = user_metadata, expiry(ttl_seconds)
            self._write_run(run)
            self._write(checkpoint)
            self._checkpoints[key] = checkpoint
        finally:
            self._writing.discard(key)
            self._remove_files(checkpoint)  # of one without a record: nobody could delete them

    @contextmanager
    def reading(self, checkpoint: Checkpoint) -> Iterator[Path]:
        """Its folder, which is not deleted in the block."""
        self._reading[checkpoint.folder] += 1
        try:
            yield checkpoint.folder
        finally:
            self._reading[checkpoint.folder] -= 1
            if not self._reading[checkpoint.folder]:
                del self._reading[checkpoint.folder]
                self._remove_files(checkpoint)

    def _write(self, checkpoint: Checkpoint) -> None:
        keys = ("time", "size_bytes", "public", "user_metadata", "expires_at")
        record = {key: getattr(checkpoint, key) for key in keys}
        write_atomically(_record_file(checkpoint), json.dumps(record, indent=2))

    def set_expiry(self, checkpoint: Checkpoint, ttl_seconds: int | None) -> None:
        checkpoint.expires_at = expiry(ttl_seconds)
        self._write(checkpoint)

    def set_public(self, checkpoint: Checkpoint, public: bool) -> None:
        checkpoint.public = public
        self._write(checkpoint)

    def delete(self, checkpoint: Checkpoint) -> None:
        """At once for who asks; its files when nobody reads them any more."""
        del self._checkpoints[checkpoint.run.training_run_id, checkpoint.kind, checkpoint.name]
        _record_file(checkpoint).unlink(missing_ok=True)
        self._remove_files(checkpoint)

    def _remove_files(self, checkpoint: Checkpoint) -> None:
        key = (checkpoint.run.training_run_id, checkpoint.kind, checkpoint.name)
        if key not in self._checkpoints and key not in self._writing and not self._reading[checkpoint.folder]:
            shutil.rmtree(checkpoint.folder, ignore_errors=True)

    def sweep(self) -> None:
        """Deletes the expired."""
        for checkpoint in [c for c in self._checkpoints.values() if c.is_expired]:
            self.delete(checkpoint)


def _record_file(checkpoint: Checkpoint) -> Path:
    return checkpoint.folder.with_name(f"{checkpoint.name}.json")
