"""Runs killed at random moments, or interrupted, and resumed, end as an uninterrupted run does: same weights, same metrics, bit for bit."""

# Trap: `types.py` in a script's folder shadowing the standard library's.

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from posttrain.tracking.metrics_log import read_metrics
from tests.conftest import ROOT

SFT = [
    "supervised/train_cli.py",
    "dataset.n_batches=40",
    "batch_size=32",
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


def command(arguments: list[str], folder: Path) -> list[str]:
    return [sys.executable, *arguments, "renderer_name=plain", f"log_path={folder}", "behavior_if_log_dir_exists=resume"]


def start(arguments: list[str], folder: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(command(arguments, folder), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(arguments: list[str], folder: Path) -> str:
    process = start(arguments, folder)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    return output


def steps_logged(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return len(file.read_bytes().splitlines()) if file.exists() else 0


def outcome(folder: Path) -> tuple[dict, list]:
    """Final weights and optimizer, and all metrics but the times."""
    final = folder / "checkpoints" / "final"
    tensors = load_file(final / "model.safetensors") | load_file(final / "training_state" / "optimizer.safetensors")
    metrics = [{k: v for k, v in record.items() if not k.startswith("time/")} for record in read_metrics(folder)]
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}, metrics


def kill_at(arguments: list[str], folder: Path, step: int, delay: float) -> None:
    """SIGKILL `delay` seconds after `step` records were logged: somewhere within a later step or a checkpoint."""
    process = start(arguments, folder)
    while steps_logged(folder) < step and process.poll() is None:
        time.sleep(0.005)
    time.sleep(delay)
    process.kill()
    process.communicate()


# Trap: a resumed run that is another run.
@pytest.mark.cpu_only
@pytest.mark.parametrize(
    ("arguments", "engine", "kills"), [(SFT, "torch", 5), (RL, "torch", 5), (RL, "vllm", 1)], ids=["sft", "rl-torch", "rl-vllm"]
)
def test_killed_and_resumed_equals_uninterrupted(arguments: list[str], engine: str, kills: int, tmp_path: Path) -> None:
    arguments = [*arguments, f"backend.engine={engine}"]
    finish(arguments, tmp_path / "whole")
    rng = random.Random(0)
    for kill in range(kills):
        total = steps_logged(tmp_path / "whole")
        kill_at(arguments, tmp_path / "killed", int(total * (kill + rng.random()) / kills), 0.1 * rng.random())
    output = finish(arguments, tmp_path / "killed")
    assert "resuming" in output
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
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "its state is saved" in output, output
    children = subprocess.run(["ps", "--ppid", str(process.pid), "-o", "pid="], capture_output=True, text=True).stdout
    assert not children.strip() and not Path(f"/proc/{process.pid}").exists()
    logged = steps_logged(tmp_path)
    assert f"at step {logged}" in finish(arguments, tmp_path)
    assert steps_logged(tmp_path) == 31 and os.path.exists(tmp_path / "plots" / "run.png")
