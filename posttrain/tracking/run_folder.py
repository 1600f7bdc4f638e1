"""The folder of a run: config.json, metrics.jsonl, checkpoints.jsonl, checkpoints/, transcripts/,
plots/, code.diff, lock. A folder with a run is resumed, deleted or refused, never overwritten; one
process has it at a time (run_lock.py). Resuming compares the settings; config_changes.jsonl records
accepted changes. Left out: the content of checkpoints (the loop writes it), remote storage.
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
from posttrain.tracking.jsonl import append_jsonl, drop_torn_line, lines_and_records, read_jsonl, write_atomically
from posttrain.tracking.run_lock import LOCK_FILE, RunLock, lock_folder
from posttrain.tracking.settings import (
    MAY_GROW,
    Changes,
    changes,
    changes_text,
    config_to_json,
    read_settings,
    with_later_options,
    write_settings,
)

BehaviorIfExists = Literal["ask", "resume", "resume_changed", "delete", "raise"]

# A change of these makes another run: never accepted.
FIXED_FOR_A_RUN = ("model_name", "env.class", "dataset.class", "env.tasks.class", "dataset.tasks.class")


@dataclass(frozen=True)
class CheckpointRecord:
    """`step` is the next step."""

    name: str
    step: int
    path: Path

    def delete(self) -> None:
        """Renamed first: a killed deletion leaves nothing that looks complete."""
        shutil.rmtree(self.path.rename(self.path.with_name(f"{self.path.name}.deleted")))


@dataclass(frozen=True)
class RunFolder:
    """Paths of an open run. `lock` excludes other processes; None: read-only."""

    path: Path
    resumed: bool = False
    lock: RunLock | None = field(default=None, compare=False, repr=False)
    opening: int = field(default=0, compare=False, repr=False)  # of those of the lock

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
        """Records, durably, that the folder `path` is a complete checkpoint before step `step`."""
        folder = Path(path).resolve()
        if not folder.is_dir():
            raise CheckpointError(f"checkpoint {name!r}: {path} is not a folder; write it before recording it")
        inside = folder.is_relative_to(self.path.resolve())
        # relative: a run can be moved
        stored = folder.relative_to(self.path.resolve()) if inside else folder
        drop_torn_line(self.checkpoints_file)
        append_jsonl(self.checkpoints_file, {"name": name, "step": step, "path": str(stored)}, sync=True)

    def list_checkpoints(self) -> list[CheckpointRecord]:
        """Records with an existing folder, oldest first; the last record of a folder counts."""
        records: dict[Path, CheckpointRecord] = {}
        for line in read_jsonl(self.checkpoints_file, {"name": str, "step": int, "path": str}):
            folder = self.path / line["path"]
            records.pop(folder, None)
            if folder.is_dir():
                records[folder] = CheckpointRecord(line["name"], line["step"], folder)
        return list(records.values())

    def last_checkpoint(self) -> CheckpointRecord | None:
        """The latest complete checkpoint, or None. CheckpointError for several, none recorded."""
        records = self.list_checkpoints()
        entries = self.checkpoints.iterdir() if self.checkpoints.is_dir() else ()
        names = sorted(path.name for path in entries if path.is_dir() and "." not in path.name)
        # one may lack its record: a kill between checkpoint and record
        if not records and len(names) > 1:
            raise CheckpointError(
                f"{self.checkpoints_file} has no record of the checkpoints that are there ({', '.join(names)}): put it "
                "back, or begin another run with load_checkpoint_path"
            )
        return records[-1] if records else None

    def prune_checkpoints(self, keep: int) -> None:
        """Deletes all but the last `keep` (>= 1) checkpoints and "final"."""
        if keep < 1:
            raise ConfigError(f"keep_checkpoints={keep}: at least 1 must be kept, or there is nothing to resume from")
        in_folder = [record for record in self.list_checkpoints() if record.path.is_relative_to(self.checkpoints)]
        for leftover in self.checkpoints.glob("*.deleted"):  # of a killed deletion
            shutil.rmtree(leftover)
        for record in in_folder[:-keep]:
            if record.name != "final":
                record.delete()

    def truncate_metrics(self, step: int) -> None:
        """Drops the metrics of `step` and later: a resumed run has an uninterrupted run's metrics."""
        lines = lines_and_records(self.metrics_file, {"step": int})
        write_atomically(self.metrics_file, (line for line, record in lines if record["step"] < step))


