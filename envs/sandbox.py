"""Runs an untrusted program (Linux) and reports how it ended; the other half is
sandbox_supervisor.py.

Every run has its own supervisor process and a fresh Python interpreter: standard library only,
empty environment, its own session and folder. Users other than root need user namespaces or
bubblewrap; root in a container without namespaces runs without them. `Isolation` reports the case.

    always        no privileges to gain; limits on CPU time, wall time, memory, processes, threads, files and output;
                  every process that is left at the end is killed
    filter        x86_64 and aarch64: the system calls of sandbox_filter.py are refused
    namespaces    no network; no sight of other processes; a read-only file system but for the program's own folder,
                  which is small and in memory
    root          a user id of its own
"""

import asyncio
import base64
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from weakref import WeakKeyDictionary

import chz

from envs.sandbox_filter import seccomp_filter
from posttrain.backend.errors import ConfigError
from posttrain.backend.ranges import COUNT, POSITIVE
from rl.types import RolloutError

# "wrong" comes from a test, the rest from the sandbox. killed: by a signal; error: exit status not 0.
Outcome = Literal["passed", "wrong", "error", "timeout", "memory", "output_limit", "killed"]
SUPERVISOR = Path(__file__).with_name("sandbox_supervisor.py")
STARTS = "open('f', 'w').write('2')\nprint(int(input()) + int(open('f').read()))\n"
GRACE_SECONDS = 30.0  # time for the supervisor beyond that of the program
MAX_CONCURRENT = max(2, os.cpu_count() or 1)  # programs running at once, for each event loop


class SandboxError(RolloutError):
    """The sandbox failed or is not available on this machine: nothing is known of the program."""


@chz.chz
class SandboxLimits:
    """Limits of one run of a program."""

    cpu_seconds: int = chz.field(default=5, validator=COUNT, doc="CPU time of one process")
    wall_seconds: float = chz.field(
        default=10.0, validator=POSITIVE, doc="time by the clock, without waiting for a free place"
    )
    memory_mb: int = chz.field(default=512, validator=COUNT, doc="address space of one process")
    processes: int = chz.field(default=16, validator=COUNT, doc="processes and threads at once")
    file_mb: int = chz.field(default=16, validator=COUNT, doc="size of a file; with namespaces, of all files together")
    open_files: int = chz.field(default=64, validator=COUNT, doc="open files of one process")
    output_kb: int = chz.field(
        default=64,
        validator=COUNT,
        doc="most standard output, and most standard error; one more byte kills the program",
    )


@dataclass(frozen=True)
class Isolation:
    """The protections on this machine. They do NOT protect from:

    * An adversary, or a hole in the kernel: no VM, and the filter allows all calls it does not
      list.
    * Reading: any file that every user may read; where the trainer is not root, any file of its
      user, keys too. Sockets that are files can be connected to with the same rights.
    * Load: up to `processes` cores and `processes * memory_mb` of memory (no cgroup) for
      `wall_seconds`.
    * Forgery: an assert test runs in the program's interpreter, which can forge success. A test of
      standard output cannot be forged: its answer never enters the sandbox.
    * Without namespaces: the network; files left in world-writable folders (/dev/shm is memory).
    * Without the filter (other processors): System V shared memory and memfd, which no limit
      counts. Without both, a segment outlives the run.
    """

    namespaces: bool
    root: bool
    why_not: str = ""  # reason for no namespaces, or for bubblewrap
    filtered: bool = True

    def __str__(self) -> str:
        unfiltered = (
            ""
            if self.filtered
            else "; no filter of system calls for this processor: memory can be had beyond its limit"
        )
        if self.namespaces:
            return ("own user, " if self.root else "") + "no network, own processes, read-only files" + unfiltered
        return f"own user only: network and world-writable folders are in reach ({self.why_not})" + unfiltered


@dataclass(frozen=True)
class Run:
    """How a program ended. "passed": its exit status was 0."""

    outcome: Outcome
    stdout: str
    stderr: str
    isolation: Isolation


async def run_program(program: str, stdin: str = "", limits: SandboxLimits | None = None) -> Run:
    """Runs Python source once fewer than MAX_CONCURRENT programs run. Raises SandboxError."""
    limits = limits or SandboxLimits()
    instructions = seccomp_filter()
    encoded = base64.b64encode(instructions).decode() if instructions else None
    request = {"program": program, "stdin": stdin, "limits": chz.asdict(limits), "filter": encoded}
    async with _places():
        reply = await _supervised(request, limits.wall_seconds + GRACE_SECONDS)
    if "failed" in reply:
        raise SandboxError(f"no sandbox on this machine: {reply['failed']}")
    return Run(reply["outcome"], reply["stdout"], reply["stderr"], Isolation(**reply["isolation"]))


async def check_limits(limits: SandboxLimits) -> Isolation:
    """Runs a trivial program. ConfigError if it fails: every program would, with reward 0."""
    run = await run_program(STARTS, "2", limits)
    if (run.outcome, run.stdout.strip()) != ("passed", "4"):
        last_line = run.stderr.strip().rsplit("\n", 1)[-1][:200]
        raise ConfigError(
            f"a trivial program fails under these limits with {run.outcome}{last_line and ': ' + last_line}: raise them "
            f"({', '.join(f'{name}={value}' for name, value in chz.asdict(limits).items())})"
        )
    return run.isolation


async def _supervised(request: dict[str, Any], seconds: float) -> dict[str, Any]:
    """The supervisor's reply. It ends the program and itself when its standard input closes."""
    pipe = asyncio.subprocess.PIPE
    supervisor = await asyncio.create_subprocess_exec(
        sys.executable,
        "-I",
        "-S",
        str(SUPERVISOR),
        stdin=pipe,
        stdout=pipe,
        stderr=asyncio.subprocess.STDOUT,
        env={},
        cwd="/",
        start_new_session=True,
    )
    assert supervisor.stdin and supervisor.stdout
    try:
        supervisor.stdin.write(json.dumps(request).encode() + b"\n")
        async with asyncio.timeout(seconds):
            text = (await supervisor.stdout.read()).decode(errors="replace")
    except TimeoutError as error:
        supervisor.kill()
        raise SandboxError(f"the sandbox did not answer in {seconds:g} s") from error
    finally:
        supervisor.stdin.close()
        await supervisor.wait()
    try:
        return json.loads(text)
    except ValueError as error:
        raise SandboxError(f"the sandbox crashed: {text.strip()[-500:] or f'exit {supervisor.returncode}'}") from error


_PLACES: "WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore]" = WeakKeyDictionary()


def _places() -> asyncio.Semaphore:
    """A semaphore belongs to the event loop that first waits for it."""
    return _PLACES.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(MAX_CONCURRENT))
