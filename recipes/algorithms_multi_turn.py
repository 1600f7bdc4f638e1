"""The algorithm presets (rl/algorithms.py) on a game of several turns, guess_number, from one warm start.

    python recipes/algorithms_multi_turn.py                         # all, one after another; runs/algorithms_multi_turn
    python recipes/algorithms_multi_turn.py algorithms=grpo,rloo seed=1 log_path=runs/again

The game and the warm start are those of recipes/guess_number. recipes/algorithms/README.md has the
results. Left out: presets that are another one with one optimizer step for each batch (dr_grpo, gspo).
"""

if not __package__:  # run as a file: put the project on the path
    import os
    import sys

    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from pathlib import Path

import chz

from envs.guess_number import GuessNumberBuilder, GuessNumberExamplesBuilder
from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import ConfigError
from posttrain.backend.ranges import COUNT, LEARNING_RATE, NON_NEGATIVE, SEED
from posttrain.tracking.command_line import run_command
from posttrain.tracking.figures import read_curve
from posttrain.tracking.metrics_log import read_metrics
from posttrain.tracking.plots import compare_runs
from posttrain.tracking.run_config import log_path_field
from posttrain.tracking.stages import Stage, run_stages, training_stage
from recipes.warm_start import preset, warm_start
from rl import train
from rl.algorithms import ALGORITHMS

RULES = {"prompt": "{low}-{high}:", "num_test": 300}
CURVES = ["test/env/all/solved", "env/all/reward/total", "test/env/all/turns"]


@chz.chz
class Config:
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
    seed: int = chz.field(default=0, validator=SEED, doc="seed of the weights, the data and the sampling")
    log_path: str = log_path_field("runs/algorithms_multi_turn", "folder of the runs, one for each preset")
    backend: BackendConfig = chz.field(
        default_factory=lambda: BackendConfig(engine="torch"), doc="how this machine trains and samples"
    )


def rl_config(config: Config, algorithm: str, start: Stage) -> train.Config:
    env = GuessNumberBuilder(n_batches=config.num_steps, batch_size=16, group_size=8, seed=config.seed, **RULES)
    return chz.replace(
        preset(ALGORITHMS[algorithm].settings),
        env=env,
        load_checkpoint_path=str(start.result),
        renderer_name="plain",
        seed=config.seed,
        learning_rate=config.learning_rate,
        lr_schedule="linear",
        eval_every=25,
        save_every=0,
        log_path=str(Path(config.log_path) / algorithm),
        backend=config.backend,
    )


async def main(config: Config) -> None:
    names = config.algorithms.split(",")
    if unknown := [name for name in names if name not in ALGORITHMS]:
        raise ConfigError(f"algorithms={unknown[0]}: no such preset; known: {', '.join(ALGORITHMS)}")
    games = GuessNumberExamplesBuilder(n_batches=2000, batch_size=64, seed=config.seed, **RULES)
    folder, nll = Path(config.log_path) / "warm_start", config.warm_start_nll
    start = warm_start(config, games, folder, renderer_name="plain", stop_at_nll=nll)
    await run_stages([training_stage(name, train.main, rl_config(config, name, start), [start]) for name in names])
    folders = [Path(config.log_path) / name for name in names]
    for folder in folders:
        won = read_curve(read_metrics(folder), CURVES[0]).values_K
        print(f"{folder.name:24s} held-out games won {won[0]:.3f} -> {won[-1]:.3f}")
    print(f"curves: {compare_runs(folders, Path(config.log_path) / 'multi_turn.png', CURVES)}")


if __name__ == "__main__":
    run_command(main, Config)
