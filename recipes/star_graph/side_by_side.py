"""Runs stages in parallel, a process each, with one progress bar for all.

A process prints to <folder>.log. A stage that fails ends the stages that need it, not the others.
Left out: several machines, a GPU per process.
"""

import asyncio
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import FrameType

from posttrain.backend.errors import CookbookError
from posttrain.tracking.jsonl import read_last_records
from posttrain.tracking.stages import Stage, plan

SHOWN_RECORDS = 100  # of a metrics file's end, for the progress bar
SECONDS_BETWEEN_LINES = 30.0


class RunFailed(CookbookError):
    """At least one stage failed; the others are complete."""


async def run_side_by_side(num_steps: Mapping[Stage, int], processes: int) -> None:
    """Runs all unfinished stages, at most `processes` at a time. RunFailed, after the others have
    finished, holds the last line of each failure. Ctrl-C and SIGTERM stop all stages, which save
    their state. The values of `num_steps` are for the progress bar.
    """
    planned = plan(list(num_steps))
    waiting = {name: stage for name, (stage, finished) in planned.items() if not finished}
    done = planned.keys() - waiting.keys()
    for name in sorted(done):
        print(f"{name}: has finished before", flush=True)
    running: dict[str, tuple[Stage, SpawnProcess]] = {}
    failed: dict[str, str] = {}
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        with _Display({stage: num_steps.get(stage, 1) for stage in waiting.values()}) as display:
            while waiting or running:
                for name, stage in list(waiting.items()):
                    needs = {need.name for need in stage.needs} & planned.keys()
                    if lost := needs & failed.keys():
                        failed[name] = f"waited for {min(lost)}"
                        del waiting[name]
                    elif needs <= done and len(running) < processes:
                        running[name] = (stage, _start(stage))
                        del waiting[name]
                await asyncio.sleep(0.5)
                display.show([stage for stage, _ in running.values()])
                for name, (stage, process) in list(running.items()):
                    if process.exitcode is not None:
                        del running[name]
                        if process.exitcode == 0:
                            done.add(name)
                        else:
                            failed[name] = _last_line(stage)
                        display.ended(stage, process.exitcode == 0)
    finally:
        signal.signal(signal.SIGTERM, before)
        for _, process in running.values():
            process.terminate()  # finishes the step and saves
        for _, process in running.values():
            process.join()
    if failed:
        raise RunFailed("; ".join(f"{name}: {reason}" for name, reason in failed.items()))


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _start(stage: Stage) -> SpawnProcess:
    process = multiprocessing.get_context("spawn").Process(target=_child, args=(stage,))
    process.start()
    return process


def _log(stage: Stage) -> Path:
    return stage.path.with_name(f"{stage.path.name}.log")


def _child(stage: Stage) -> None:
    stage.path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(_log(stage), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    try:
        asyncio.run(stage.run())
    except CookbookError as error:
        print(f"error: {error}", flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BaseException:
        traceback.print_exc()
        sys.exit(1)


def _last_line(stage: Stage) -> str:
    log = _log(stage)
    text = log.read_text(errors="replace").strip() if log.exists() else ""
    return f"{text.splitlines()[-1].removeprefix('error: ') if text else 'no output'} (see {log})"


# --- progress -----------------------------------------------------------------------------------


class _Display:
    """A bar for each stage on a terminal; elsewhere a line every SECONDS_BETWEEN_LINES."""

    def __init__(self, num_steps: Mapping[Stage, int]):
        self._num_steps, self._bar, self._tasks = num_steps, None, {}
        self._last_line = time.monotonic()
        self._began = time.monotonic()

    def __enter__(self) -> "_Display":
        if sys.stdout.isatty() and self._num_steps:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            columns = (
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
            )
            self._bar = Progress(*columns, TextColumn("{task.fields[status]}"))
            self._bar.start()
            for stage, num_steps in self._num_steps.items():
                self._tasks[stage.name] = self._bar.add_task(stage.name, total=num_steps, start=False, status="")
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, running: Sequence[Stage]) -> None:
        if self._bar is None and time.monotonic() - self._last_line < SECONDS_BETWEEN_LINES:
            return
        self._last_line = time.monotonic()
        parts = []
        for stage in running:
            done, status = _progress(stage)
            parts.append(f"{stage.name} {done}/{self._num_steps[stage]} {status}".rstrip())
            if self._bar is not None:
                self._bar.start_task(self._tasks[stage.name])
                self._bar.update(self._tasks[stage.name], completed=done, status=status)
        if self._bar is None and parts:
            print(f"{time.monotonic() - self._began:5.0f} s  " + "   ".join(parts), flush=True)

    def ended(self, stage: Stage, succeeded: bool) -> None:
        if self._bar is not None:
            completed, status = (self._num_steps[stage], _progress(stage)[1]) if succeeded else (None, "FAILED")
            self._bar.update(self._tasks[stage.name], completed=completed, status=status)
            self._bar.stop_task(self._tasks[stage.name])
        else:
            outcome = f"finished  {_progress(stage)[1]}" if succeeded else f"FAILED: {_last_line(stage)}"
            print(f"{time.monotonic() - self._began:5.0f} s  {stage.name}: {outcome}", flush=True)


def _progress(stage: Stage) -> tuple[int, str]:
    """Steps completed and the last first-hop accuracies, from the end of the metrics file."""
    records = read_last_records(stage.path / "metrics.jsonl", SHOWN_RECORDS)
    accuracy = {
        key: value
        for record in records
        for key, value in record.items()
        if key.endswith("/first_hop") and "env/all" not in key.replace("test/env/all", "")
    }
    status = "  ".join(
        f"{key.removesuffix('/first_hop')} {value:.2f}" for key, value in accuracy.items() if value is not None
    )
    return int(records[-1]["step"]) + 1 if records else 0, status and f"first hop: {status}"
