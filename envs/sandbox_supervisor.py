"""The process that runs one program for sandbox.py, started from this file, standard library only.

Root without namespaces ends the program by kill(-1), sent with the program's own user id. Where a
user may make no namespaces, bubblewrap makes them and this file runs again within (`launch`).

    in:   {"program": ..., "stdin": ..., "limits": {...}, "filter": a seccomp filter in base64, or null} on one line;
          then standard input stays open as long as the answer is wanted
    out:  {"outcome": ..., "stdout": ..., "stderr": ..., "isolation": {...}}   or   {"failed": why there is no sandbox}

    supervisor      reads the output, watches the clock; never runs a line of the program
      init          process 1 of a process namespace: at its end the kernel kills every process of the namespace
        program     without privileges
"""

import base64
import contextlib
import ctypes
import errno
import json
import os
import resource
import select
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

NEWNS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 0x1000, 0x4000, 0x40000
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = 442, -100, 0x8000, 1
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
SECCOMP_MODE_FILTER = 2
UIDS = range(61184, 65184)  # the range of systemd's short-lived users
MAX_FILES = 4096
MB = 2**20

libc = ctypes.CDLL(None, use_errno=True)
is_root = os.getuid() == 0
bubblewrap = None if is_root else shutil.which("bwrap", path="/usr/local/bin:/usr/bin:/bin")


def check(result: int, action: str) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{action}: {os.strerror(ctypes.get_errno())}")


def claim_uid() -> tuple[int, socket.socket | None]:
    """A user id that no other sandbox has. The claim is a socket's name, which ends with the
    process.
    """
    if not is_root:
        return os.getuid(), None
    for i in range(len(UIDS)):
        uid = UIDS[(os.getpid() + i) % len(UIDS)]
        claim = socket.socket(socket.AF_UNIX)
        try:
            claim.bind(f"\0cookbook-sandbox-{uid}")
            return uid, claim
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
    raise OSError(errno.EAGAIN, "no free user id")


def enter_process_namespace() -> str:
    """Makes the next child process 1 of a new process namespace.

    Returns "", or the reason of a failure where root or bubblewrap goes on without. Raises OSError.
    """
    uid, gid = os.getuid(), os.getgid()
    try:
        check(libc.unshare(NEWPID if is_root else NEWPID | NEWUSER), "unshare")
    except OSError as error:
        if is_root or bubblewrap:
            return str(error.strerror)
        raise OSError(
            error.errno, f"{error.strerror}; run as root, allow user namespaces, or install bubblewrap"
        ) from error
    if not is_root:  # a user namespace may mount, until the program's exec
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
    return ""


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    check(libc.mount(source.encode(), target.encode(), kind.encode(), flags, options.encode()), f"mount {target}")


def close_off(folder: Path, uid: int, file_mb: int) -> None:
    """No network; files read-only except in folder/work. The interpreter is also at folder/python,
    as its path may be readable by root only.
    """
    check(libc.unshare(NEWNS | NEWIPC | NEWNET), "unshare")
    mount("none", "/", "none", MS_REC | MS_PRIVATE)
    mount(sys.base_prefix, f"{folder}/python", "none", MS_BIND | MS_REC)
    attributes = struct.pack("QQQQ", MOUNT_ATTR_RDONLY, 0, 0, 0)
    check(
        libc.syscall(SYS_MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, attributes, len(attributes)),
        "mount_setattr (Linux 5.12)",
    )
    mount("tmpfs", f"{folder}/work", "tmpfs", MS_NOSUID | MS_NODEV, f"size={file_mb}m,nr_inodes={MAX_FILES},mode=700")
    os.chown(f"{folder}/work", uid, -1)
    mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV)


