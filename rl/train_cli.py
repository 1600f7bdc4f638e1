"""Reinforcement learning from the command line.

python rl/train_cli.py env=arithmetic model_name=tiny group_size=8
python -m rl.train_cli env=my_package.my_module:MyBuilder env.difficulty=3 algorithm=rloo
"""

if not __package__:  # run as a file: this folder, first on the path, has a types.py that would shadow the standard library's
    import os
    import sys

    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import asyncio

import chz

from envs.arithmetic import ArithmeticBuilder
from posttrain.backend.ranges import COUNT
from posttrain.tracking.command_line import run_command
from rl import train
from rl.algorithms import ALGORITHMS
from rl.types import RLDatasetBuilder

ENVS = {
    "arithmetic": "envs.arithmetic:ArithmeticBuilder",
    "gsm8k": "envs.math_word:Gsm8kBuilder",
    "math": "envs.math_word:MathWordBuilder",
    "code": "envs.code:CodeBuilder",
    "tool_use": "envs.tool_use:CalculatorBuilder",
    "guess_number": "envs.guess_number:GuessNumberBuilder",
    "twenty_questions": "envs.twenty_questions:TwentyQuestionsBuilder",
    "textarena": "envs.textarena:TextArenaBuilder",
    "chain": "envs.arithmetic_chain:ChainBuilder",
    "pairwise": "envs.pairwise:PairwiseBuilder",
    "reward_model": "envs.reward_model_env:RewardModelEnvBuilder",
    "star_graph": "envs.star_graph_data:StarGraphBuilder",
    "verifiers": "envs.verifiers_adapter:VerifiersBuilder",
}
ADVANTAGES = {
    "group_mean": "rl.advantages:GroupMean",
    "group_mean_std": "rl.advantages:GroupMeanStd",
    "rloo": "rl.advantages:LeaveOneOut",
    "batch_mean": "rl.advantages:BatchMean",
    "seat_mean": "rl.advantages:SeatMean",
    "none": "rl.advantages:NoBaseline",
}


@chz.chz
class CLIConfig(train.Config):
    """Reinforcement learning of a language model on an environment."""

    env: RLDatasetBuilder = chz.field(default_factory=ArithmeticBuilder, doc="builder of the training and held-out environments")
    algorithm: str | None = chz.field(default=None, doc="sets several options at once, see below; None = importance_sampling")
    group_size: int | None = chz.field(default=None, validator=COUNT, doc="short for env.group_size: rollouts per problem")
    groups_per_batch: int | None = chz.field(default=None, validator=COUNT, doc="short for env.batch_size: problems per step")

    def resolved(self) -> "CLIConfig":
        """With the two short options written into `env`."""
        given = {"group_size": self.group_size, "batch_size": self.groups_per_batch}
        env = chz.replace(self.env, **{name: value for name, value in given.items() if value is not None})
        return chz.replace(self, env=env, group_size=None, groups_per_batch=None)


def main() -> None:
    presets = {"algorithm": {name: algorithm.settings for name, algorithm in ALGORITHMS.items()}}
    names = {"env": ENVS, "advantage": ADVANTAGES}
    run_command(lambda config: asyncio.run(train.main(config.resolved())), CLIConfig, names, presets)


if __name__ == "__main__":
    main()
