"""Block `user_runs`: what a user types first: supervised training, then RL from its checkpoint,
with vLLM.

Long enough to see that both learn. The command lines' own checks (sampler against trainer, alarms)
end a run that is wrong.
"""

import subprocess
import sys
import tempfile
import time
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


def run(record: Record, name: str, command: str, folder: Path) -> list[dict[str, Any]]:
    start = time.perf_counter()
    ended = subprocess.run([sys.executable, *command.split(), f"log_path={folder}"], capture_output=True, text=True)
    record.figure(f"{name}: s", time.perf_counter() - start)
    print(ended.stdout[-3000:], ended.stderr[-3000:])
    record.holds(f"{name}: exit status {ended.returncode}", ended.returncode == 0)
    return read_metrics(folder) if ended.returncode == 0 else []


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
