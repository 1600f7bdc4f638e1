"""Reinforcement learning from the command line.

python rl/train_cli.py env=arithmetic model_name=tiny group_size=8
python -m rl.train_cli env=my_package.my_module:MyBuilder env.difficulty=3 algorithm=rloo
"""

# run as a file, this folder is first on the path, and its types.py would shadow the standard one
if not __package__:
    import os
    import sys

    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import chz

from posttrain.backend.ranges import COUNT
from posttrain.tracking.command_line import by_name, run_command
from posttrain.tracking.metrics_log import Metrics
from rl.algorithms import ALGORITHMS
from rl.config import Config
from rl.names import ADVANTAGES, ENVS
from rl.types import RLDatasetBuilder
from supervised.names import EVALUATOR_OPTIONS


@chz.chz
class CLIConfig(Config):
    """Reinforcement learning of a language model on an environment."""

    env: RLDatasetBuilder = chz.field(
        default_factory=by_name(ENVS["arithmetic"]), doc="the task: training and held-out environments"
    )
    algorithm: str | None = chz.field(
        default=None, doc="sets several options at once, see below; None = importance_sampling"
    )
    group_size: int | None = chz.field(
        default=None, validator=COUNT, doc="short for env.group_size: rollouts per problem"
    )
    groups_per_batch: int | None = chz.field(
        default=None, validator=COUNT, doc="short for env.batch_size: problems per step"
    )

    def resolved(self) -> "CLIConfig":
        """With the two short options written into `env`."""
        given = {"group_size": self.group_size, "batch_size": self.groups_per_batch}
        env = chz.replace(self.env, **{name: value for name, value in given.items() if value is not None})
        return chz.replace(self, env=env, group_size=None, groups_per_batch=None)


async def trained(config: CLIConfig) -> Metrics:
    from rl import train  # with torch, for which --help and errors do not wait

    return await train.main(config.resolved())


def main() -> None:
    presets = {"algorithm": {name: algorithm.settings for name, algorithm in ALGORITHMS.items()}}
    names = {"env": ENVS, "advantage": ADVANTAGES} | EVALUATOR_OPTIONS
    run_command(trained, CLIConfig, names, presets)


if __name__ == "__main__":
    main()
