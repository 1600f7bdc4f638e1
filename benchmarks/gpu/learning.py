"""Block `learning`: 85M weights learn sums of two digits: a supervised run on 1,024 of them, repeated
until it gets no better on held-out ones, then RL with vLLM from its best checkpoint. The supervised run needs no
vLLM: it may be done already, by block `warm_start`.

On a CPU: a few steps of `tiny`.
"""

from pathlib import Path

import torch

from benchmarks.gpu.checks import Record
from benchmarks.gpu.user_runs import run, run_folders, values
from posttrain.tracking.metrics_log import read_metrics
from posttrain.tracking.run_folder import RunFolder

CUDA = torch.cuda.is_available()
MODEL = "renderer_name=plain model_name=" + ("gpt2-small" if CUDA else "tiny")
# Four tokens are decoded in a step: to record CUDA graphs would take longer.
VLLM = "backend.engine=vllm backend.enforce_eager=true backend.sampler_memory_gb=" + ("4" if CUDA else "0.25")
EVERY, RL_EVERY = (80, 40) if CUDA else (2, 2)  # steps between evaluations
TEST = 1000 if CUDA else 20  # held-out sums
SFT = (
    f"supervised/train_cli.py dataset=arithmetic {MODEL} dataset.batch_size=64 dataset.num_test={TEST} "
    f"evaluators.0=env evaluators.0.env=arithmetic evaluators.0.env.num_test={TEST} lr_schedule=constant "
    f"keep_checkpoints=None eval_every={EVERY} save_every={EVERY} backend.engine=torch "
) + ("dataset.n_batches=16 num_epochs=40 learning_rate=3e-4" if CUDA else "dataset.n_batches=4 learning_rate=2e-3")
RL = f"rl/train_cli.py env=arithmetic {MODEL} env.group_size=8 env.num_test={TEST} eval_every={RL_EVERY} {VLLM} " + (
    "env.batch_size=64 env.n_batches=240 learning_rate=2e-5" if CUDA else "env.batch_size=8 env.n_batches=4"
)
ALONE, AFTER_RL = "eval/env/all/correct", "test/env/all/correct"


def best_checkpoint(run: Path) -> Path | None:
    """Of the supervised run's, which were all evaluated."""
    accuracy = {step["step"]: step[ALONE] for step in read_metrics(run) if ALONE in step}
    evaluated = [saved for saved in RunFolder(run).list_checkpoints() if saved.step in accuracy]
    return max(evaluated, key=lambda saved: accuracy[saved.step]).path if evaluated else None


def supervised(record: Record, folder: Path) -> None:
    """Trains, or goes on with it, unless it is done."""

    def show(folder: Path) -> None:
        record.figure(f"held-out accuracy of supervised training, each {EVERY} steps", values(folder, ALONE))

    if (folder / "checkpoints" / "final").exists():
        show(folder)
    else:
        run(record, "sft", SFT, folder, show)


def main() -> None:
    record = Record()
    with run_folders("learning", record) as folder:
        sft, rl = folder / "sft", folder / "rl"
        supervised(record, sft)

        def show(_: Path) -> None:
            alone, after = values(sft, ALONE), values(rl, AFTER_RL)
            record.figure(f"held-out accuracy of RL, each {RL_EVERY} steps", after)
            record.figure(
                "|dlogp| of RL, largest mean of a step", max(values(rl, "optim/logprob_gap_mean"), default=0.0)
            )
            record.figure("accuracy above supervised training alone", after[-1] - max(alone) if after else None)

        if start := best_checkpoint(sft):
            run(record, "rl", f"{RL} load_checkpoint_path={start}", rl, show)
        record.holds("RL was evaluated", bool(values(rl, AFTER_RL)))
    record.print()


if __name__ == "__main__":
    main()
