"""Where the time of a step goes: overlapping spans of sampling, environments, scoring, training,
syncs and evaluation, their shares and a picture. `span("env")` records into the timeline of
`recording`, which asyncio tasks inherit. Left out: single training passes, the inside of vLLM.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import chain, takewhile
from pathlib import Path
from typing import Any

KINDS = ("sampling", "env", "score", "train", "sync", "eval")
PICTURE_SPANS = 20_000  # of the last steps


@dataclass(eq=False)
class Span:
    """`end` is infinite for an open span. Seconds of `time.perf_counter`."""

    kind: str
    start: float
    end: float = float("inf")


class Timeline:
    """The latest spans of a run."""

    def __init__(self) -> None:
        self._spans: deque[Span] = deque(maxlen=PICTURE_SPANS)
        self._open: set[Span] = set()
        self._began = time.perf_counter()

    @contextmanager
    def span(self, kind: str) -> Iterator[None]:
        span = Span(kind, time.perf_counter())
        self._open.add(span)
        try:
            yield
        finally:
            span.end = time.perf_counter()
            self._open.discard(span)
            self._spans.append(span)

    def shares(self, start: float, end: float) -> dict[str, float]:
        """Shares of the seconds from `start` to `end`: with at least one span of a kind, and with
        none ("idle"); also the mean number of rollouts in an environment or sampler
        ("rollouts_in_flight")."""
        clipped: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
        for span in chain(
            self._open, takewhile(lambda span: span.end > start, reversed(self._spans))
        ):  # ordered by their ends
            if span.start < end:
                clipped[span.kind].append((max(span.start, start), min(span.end, end)))
        length = max(end - start, 1e-9)
        shares = {kind: covered(intervals) / length for kind, intervals in clipped.items() if intervals}
        shares["idle"] = 1.0 - covered([interval for intervals in clipped.values() for interval in intervals]) / length
        busy = sum(stop - begin for kind in ("sampling", "env") for begin, stop in clipped[kind])
        return shares | {"rollouts_in_flight": busy / length}

    def plot(self, path: Path, seconds: float = 30.0) -> Path | None:
        """Draws the number of open spans of each kind over the last `seconds`. None without spans."""
        if not self._spans:
            return None
        from posttrain.tracking.figures import (  # draws, so it is imported when something is drawn
            COLORS,
            finish_axis,
            panel_axes,
            save_figure,
        )

        end = max(span.end for span in self._spans)
        start = max(end - seconds, min(span.start for span in self._spans))
        kinds = [kind for kind in KINDS if any(span.kind == kind and span.end > start for span in self._spans)]
        title = f"the last {end - start:.0f} seconds of the run: number of open spans of each kind"
        figure, axes = panel_axes(len(kinds), title, columns=1, size=(11, 1.0))
        for axis, kind, color in zip(axes, kinds, COLORS, strict=False):
            times, counts = concurrency([span for span in self._spans if span.kind == kind and span.end > start])
            axis.fill_between([t - self._began for t in times], counts, step="post", color=color, linewidth=0)
            axis.set_xlim(start - self._began, end - self._began)
            axis.set_ylim(0, 1.05 * max(counts))
            axis.yaxis.get_major_locator().set_params(integer=True, nbins=3)
            axis.set_ylabel(kind, rotation=0, ha="right", va="center", fontsize=9)
            finish_axis(axis, "", xlabel="seconds since the run was started" if axis is axes[-1] else "")
            axis.tick_params(labelbottom=axis is axes[-1])
        return save_figure(figure, path)


def covered(intervals: Sequence[tuple[float, float]]) -> float:
    """Length of the union."""
    total, reached = 0.0, -float("inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def concurrency(spans: Sequence[Span]) -> tuple[list[float], list[int]]:
    """Moments at which the number of open spans changes, and the number after each."""
    changes = sorted([(span.start, 1) for span in spans] + [(span.end, -1) for span in spans])
    times, counts, count = [], [], 0
    for moment, change in changes:
        count += change
        times.append(moment)
        counts.append(count)
    return times, counts


_recording: ContextVar[Timeline | None] = ContextVar("timeline", default=None)


@contextmanager
def recording(timeline: Timeline) -> Iterator[Timeline]:
    token = _recording.set(timeline)
    try:
        yield timeline
    finally:
        _recording.reset(token)


@contextmanager
def span(kind: str) -> Iterator[None]:
    """Records into the installed timeline, if any."""
    timeline: Any = _recording.get()
    if timeline is None:
        yield
        return
    with timeline.span(kind):
        yield
