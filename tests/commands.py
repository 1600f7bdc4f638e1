"""Commands in processes that have torch, transformers and the loops imported already: forked by
multiprocessing's fork server.

A command is what stands after `python`: a file, `-m module` or `-c code`, and arguments. The pictures
of a run are built and not rendered, unless `rendered`. Left out: vLLM, which it imports itself.
"""

import atexit
import importlib
import itertools
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

from huggingface_hub import constants

from posttrain.tracking import plots, timeline
from tests.heap import freeze_for_good
from tests.processes import PATIENCE, actors

ROOT = Path(__file__).resolve().parents[1]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "posttrain.backend.trainer",
        "posttrain.backend.torch_sampler",
        "peft",
        "rl.train",
        "supervised.train",
        "preference.train_dpo",
        "posttrain.tracking.plots",
        "matplotlib.backends.backend_agg",
    ]
)


@dataclass(frozen=True)
class _Request:
    command: list[str]
    cwd: str
    environment: dict[str, str]
    files: tuple[str, str, str]  # standard input, output and error
    killed_at: tuple[str, int] | None
    kills: tuple[str, str, int] | None
    rendered: bool


class Command:
    """A command under way. Its output goes to files, so that it never waits for a reader.

    `killed_at=(name, n)`: SIGKILL comes when it is about to open a file of that name for the nth
    time. `kills=(kind, name, n)`: then it comes to its oldest actor of that kind.
    """

    def __init__(
        self,
        *command: str | Path,
        cwd: Path = ROOT,
        env: dict[str, str] | None = None,
        typed: str = "",
        killed_at: tuple[str, int] | None = None,
        kills: tuple[str, str, int] | None = None,
        rendered: bool = False,
    ):
        self._folder = tempfile.TemporaryDirectory()
        files = [Path(self._folder.name, name) for name in ("in", "out", "err")]
        files[0].write_text(typed)
        self._out, self._err = files[1:]
        names = (str(files[0]), str(files[1]), str(files[2]))
        words, environment = [str(part) for part in command], os.environ | (env or {})
        request = _Request(words, str(cwd), environment, names, killed_at, kills, rendered)
        self._process = CONTEXT.Process(target=_run, args=(request,))
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self) -> int:
        self._process.join(PATIENCE)
        if self._process.exitcode is None:
            self.kill()
            raise TimeoutError(f"still running after {PATIENCE:.0f} s: {self.output()[-2000:]}")
        return self._process.exitcode

    def output(self) -> str:
        """Standard output, then standard error, so far."""
        return "".join(file.read_text() for file in (self._out, self._err) if file.exists())

    def completed(self) -> "CompletedProcess[str]":
        """After its end: as `subprocess.run` gives it."""
        status = self.wait()
        return CompletedProcess([], status, self._out.read_text(), self._err.read_text())


def run(
    *command: str | Path, cwd: Path = ROOT, env: dict[str, str] | None = None, typed: str = "", rendered: bool = False
) -> "CompletedProcess[str]":
    return Command(*command, cwd=cwd, env=env, typed=typed, rendered=rendered).completed()


def _run(request: _Request) -> None:
    """In the new process: becomes the command, and ends as the interpreter would."""
    freeze_for_good()
    for number, (name, flags) in enumerate(
        zip(request.files, (os.O_RDONLY, *[os.O_WRONLY | os.O_CREAT] * 2), strict=True)
    ):
        os.dup2(os.open(name, flags, 0o644), number)
    sys.stdin, sys.stdout, sys.stderr = (open(n, "r" if n == 0 else "w") for n in range(3))  # noqa: SIM115
    os.chdir(request.cwd)
    os.environ.clear()
    os.environ.update(request.environment)
    importlib.reload(constants)  # of the hub's address and cache, which the fork server has imported
    kind, *arguments = request.command
    path = [str(Path(request.cwd, kind).parent) if kind.endswith(".py") else request.cwd]
    sys.path[:] = [*path, *filter(None, request.environment.get("PYTHONPATH", "").split(os.pathsep)), *sys.path[1:]]
    sys.modules.pop("__mp_main__", None)
    if not request.rendered:
        plots.save_figure = timeline.save_figure = _save_nothing
    if request.killed_at:
        _kill_at(*request.killed_at, os.getpid)
    if request.kills:
        whom, name, number = request.kills
        _kill_at(name, number, lambda: actors(whom)[0])
    status: Any = 0
    try:
        if kind == "-m":
            sys.argv[:] = arguments
            runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        elif kind == "-c":
            sys.argv[:] = ["-c", *arguments[1:]]
            exec(compile(arguments[0], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv[:] = request.command
            runpy.run_path(kind, run_name="__main__")
    except SystemExit as end:
        status = end.code
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        status = 1
    if isinstance(status, str):
        print(status, file=sys.stderr)
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status if isinstance(status, int) else int(status is not None))


def _save_nothing(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def _kill_at(name: str, count: int, whom: Callable[[], int]) -> None:
    opened = itertools.count(1)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and str(arguments[0]).endswith(name) and next(opened) == count:
            os.kill(whom(), signal.SIGKILL)

    sys.addaudithook(hook)
