"""Block `learning`: 85M weights learn sums of two digits, by a supervised run that ends early, then by
RL with vLLM to an accuracy on held-out sums that the start does not have.

On a CPU: a few steps of `tiny`.
"""

import tempfile
from pathlib import Path

import torch

from benchmarks.gpu.checks import Record
from benchmarks.gpu.user_runs import run

CUDA = torch.cuda.is_available()
MODEL = "renderer_name=plain model_name=" + ("gpt2-small" if CUDA else "tiny")
SFT = f"supervised/train_cli.py dataset=arithmetic {MODEL} dataset.batch_size=128 dataset.n_batches=1000 " + (
    "stop_at_nll=0.3 learning_rate=3e-4" if CUDA else "max_steps=4 learning_rate=2e-3"
)
RL = f"rl/train_cli.py env=arithmetic {MODEL} env.group_size=8 backend.engine=vllm lr_schedule=linear " + (
    "env.batch_size=64 env.n_batches=300 eval_every=50 learning_rate=5e-5 backend.sampler_memory_gb=4"
    if CUDA
    else "env.batch_size=8 env.n_batches=4 env.num_test=20 eval_every=2 backend.sampler_memory_gb=0.25"
)
RISE = 0.2  # of the held-out accuracy


def main() -> None:
    record = Record()
    with tempfile.TemporaryDirectory() as folder:
        sft, rl = Path(folder) / "sft", Path(folder) / "rl"
        start = f" load_checkpoint_path={sft}/checkpoints/final"
        steps = run(record, "rl", RL + start, rl) if run(record, "sft", SFT, sft) else []
    for name, metric in (("held-out accuracy", "test/env/all/correct"), ("|dlogp|", "optim/logprob_gap_mean")):
        record.figure(name, [round(step[metric], 4) for step in steps if metric in step])
    accuracy = [step["test/env/all/correct"] for step in steps if "test/env/all/correct" in step]
    record.holds("held-out accuracy was measured", bool(accuracy))
    if CUDA and accuracy:
        record.holds(f"it rises by {RISE}", accuracy[-1] >= accuracy[0] + RISE)
    record.print()


if __name__ == "__main__":
    main()