def become_program(request: dict[str, Any], folder: Path, uid: int, namespaces: bool) -> None:
    """Gives up all privileges and executes the program. Only raises, never returns."""
    os.setsid()
    os.umask(0o022)
    os.chdir(folder / "work")
    Path("program.py").write_text(request["program"], encoding="utf-8", errors="surrogatepass")
    stdin = os.memfd_create("stdin")
    os.write(stdin, request["stdin"].encode(errors="surrogatepass"))
    os.lseek(stdin, 0, os.SEEK_SET)
    os.dup2(stdin, 0)
    set_limits(request["limits"])
    if is_root:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")
    if request["filter"]:
        install_filter(base64.b64decode(request["filter"]))
    python = Path(os.path.realpath(sys.executable))
    prefix = Path(sys.base_prefix)
    if namespaces:
        python, prefix = folder / "python" / python.relative_to(prefix), folder / "python"
    # -P -s is -I but reads these variables. A fixed hash seed makes the order of a set reproducible.
    environment = {
        "HOME": str(folder / "work"),
        "LANG": "C.UTF-8",
        "PYTHONHASHSEED": "0",
        "LD_LIBRARY_PATH": str(prefix / "lib"),
    }
    os.execve(python, [str(python), "-P", "-s", "-S", "program.py"], environment)


def install_filter(instructions: bytes) -> None:
    """Installs it for this process and its children. Raises OSError on a kernel without seccomp."""

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p)]

    buffer = ctypes.create_string_buffer(instructions)
    program = Program(len(instructions) // 8, ctypes.addressof(buffer))
    check(libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0), "seccomp")


def start_in_bubblewrap(request: dict[str, Any], folder: Path, status: int) -> None:
    """Executes bubblewrap with `launch` in it; the request is an unnamed file. Only raises."""
    sent = os.memfd_create("request", 0)
    os.write(sent, json.dumps(request).encode())
    os.lseek(sent, 0, os.SEEK_SET)
    os.set_inheritable(status, True)
    work, size = str(folder / "work"), str(request["limits"]["file_mb"] * MB)
    walls = ["--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL", "--ro-bind", "/", "/"]
    walls += ["--proc", "/proc", "--dev", "/dev", "--size", size, "--tmpfs", work, "--chdir", work, "--clearenv"]
    launch = [sys.executable, "-I", "-S", __file__, "launch", str(folder), str(sent), str(status)]
    os.execv(str(bubblewrap), [str(bubblewrap), *walls, "--", *launch])


def launch(folder: str, sent: str, status: str) -> None:
    """The inner part of `start_in_bubblewrap`. "started" reports that bubblewrap has done its part."""
    request = json.loads(os.fdopen(int(sent)).read())
    os.set_inheritable(int(status), False)  # closed by exec
    os.write(int(status), b"started ")
    become_program(request, Path(folder), os.getuid(), namespaces=False)


def set_limits(limits: dict[str, Any]) -> None:
    for name, soft, hard in (
        # SIGXCPU at the soft limit, SIGKILL at the hard one
        (resource.RLIMIT_CPU, limits["cpu_seconds"], limits["cpu_seconds"] + 1),
        (resource.RLIMIT_AS, limits["memory_mb"] * MB, limits["memory_mb"] * MB),
        (resource.RLIMIT_FSIZE, limits["file_mb"] * MB, limits["file_mb"] * MB),
        (resource.RLIMIT_NOFILE, limits["open_files"], limits["open_files"]),
        (resource.RLIMIT_NPROC, limits["processes"], limits["processes"]),
        (resource.RLIMIT_CORE, 0, 0),
    ):
        resource.setrlimit(name, (soft, hard))


