"""Runs of one experiment side by side: a process each, so many at a time, some after others, with one progress bar for all.

A run that has finished leaves finished.json with its settings in its folder and is not run again; asked for with other settings, it is an error.
What a process prints goes to <folder>.log. A run that fails ends those that wait for it, not the others; the error comes at the end.
Left out: several machines, and a GPU each.
"""

import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import FrameType
from typing import Any

from posttrain.backend.errors import ConfigError, CookbookError
from posttrain.tracking.jsonl import write_atomically
from posttrain.tracking.settings import changes, changes_text, read_settings

TAIL = 1 << 16  # bytes at the end of a metrics file that are read for the progress bar
SECONDS_BETWEEN_LINES = 30.0


class RunFailed(CookbookError):
    """One or more runs ended with an error; the others are complete."""


@dataclass(frozen=True)
class Job:
    """`run` must pickle. `after` are names of jobs to wait for; names that are not among the jobs are ignored."""

    name: str
    folder: Path  # of its metrics.jsonl
    num_steps: int
    run: Callable[[], object]
    settings: dict[str, Any]
    after: tuple[str, ...] = ()

    @property
    def marker(self) -> Path:
        return self.folder / "finished.json"

    def finished(self) -> bool:
        """ConfigError if it was run with other settings."""
        if not self.marker.exists():
            return False
        if found := changes(read_settings(self.marker), json.loads(json.dumps(self.settings))):
            raise ConfigError(f"{self.folder} was run with {changes_text(found)}: delete it or choose another log_path")
        return True


def run_side_by_side(jobs: Sequence[Job], processes: int) -> None:
    """Returns when all have finished. RunFailed has the last lines of what failed. Ctrl-C and SIGTERM stop all; they save their state."""
    waiting = {job.name: job for job in jobs}
    done = {job.name for job in jobs if job.finished()}
    for name in done:
        print(f"{name}: has finished before", flush=True)
        del waiting[name]
    running: dict[str, tuple[Job, SpawnProcess]] = {}
    failed: dict[str, str] = {}
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        with _Display([job for job in jobs if job.name in waiting]) as display:
            while waiting or running:
                for name, job in list(waiting.items()):
                    needs = {needed for needed in job.after if needed in {j.name for j in jobs}}
                    if lost := needs & failed.keys():
                        failed[name] = f"waited for {min(lost)}"
                        del waiting[name]
                    elif needs <= done and len(running) < processes:
                        running[name] = (job, _start(job))
                        del waiting[name]
                time.sleep(0.5)
                display.show([job for job, _ in running.values()])
                for name, (job, process) in list(running.items()):
                    if process.exitcode is not None:
                        del running[name]
                        if process.exitcode == 0:
                            done.add(name)
                        else:
                            failed[name] = _last_line(job)
                        display.ended(job, process.exitcode == 0)
    finally:
        signal.signal(signal.SIGTERM, before)
        for _, process in running.values():
            process.terminate()  # they finish their step and save it
        for _, process in running.values():
            process.join()
    if failed:
        raise RunFailed("; ".join(f"{name}: {why}" for name, why in failed.items()))


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _start(job: Job) -> SpawnProcess:
    process = multiprocessing.get_context("spawn").Process(target=_child, args=(job,))
    process.start()
    return process


def _log(job: Job) -> Path:
    return job.folder.parent / f"{job.folder.name}.log"


def _child(job: Job) -> None:
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(_log(job), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    try:
        job.run()
    except CookbookError as error:
        print(f"error: {error}", flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BaseException:
        traceback.print_exc()
        sys.exit(1)
    write_atomically(job.marker, json.dumps(job.settings, indent=1) + "\n")


def _last_line(job: Job) -> str:
    lines = [line for line in _log(job).read_text(errors="replace").splitlines() if line.strip()] if _log(job).exists() else []
    return f"{lines[-1].removeprefix('error: ') if lines else 'died without a word'} (see {_log(job)})"


# --- progress -------------------------------------------------------------------------------------------------------------------


class _Display:
    """A bar for each job on a terminal, a line now and then elsewhere."""

    def __init__(self, jobs: Sequence[Job]):
        self._jobs, self._bar, self._tasks = jobs, None, {}
        self._last_line = time.monotonic()
        self._began = time.monotonic()

    def __enter__(self) -> "_Display":
        if sys.stdout.isatty() and self._jobs:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            columns = (TextColumn("[bold]{task.description}"), BarColumn(bar_width=30), MofNCompleteColumn(), TimeElapsedColumn())
            self._bar = Progress(*columns, TextColumn("{task.fields[status]}"))
            self._bar.start()
            for job in self._jobs:
                self._tasks[job.name] = self._bar.add_task(job.name, total=job.num_steps, start=False, status="")
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, running: Sequence[Job]) -> None:
        if self._bar is None and time.monotonic() - self._last_line < SECONDS_BETWEEN_LINES:
            return
        self._last_line = time.monotonic()
        parts = []
        for job in running:
            done, status = _progress(job)
            parts.append(f"{job.name} {done}/{job.num_steps} {status}".rstrip())
            if self._bar is not None:
                self._bar.start_task(self._tasks[job.name])
                self._bar.update(self._tasks[job.name], completed=done, status=status)
        if self._bar is None and parts:
            print(f"{time.monotonic() - self._began:5.0f} s  " + "   ".join(parts), flush=True)

    def ended(self, job: Job, well: bool) -> None:
        if self._bar is not None:
            self._bar.update(
                self._tasks[job.name], completed=job.num_steps if well else None, status=_progress(job)[1] if well else "FAILED"
            )
            self._bar.stop_task(self._tasks[job.name])
        else:
            outcome = f"finished  {_progress(job)[1]}" if well else f"FAILED: {_last_line(job)}"
            print(f"{time.monotonic() - self._began:5.0f} s  {job.name}: {outcome}", flush=True)


def _progress(job: Job) -> tuple[int, str]:
    """Steps done, and the last first-hop accuracies, from the end of the metrics file."""
    path = job.folder / "metrics.jsonl"
    if not path.exists():
        return 0, ""
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - TAIL))
        lines = stream.read().decode(errors="replace").splitlines()
    records = []
    for line in lines:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue  # cut off, or being written
    found = {
        key: value
        for record in records
        for key, value in record.items()
        if key.endswith("/first_hop") and "env/all" not in key.replace("test/env/all", "")
    }
    status = "  ".join(f"{key.removesuffix('/first_hop')} {value:.2f}" for key, value in found.items() if value is not None)
    return min(int(records[-1]["step"]) + 1 if records else 0, job.num_steps), status and f"first hop: {status}"
