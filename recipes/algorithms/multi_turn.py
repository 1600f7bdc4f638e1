"""The algorithm presets (rl/algorithms.py) on a game of several turns, guess_number, from one warm start.

    python recipes/algorithms/multi_turn.py                         # all, one after another; runs/algorithms_multi_turn
    python recipes/algorithms/multi_turn.py algorithms=grpo,rloo seed=1 log_path=runs/again

The game and the warm start are those of recipes/guess_number. README.md has the results. Left out:
presets that are another one with one optimizer step for each batch (dr_grpo, gspo).
"""

if not __package__:  # run as a file: put the project on the path
    import os
    import sys

    sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import chz

from envs.guess_number import GuessNumberBuilder, GuessNumberExamplesBuilder
from posttrain.backend.ranges import COUNT, LEARNING_RATE, NON_NEGATIVE
from posttrain.tracking.command_line import run_command
from posttrain.tracking.run_config import log_path_field
from recipes.algorithms import train

RULES = {"prompt": "{low}-{high}:", "num_test": 300}
CURVES = ["test/env/all/solved", "env/all/reward/total", "test/env/all/turns"]


@chz.chz
class Config(train.Config):
    """The algorithm presets on a guessing game of several turns, from one warm start."""

    algorithms: str = chz.field(
        default="importance_sampling,reinforce,rloo,grpo,dapo,cispo,ppo,ppo_critic,reinforce_pp,reinforce_pp_baseline",
        doc="presets to run, by comma",
    )
    warm_start_nll: float = chz.field(
        default=0.72, validator=NON_NEGATIVE, doc="nats per token at which the warm start ends"
    )
    num_steps: int = chz.field(default=50, validator=COUNT, doc="steps of RL, 16 games by 8 attempts each")
    learning_rate: float = chz.field(default=5e-4, validator=LEARNING_RATE, doc="of RL, at the first step; falls to 0")
    log_path: str = log_path_field("runs/algorithms_multi_turn", "folder of the runs, one for each preset")


async def main(config: Config) -> None:
    games = GuessNumberExamplesBuilder(n_batches=2000, batch_size=64, seed=config.seed, **RULES)
    env = GuessNumberBuilder(n_batches=config.num_steps, batch_size=16, group_size=8, seed=config.seed, **RULES)
    await train.run_presets(config, games, env, CURVES, "held-out games won")


if __name__ == "__main__":
    run_command(main, Config)