def run_init(request: dict[str, Any], folder: Path, uid: int, namespaces: bool, status: int) -> None:
    """Starts the program, waits for it, reaps other orphans, and writes to `status` how it ended."""
    try:
        check(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")
        if namespaces:
            close_off(folder, uid, request["limits"]["file_mb"])
        program = os.fork()
        if program == 0 and bubblewrap and not namespaces:
            start_in_bubblewrap(request, folder, status)
        if program == 0:
            become_program(request, folder, uid, namespaces)
        while (ended := os.wait())[0] != program:
            pass
        code = os.waitstatus_to_exitcode(ended[1])
        os.write(status, f"exit {code}".encode())
    except OSError as error:
        hint = "; the interpreter must be readable for every user" if isinstance(error, PermissionError) else ""
        os.write(status, f"failed {error.strerror} {error.filename or ''}{hint}\n".encode())
    finally:
        os._exit(0)


def watch(limits: dict[str, Any], stdout: int, stderr: int, status: int) -> tuple[str, dict[int, bytearray]]:
    """Reads until init ends or a limit is met. Returns that outcome or "", and the output by pipe."""
    deadline = time.monotonic() + limits["wall_seconds"]
    read = {fd: bytearray() for fd in (stdout, stderr, status)}
    unread = set(read)
    while status in unread:
        ready, _, _ = select.select([0, *unread], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return "timeout", read
        if 0 in ready:
            raise SystemExit("the trainer has closed the connection")
        for fd in ready:
            read[fd] += (chunk := os.read(fd, 1 << 16))
            unread -= set() if chunk else {fd}
        if max(len(read[stdout]), len(read[stderr])) > limits["output_kb"] * 1024:
            return "output_limit", read
    return "", read


def drain(fd: int, read: bytearray, limit: int) -> None:
    """Reads the output that killed processes left in a pipe."""
    while len(read) <= limit and select.select([fd], [], [], 0)[0] and (chunk := os.read(fd, 1 << 16)):
        read += chunk


def kill_all(init: int, uid: int, namespaces: bool) -> None:
    os.kill(init, signal.SIGKILL)
    os.waitpid(init, 0)  # in a namespace: returns when all its processes are dead
    if is_root and not namespaces:  # bubblewrap dies with init, and its namespace with it
        if (killer := os.fork()) == 0:
            with contextlib.suppress(ProcessLookupError):
                os.setresuid(uid, uid, uid)
                os.kill(-1, signal.SIGKILL)
            os._exit(0)
        os.waitpid(killer, 0)


def outcome_of(code: int, stderr: str) -> str:
    if code == -signal.SIGXCPU:
        return "timeout"
    if code < 0:
        return "killed"
    if code == 0:
        return "passed"
    return "memory" if stderr.rstrip().rsplit("\n", 1)[-1].startswith("MemoryError") else "error"


def supervise(request: dict[str, Any], folder: Path, uid: int) -> dict[str, Any]:
    why_not = enter_process_namespace()
    namespaces, limits = not why_not, request["limits"]
    pipes = [os.pipe() for _ in range(3)]
    stdout, stderr, status = (reader for reader, _ in pipes)
    if (init := os.fork()) == 0:
        os.dup2(pipes[0][1], 1)
        os.dup2(pipes[1][1], 2)
        run_init(request, folder, uid, namespaces, pipes[2][1])
    for _, writer in pipes:
        os.close(writer)
    try:
        outcome, read = watch(limits, stdout, stderr, status)
    finally:
        kill_all(init, uid, namespaces)
    size = limits["output_kb"] * 1024
    for fd in (stdout, stderr):
        drain(fd, read[fd], size)
    if max(len(read[stdout]), len(read[stderr])) > size:
        outcome = "output_limit"
    texts = {name: read[fd][:size].decode(errors="replace") for name, fd in (("stdout", stdout), ("stderr", stderr))}
    wrapped = bool(bubblewrap and not namespaces)
    report = read[status].decode().partition("\n")[0]
    started = report.startswith("started ")
    word, _, rest = report.removeprefix("started ").partition(" ")
    if word == "failed":
        return {"failed": rest}
    if wrapped and word and not started:
        return {"failed": f"bubblewrap: {texts['stderr'].strip()}"}
    code = int(rest) if word else -signal.SIGKILL
    if wrapped and code > 128:  # as a shell, bubblewrap reports a signal so
        code = 128 - code
    outcome = outcome or outcome_of(code, texts["stderr"])
    isolation = {
        "namespaces": namespaces or wrapped,
        "root": is_root,
        "why_not": why_not,
        "filtered": bool(request["filter"]),
    }
    return {"outcome": outcome, **texts, "isolation": isolation}


def main() -> None:
    request = json.loads(sys.stdin.buffer.readline())
    uid, claim = claim_uid()
    folder = Path(tempfile.mkdtemp(prefix="sandbox-"))
    try:
        folder.chmod(0o711)
        (folder / "python").mkdir()
        (folder / "work").mkdir(mode=0o700)
        os.chown(folder / "work", uid, -1)
        reply = supervise(request, folder, uid)
    except OSError as error:
        reply = {"failed": str(error.strerror)}
    finally:
        os.rmdir(folder / "python")  # not rmtree: fails if the interpreter is still mounted there
        shutil.rmtree(folder)
    print(json.dumps(reply))
    del claim  # kept until here


if __name__ == "__main__":
    if sys.argv[1:2] == ["launch"]:
        launch(*sys.argv[2:])
    main()
