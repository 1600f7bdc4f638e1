"""Block `user_runs`: what a user types first: supervised training, then RL from its checkpoint,
with vLLM.

Long enough to see that both learn. The command lines' own checks (sampler against trainer, alarms)
end a run that is wrong.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.checks import Record
from posttrain.tracking.metrics_log import read_metrics

# The warm start and the RL that tests/test_cli.py requires to learn on a CPU.
TASK = "num_digits=1 operators=+- num_test=20"
SFT = "supervised/train_cli.py dataset.n_batches=45 renderer_name=plain learning_rate=2e-3 " + " ".join(
    f"dataset.{option}" for option in TASK.split()
)
RL = (
    "rl/train_cli.py env.n_batches=60 groups_per_batch=32 max_tokens=4 renderer_name=plain learning_rate=3e-4 advantage=rloo "
    + " ".join(f"env.{option}" for option in TASK.split())
)
VLLM = "backend.engine=vllm backend.sampler_memory_gb=1"


@contextmanager
def run_folders(block: str, record: Record | None = None) -> Iterator[Path]:
    """The folder of a block's runs. That of first_light.py is there when the block is started again, or another
    block goes on, until the block whose `record` it is has passed."""
    if not (kept := os.environ.get("BLOCK_RUNS")):
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    yield Path(kept) / block
    if record and record.passed:
        shutil.rmtree(Path(kept) / block)


def run(
    record: Record, name: str, command: str, folder: Path, show: Callable[[Path], None] = lambda folder: None
) -> list[dict[str, Any]]:
    """Its metrics. `show` records figures of the run folder, whenever it has further metrics: a block
    that is killed keeps them. A run that was killed goes on."""
    start, metrics, seen = time.perf_counter(), folder / "metrics.jsonl", 0
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [sys.executable, *command.split(), f"log_path={folder}", "behavior_if_log_dir_exists=resume"],
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        while process.poll() is None:
            time.sleep(0.5)
            if metrics.exists() and seen < (size := metrics.stat().st_size):
                seen = size
                show(folder)
        output.seek(0)
        print(output.read()[-3000:])
    record.figure(f"{name}: s", time.perf_counter() - start)
    record.holds(f"{name}: exit status {process.returncode}", process.returncode == 0)
    if process.returncode:
        return []
    show(folder)
    return read_metrics(folder)


def values(folder: Path, metric: str) -> list[float]:
    """Of the steps that have it, so far."""
    steps = read_metrics(folder) if (folder / "metrics.jsonl").exists() else []
    return [float(f"{step[metric]:.4g}") for step in steps if step.get(metric) is not None]


def main() -> None:
    record = Record()
    small = "" if torch.cuda.is_available() else " max_steps=4"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if steps := run(record, "sft", SFT + small, folder / "sft"):
            record.figure("sft: held-out nll", [step["test/nll"] for step in steps if "test/nll" in step])
        start = f" load_checkpoint_path={folder / 'sft/checkpoints/final'} {VLLM}"
        if steps := run(record, "rl", RL + start + small, folder / "rl"):
            reward = [step["env/all/reward/total"] for step in steps if "env/all/reward/total" in step]
            first, last = sum(reward[:5]) / 5, sum(reward[-5:]) / 5
            record.figure("rl: reward of the first and the last five steps", [first, last])
            if not small:
                record.holds(f"rl: the reward rises to {last:.2f}", last > max(first, 0.9))
            gaps = [step["optim/logprob_gap_mean"] for step in steps if "optim/logprob_gap_mean" in step]
            record.at_most("rl: largest mean |dlogp|", max(gaps), 0.05)
            record.figure(
                "rl: s/step", sorted(step["time/total"] for step in steps if "time/total" in step)[len(steps) // 2]
            )
    record.print()


if __name__ == "__main__":
    main()
