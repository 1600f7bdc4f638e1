"""The same small search for the Belief State Transformer and for a GPT of as many weights, on star
graphs: every shape with every pair of learning rate and first weights' deviation, one seed.

    python recipes/belief_state/search.py model=gpt  # runs/belief_state_search/gpt

Prints a table, best first, and writes results.json: the first hop of each setting at the end.
"""

if not __package__:  # run as a file: put the project on the path
    import os
    import sys

    sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from pathlib import Path
from typing import Literal

import chz

from posttrain.backend.ranges import COUNT, SEED
from posttrain.tracking.command_line import run_command
from posttrain.tracking.metrics_log import read_metrics
from posttrain.tracking.run_config import log_path_field
from posttrain.tracking.stages import Stage, run_stages, training_stage
from recipes.belief_state import train
from recipes.belief_state.star_graph import StarGraphBuilder
from recipes.results import write_results

# layers (of each encoder) and width; 0.70 to 0.78 million weights each
SHAPES = {"bst": [(1, 112), (2, 96), (3, 80), (4, 72)], "gpt": [(2, 168), (3, 144), (6, 104), (10, 72)]}
RATES_AND_DEVIATIONS = [(3e-3, 0.08), (1e-3, 0.08), (2e-3, 0.12)]


@chz.chz
class Config:
    """A search over shapes, learning rates and first weights."""

    model: Literal["bst", "gpt"] = chz.field(default="gpt", doc="which of the two")
    data: StarGraphBuilder = chz.field(default_factory=StarGraphBuilder, doc="graphs, and the GPT's targets")
    num_steps: int = chz.field(default=600, validator=COUNT, doc="optimizer steps of each run")
    seed: int = chz.field(default=3, validator=SEED, doc="of weights and graphs; reported runs have others")
    log_path: str = log_path_field("runs/belief_state_search", "folder of the runs")


def stages_of(config: Config) -> list[Stage]:
    folder, stages = Path(config.log_path) / config.model, []
    for num_layers, hidden in SHAPES[config.model]:
        for rate, deviation in RATES_AND_DEVIATIONS:
            name = f"{num_layers} layers, {hidden} wide, learning rate {rate:g}, deviation {deviation:g}"
            run = train.Config(
                data=config.data,
                model=config.model,
                num_layers=num_layers,
                hidden=hidden,
                learning_rate=rate,
                init_std=deviation,
                num_steps=config.num_steps,
                seed=config.seed,
                eval_every=100,
                save_every=0,
                log_path=str(folder / f"{num_layers}x{hidden}_{rate:g}_{deviation:g}"),
            )
            stages.append(training_stage(name, train.main, run))
    return stages


async def main(config: Config) -> None:
    stages = stages_of(config)
    await run_stages(stages)
    results = {stage.name: read_metrics(stage.path)[-1]["test/first_hop"] for stage in stages}
    write_results(Path(config.log_path) / config.model, results)
    for name, first_hop in sorted(results.items(), key=lambda item: -item[1]):
        print(f"{first_hop:.3f}  {name}")


if __name__ == "__main__":
    run_command(main, Config)
