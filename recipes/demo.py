"""`make demo`: a 0.8M-parameter model with random weights learns two-digit addition, first by
imitation, then by reinforcement learning.

The warm start ends early, with under 70% of the held-out sums right. Then vLLM samples and torch
trains in one process, and only the reward tells which answers are right.

    python recipes/demo.py                    # runs/demo
    python recipes/demo.py seed=1 backend.engine=torch

Expect a greedy accuracy on held-out sums of at least 0.95 at the end.
"""

if not __package__:  # run as a file: put the project on the path
    import os
    import sys

    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import time
from pathlib import Path

import chz

from envs.arithmetic import ArithmeticBuilder, ArithmeticExamplesBuilder
from posttrain.backend.learning_rate import LRSchedule
from posttrain.backend.ranges import LEARNING_RATE, NON_NEGATIVE, WHOLE
from posttrain.tracking.command_line import run_command
from posttrain.tracking.metrics_log import read_metrics
from posttrain.tracking.run_config import log_path_field
from posttrain.tracking.run_folder import BehaviorIfExists
from recipes.warm_start import warm_started
from rl import train as rl_train
from rl.types import RLDatasetBuilder


@chz.chz
class Config(rl_train.Config):
    """The demo: a supervised warm start on sums, then reinforcement learning."""

    env: RLDatasetBuilder = chz.field(
        default_factory=lambda: ArithmeticBuilder(n_batches=500, batch_size=64, group_size=8),
        doc="builder of the environments",
    )
    warm_start_nll: float = chz.field(
        default=0.3, validator=NON_NEGATIVE, doc="nats per token at which the warm start ends"
    )
    renderer_name: str | None = chz.field(default="plain", doc="role_colon, chat_template or plain")
    learning_rate: float = chz.field(default=3e-4, validator=LEARNING_RATE, doc="of RL, at its first step")
    lr_schedule: LRSchedule = chz.field(default="linear", doc="how RL's learning rate falls")
    save_every: int = chz.field(
        default=100, validator=WHOLE, doc="checkpoint after every this many steps, and at the end"
    )
    log_path: str = log_path_field("runs/demo", "the run folder; the warm start's is beside it")
    behavior_if_log_dir_exists: BehaviorIfExists = chz.field(
        default="delete", doc="what to do with the last demo's folder"
    )


def examples(config: Config) -> ArithmeticExamplesBuilder:
    """Of the sums that RL will train on, and none of those it holds out."""
    assert isinstance(config.env, ArithmeticBuilder)
    task = {
        name: getattr(config.env, name) for name in ("num_digits", "min_digits", "operators", "num_test", "split_seed")
    }
    return ArithmeticExamplesBuilder(**task, n_batches=1000, batch_size=128, seed=config.seed)


def print_result(config: Config, seconds: float) -> None:
    from rich.console import Console
    from rich.table import Table

    records = read_metrics(config.log_path)
    accuracy = [record["test/env/all/correct"] for record in records if "test/env/all/correct" in record]
    gaps = [record["optim/logprob_gap_mean"] for record in records if "optim/logprob_gap_mean" in record]
    table = Table("held-out accuracy, greedy", "", title=f"seed {config.seed}", title_justify="left")
    table.add_row("after the supervised warm start", f"{accuracy[0]:.3f}")
    table.add_row(f"after {len(gaps)} steps of RL", f"{accuracy[-1]:.3f}")
    table.add_section()
    table.add_row("largest mean |sampler - trainer| logprob of a step", f"{max(gaps):.1e}")
    table.add_row("time, both stages", f"{seconds:.0f} s")
    Console().print(table)
    folder = Path(config.log_path)
    print(
        f"curves: {folder / 'plots/run.png'}\ntranscript, to open in a browser: "
        f"{sorted((folder / 'transcripts').glob('*.html'))[-1]}"
    )


async def main(config: Config) -> None:
    start = time.monotonic()
    config = chz.replace(config, env=chz.replace(config.env, seed=config.seed))
    config = await warm_started(config, examples(config), stop_at_nll=config.warm_start_nll)
    await rl_train.main(config)
    print_result(config, time.monotonic() - start)


if __name__ == "__main__":
    run_command(main, Config)
