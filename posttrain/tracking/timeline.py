"""Where the time of a step goes: overlapping spans of sampling, environments, scoring, training,
syncs and evaluation, their shares and a picture; of ranks and replicas, a row each. `span("env")`
records into the timeline of `recording`, which asyncio tasks inherit. Left out: the inside of vLLM.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from posttrain.backend.spans import Span, Spans
from posttrain.tracking.figures import COLORS, finish_axis, panel_axes, save_figure

KINDS = ("sampling", "env", "score", "train", "sync", "eval")
PROCESS_KINDS = ("sampling", "train", "publish", "load", "save")  # of ranks and replicas; later ones are drawn above
SHOWN = 30.0  # seconds of the picture
SYNC = "sync"  # the name under which a pool records the halves of a sync


class Timeline:
    """The latest spans of a run. `spans`: where the ranks and replicas of a ServiceClient record."""

    def __init__(self, spans: Spans | None = None) -> None:
        self.spans = Spans() if spans is None else spans
        self._began = time.perf_counter()

    def metrics(self, start: float, end: float) -> dict[str, float]:
        """Of the step from `start` to `end`: `shares` as time/share/..., and `of_processes`. Spans that neither
        the next step nor the picture needs are dropped."""
        shares = {f"time/share/{kind}": share for kind, share in self.shares(start, end).items()}
        metrics = shares | self.of_processes(start, end)
        self.spans.forget(min(start, end - SHOWN))
        return metrics

    def shares(self, start: float, end: float) -> dict[str, float]:
        """Shares of the seconds from `start` to `end`: with at least one span of a kind, and with
        none ("idle"); also the mean number of rollouts in an environment or sampler
        ("rollouts_in_flight")."""
        clipped: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
        for span in self.spans.between(start, end):
            if not span.process:
                clipped[span.kind].append((max(span.start, start), min(span.end, end)))
        length = max(end - start, 1e-9)
        shares = {kind: covered(intervals) / length for kind, intervals in clipped.items() if intervals}
        shares["idle"] = 1.0 - covered([interval for intervals in clipped.values() for interval in intervals]) / length
        busy = sum(stop - begin for kind in ("sampling", "env") for begin, stop in clipped[kind])
        return shares | {"rollouts_in_flight": busy / length}

    def of_processes(self, start: float, end: float) -> dict[str, float]:
        """Each rank's and replica's share of the seconds without a call ("idle"), a replica's sampled
        tokens per second, and the seconds of the sync: writing the files, until the last replica
        runs on them, and the longest that a replica decoded nothing for it. Empty for one process."""
        length = max(end - start, 1e-9)
        spans = [span for span in self.spans.between(start, end) if span.process]
        metrics: dict[str, float] = {}
        for process in self.spans.processes:
            clipped = [(max(s.start, start), min(s.end, end), s) for s in spans if s.process == process]
            if process == SYNC:
                for kind in ("publish", "load"):
                    metrics[f"time/sync_{kind}"] = covered([(b, e) for b, e, s in clipped if s.kind == kind])
                continue
            name = f"processes/{process.replace(' ', '_')}"
            metrics[f"{name}/idle"] = 1.0 - covered([(begin, stop) for begin, stop, _ in clipped]) / length
            if process.startswith("replica"):
                tokens = sum(span.tokens for _, _, span in clipped if span.end <= end)
                metrics[f"{name}/tokens_per_second"] = tokens / length
                paused = covered([(b, e) for b, e, s in clipped if s.kind == "load"])
                metrics["time/sync_pause"] = max(metrics.get("time/sync_pause", 0.0), paused)
        return metrics

    def plot(self, path: Path, seconds: float = SHOWN) -> Path | None:
        """Draws the number of open spans of each kind over the last `seconds`. None without spans."""
        end = self.spans.last_end
        spans = self.spans.between(end - seconds, end)
        if not spans:
            return None
        start = max(end - seconds, min(span.start for span in spans))
        kinds = [kind for kind in KINDS if any(span.kind == kind and not span.process for span in spans)]
        processes = [process for process in self.spans.processes if process != SYNC]
        title = f"the last {end - start:.0f} seconds of the run: number of open spans of each kind"
        if processes:
            title += "; below, what each rank and replica is at"
        heights = [1.0] * len(kinds) + ([0.4 + 0.2 * len(processes)] if processes else [])
        figure, axes = panel_axes(len(heights), title, columns=1, size=(11, 1.0), heights=heights)
        for axis, kind in zip(axes, kinds, strict=False):
            times, counts = concurrency([span for span in spans if span.kind == kind and not span.process])
            axis.fill_between(
                [t - self._began for t in times], counts, step="post", color=COLORS[KINDS.index(kind)], linewidth=0
            )
            axis.set_ylim(0, 1.05 * max(counts))
            axis.yaxis.get_major_locator().set_params(integer=True, nbins=3)
            axis.set_ylabel(kind, rotation=0, ha="right", va="center", fontsize=9)
        if processes:
            self._draw_processes(axes[-1], processes, spans, end)
        for axis in axes:
            axis.set_xlim(start - self._began, end - self._began)
            finish_axis(axis, "", xlabel="seconds since the run was started" if axis is axes[-1] else "")
            axis.tick_params(labelbottom=axis is axes[-1])
        return save_figure(figure, path)

    def _draw_processes(self, axis: Any, processes: Sequence[str], spans: Sequence[Span], end: float) -> None:
        """A row for each: what it is at."""
        colors = dict(zip(("sampling", "save", "", "train", "publish", "", "load"), COLORS, strict=False))
        for kind in PROCESS_KINDS:
            for row, process in enumerate(processes):
                bars = [
                    (span.start - self._began, min(span.end, end) - span.start)
                    for span in spans
                    if span.process == process and span.kind == kind
                ]
                axis.broken_barh(bars, (row - 0.4, 0.8), color=colors[kind], linewidth=0, label="" if row else kind)
        axis.set_yticks(range(len(processes)), processes)
        axis.set_ylim(len(processes) - 0.5, -0.5)
        axis.legend(fontsize=8, frameon=False, ncols=len(PROCESS_KINDS), loc="lower right", bbox_to_anchor=(1, 1))


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
    before = _recording.get()
    _recording.set(timeline)
    try:
        yield timeline
    finally:  # no token: a coroutine that nobody awaits any more is closed in another context
        _recording.set(before)


@contextmanager
def span(kind: str) -> Iterator[None]:
    """Records into the installed timeline, if any."""
    timeline: Any = _recording.get()
    if timeline is None:
        yield
        return
    with timeline.spans.span(kind):
        yield
