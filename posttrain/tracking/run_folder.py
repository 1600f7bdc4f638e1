"""The folder of one run: its configuration, metrics, checkpoints, transcripts and plots.

    config.json  metrics.jsonl  checkpoints.jsonl  checkpoints/  transcripts/  plots/  code.diff  lock

A folder that already holds a run is resumed, deleted or refused, never overwritten; one process at
a time has it (run_lock.py). It is resumed with the settings that made it, or after saying which
differ: config_changes.jsonl keeps those that were let through. Left out: what a checkpoint contains
(the training loop writes it, this file only records that it is complete) and remote storage.
"""

import os
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from posttrain.backend.atomic_folder import recover_folders
from posttrain.backend.errors import CheckpointError, ConfigError
from posttrain.tracking.code_diff import append_code_diff
from posttrain.tracking.jsonl import append_jsonl, drop_torn_line, read_jsonl, write_jsonl
from posttrain.tracking.run_lock import LOCK_FILE, RunLock, lock_folder
from posttrain.tracking.settings import (
    MAY_GROW,
    Changes,
    changes,
    changes_text,
    config_to_json,
    defaults_to_json,
    read_settings,
    write_settings,
)

__all__ = ["BehaviorIfExists", "CheckpointRecord", "RunFolder", "config_to_json", "open_run_folder"]

BehaviorIfExists = Literal["ask", "resume", "resume_changed", "delete", "raise"]

# A run continued with another of these would be another run, whatever the user says.
FIXED_FOR_A_RUN = ("model_name", "env.class", "dataset.class", "env.tasks.class", "dataset.tasks.class")


@dataclass(frozen=True)
class CheckpointRecord:
    """`step` is the next step to run."""

    name: str
    step: int
    path: Path


@dataclass(frozen=True)
class RunFolder:
    """Paths of an open run. `lock` keeps other processes out as long as this object lives; None:
    opened only to read.
    """

    path: Path
    resumed: bool = False
    lock: RunLock | None = field(default=None, compare=False, repr=False)

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

    def record_checkpoint(self, name: str, step: int, path: str | os.PathLike[str]) -> None:
        """Notes that the folder `path` is a complete checkpoint, from which step `step` is the
        next. On disk on return.
        """
        folder = Path(path).resolve()
        if not folder.is_dir():
            raise CheckpointError(f"checkpoint {name!r}: {path} is not a folder; write it before recording it")
        inside = folder.is_relative_to(self.path.resolve())
        # relative, so that a run can be moved
        stored = folder.relative_to(self.path.resolve()) if inside else folder
        drop_torn_line(self.checkpoints_file)
        append_jsonl(self.checkpoints_file, {"name": name, "step": step, "path": str(stored)}, sync=True)

    def list_checkpoints(self) -> list[CheckpointRecord]:
        """Records whose folder is still there, oldest first; a folder recorded again counts once,
        as its last record.
        """
        records: dict[Path, CheckpointRecord] = {}
        for line in read_jsonl(self.checkpoints_file, {"name": str, "step": int, "path": str}):
            folder = self.path / line["path"]
            records.pop(folder, None)
            if folder.is_dir():
                records[folder] = CheckpointRecord(line["name"], line["step"], folder)
        return list(records.values())

    def last_checkpoint(self) -> CheckpointRecord | None:
        """The latest complete checkpoint, or None. CheckpointError where there are several, and no
        record of any.
        """
        records = self.list_checkpoints()
        found = (
            sorted(path.name for path in self.checkpoints.iterdir() if path.is_dir())
            if self.checkpoints.is_dir()
            else []
        )
        found = [name for name in found if not name.startswith(".") and "." not in name]
        # one may be there without a record: a kill came between the two
        if not records and len(found) > 1:
            raise CheckpointError(
                f"{self.checkpoints_file} has no record of the checkpoints that are there ({', '.join(found)}): put it "
                "back, "
                "or begin another run with load_checkpoint_path"
            )
        return records[-1] if records else None

    def prune_checkpoints(self, keep: int) -> None:
        """Deletes all but the last `keep` checkpoints (>= 1) and the one named "final". Call it
        after recording a new one.
        """
        if keep < 1:
            raise ConfigError(f"keep_checkpoints={keep}: at least 1 must be kept, or there is nothing to resume from")
        mine = [record for record in self.list_checkpoints() if record.path.is_relative_to(self.checkpoints)]
        for record in mine[:-keep]:
            # renamed first: a deletion that is killed half way leaves nothing that looks whole
            if record.name != "final":
                record.path.rename(record.path.with_name(record.path.name + ".deleted"))
        for leftover in self.checkpoints.glob("*.deleted"):
            shutil.rmtree(leftover)

    def truncate_metrics(self, step: int) -> None:
        """Forgets the metrics of `step` and later, so that a resumed run's metrics are those of an
        uninterrupted one.
        """
        kept = [record for record in read_jsonl(self.metrics_file, {"step": int}) if record["step"] < step]
        write_jsonl(self.metrics_file, kept)


