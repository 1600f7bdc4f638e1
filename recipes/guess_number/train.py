"""Guess a number in several turns: a warm start on play without strategy, then RL, which finds one.

    python recipes/guess_number/train.py                       # runs/guess_number
    python recipes/guess_number/train.py seed=1 env.largest=49 log_path=runs/guess_49

The demonstrations guess any number that is still possible. The reward favours bisection: 1 for the
number, minus `env.guess_cost` per guess after the first, 0 after `env.max_guesses`. README.md has
the results.
"""

if not __package__:  # run as a file: put the project on the path
    import os
    import sys

    sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


import chz

from envs.guess_number import GuessNumber, GuessNumberBuilder, GuessNumberExamplesBuilder
from posttrain.backend.config import BackendConfig
from posttrain.backend.learning_rate import LRSchedule
from posttrain.backend.ranges import LEARNING_RATE, NON_NEGATIVE, WHOLE
from posttrain.tracking.command_line import run_command
from posttrain.tracking.run_config import log_path_field
from recipes.warm_start import torch_backend, warm_started
from rl import train
from rl.types import RLDatasetBuilder


@chz.chz
class Config(train.Config):
    """Reinforcement learning on a guessing game of several turns, after a supervised warm start."""

    env: RLDatasetBuilder = chz.field(
        default_factory=lambda: GuessNumberBuilder(prompt="{low}-{high}:", n_batches=130, batch_size=32),
        doc="builder of the games",
    )
    warm_start_nll: float = chz.field(
        default=0.72,
        validator=NON_NEGATIVE,
        doc="nats per token at which the warm start ends; play without strategy has 0.56",
    )
    renderer_name: str | None = chz.field(default="plain", doc="role_colon, chat_template or plain")
    learning_rate: float = chz.field(default=5e-4, validator=LEARNING_RATE, doc="of RL, at its first step")
    lr_schedule: LRSchedule = chz.field(default="linear", doc="how RL's learning rate falls")
    save_every: int = chz.field(
        default=50, validator=WHOLE, doc="checkpoint after every this many steps, and at the end"
    )
    log_path: str = log_path_field("runs/guess_number", "the run folder; the warm start's is beside it")
    backend: BackendConfig = torch_backend()


def examples(config: Config) -> GuessNumberExamplesBuilder:
    """Play without strategy, with the rules of `config.env`."""
    assert isinstance(config.env, GuessNumberBuilder)
    game = {name: getattr(config.env, name) for name in chz.chz_fields(GuessNumber)}
    return GuessNumberExamplesBuilder(**game, n_batches=2000, batch_size=64, seed=config.seed)


async def main(config: Config) -> None:
    config = chz.replace(config, env=chz.replace(config.env, seed=config.seed))
    config = await warm_started(config, examples(config), stop_at_nll=config.warm_start_nll)
    await train.main(config)


if __name__ == "__main__":
    run_command(main, Config)
