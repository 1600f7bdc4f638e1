"""Runs killed at the worst moments, or interrupted, and resumed, end as an uninterrupted run does:
same weights, same metrics, bit for bit.
"""

# Trap: `types.py` in a script's folder shadowing the standard library's.

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.commands import Command, run
from tests.finished_runs import outcome, steps_logged

SFT = [
    "supervised/train_cli.py",
    "dataset.n_batches=20",
    "batch_size=16",
    "num_epochs=2",
    "dataset.num_test=20",
    "eval_every=10",
    "save_every=5",
]
RL = [
    "rl/train_cli.py",
    "env.n_batches=30",
    "group_size=4",
    "groups_per_batch=8",
    "env.num_test=20",
    "max_tokens=8",
    "eval_every=10",
    "save_every=3",
]


def start(arguments: list[str], folder: Path, killed_at: tuple[str, int] | None = None) -> Command:
    options = ["renderer_name=plain", f"log_path={folder}", "behavior_if_log_dir_exists=resume"]
    return Command(*arguments, *options, killed_at=killed_at)


def finish(arguments: list[str], folder: Path) -> str:
    process = start(arguments, folder)
    assert process.wait() == 0, process.output()
    return process.output()


def kill_at(arguments: list[str], folder: Path, file: str, count: int) -> None:
    """SIGKILL as the command is about to open the file for that time."""
    process = start(arguments, folder, killed_at=(file, count))
    assert process.wait() == -signal.SIGKILL, process.output()


# Between a step and its line in the log; within a checkpoint; between a checkpoint and its line in
# the record.
KILLS = (("metrics.jsonl", 12), ("training_state.json", 4), ("checkpoints.jsonl", 12))


# Trap: a resumed run that is another run.
@pytest.mark.cpu_only
@pytest.mark.parametrize(
    ("arguments", "engine", "kills"),
    [
        pytest.param(SFT, "torch", KILLS, id="sft"),
        pytest.param(RL, "torch", KILLS[:2], id="rl-torch"),
        pytest.param(RL, "vllm", KILLS[:1], id="rl-vllm", marks=[pytest.mark.slow, pytest.mark.needs_vllm]),
    ],
)
def test_killed_and_resumed_equals_uninterrupted(
    arguments: list[str], engine: str, kills: Sequence[tuple[str, int]], tmp_path: Path
) -> None:
    arguments = [*arguments, f"backend.engine={engine}"]
    whole = start(arguments, tmp_path / "whole")
    for file, count in kills:
        kill_at(arguments, tmp_path / "killed", file, count)
    output = finish(arguments, tmp_path / "killed")
    assert "resuming" in output and whole.wait() == 0
    assert "ERROR" not in output + whole.output()  # of a library, in a run that is well
    (weights, metrics), (weights_whole, metrics_whole) = outcome(tmp_path / "killed"), outcome(tmp_path / "whole")
    assert metrics == metrics_whole
    assert weights == weights_whole


# Trap: orphan processes after Ctrl-C.
def test_ctrl_c_saves_the_step_and_leaves_no_process(tmp_path: Path) -> None:
    arguments = [*RL, "backend.engine=torch", "save_every=0"]
    process = start(arguments, tmp_path)
    while steps_logged(tmp_path) < 7 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130 and "its state is saved" in process.output(), process.output()
    children = subprocess.run(["ps", "--ppid", str(process.pid), "-o", "pid="], capture_output=True, text=True).stdout
    assert not children.strip() and not Path(f"/proc/{process.pid}").exists()
    logged = steps_logged(tmp_path)
    resuming = shlex.split(process.output().partition("to continue, run: ")[2].partition("\n")[0])
    done = run(*resuming[1:])
    assert done.returncode == 0 and f"at step {logged}" in done.stdout, (resuming, done.stderr)
    assert steps_logged(tmp_path) == 31 and os.path.exists(tmp_path / "plots" / "run.png")
