"""Processes on this machine, as /proc lists them: those below another, and Ray's actors; an actor; and waiting.
It imports little: each process of Ray that has the actor imports this file.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path

PATIENCE = 1500.0  # seconds until a wait is taken for a hang; less than pytest's own limit


class Actor:
    async def process(self) -> tuple[int, str | None]:
        return os.getpid(), os.environ.get("OMP_NUM_THREADS")

    async def fail(self) -> None:
        from posttrain.backend.errors import NonFiniteError

        raise NonFiniteError("a loss is not finite", [3])


def descendants(pid: int) -> list[int]:
    """Process ids of all children, their children included."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        if fields := _status(int(folder.name)):
            parents[int(folder.name)] = int(fields[1])
    children = [child for child, parent in parents.items() if parent == pid]
    return children + [below for child in children for below in descendants(child)]


def runs(pid: int) -> bool:
    fields = _status(pid)
    return bool(fields) and fields[0] not in "XZ"


def title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def actors(kind: str, driver: int | None = None) -> list[int]:
    """Process ids of the actors of this class, oldest first, which the driver has (None = this process)."""
    return sorted(pid for pid in descendants(driver or os.getpid()) if title(pid).startswith(f"ray::{kind}"))


def wait_until(holds: Callable[[], object], seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _status(pid: int) -> list[str]:
    """State, parent, ...; empty for a process that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