def open_run_folder(path: str | os.PathLike[str], behavior: BehaviorIfExists, config: Any) -> RunFolder:
    """Makes the run folder, or decides by `behavior` what becomes of the one that is there, and
    writes config.json into it.

    Raises ConfigError where a run exists and may not be touched or belongs to another process,
    where the folder holds something that is no run, and where a run would be resumed with another
    model, environment or dataset, or with other settings (in a terminal the user is asked;
    "resume_changed" lets them through).
    """
    path = Path(path).expanduser()
    there = _holds_a_run(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be a run folder ({error}); choose another log_path") from error
    if there and behavior == "ask":
        behavior = _ask(path)
    if there and behavior == "raise":
        raise ConfigError(f"{path} already holds a run; {REMEDY}")
    if there and behavior == "delete":
        _empty(path)
    resumed = there and behavior != "delete"
    run, config_json = RunFolder(path, resumed, lock), config_to_json(config)
    if resumed:
        _check_settings(run, behavior, config, config_json)
    for folder in (run.checkpoints, run.transcripts, run.plots):
        folder.mkdir(parents=True, exist_ok=True)
    recover_folders(run.checkpoints)
    if not os.path.lexists(run.metrics_file):
        run.metrics_file.touch()
    drop_torn_line(run.metrics_file)
    write_settings(run.config_file, config_json)
    append_code_diff(path / "code.diff", config_json)
    return run


REMEDY = (
    "add behavior_if_log_dir_exists=resume to go on with it, behavior_if_log_dir_exists=delete to start over, "
    "or choose another log_path"
)


def _holds_a_run(path: Path) -> bool:
    """ConfigError where the path is something else than a run folder, an empty folder or
    nothing.
    """
    try:
        if path.exists() and not path.is_dir():
            raise ConfigError(f"{path} is a file; choose another run folder")
        entries = [entry for entry in path.iterdir() if entry.name != LOCK_FILE] if path.exists() else []
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be a run folder ({error}); choose another log_path") from error
    if entries and not _is_run_folder(path):
        raise ConfigError(f"{path} is not empty and holds no run (no metrics.jsonl); choose another run folder")
    return bool(entries)


def _empty(path: Path) -> None:
    """All but the lock, which stays held meanwhile."""
    for entry in path.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != LOCK_FILE:
            entry.unlink()


def _is_run_folder(path: Path) -> bool:
    # config.json alone would also fit a Hugging Face model. Killed before metrics.jsonl, a run
    # leaves only empty folders and its lock.
    files = (entry for entry in path.rglob("*") if entry.is_file() and entry != path / LOCK_FILE)
    return os.path.lexists(path / "metrics.jsonl") or not any(files)


def _ask(path: Path) -> BehaviorIfExists:
    if not sys.stdin.isatty():
        raise ConfigError(f"{path} already holds a run, and there is no terminal to ask; {REMEDY}")
    answers: dict[str, BehaviorIfExists] = {"r": "resume", "d": "delete", "q": "raise"}
    return answers[_answer(f"{path} already holds a run: [r]esume it, [d]elete it, or [q]uit? ", "rdq")]


def _answer(question: str, letters: str) -> str:
    """One of the letters; the last one where the input ends."""
    while True:
        try:
            answer = input(question).strip().lower()[:1]
        except EOFError:
            return letters[-1]
        if answer and answer in letters:
            return answer


def _check_settings(run: RunFolder, behavior: BehaviorIfExists, config: Any, now: Any) -> None:
    """Names what differs from config.json. ConfigError unless nothing does, or the user lets it
    through.
    """
    if not os.path.lexists(run.config_file):
        return
    saved = read_settings(run.config_file, "put it back, or delete it to go on without a comparison of the settings")
    # options of a newer version
    later = {name: value for name, value in defaults_to_json(config).items() if name not in saved}
    found = changes(saved | later, now, may_grow=MAY_GROW)
    for name in FIXED_FOR_A_RUN:
        if name in found:
            before, after = found[name]
            raise ConfigError(
                f"{run.path} was run with {name}={before}, not {after}; resume with the same or choose another run "
                "folder"
            )
    if not found:
        return
    if behavior != "resume_changed":
        _ask_about(run.path, found)
    print(f"{run.path} goes on with other settings than before: {changes_text(found)}")
    append_jsonl(run.path / "config_changes.jsonl", {"time": time.strftime("%Y-%m-%d %H:%M:%S"), "changes": found})


def _ask_about(path: Path, found: Changes) -> None:
    text = f"{path} was made with {changes_text(found)}"
    if not sys.stdin.isatty() or _answer(f"{text}. [c]ontinue with the new settings, or [q]uit? ", "cq") == "q":
        raise ConfigError(
            f"{text}: give the settings of before, behavior_if_log_dir_exists=resume_changed to go on with the new "
            "ones, "
            "or another log_path"
        )
