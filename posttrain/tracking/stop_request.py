"""Ctrl-C, SIGTERM, a closed terminal (SIGHUP) and a closed standard output (`| head`) ask a run to
save and stop after the current step. A second Ctrl-C or SIGTERM stops at once (SIGHUP does not: a
closed terminal may send several). Under `nohup` SIGHUP stays ignored. Left out: threads other than
the main one, which get no signals.
"""

import errno
import os
import signal
import sys
from contextlib import suppress
from types import FrameType
from typing import Any, TextIO, cast

GONE = (errno.EPIPE, errno.EIO)  # the reader of a pipe, or the terminal, is gone


class Stopped(KeyboardInterrupt):
    """The run was asked to stop, and has saved its state."""


class StopRequest:
    """`with StopRequest() as stop: ... if stop: save and leave`."""

    def __init__(self) -> None:
        self._asked = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._handle)
        self._stdout = sys.stdout
        sys.stdout = cast(TextIO, _WatchedOutput(sys.stdout, self))
        return self

    def __exit__(self, *exc: object) -> None:
        sys.stdout = self._stdout
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._asked and number != signal.SIGHUP:
            raise KeyboardInterrupt
        if not self._asked:
            _say(b"\nstopping after this step, then saving; once more to stop at once\n")
        self._asked = True

    def ask(self) -> None:
        self._asked = True

    def __bool__(self) -> bool:
        return self._asked


class _WatchedOutput:
    """Standard output that requests a stop, and drops text, after its reader is gone."""

    def __init__(self, stream: TextIO, stop: StopRequest):
        self._stream, self._stop = stream, stop

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._lost(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._lost(error)

    def _lost(self, error: OSError) -> None:
        if error.errno not in GONE:
            raise error
        silence(self._stream)
        self._stop.ask()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _say(text: bytes) -> None:
    """For signal handlers, where print may find its buffer in the middle of a write."""
    with suppress(OSError):  # the terminal may be gone
        os.write(1, text)


def silence(stream: TextIO) -> None:
    """Drops a stream's remaining output, also at the interpreter's end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
