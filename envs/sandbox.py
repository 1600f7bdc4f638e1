"""Runs a program that nobody has read, and says how it ended: the trainer's half. The other half is
sandbox_supervisor.py.

Every run has a supervisor process of its own, and under it a fresh Python interpreter with an empty
environment, a session and a folder of its own, the standard library and no other package. What
holds a program (Linux only):

    always        no privileges to gain; limits on CPU time, wall time, memory, processes, threads, files and output; when the run
                  ends, every process that it left is killed, wherever it has hidden
    filter        on x86_64 and aarch64 the system calls of sandbox_filter.py are refused: memory that no limit counts, namespaces
                  and mounts of the program's own, sockets beside Unix and IP
    namespaces    no network; no sight of other processes, so none to signal or to read the environment of; a file system that is
                  read-only but for its own folder, which is in memory and small
    as root       a user id that nothing else has

Who is not root needs user namespaces, or bubblewrap installed where the machine allows only
programs of its own to make them, and is refused without. Root in a container that forbids
namespaces goes without them. `Isolation` says which it is.

What this does NOT protect from:
* an adversary, or a hole in the kernel: this is a seat belt against what a policy may write, not a
  prison. No VM, and the filter
  refuses some calls and allows all others;
* reading: any file that every user may read, data sets and their answers among them; where the
  trainer is not root, any file of
  its user, keys too. Sockets that are files can be connected to with the same rights;
* load: up to `processes` cores and `processes * memory_mb` of memory for `wall_seconds`. Memory is
  limited per process (no cgroup);
* a program that looks for its own checks: an assert test runs in the interpreter of the program it
  judges, which can find it there
  and forge success. A test of standard output cannot be forged: its answer never enters the
  sandbox.
Without namespaces also: the network; files left in world-writable folders (/dev/shm is memory), as
many as they hold. Without the filter (other processors): System V shared memory and memfd, which no
limit counts; without both, a segment outlives the run.
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

# wrong is the judge's word; the sandbox itself says how the program ended. killed: by a signal.
# error: exit status other than 0.
Outcome = Literal["passed", "wrong", "error", "timeout", "memory", "output_limit", "killed"]
SUPERVISOR = Path(__file__).with_name("sandbox_supervisor.py")
STARTS = "open('f', 'w').write('2')\nprint(int(input()) + int(open('f').read()))\n"
GRACE_SECONDS = 30.0  # a supervisor that takes this much longer than the program may is broken
MAX_CONCURRENT = max(2, os.cpu_count() or 1)  # programs running at once, for each event loop


class SandboxError(RolloutError):
    """The sandbox itself failed, or is not to be had on this machine: nothing is known of the
    program.
    """


@chz.chz
class SandboxLimits:
    """What one run of a program may use."""

    cpu_seconds: int = chz.field(default=5, validator=COUNT, doc="CPU time of one process")
    wall_seconds: float = chz.field(
        default=10.0, validator=POSITIVE, doc="time by the clock; it does not include waiting for a free place"
    )
    memory_mb: int = chz.field(default=512, validator=COUNT, doc="address space of one process")
    processes: int = chz.field(default=16, validator=COUNT, doc="processes and threads at once")
    file_mb: int = chz.field(
        default=16, validator=COUNT, doc="size of a file, and of all files together where namespaces are to be had"
    )
    open_files: int = chz.field(default=64, validator=COUNT, doc="open files of one process")
    output_kb: int = chz.field(
        default=64, validator=COUNT, doc="standard output, and standard error; at one more byte the program is killed"
    )


@dataclass(frozen=True)
class Isolation:
    """What holds the programs on this machine."""

    namespaces: bool
    root: bool
    why_not: str = ""  # why there are no namespaces, or why bubblewrap had to make them
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
    """How a program ended. "passed" says no more than that its exit status was 0."""

    outcome: Outcome
    stdout: str
    stderr: str
    isolation: Isolation


async def run_program(program: str, stdin: str = "", limits: SandboxLimits | None = None) -> Run:
    """Runs Python source. Waits while MAX_CONCURRENT others run. Raises SandboxError where the
    sandbox is at fault.
    """
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
    """Runs a program that computes nothing. ConfigError where it does not end well: then no program
    would, and every reward be 0.
    """
    run = await run_program(STARTS, "2", limits)
    if (run.outcome, run.stdout.strip()) != ("passed", "4"):
        said = run.stderr.strip().rsplit("\n", 1)[-1][:200]
        raise ConfigError(
            "under these limits not even a program of two lines runs; it ended with "
            f"{run.outcome}{said and ': ' + said}: raise them "
            f"({', '.join(f'{name}={value}' for name, value in chz.asdict(limits).items())})"
        )
    return run.isolation


async def _supervised(request: dict[str, Any], seconds: float) -> dict[str, Any]:
    """The supervisor's reply. It ends its program and itself when its standard input closes, so
    nothing is left after a cancellation.
    """
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
