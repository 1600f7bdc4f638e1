"""Two-digit addition with every algorithm preset (rl/algorithms.py), from one supervised warm
start.

    python recipes/algorithms/train.py                             # all presets, one after another; runs/algorithms
    python recipes/algorithms/train.py algorithms=grpo,rloo seed=1 log_path=runs/algorithms_1

All other settings are the same. Finished runs are kept, killed runs resume, and changed settings
are an error.
"""

if not __package__:  # run as a file: put the project on the path
    import os
    import sys

    sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from collections.abc import Sequence
from pathlib import Path

import chz

from envs.arithmetic import ArithmeticBuilder, ArithmeticExamplesBuilder
from posttrain.backend.config import BackendConfig
from posttrain.backend.errors import ConfigError
from posttrain.backend.ranges import COUNT, LEARNING_RATE, NON_NEGATIVE, SEED
from posttrain.tracking.command_line import run_command
from posttrain.tracking.figures import read_curve
from posttrain.tracking.metrics_log import read_metrics
from posttrain.tracking.plots import compare_runs
from posttrain.tracking.run_config import log_path_field
from posttrain.tracking.stages import Stage, run_stages, training_stage
from recipes.warm_start import preset, torch_backend, warm_start
from rl import train
from rl.algorithms import ALGORITHMS
from rl.types import RLDatasetBuilder
from supervised.types import SupervisedDatasetBuilder


@chz.chz
class Config:
    """Every algorithm preset on two-digit addition, from one warm start."""

    algorithms: str = chz.field(
        default="importance_sampling,reinforce,rloo,grpo,dr_grpo,dapo,ppo,cispo", doc="presets to run, by comma"
    )
    warm_start_nll: float = chz.field(
        default=0.3,
        validator=NON_NEGATIVE,
        doc="nats per token at which the warm start ends; at 0.3 about two sums of three are right",
    )
    num_steps: int = chz.field(default=500, validator=COUNT, doc="steps of RL, 64 problems by 8 rollouts each")
    learning_rate: float = chz.field(default=3e-4, validator=LEARNING_RATE, doc="of RL, at the first step; falls to 0")
    seed: int = chz.field(default=0, validator=SEED, doc="seed of the weights, the data and the sampling")
    log_path: str = log_path_field("runs/algorithms", "folder of the runs, one for each preset")
    backend: BackendConfig = torch_backend()


def rl_config(config: Config, algorithm: str, start: Stage, env: RLDatasetBuilder) -> train.Config:
    return chz.replace(
        preset(ALGORITHMS[algorithm].settings),
        env=env,
        load_checkpoint_path=str(start.result),
        renderer_name="plain",
        seed=config.seed,
        learning_rate=config.learning_rate,
        lr_schedule="linear",
        eval_every=25,
        save_every=100,
        keep_checkpoints=1,
        transcript_every=100,
        log_path=str(Path(config.log_path) / algorithm),
        backend=config.backend,
    )


async def run_presets(
    config: Config, examples: SupervisedDatasetBuilder, env: RLDatasetBuilder, keys: Sequence[str], what: str
) -> None:
    """A warm start on `examples`, then each preset on `env`. `what` is the first of the metrics `keys`."""
    names = config.algorithms.split(",")
    if unknown := [name for name in names if name not in ALGORITHMS]:
        raise ConfigError(f"algorithms={unknown[0]}: no such preset; known: {', '.join(ALGORITHMS)}")
    folder, nll = Path(config.log_path) / "warm_start", config.warm_start_nll
    start = warm_start(config, examples, folder, renderer_name="plain", stop_at_nll=nll)
    await run_stages([training_stage(name, train.main, rl_config(config, name, start, env), [start]) for name in names])
    folders = [Path(config.log_path) / name for name in names]
    for folder in folders:
        results = read_curve(read_metrics(folder), keys[0]).values_K
        print(f"{folder.name:24s} {what} {results[0]:.3f} -> {results[-1]:.3f}")
    print(f"curves: {compare_runs(folders, Path(config.log_path) / 'compare.png', keys)}")


async def main(config: Config) -> None:
    sums = ArithmeticExamplesBuilder(num_digits=2, n_batches=1000, batch_size=128, seed=config.seed)
    env = ArithmeticBuilder(num_digits=2, n_batches=config.num_steps, batch_size=64, group_size=8, seed=config.seed)
    keys = ["test/env/all/correct", "env/all/reward/total", "optim/entropy"]
    await run_presets(config, sums, env, keys, "held-out accuracy")


if __name__ == "__main__":
    run_command(main, Config)
