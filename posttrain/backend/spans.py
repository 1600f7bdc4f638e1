"""Intervals in which something is at work: in the main process, and in ranks and replicas as the main
process sees them: from a call to its answer, so that no clock of another node is read.
"""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, takewhile

LATEST = 500_000  # that are kept, 100 MB; a step of 8,192 rollouts of 20 turns has 340,000


@dataclass(eq=False, slots=True)
class Span:
    """`end` is infinite for an open span. Seconds of `time.perf_counter`. `process`: "rank 0",
    "replica 1"; "sync" for the halves of a sync; "" for the rest. `tokens` were sampled at its end."""

    kind: str
    start: float
    end: float = float("inf")
    process: str = ""
    tokens: int = 0


class Spans:
    """The latest. Any thread may record."""

    def __init__(self) -> None:
        self.processes: dict[str, None] = {}  # all that have ever been at work
        self._open: set[Span] = set()
        self._closed: deque[Span] = deque(maxlen=LATEST)  # ordered by their ends, nearly

    def begin(self, kind: str, process: str = "") -> Span:
        if process:
            self.processes.setdefault(process)
        span = Span(kind, time.perf_counter(), process=process)
        self._open.add(span)
        return span

    def end(self, span: Span, tokens: int = 0, seconds: float | None = None) -> None:
        """`seconds`: it was at work only so long."""
        span.end, span.tokens = time.perf_counter(), tokens
        if seconds is not None:
            span.start = max(span.start, span.end - seconds)
        self._open.discard(span)
        self._closed.append(span)

    @contextmanager
    def span(self, kind: str, process: str = "") -> Iterator[None]:
        span = self.begin(kind, process)
        try:
            yield
        finally:
            self.end(span)

    def between(self, start: float, end: float) -> list[Span]:
        """Those that overlap it, the open ones first."""
        closed = takewhile(lambda span: span.end > start, reversed(self._closed.copy()))
        return [span for span in chain(list(self._open), closed) if span.start < end]

    def forget(self, before: float) -> None:
        """Drops the closed ones that ended before that."""
        while self._closed and self._closed[0].end < before:
            self._closed.popleft()

    @property
    def last_end(self) -> float:
        """Of the closed ones; 0 without one."""
        return self._closed[-1].end if self._closed else 0.0
