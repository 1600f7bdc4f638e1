"""One process per run folder, and what asks a run to save and stop: signals, a closed terminal, a
reader of its output that has gone.
"""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import chz
import pytest

from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import ConfigError, TrainerLostError
from posttrain.tracking import how_to_resume
from posttrain.tracking.command_line import run_command
from posttrain.tracking.metrics_log import read_metrics
from posttrain.tracking.one_line_errors import one_line_errors
from posttrain.tracking.run_folder import BehaviorIfExists, open_run_folder
from posttrain.tracking.stop_request import StopRequest
from posttrain.tracking.trainer_restarts import with_restarts
from tests.conftest import ROOT
from tests.processes import PATIENCE

ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}


def holder(folder: Path, then: str) -> "subprocess.Popen[str]":
    """A process that opens the run folder, says so, and does `then`."""
    script = textwrap.dedent(f"""
        import os, signal, subprocess, sys, time
        from posttrain.tracking.run_folder import open_run_folder
        run = open_run_folder({str(folder)!r}, "resume", {{}})
    """)
    process = subprocess.Popen(
        [sys.executable, "-c", script + then], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    assert process.stdout is not None
    process.child = int(process.stdout.readline())  # type: ignore[attr-defined]
    return process


# Trap: two processes in one run folder.
def test_a_second_process_is_told_who_has_the_folder(tmp_path: Path) -> None:
    process = holder(tmp_path / "run", "print(0, flush=True); time.sleep(600)")
    with pytest.raises(ConfigError) as refused:
        open_run_folder(tmp_path / "run", "delete", {})
    text = str(refused.value)
    assert (
        f"in use by process {process.pid} on {os.uname().nodename} since 2" in text
        and "choose another log_path" in text
    )
    process.kill()
    process.wait()
    run = open_run_folder(tmp_path / "run", "resume", {})  # the kernel gave it back
    assert run.lock is not None and str(os.getpid()) in run.lock.file.read_text()
    open_run_folder(tmp_path / "run", "delete", {})  # the same process may open it again
    del run
    # and lets go of what it no longer uses
    assert holder(tmp_path / "run", "print(0, flush=True)").wait() == 0


CHILDREN = {
    "forked": "if os.fork(): os._exit(0)\nprint(os.getpid(), flush=True)\ntime.sleep(600)",
    "executed": "child = subprocess.Popen(['sleep', '600'], stdout=subprocess.DEVNULL).pid\nprint(child, "
    "flush=True)\nos._exit(0)",
    "with its descriptors": "child = subprocess.Popen(['sleep', '600'], stdout=subprocess.DEVNULL, "
    "close_fds=False).pid\n"
    "print(child, flush=True)\nos._exit(0)",
}


# Trap: a lock kept by a child.
@pytest.mark.parametrize("kind", CHILDREN)
def test_a_child_that_outlives_the_run_does_not_keep_the_lock(kind: str, tmp_path: Path) -> None:
    process = holder(tmp_path / "run", CHILDREN[kind])
    child = process.child  # type: ignore[attr-defined]
    process.wait()
    try:
        os.kill(child, 0)  # it is alive
        open_run_folder(tmp_path / "run", "resume", {})
    finally:
        os.kill(child, signal.SIGKILL)


@pytest.fixture
def terminal() -> Iterator[None]:
    """SIGHUP as it is in a terminal; under `nohup pytest` it would be ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize(
    ("signals", "at_once"),
    [
        ([signal.SIGINT], False),
        ([signal.SIGTERM], False),
        ([signal.SIGHUP], False),
        # a closed terminal: from the kernel and from the shell
        ([signal.SIGHUP, signal.SIGHUP], False),
        ([signal.SIGHUP, signal.SIGTERM], True),
        ([signal.SIGINT, signal.SIGINT], True),
    ],
)
def test_signals_ask_for_a_stop_and_a_second_one_stops_at_once(signals: list[int], at_once: bool) -> None:
    stopped_at_once = False
    with StopRequest() as stop:
        assert not stop
        try:
            for number in signals:
                os.kill(os.getpid(), number)
                time.sleep(0.01)
        except KeyboardInterrupt:
            stopped_at_once = True
        assert stop
    assert stopped_at_once == at_once


def test_nohup_holds() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_output_that_nobody_reads_asks_for_a_stop_and_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    with open(writing, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        with StopRequest() as stop:
            print("step 1", flush=True)
            os.close(reading)
            assert not stop
            print("step 2", flush=True)
            assert stop
            print("step 3", flush=True)
        print("the table at the end", flush=True)


def test_an_output_that_was_closed_before_the_run_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        with pytest.raises(SystemExit) as left, one_line_errors():
            print("4 examples", flush=True)
        assert left.value.code == 141


def close_terminal(process: "subprocess.Popen[bytes]") -> None:
    process.send_signal(signal.SIGHUP)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    process.stderr.close()


def close_output(process: "subprocess.Popen[bytes]") -> None:
    assert process.stdout is not None
    process.stdout.close()


# Trap: a step lost to a closed terminal or output.
@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize("end", [close_terminal, pytest.param(close_output, marks=pytest.mark.slow)])
def test_a_run_whose_terminal_or_reader_goes_away_saves_its_step(end: Callable, tmp_path: Path) -> None:
    options = [
        "dataset.n_batches=100000",
        "batch_size=4",
        "model_name=micro",
        "eval_every=0",
        "save_every=0",
        f"log_path={tmp_path}",
    ]
    script = textwrap.dedent("""
        import sys, posttrain.tracking.progress
        posttrain.tracking.progress.SECONDS_BETWEEN_LINES = 0.0
        from supervised.train_cli import main
        main()
    """)
    command = [sys.executable, "-c", script, *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT)
    while process.poll() is None and not ((tmp_path / "metrics.jsonl").exists() and len(read_metrics(tmp_path)) >= 3):
        time.sleep(0.02)
    end(process)
    assert process.wait(PATIENCE) == 130
    logged = len(read_metrics(tmp_path))
    assert logged < 100_000 and (tmp_path / "checkpoints" / f"{logged:06d}" / "model.safetensors").exists()


@chz.chz
class Recipe:
    """Resumes by itself."""

    seed: int = 0
    backend: BackendConfig = chz.field(default_factory=BackendConfig)


@chz.chz
class Command(Recipe):
    behavior_if_log_dir_exists: BehaviorIfExists = "delete"


@pytest.mark.parametrize(
    ("config_class", "given", "option"),
    [
        (Command, ["behavior_if_log_dir_exists=delete", "seed=1"], " behavior_if_log_dir_exists=resume"),
        (Command, ["seed=1"], " behavior_if_log_dir_exists=resume"),
        (Recipe, ["seed=1"], ""),
    ],
)
def test_a_stopped_command_says_the_line_that_continues_it(
    config_class: type, given: list[str], option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Whoever typed `make demo` does not know it, and recipes that resume by themselves refuse the option."""
    monkeypatch.setattr(how_to_resume, "_options", None)
    assert "the same program with behavior_if_log_dir_exists=resume" in how_to_resume.how_to_resume()
    monkeypatch.setattr(sys, "orig_argv", ["my python", "-u", "recipes/demo.py", *given])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    monkeypatch.setattr(sys, "argv", ["recipes/demo.py", *given])

    @with_restarts
    async def main(config: Recipe) -> None:
        raise TrainerLostError("a training process has died")

    with pytest.raises(SystemExit):
        run_command(main, config_class)
    assert f"(to continue, run: 'my python' recipes/demo.py seed=1{option})" in capsys.readouterr().err


@pytest.mark.parametrize("lost", [False, True])
def test_ctrl_c_ends_a_command_that_opens_a_model(lost: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """asyncio would wait for the next `await`, which comes when the model is open; where Python drops what a
    weak reference's callback raises, it still does."""
    monkeypatch.setattr(sys, "argv", ["recipes/demo.py"])
    opened: list[bool] = []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a script starts with &

    async def main(config: Recipe) -> None:
        with suppress(*[KeyboardInterrupt] * lost):
            signal.raise_signal(signal.SIGINT)
        if not lost:
            opened.append(True)
        await asyncio.sleep(0)
        opened.append(True)

    try:
        with pytest.raises(SystemExit) as end:
            run_command(main, Recipe)
        assert end.value.code == 130 and not opened
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
