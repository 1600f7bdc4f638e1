"""What would stay after a process that dies: published weights in shared memory, its segments and
semaphores, processes of Ray. A keeper process, which outlives this one, removes them.
"""

import atexit
import contextlib
import fcntl
import glob
import inspect
import multiprocessing
import os
import secrets
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO

from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import ConfigError

FOLDER = "posttrain-weights"
LOCK = "lock"


_locks: dict[Path, IO[bytes]] = {}  # of the folders of this process


def weight_folder(config: BackendConfig) -> Path:
    """A new folder, named after this process, which holds its lock. Folders whose process has died, as a
    free lock says, are removed: a process id may be of another container, which has this host's name."""
    shared_memory = Path("/dev/shm")
    parent = Path(config.sync_dir).expanduser().absolute() if config.sync_dir else shared_memory
    if not config.sync_dir and not shared_memory.is_dir():
        parent = Path(tempfile.gettempdir())
    prefix = f"{FOLDER}-{socket.gethostname()}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for folder in parent.glob(f"{prefix}-*-*"):
            if _is_left(folder):
                remove(folder)
        name = f"{prefix}-{os.getpid()}-{secrets.token_hex(4)}"
        unlocked, folder = parent / f".{name}", parent / name
        unlocked.mkdir()
        lock = (unlocked / LOCK).open("wb")
        with contextlib.suppress(OSError):  # no locks on this file system: nobody will remove it
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        unlocked.rename(folder)
    except OSError as error:
        raise ConfigError(f"weights cannot be published in {parent} (backend.sync_dir): {error}") from error
    _locks[folder] = lock
    return folder


def _is_left(folder: Path) -> bool:
    try:
        with (folder / LOCK).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held, or nobody can tell
        return False
    return True


def remove_own(folder: Path) -> None:
    remove(folder)
    if lock := _locks.pop(folder, None):
        lock.close()


def remove(folder: "str | Path") -> None:
    """Also what processes have noted there (`note_shared_memory`, `note_temporary_folder`)."""
    import glob
    import os
    import shutil

    for note in glob.glob(f"{glob.escape(str(folder))}/*.segments"):
        with open(note) as lines:
            for path in [path for line in lines.read().splitlines() for path in glob.glob(line)]:
                shutil.rmtree(path, ignore_errors=True) if os.path.isdir(path) else os.remove(path)
    shutil.rmtree(folder, ignore_errors=True)


def note_temporary_folder(note: Path) -> None:
    """A folder of its own for the temporary files of this process and its children, which is written down: vLLM
    leaves sockets and a file store in it after a SIGKILL, by which Ray ends a process. Compiled kernels stay where
    other processes find them."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache_dir()
    tempfile.tempdir = os.environ["TMPDIR"] = tempfile.mkdtemp(prefix="posttrain-")
    with note.open("a") as file:
        file.write(f"{glob.escape(tempfile.tempdir)}\n")


def note_semaphores(note: Path) -> None:
    """Gives the semaphores that this process and its children will make a prefix of their own, and
    writes it down. Nobody else can remove them: Ray kills Python's resource tracker as well."""
    prefix = f"mp-{secrets.token_hex(4)}"
    multiprocessing.current_process()._config["semprefix"] = f"/{prefix}"  # type: ignore[attr-defined]
    with note.open("a") as file:
        file.write(f"/dev/shm/sem.{prefix}-*\n")


def note_shared_memory(note: Path) -> None:
    """Adds the segments that this process and its children have mapped: nobody else can remove them
    after a SIGKILL."""
    paths = set()
    for pid in _family(os.getpid()):
        with contextlib.suppress(OSError):
            maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
            paths |= {line.split(maxsplit=5)[-1] for line in maps if "/dev/shm/" in line}
    segments = [path for path in paths if Path(path).name.startswith(("psm_", "vllm_"))]  # Python's and vLLM's
    with note.open("a") as file:
        file.writelines(f"{glob.escape(path)}\n" for path in segments)


def _family(pid: int) -> list[int]:
    """The process and all below it."""
    children = [
        child for file in Path(f"/proc/{pid}/task").glob("*/children") for child in map(int, file.read_text().split())
    ]
    return [pid, *(below for child in children for below in _family(child))]


# Waits for a word of the process that started it, or for its end. Its pipe does not close where that has forked
# processes that live on, as multiprocessing does: they have it, too. Then it ends Ray's processes and their children,
# workers too, and removes the folders. Ray ends a process without a word when its own have died.
KEEPER = (
    f"{inspect.getsource(remove)}"
    + """
import glob, os, select, signal, sys, time
parent, folders, sessions = int(sys.argv[1]), [*filter(None, sys.argv[2].split(os.pathsep))], sys.argv[3]
started = {int(pid) for pid in sys.argv[4:]}

def word():
    said = b""
    while said not in (b"closed", b"exit"):
        lives = os.getppid() == parent
        if select.select([0], [], [], 1 if lives else 0)[0]:
            if not (read := os.read(0, 16)):
                break
            said += read
        elif not lives:
            break
    return said

def status(pid):  # state, parent, process group
    try:
        return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[:3]
    except OSError:
        return "X", "0", "0"

def alive(pid):
    return status(pid)[0] not in "XZ"

def command(pid):
    try:
        return open(f"/proc/{pid}/cmdline", "rb").read()
    except OSError:
        return b""

def all_processes():
    return map(int, filter(str.isdigit, os.listdir("/proc")))

def add_children(family):
    for pid in all_processes():
        if pid not in family and family & set(map(int, status(pid)[1:])):
            family.add(pid)
            add_children(family)

add_children(started)  # Ray's agents: a dead parent could not be asked later
if (said := word()) != b"closed":
    if said != b"exit":
        text = "ERROR the main process was killed, by the system (memory?) or with Ray: resume the run from its last checkpoint"
        print(text, file=sys.stderr, flush=True)
    family = set(started)
    add_children(family)
    # a dead process's number may belong to another by now
    family = {pid for pid in family if alive(pid) and (pid not in started or b"ray" in command(pid))}
    for session in glob.glob(sessions):
        folders.append(session)
        family |= {pid for pid in all_processes() if os.fsencode(session) in command(pid)}
    for number, seconds in ((signal.SIGTERM, 2), (signal.SIGKILL, 5)):
        for pid in family:
            try:
                os.kill(pid, number)
            except OSError:
                pass
        deadline = time.monotonic() + seconds
        while any(map(alive, family)) and time.monotonic() < deadline:
            time.sleep(0.05)
    for folder in folders:
        remove(folder)
"""
)


def start_keeper(folders: list[str], pids: list[int], sessions: str = "") -> "subprocess.Popen[bytes]":
    """`sessions`: a pattern, with *, for the folders of a Ray whose processes name them: not all are there yet."""
    said = (str(os.getpid()), os.pathsep.join(folders), sessions)
    command = [sys.executable, "-S", "-c", KEEPER, *said, *map(str, pids)]
    keeper = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    atexit.register(_exits, keeper)
    return keeper


def _exits(keeper: "subprocess.Popen[bytes]") -> None:
    """Nobody has killed this process."""
    assert keeper.stdin
    with contextlib.suppress(OSError, ValueError):  # it was told before
        keeper.stdin.write(b"exit")
        keeper.stdin.close()
