"""Longer arms step by step: a Belief State Transformer or a GPT on star graphs whose arms have 3, 4
and 5 nodes, each length from the weights of the one before.

    python recipes/belief_state/curriculum.py  # runs/belief_state_curriculum/l3, l4, l5
    python recipes/belief_state/curriculum.py lengths=[5] steps=[4000] log_path=runs/without  # 5 from nothing
    python recipes/belief_state/curriculum.py run.model=gpt run.num_layers=6 run.hidden=104
"""

if not __package__:  # run as a file: put the project on the path
    import os
    import sys

    sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from pathlib import Path

import chz

from posttrain.backend.errors import ConfigError
from posttrain.backend.ranges import COUNT
from posttrain.tracking.command_line import run_command
from posttrain.tracking.run_config import log_path_field
from posttrain.tracking.stages import Stage, run_stages, training_stage
from recipes.belief_state import train
from recipes.belief_state.star_graph import StarGraphBuilder


@chz.chz
class Config:
    """Training on star graphs of growing length."""

    run: train.Config = chz.field(
        default_factory=train.Config, doc="model and optimizer; graphs, steps and folder are set here"
    )
    data: StarGraphBuilder = chz.field(default_factory=StarGraphBuilder, doc="graphs; their length is set here")
    lengths: list[int] = chz.field(default_factory=lambda: [3, 4, 5], validator=COUNT, doc="nodes of an arm, in turn")
    steps: list[int] = chz.field(
        default_factory=lambda: [600, 1500, 2000], validator=COUNT, doc="optimizer steps of each length"
    )
    log_path: str = log_path_field("runs/belief_state_curriculum", "folder of the runs")


async def main(config: Config) -> None:
    if not config.lengths or len(config.lengths) != len(config.steps):
        raise ConfigError(f"lengths={config.lengths}, steps={config.steps}: give a number of steps for each length")
    stages: list[Stage] = []
    for length, steps in zip(config.lengths, config.steps, strict=True):
        run = chz.replace(
            config.run,
            data=chz.replace(config.data, path_length=length),
            num_steps=steps,
            load_checkpoint_path=str(stages[-1].result) if stages else config.run.load_checkpoint_path,
            log_path=str(Path(config.log_path) / f"l{length}"),
        )
        stages.append(training_stage(f"l{length}", train.main, run, stages[-1:]))
    await run_stages(stages)


if __name__ == "__main__":
    run_command(main, Config)