def open_run_folder(path: str | os.PathLike[str], behavior: BehaviorIfExists, config: Any) -> RunFolder:
    """Creates the run folder and its config.json, or applies `behavior` to an existing run.

    ConfigError if the run may not be changed, is under way or belongs to another process, if torchrun has started
    copies of it, if the folder holds something else, or if the settings differ: another model,
    environment or dataset is always refused; other changes ask in a terminal, and "resume_changed"
    accepts them.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun's
        from posttrain.backend.ranks import check_no_copies  # with torch

        check_no_copies()
    path = Path(path).expanduser().absolute()  # an environment may change the working directory
    there = _holds_a_run(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be a run folder ({error}); choose another log_path") from error
    opening = lock.opened()
    if there and behavior == "ask":
        behavior = _ask(path)
    if there and behavior == "raise":
        raise ConfigError(f"{path} already holds a run; {REMEDY}")
    if there and behavior == "delete":
        _empty(path)
    resumed = there and behavior != "delete"
    run, config_json = RunFolder(path, resumed, lock, opening), config_to_json(config)
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
    "add behavior_if_log_dir_exists=resume to continue it, behavior_if_log_dir_exists=delete to start over, "
    "or choose another log_path"
)


def _holds_a_run(path: Path) -> bool:
    """ConfigError if the path is neither a run folder, an empty folder nor absent."""
    try:
        if path.exists() and not path.is_dir():
            raise ConfigError(f"{path} is a file; choose another run folder")
        entries = [entry for entry in path.iterdir() if entry.name != LOCK_FILE] if path.exists() else []
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be a run folder ({error}); choose another log_path") from error
    if entries and not _is_run_folder(path):
        raise ConfigError(f"{path} is not empty and holds no run (no metrics.jsonl); choose another run folder")
    return bool(entries)


def delete_run(path: str | os.PathLike[str]) -> None:
    """Empties the folder if it holds a run. ConfigError as open_run_folder's."""
    path = Path(path).expanduser()
    if _holds_a_run(path):
        lock = lock_folder(path)
        lock.opened()
        _empty(path)
        del lock


def _empty(path: Path) -> None:
    """Deletes all but the lock, which stays held."""
    for entry in path.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != LOCK_FILE:
            entry.unlink()


def _is_run_folder(path: Path) -> bool:
    # config.json alone could be a Hugging Face model's. A run killed before metrics.jsonl has empty
    # folders and the lock.
    files = (entry for entry in path.rglob("*") if entry.is_file() and entry != path / LOCK_FILE)
    return os.path.lexists(path / "metrics.jsonl") or not any(files)


def _ask(path: Path) -> BehaviorIfExists:
    if not sys.stdin.isatty():
        raise ConfigError(f"{path} already holds a run, and there is no terminal to ask; {REMEDY}")
    answers: dict[str, BehaviorIfExists] = {"r": "resume", "d": "delete", "q": "raise"}
    return answers[_answer(f"{path} already holds a run: [r]esume it, [d]elete it, or [q]uit? ", "rdq")]


def _answer(question: str, letters: str) -> str:
    """One of the letters; the last at the end of input."""
    while True:
        try:
            answer = input(question).strip().lower()[:1]
        except EOFError:
            return letters[-1]
        if answer and answer in letters:
            return answer


def _check_settings(run: RunFolder, behavior: BehaviorIfExists, config: Any, now: Any) -> None:
    """ConfigError, with the changes since config.json, unless the user accepts them."""
    if not os.path.lexists(run.config_file):
        return
    saved = read_settings(run.config_file, "restore it, or delete it to resume without a comparison of the settings")
    different = changes(with_later_options(saved, config), now, may_grow=MAY_GROW)
    for name in FIXED_FOR_A_RUN:
        if name in different:
            before, after = different[name]
            raise ConfigError(
                f"{run.path} was run with {name}={before}, not {after}; resume with the same or choose another run "
                "folder"
            )
    if not different:
        return
    if behavior != "resume_changed":
        _ask_about(run.path, different)
    print(f"{run.path} continues with changed settings: {changes_text(different)}")
    append_jsonl(run.path / "config_changes.jsonl", {"time": time.strftime("%Y-%m-%d %H:%M:%S"), "changes": different})


def _ask_about(path: Path, different: Changes) -> None:
    text = f"{path} was made with {changes_text(different)}"
    if not sys.stdin.isatty() or _answer(f"{text}. [c]ontinue with the new settings, or [q]uit? ", "cq") == "q":
        raise ConfigError(
            f"{text}: give the old settings, behavior_if_log_dir_exists=resume_changed to continue with the new ones, "
            "or another log_path"
        )
