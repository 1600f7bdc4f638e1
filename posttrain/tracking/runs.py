"""Runs on the disk: a list, the last metrics of one, several side by side, old checkpoints deleted.

  posttrain-runs list runs
  posttrain-runs show runs/rl
  posttrain-runs compare runs/a runs/b metrics=test/env/all/*
  posttrain-runs clean runs metric=test/env/all/correct delete=true

`clean` keeps each run's last checkpoint, `final` and the best by `metric`; without delete=true it
only says what it would delete. The same by `python -m posttrain.tracking.runs`.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from posttrain.backend.errors import ConfigError, CookbookError
from posttrain.tracking.disk_space import folder_bytes
from posttrain.tracking.metrics_log import (
    IMPORTANT,
    each_record,
    format_number,
    last_metrics,
    print_metrics_table,
    read_last_metrics,
    read_latest_metrics,
)
from posttrain.tracking.one_line_errors import one_line_errors
from posttrain.tracking.run_folder import CheckpointRecord, RunFolder
from posttrain.tracking.run_lock import LOCK_FILE, lock_folder
from posttrain.tracking.settings import changes, class_name, read_settings

WRITTEN = ("checkpoints", "transcripts", "plots")  # in a run folder
LOWER_IS_BETTER = ("nll", "loss", "ece", "perplexity", "illegal", "truncated")


def find_runs(folders: Sequence[Path]) -> list[Path]:
    """Run folders among and below `folders`, in the order of their paths. ConfigError without any."""
    found = [run for folder in folders for run in _runs_below(folder)]
    runs = sorted({run.resolve(): run for run in found}.values())
    if not runs:
        raise ConfigError(f"no run folder (with metrics.jsonl and config.json) in {', '.join(map(str, folders))}")
    return runs


def _runs_below(folder: Path) -> Iterator[Path]:
    """What a run writes may be thousands of files, and is not searched for others."""
    for path, folders, files in os.walk(folder):
        if "metrics.jsonl" in files and "config.json" in files:
            folders[:] = [name for name in folders if name not in WRITTEN]
            yield Path(path)


def list_runs(folders: Sequence[Path]) -> None:
    columns = ("run", "model", "task", "steps", "metric", "value", "checkpoints", "MB", "changed", "state")
    rows, faults = [], []
    for run in find_runs(folders):
        try:
            rows.append(_summary(run))
        except CookbookError as error:
            faults.append(f"not listed: {error}")
    _print_table(columns, rows, left=(0, 1, 2, 4, 9))
    print("".join(f"{fault}\n" for fault in faults), end="")


def _summary(run: Path) -> list[str]:
    settings, records = _settings(run), read_latest_metrics(run)
    metrics, checkpoints = last_metrics(records), RunFolder(run).list_checkpoints()
    # the last record is an evaluation after the last step
    final = [record.step for record in checkpoints if record.name == "final"]
    steps = final[0] if final else records[-1]["step"] + 1 if records else 0
    name = next((name for name in IMPORTANT if name in metrics), "")
    return [
        str(run),
        Path(str(settings.get("model_name", ""))).name,
        class_name(settings, "env", "dataset").removesuffix("Builder"),
        str(steps),
        name,
        format_number(metrics[name]) if name else "",
        str(len(checkpoints)),
        f"{sum(folder_bytes(record.path) for record in checkpoints) / 1e6:,.1f}",
        time.strftime("%Y-%m-%d %H:%M", time.localtime((run / "metrics.jsonl").stat().st_mtime)),
        _state(run, checkpoints),
    ]


def _state(run: Path, checkpoints: Sequence[CheckpointRecord]) -> str:
    if _is_in_use(run):
        return "running"
    return "finished" if any(record.name == "final" for record in checkpoints) else "stopped"


def _is_in_use(run: Path) -> bool:
    if not (run / LOCK_FILE).exists():
        return False
    try:
        lock_folder(run).close()
    except ConfigError:
        return True
    return False


def show_runs(folders: Sequence[Path], metrics: str = "*") -> None:
    """All last metrics, and the checkpoints with their sizes."""
    for run in find_runs(folders):
        logged = read_last_metrics(run)
        last = {name: value for name, value in logged.items() if _chosen(name, metrics)}
        if logged and not last:
            raise ConfigError(f"no metric {metrics} was logged in {run}; it has {', '.join(sorted(logged))}")
        print_metrics_table(last, f"{run}: last metrics")
        for record in RunFolder(run).list_checkpoints():
            print(f"{record.path}  before step {record.step}  {folder_bytes(record.path) / 1e6:,.1f} MB")


def compare_runs(folders: Sequence[Path], metrics: str = "") -> None:
    """Last metrics side by side, and the settings that differ."""
    runs = find_runs(folders)
    labels = _short_labels(runs)
    last_R = [read_last_metrics(run) for run in runs]
    names = list(dict.fromkeys(name for last in last_R for name in last))
    usual = [name for name in IMPORTANT if name in names]
    names = [name for name in sorted(names) if _chosen(name, metrics)] if metrics else usual
    if not names:
        raise ConfigError(f"no metric {metrics or 'of the usual ones'} was logged in {', '.join(map(str, runs))}")
    rows = [[name, *(format_number(last[name]) if name in last else "" for last in last_R)] for name in names]
    _print_table(("metric", *labels), rows, left=(0,))
    settings_R = [_settings(run) for run in runs]
    differing = dict.fromkeys(name for settings in settings_R[1:] for name in changes(settings_R[0], settings))
    if differing:
        rows = [[name, *(str(_value(settings, name)) for settings in settings_R)] for name in differing]
        _print_table(("setting", *labels), rows, left=(0,))


def clean_runs(folders: Sequence[Path], metric: str = "", delete: str = "false") -> None:
    """Deletes checkpoints except the last, `final` and the best; a run in use is left alone."""
    if delete not in ("true", "false"):
        raise ConfigError(f"delete={delete} must be true or false")
    freed, runs = 0, find_runs(folders)
    used_by = {path: run for run in runs for path in _paths_in(_settings(run))}
    logged_R: dict[Path, set[str]] = {}
    for run in runs:
        try:
            with closing(lock_folder(run)):
                logged_R[run], at = _logged(RunFolder(run))
                if not metric or metric in logged_R[run]:
                    why = _kept(RunFolder(run), metric or _usual(logged_R[run]), at)
                    freed += _clean(RunFolder(run), why, used_by, delete == "true")
                else:
                    print(f"{run}: no metric {metric!r} was logged; left alone")
        except CookbookError as error:  # of hundreds of runs one may be in use, or damaged
            print(f"{error}; {run} is left alone")
    logged = set[str]().union(*logged_R.values())
    if metric and logged_R and metric not in logged:
        near = ", ".join(name for name in IMPORTANT if name in logged) or "none of the usual ones"
        raise ConfigError(f"no metric {metric!r} was logged there; the runs have {near}")
    if delete == "true":
        print(f"{freed / 1e6:,.1f} MB freed")
    else:
        print(f"{freed / 1e6:,.1f} MB would be freed; nothing was deleted: delete=true deletes")


def _clean(folder: RunFolder, why: dict[Path, str], used_by: Mapping[Path, Path], delete: bool) -> int:
    """The bytes of the checkpoints that are not among those to keep (`why`), nor among `used_by`."""
    freed = 0
    for record in folder.list_checkpoints():
        path = record.path.resolve()
        if path in used_by:
            why.setdefault(record.path, f"{used_by[path]} begins with it")
        if record.path in why or not path.is_relative_to(folder.checkpoints.resolve()):
            continue
        size = folder_bytes(record.path)
        freed += size
        print(f"{'deleted' if delete else 'would delete'} {record.path}  {size / 1e6:,.1f} MB")
        if delete:
            record.delete()
    print(f"{folder.path}: keeps {', '.join(f'{path.name} ({reason})' for path, reason in why.items()) or 'nothing'}")
    return freed


def _paths_in(settings: Any) -> set[Path]:
    """The folders that settings name: a start, a reference, a model."""
    if isinstance(settings, Mapping):
        return {path for value in settings.values() for path in _paths_in(value)}
    return {Path(settings).expanduser().resolve()} if isinstance(settings, str) and "/" in settings else set()


def _logged(folder: RunFolder) -> tuple[set[str], dict[int, dict[str, float]]]:
    """The names of the metrics with values, and step -> those of the steps with a checkpoint. An evaluation
    before step s is of the checkpoint of step s."""
    names = set[str]()
    at: dict[int, dict[str, float]] = {record.step: {} for record in folder.list_checkpoints()}
    for record in each_record(folder.path):
        values = {name: value for name, value in record.items() if value is not None}
        names |= values.keys()
        if record["step"] in at:
            at[record["step"]] |= values
    return names, at


def _usual(logged: set[str]) -> str:
    return next((name for name in IMPORTANT if name.startswith("test/") and name in logged), "")


def _kept(folder: RunFolder, metric: str, at: Mapping[int, Mapping[str, float]]) -> dict[Path, str]:
    """The folders to keep, each with the reason; `at`: step -> its metrics."""
    checkpoints = folder.list_checkpoints()
    why: dict[Path, str] = {record.path: "final" for record in checkpoints if record.name == "final"}
    if checkpoints:
        why.setdefault(checkpoints[-1].path, "last")
    scored = [(at[record.step][metric], record) for record in checkpoints if metric in at[record.step]]
    if scored:
        sign = -1 if any(word in metric for word in LOWER_IS_BETTER) else 1
        value, best = max(scored, key=lambda pair: (sign * pair[0], pair[1].step))
        text = f"best {metric} {format_number(value)}"
        why[best.path] = f"{why[best.path]}, {text}" if best.path in why else text
    return why


def _settings(run: Path) -> dict[str, Any]:
    return read_settings(run / "config.json")


def _value(settings: Mapping[str, Any], name: str) -> Any:
    value: Any = settings
    for part in name.split("."):
        value = value.get(part, "") if isinstance(value, Mapping) else ""
    return value


def _short_labels(runs: Sequence[Path]) -> list[str]:
    names = [run.resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run) for run in runs]


def _chosen(name: str, patterns: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns.split(","))


def _print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int]) -> None:
    """Plain columns, which can be piped into other programs."""
    widths = [max(len(row[place]) for row in [columns, *rows]) for place in range(len(columns))]
    for row in [columns, *rows]:
        cells = [
            cell.ljust(width) if place in left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


COMMANDS: Mapping[str, tuple[Callable[..., None], tuple[str, ...]]] = {
    "list": (list_runs, ()),
    "show": (show_runs, ("metrics",)),
    "compare": (compare_runs, ("metrics",)),
    "clean": (clean_runs, ("metric", "delete")),
}


def main(argv: Sequence[str]) -> None:
    """ConfigError for an unknown command or option."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(__doc__)
        return
    name, *arguments = argv
    if name not in COMMANDS:
        raise ConfigError(f"unknown command {name!r}; known: {', '.join(COMMANDS)}")
    command, allowed = COMMANDS[name]
    options = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    if unknown := sorted(options.keys() - set(allowed)):
        raise ConfigError(f"{name} has no option {unknown[0]!r}; it has {', '.join(allowed) or 'none'}")
    folders = [Path(argument).expanduser() for argument in arguments if "=" not in argument] or [Path("runs")]
    command(folders, **options)


def command() -> None:
    with one_line_errors():
        main(sys.argv[1:])


if __name__ == "__main__":
    command()
