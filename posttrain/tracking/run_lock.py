"""One process per run folder: a kernel lock, released whenever its holder ends. The file `lock`
names the holder; a dead holder's text has no effect. What a process does in a folder shares the lock,
but of its runs one at a time. Left out: file systems without locks, where a warning is printed.
"""

import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from weakref import WeakSet

from posttrain.backend.errors import ConfigError

LOCK_FILE = "lock"


class RunLock:
    """Held while this object lives."""

    def __init__(self, folder: Path):
        self.file, self._has_run, self._openings = folder / LOCK_FILE, False, 0
        # Python closes it in executed programs
        self._descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = self.file.read_bytes()
            self.close()
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise ConfigError(
                    f"{folder} is in use{_holder_text(holder)}: stop that run, or choose another log_path"
                ) from None
            print(
                f"{folder}: no lock on this file system ({error.strerror}); take care that one process alone runs here"
            )
            return
        about = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.truncate(self._descriptor, 0)
        os.write(self._descriptor, (json.dumps(about) + "\n").encode())
        _held.add(self)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            self.close()

    def opened(self) -> int:
        """The number of this opening of the folder. ConfigError while a run of this process takes steps in it."""
        if self._has_run:
            raise ConfigError(f"a run of this process is under way in {self.file.parent}: choose another log_path")
        self._openings += 1
        return self._openings

    @contextmanager
    def running(self, opening: int) -> Iterator[None]:
        """For a run's steps. ConfigError if another run of this process opened the folder after it."""
        if opening != self._openings:
            raise ConfigError(f"{self.file.parent} was opened by another run of this process: choose another log_path")
        self._has_run = True
        try:
            yield
        finally:
            self._has_run = False

    def is_of(self, folder: Path) -> bool:
        """Whether this locks that folder, not a deleted folder of the same path."""
        try:
            return self._descriptor >= 0 and os.path.samestat(os.fstat(self._descriptor), (folder / LOCK_FILE).stat())
        except OSError:
            return False


_held: WeakSet[RunLock] = WeakSet()
_looking = threading.Lock()  # two threads may open one folder


def lock_folder(folder: Path) -> RunLock:
    """The lock of an existing folder. ConfigError, with the holder, if another process has it."""
    with _looking:
        return next((lock for lock in list(_held) if lock.is_of(folder)), None) or RunLock(folder)


def _holder_text(content: bytes) -> str:
    try:
        about = json.loads(content)
        return f" by process {about['pid']} on {about['host']} since {about['since']}"
    except (ValueError, KeyError, TypeError):
        return " by another process"  # its name is not written yet


def _let_go_in_child() -> None:
    """A forked child inherits the descriptors and would keep the lock after its parent."""
    for lock in list(_held):
        lock.close()


os.register_at_fork(after_in_child=_let_go_in_child)
