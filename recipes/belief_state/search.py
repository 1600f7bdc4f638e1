"""The same small search for the Belief State Transformer and for a GPT of as many weights, on star
graphs: every shape with every pair of learning rate and first weights' deviation, one seed, on
validation graphs. Then the best setting with other seeds, and with more steps, on the held-out graphs.

    python recipes/belief_state/search.py model=gpt data.loss_on=path  # runs/belief_state_search/gpt

Prints the table, best first, and writes results.json: the share of right first hops at the end.
"""

if not __package__:  # run as a file: put the project on the path
    import os
    import sys

    sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from pathlib import Path
from typing import Any, Literal

import chz

from posttrain.backend.errors import ConfigError
from posttrain.backend.ranges import COUNT, SEED
from posttrain.tracking.command_line import run_command
from posttrain.tracking.metrics_log import read_metrics
from posttrain.tracking.run_config import log_path_field
from posttrain.tracking.stages import Stage, run_stages, training_stage
from recipes.belief_state import train
from recipes.belief_state.star_graph import StarGraphBuilder
from recipes.labels import folder_name
from recipes.results import write_results
from recipes.warm_start import check_seeds

# layers (of each encoder) and width; 0.71 to 0.75 million weights each
SHAPES = {"bst": [(1, 112), (2, 96), (3, 80)], "gpt": [(2, 168), (3, 144), (6, 104)]}
RATES_AND_DEVIATIONS = [(3e-3, 0.08), (1e-3, 0.08), (2e-3, 0.12)]
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    model: {
        f"{layers} x {hidden}, rate {rate:g}, deviation {deviation:g}": {
            "model": model,
            "num_layers": layers,
            "hidden": hidden,
            "learning_rate": rate,
            "init_std": deviation,
        }
        for layers, hidden in shapes
        for rate, deviation in RATES_AND_DEVIATIONS
    }
    for model, shapes in SHAPES.items()
}


@chz.chz
class Config:
    """A search over shapes, learning rates and first weights."""

    model: Literal["bst", "gpt"] = chz.field(default="gpt", doc="which of the two")
    data: StarGraphBuilder = chz.field(default_factory=StarGraphBuilder, doc="graphs, and the GPT's targets")
    num_steps: int = chz.field(default=600, validator=COUNT, doc="optimizer steps of each run")
    seed: int = chz.field(default=3, validator=SEED, doc="of the search: weights and graphs")
    validation_seed: int = chz.field(
        default=1, validator=SEED, doc="of the graphs on which settings are chosen; not data.test_seed"
    )
    seeds: list[int] = chz.field(default_factory=lambda: [0, 1, 2], validator=SEED, doc="of the best setting's runs")
    times: list[int] = chz.field(
        default_factory=lambda: [1, 3], validator=COUNT, doc="the best setting's runs have this many times num_steps"
    )
    log_path: str = log_path_field("runs/belief_state_search", "folder of the runs")


def run_stage(config: Config, setting: str, data: StarGraphBuilder, num_steps: int, seed: int) -> Stage:
    name = f"{folder_name(setting)}_steps_{num_steps}_seed_{seed}"
    run = train.Config(
        **SETTINGS[config.model][setting],
        data=data,
        num_steps=num_steps,
        seed=seed,
        save_every=0,
        log_path=str(Path(config.log_path) / config.model / name),
    )
    return training_stage(name, train.main, run)


def validation_data(config: Config) -> StarGraphBuilder:
    """The data of the search: with held-out graphs of its own. Raises ConfigError."""
    if config.data.path or config.data.test_path:
        raise ConfigError(
            "the search draws its validation graphs: leave data.path and data.test_path out (recipes/belief_state/"
            "train.py trains on files)"
        )
    if config.validation_seed == config.data.test_seed:
        raise ConfigError(
            f"validation_seed={config.validation_seed} is data.test_seed, too: settings would be chosen on the graphs "
            "on which the best is reported"
        )
    return chz.replace(config.data, test_seed=config.validation_seed)


def first_hop(stage: Stage) -> float:
    return read_metrics(stage.path)[-1]["test/first_hop"]


async def main(config: Config) -> None:
    check_seeds(config.seeds)
    data = validation_data(config)
    searched = {name: run_stage(config, name, data, config.num_steps, config.seed) for name in SETTINGS[config.model]}
    await run_stages(list(searched.values()))
    results = {name: first_hop(stage) for name, stage in searched.items()}
    best = max(results, key=lambda name: (results[name], -read_metrics(searched[name].path)[-1]["test/loss"]))
    ranked = sorted(results.items(), key=lambda item: -item[1])
    for times in config.times:
        steps = times * config.num_steps
        stages = [run_stage(config, best, config.data, steps, seed) for seed in config.seeds]
        await run_stages(stages)
        results |= {
            f"best, {steps} steps, seed {seed}": first_hop(stage)
            for seed, stage in zip(config.seeds, stages, strict=True)
        }
    write_results(Path(config.log_path) / config.model, results)
    print("\n".join(f"{value:.3f}  {name}" for name, value in ranked))
    print("\n".join(f"{value:.3f}  {name}" for name, value in results.items() if name not in searched))


if __name__ == "__main__":
    run_command(main, Config)
