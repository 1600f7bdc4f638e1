"""Reinforcement learning from builders: a supervised warm start, then RL on problems of the same
kind.

`tiny` has random weights. So, unless load_checkpoint_path is given, a supervised run in
LOG_PATH_warm_start comes first. Both builders hold out the same sums. For another task, replace
ArithmeticBuilder.

    python recipes/rl_basic.py                                             # two minutes on 2 cores; runs/rl_basic
    python recipes/rl_basic.py advantage=rl.advantages:LeaveOneOut loss_fn=ppo num_substeps=2
    python recipes/rl_basic.py load_checkpoint_path=runs/rl_basic_warm_start/checkpoints/final log_path=runs/again

Expect test/env/all/correct, greedy accuracy on held-out sums, to rise from about 0.8 to above 0.9 with seed 0;
other seeds begin elsewhere (recipes/README.md).
"""

if not __package__:  # run as a file: put the project on the path
    import os
    import sys

    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


import chz

from envs.arithmetic import ArithmeticBuilder, ArithmeticExamplesBuilder
from posttrain.backend.ranges import LEARNING_RATE, WHOLE
from posttrain.tracking.command_line import run_command
from posttrain.tracking.run_config import log_path_field
from recipes.warm_start import warm_started
from rl import train
from rl.types import RLDatasetBuilder


@chz.chz
class Config(train.Config):
    """Reinforcement learning on two-digit addition, after a supervised warm start."""

    env: RLDatasetBuilder = chz.field(
        default_factory=lambda: ArithmeticBuilder(num_digits=2, batch_size=64, group_size=8, n_batches=60),
        doc="builder of the training and held-out environments",
    )
    warm_start_steps: int = chz.field(
        default=240, validator=WHOLE, doc="supervised steps before RL, unless load_checkpoint_path is given; 0 = none"
    )
    renderer_name: str | None = chz.field(
        default="plain", doc="role_colon, chat_template or plain; None = by the tokenizer"
    )
    learning_rate: float = chz.field(default=2e-4, validator=LEARNING_RATE, doc="constant")
    log_path: str = log_path_field("runs/rl_basic")


async def main(config: Config) -> None:
    if config.warm_start_steps:
        sums = ArithmeticExamplesBuilder(num_digits=2, batch_size=128, n_batches=config.warm_start_steps)
        config = await warm_started(config, sums)
    await train.main(config)


if __name__ == "__main__":
    run_command(main, Config)
