"""The folder of one run: its configuration, metrics, checkpoints, transcripts and plots.

    config.json  metrics.jsonl  checkpoints.jsonl  checkpoints/  transcripts/  plots/  code.diff

A folder that already holds a run is resumed, deleted or refused, never overwritten. Left out: what a checkpoint contains
(the training loop writes it, this file only records that it is complete) and remote storage.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import chz

from backend.atomic_folder import recover_folders
from backend.errors import CheckpointError, ConfigError
from tracking.jsonl import append_jsonl, drop_torn_line, read_jsonl, write_atomically

BehaviorIfExists = Literal["ask", "resume", "delete", "raise"]

# A run continued with another of these would be another run.
FIXED_FOR_A_RUN = ("model_name", "env.class", "dataset.class", "env.tasks.class", "dataset.tasks.class")


@dataclass(frozen=True)
class CheckpointRecord:
    """`step` is the next step to run. `extra` is whatever the loop needs beside the folder (epoch, sampler path, ...)."""

    name: str
    step: int
    path: Path
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RunFolder:
    """Paths of an open run. `changed_config` holds, on resume, the options that differ: name -> (before, now)."""

    path: Path
    resumed: bool = False
    changed_config: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    @property
    def config_file(self) -> Path:
        return self.path / "config.json"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints_file(self) -> Path:
        return self.path / "checkpoints.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def transcripts(self) -> Path:
        return self.path / "transcripts"

    @property
    def plots(self) -> Path:
        return self.path / "plots"

    def record_checkpoint(self, name: str, step: int, path: str | os.PathLike[str], extra: dict[str, Any] | None = None) -> None:
        """Notes that the folder `path` is a complete checkpoint, from which step `step` is the next. On disk on return."""
        folder = Path(path).resolve()
        if not folder.is_dir():
            raise CheckpointError(f"checkpoint {name!r}: {path} is not a folder; write it before recording it")
        inside = folder.is_relative_to(self.path.resolve())
        stored = folder.relative_to(self.path.resolve()) if inside else folder  # relative, so that a run can be moved
        drop_torn_line(self.checkpoints_file)
        append_jsonl(self.checkpoints_file, {"name": name, "step": step, "path": str(stored), "extra": extra or {}}, sync=True)

    def list_checkpoints(self) -> list[CheckpointRecord]:
        """Records whose folder is still there, oldest first; a folder recorded again counts once, as its last record."""
        records: dict[Path, CheckpointRecord] = {}
        for line in read_jsonl(self.checkpoints_file):
            folder = self.path / line["path"]
            records.pop(folder, None)
            if folder.is_dir():
                records[folder] = CheckpointRecord(line["name"], line["step"], folder, line["extra"])
        return list(records.values())

    def last_checkpoint(self) -> CheckpointRecord | None:
        """The latest complete checkpoint, or None."""
        return next(reversed(self.list_checkpoints()), None)

    def prune_checkpoints(self, keep: int) -> None:
        """Deletes all but the last `keep` checkpoints (>= 1) and the one named "final". Call it after recording a new one."""
        if keep < 1:
            raise ConfigError(f"keep_checkpoints={keep}: at least 1 must be kept, or there is nothing to resume from")
        mine = [record for record in self.list_checkpoints() if record.path.is_relative_to(self.checkpoints)]
        for record in mine[:-keep]:
            if record.name != "final":  # renamed first: a deletion that is killed half way leaves nothing that looks whole
                record.path.rename(record.path.with_name(record.path.name + ".deleted"))
        for leftover in self.checkpoints.glob("*.deleted"):
            shutil.rmtree(leftover)

    def truncate_metrics(self, step: int) -> None:
        """Forgets the metrics of `step` and later, so that a resumed run's metrics are those of an uninterrupted one."""
        kept = [record for record in read_jsonl(self.metrics_file) if record["step"] < step]
        write_atomically(self.metrics_file, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept))


