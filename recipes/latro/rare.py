"""LaTRO where the useful rationales are rare, one in twenty of the warm start's: with K from 2 to 16,
beside SFT on gold rationales and RL with a verifier. All have the same number of updates, and 128
samples in each.

    python recipes/latro/rare.py                  # runs/latro_rare
    python recipes/latro/rare.py noise=0 seeds=0 log_path=runs/latro_rare_exact
"""

if not __package__:  # run as a file: put the project on the path
    import os
    import sys

    sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import chz

from posttrain.backend.ranges import COUNT, SHARE
from posttrain.tracking.command_line import run_command
from posttrain.tracking.run_config import log_path_field
from recipes.latro.experiment import compare
from recipes.latro.toy import ToyBuilder
from recipes.latro.variants import GOLD, Lines

LINES: Lines = {
    **{f"LaTRO, K={k}": {"rloo_k": k} for k in (2, 4, 8, 16)},
    "verifier, K=8": {"method": "verifier"},
    "SFT on gold rationales": GOLD,
}


@chz.chz
class Config:
    """LaTRO from a warm start whose useful rationales are rare."""

    useful: float = chz.field(default=0.05, validator=SHARE, doc="share of running sums in the warm start")
    noise: float = chz.field(
        default=0.1, validator=SHARE, doc="probability that a step of a running sum is wrong in the warm start"
    )
    warm_start_updates: int = chz.field(default=800, validator=COUNT, doc="supervised updates")
    max_updates: int = chz.field(default=80, validator=COUNT, doc="updates of each line")
    seeds: str = chz.field(default="0,1,2", doc="seeds, by comma")
    log_path: str = log_path_field("runs/latro_rare", "folder of the runs")


async def main(config: Config) -> None:
    filler = (1 - config.useful) / 2  # and as many running maxima
    task = ToyBuilder(useful=config.useful, filler=filler, noise=config.noise)
    shared = {"dataset": task, "warm_start_updates": config.warm_start_updates, "max_updates": config.max_updates}
    await compare(LINES, shared, config.seeds, config.log_path)


if __name__ == "__main__":
    run_command(main, Config)
