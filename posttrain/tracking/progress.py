"""The progress bar of a training loop; occasional lines if the output is not a terminal."""

import asyncio
import sys
import time
from collections import deque
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from posttrain.tracking.metrics_log import format_number

T = TypeVar("T")

SECONDS_BETWEEN_LINES = 10.0
STEPS_IN_RATE = 20  # rate over the last steps: the first ones compile and warm up


class TrainingProgress:
    """`with TrainingProgress(total_steps, start=resumed_at) as progress: ... progress.update(step,
    {"reward": 0.71})`. `step`, from 0, has just finished. Printed lines appear above the bar."""

    def __init__(self, total_steps: int, start: int = 0, description: str = "training"):
        self.total_steps, self.start, self.description = total_steps, start, description
        self._bar: Any = None
        self._last_line = -float("inf")
        self._finished: deque[tuple[int, float]] = deque(maxlen=STEPS_IN_RATE + 1)

    def __enter__(self) -> "TrainingProgress":
        self._finished.append((self.start, time.monotonic()))
        if sys.stdout.isatty():
            self._bar = _make_bar()
            self._bar.start()
            self._task = self._bar.add_task(self.description, total=self.total_steps, completed=self.start, status="")
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, metrics: Mapping[str, float] | None = None) -> None:
        now = time.monotonic()
        done = step + 1
        first = len(self._finished) == 1
        self._finished.append((done, now))
        if self._bar is not None:
            self._bar.update(self._task, completed=done, status=self._status(metrics))
        elif first or done == self.total_steps or now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            print(f"{self.description}  step {done}/{self.total_steps}  {self._status(metrics)}", flush=True)

    def _status(self, metrics: Mapping[str, float] | None) -> str:
        (first_step, first_time), (last_step, last_time) = self._finished[0], self._finished[-1]
        seconds_per_step = (last_time - first_time) / max(last_step - first_step, 1)
        parts = [
            f"{seconds_per_step:.2f} s/step",
            f"ETA {_duration(seconds_per_step * (self.total_steps - last_step))}",
        ]
        return "  ".join(parts + [f"{name} {format_number(value)}" for name, value in (metrics or {}).items()])


async def reported(waited_for: Awaitable[T], activity: str, seconds: float = 60.0) -> T:
    """Awaits it, and prints every `seconds` that it is still in progress."""
    task, began = asyncio.ensure_future(waited_for), time.monotonic()
    try:
        while not (await asyncio.wait({task}, timeout=seconds))[0]:
            print(f"still {activity} after {_duration(time.monotonic() - began)}", flush=True)
    finally:
        if not task.done():
            task.cancel()
    return task.result()


class Count:
    """Prints every SECONDS_BETWEEN_LINES how many of `total` are done, and for how long the rest takes."""

    def __init__(self, total: int, activity: str):
        self._total, self._activity, self._done = total, activity, 0
        self._began = self._printed = time.monotonic()

    def add(self, number: int = 1) -> None:
        self._done += number
        now = time.monotonic()
        if now - self._printed >= SECONDS_BETWEEN_LINES and self._done < self._total:
            self._printed = now
            rest = (now - self._began) / self._done * (self._total - self._done)
            print(f"{self._activity}: {self._done:,} of {self._total:,}, ETA {_duration(rest)}", flush=True)


def counted(items: Sequence[T], activity: str) -> Iterator[T]:
    """The items; prints every SECONDS_BETWEEN_LINES how many have been taken."""
    count = Count(len(items), activity)
    for item in items:
        yield item
        count.add()


def _make_bar() -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}"),
    )


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"