def open_run_folder(path: str | os.PathLike[str], behavior: BehaviorIfExists, config: Any) -> RunFolder:
    """Makes the run folder, or decides by `behavior` what becomes of the one that is there, and writes config.json into it.

    Raises ConfigError where a run exists and may not be touched, where the folder holds something that is no run, and where
    a run would be resumed with another model, environment or dataset.
    """
    path = Path(path).expanduser()
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{path} is a file; choose another run folder")
    resumed = False
    if path.is_dir() and any(path.iterdir()):
        if not _is_run_folder(path):
            raise ConfigError(f"{path} is not empty and holds no run (no metrics.jsonl); choose another run folder")
        if behavior == "ask":
            behavior = _ask(path)
        if behavior == "raise":
            raise ConfigError(
                f"{path} already holds a run; continue it, delete it (behavior resume or delete), or choose another"
            )
        resumed = behavior == "resume"
        if behavior == "delete":
            shutil.rmtree(path)
    config_json = config_to_json(config)
    changed = _compare_with_saved(path, config_json) if resumed else {}
    run = RunFolder(path, resumed, changed)
    for folder in (run.checkpoints, run.transcripts, run.plots):
        folder.mkdir(parents=True, exist_ok=True)
    recover_folders(run.checkpoints)
    run.metrics_file.touch()
    drop_torn_line(run.metrics_file)
    write_atomically(run.config_file, json.dumps(config_json, indent=2) + "\n")
    _write_code_diff(path / "code.diff")
    return run


def _is_run_folder(path: Path) -> bool:
    # config.json alone would also fit a Hugging Face model. Killed before metrics.jsonl, a run leaves only empty folders.
    return (path / "metrics.jsonl").is_file() or not any(entry.is_file() for entry in path.rglob("*"))


def _ask(path: Path) -> BehaviorIfExists:
    if not sys.stdin.isatty():
        raise ConfigError(
            f"{path} already holds a run and there is no terminal to ask; say resume, delete or raise, or choose another"
        )
    answers: dict[str, BehaviorIfExists] = {"r": "resume", "d": "delete", "q": "raise"}
    while True:
        try:
            answer = input(f"{path} already holds a run: [r]esume it, [d]elete it, or [q]uit? ").strip().lower()[:1]
        except EOFError:
            answer = "q"
        if answer in answers:
            return answers[answer]


def config_to_json(config: Any) -> Any:
    """A configuration as JSON values. A nested object keeps its class ("module:Class") beside its fields."""
    return _to_json(config, top=True)


def _to_json(value: Any, top: bool = False) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value.value if isinstance(value, Enum) else value
    if isinstance(value, float):
        return value if value - value == 0 else str(value)  # inf and nan are not JSON
    if isinstance(value, Enum):
        return _to_json(value.value)
    if isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")):
        return f"{value.__module__}:{value.__qualname__}"
    if chz.is_chz(value) or is_dataclass(value):
        names = chz.chz_fields(value) if chz.is_chz(value) else vars(value)
        # The top class is left out: it is __main__:Config or rl.train_cli:Config according to how the script was started.
        kind = {} if top else {"class": f"{type(value).__module__}:{type(value).__qualname__}"}
        return kind | {name: _to_json(getattr(value, name)) for name in names}
    if isinstance(value, Mapping):
        return {str(key): _to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_to_json(item) for item in (sorted(value, key=repr) if isinstance(value, set | frozenset) else value)]
    return str(value) if isinstance(value, os.PathLike) else repr(value)


def _compare_with_saved(path: Path, now: Any) -> dict[str, tuple[Any, Any]]:
    """Options that differ from those in config.json; ConfigError where the run would no longer be the same one."""
    if not (path / "config.json").exists():
        return {}
    before_flat, now_flat = _flatten(json.loads((path / "config.json").read_text())), _flatten(now)
    names = [*before_flat, *(name for name in now_flat if name not in before_flat)]
    changed = {n: (before_flat.get(n), now_flat.get(n)) for n in names if before_flat.get(n) != now_flat.get(n)}
    for name in FIXED_FOR_A_RUN:
        if name in changed:
            before, after = changed[name]
            raise ConfigError(
                f"{path} was run with {name}={before}, not {after}; resume with the same or choose another run folder"
            )
    return changed


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    parts = [_flatten(item, f"{prefix}.{key}" if prefix else key) for key, item in value.items()]
    return {name: leaf for part in parts for name, leaf in part.items()}


def _write_code_diff(file: Path) -> None:
    """Appends the commit and the uncommitted changes this code runs from; outside a git checkout it writes nothing."""
    repository = Path(__file__).resolve().parent.parent
    if not (repository / ".git").exists():
        return
    output = ""
    for arguments in (["rev-parse", "HEAD"], ["diff", "--no-ext-diff", "--no-color", "HEAD"]):
        try:
            command = ["git", "--no-optional-locks", "-C", str(repository), *arguments]
            output += subprocess.run(command, capture_output=True, timeout=5, check=True).stdout.decode("utf-8", "replace")
        except (OSError, subprocess.SubprocessError):
            return  # no git, no commit yet, or a slow disk: the run matters more
    with file.open("a", encoding="utf-8") as stream:
        stream.write(f"commit {output}\n")
