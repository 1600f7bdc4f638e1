"""GRPO on two-digit addition and what changes one thing of it, in three seeds from the same warm
starts: other algorithms, weights and optimizers of other precision, older samples; or what can go
wrong, and the metrics that show it.

    python recipes/algorithms/beside_grpo.py                       # runs/beside_grpo/algorithms.png
    python recipes/algorithms/beside_grpo.py variants=precision    # runs/beside_grpo/precision.png; also off_policy, faults
    python recipes/algorithms/beside_grpo.py seeds=0 num_steps=200
"""

if not __package__:  # run as a file: put the project on the path
    import os
    import sys

    sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import chz
import numpy as np

from envs.arithmetic import ArithmeticBuilder, ArithmeticExamplesBuilder
from posttrain.backend.config import BackendConfig
from posttrain.backend.ranges import COUNT, LEARNING_RATE, NON_NEGATIVE
from posttrain.tracking.command_line import run_command
from posttrain.tracking.figures import (
    Curve,
    Panel,
    Records,
    at_multiples,
    curves_by_label,
    draw_panels,
    over_total,
    save_figure,
)
from posttrain.tracking.metrics_log import read_metrics
from posttrain.tracking.run_config import log_path_field
from posttrain.tracking.stages import Stage, run_stages, training_stage
from recipes.algorithms.variants import DRAWN, GAP, VARIANTS
from recipes.labels import folder_name
from recipes.warm_start import preset, seeds_of, torch_backend, warm_start
from rl import train

CORRECT, SAMPLED = "test/env/all/correct", ("env/all/total_ac_tokens", "train/refill_tokens")


@chz.chz
class Config:
    """GRPO, and what changes one thing of it."""

    variants: Literal["algorithms", "precision", "off_policy", "faults"] = chz.field(
        default="algorithms",
        doc="what is changed: the algorithm, the precision of weights and optimizer, the age of the samples; or what "
        "goes wrong",
    )
    seeds: str = chz.field(default="0,1,2", doc="seeds by comma")
    warm_start_nll: float = chz.field(
        default=0.4, validator=NON_NEGATIVE, doc="nats per token at which the warm start ends"
    )
    num_steps: int = chz.field(default=150, validator=COUNT, doc="steps of RL, 32 problems by 8 rollouts each")
    learning_rate: float = chz.field(default=3e-4, validator=LEARNING_RATE, doc="at the first step; falls to 0")
    log_path: str = log_path_field("runs/beside_grpo", "folder of the runs")
    backend: BackendConfig = torch_backend()


def stages_of(config: Config, seed: int) -> list[Stage]:
    folder = Path(config.log_path) / str(seed)
    sums = ArithmeticExamplesBuilder(num_digits=2, n_batches=1000, batch_size=128, seed=seed)
    settings = {"renderer_name": "plain", "seed": seed, "stop_at_nll": config.warm_start_nll, "eval_every": 0}
    start = warm_start(config, sums, folder / "start", f"start_{seed}", **settings)
    stages = []
    for name, (options, backend) in VARIANTS[config.variants].items():
        run = chz.replace(
            preset(options),
            env=ArithmeticBuilder(num_digits=2, n_batches=config.num_steps, batch_size=32, group_size=8, seed=seed),
            load_checkpoint_path=str(start.result),
            renderer_name="plain",
            seed=seed,
            learning_rate=float(options.get("learning_rate", config.learning_rate)),
            lr_schedule="linear",
            eval_every=10,
            save_every=0,
            transcript_every=100,
            log_path=str(folder / folder_name(name)),
            backend=chz.replace(config.backend, **backend),
        )
        stages.append(training_stage(f"{name}_{seed}", train.main, run, [start]))
    return stages


async def main(config: Config) -> None:
    stages = {seed: stages_of(config, seed) for seed in seeds_of(config.seeds)}
    await run_stages([stage for of_seed in stages.values() for stage in of_seed])
    runs = {
        name: [read_metrics(of_seed[i].path) for of_seed in stages.values()]
        for i, name in enumerate(VARIANTS[config.variants])
    }
    for name, seeds in runs.items():
        curves = [over_total(records, CORRECT, *SAMPLED) for records in seeds]
        ends = ", ".join(f"{curve.values_K[0]:.3f} -> {curve.values_K[-1]:.3f}" for curve in curves)
        sampled = ", ".join(f"{curve.steps_K[-1]:,}" for curve in curves)
        print(f"{name:33s} held-out accuracy {ends}; sampled tokens {sampled}")
    print(f"curves: {draw(config.variants, runs, Path(config.log_path) / f'{config.variants}.png')}")


def draw(variants: str, runs: Mapping[str, Sequence[Records]], out: Path) -> Path:
    """Held-out accuracy of the variants over the steps, and over sampled tokens or beside the metrics DRAWN."""
    panels = [Panel("held-out accuracy", curves_by_label(runs, CORRECT))]
    if variants not in DRAWN:
        tokens = {name: [over_total(records, CORRECT, *SAMPLED) for records in seeds] for name, seeds in runs.items()}
        shared = {name: [at_multiples(curve, 5000) for curve in curves] for name, curves in tokens.items()}
        panels.append(Panel("held-out accuracy", shared, xlabel="sampled tokens"))
    for key in DRAWN.get(variants, []):
        curves = curves_by_label(runs, key)
        if key == GAP:
            curves = {
                name: [Curve(steps, np.log10(gaps).tolist()) for steps, gaps in seeds] for name, seeds in curves.items()
            }
        panels.append(Panel(f"{'log10 of ' * (key == GAP)}{key}", curves))
    return save_figure(draw_panels(panels, shared_legend=True), out)


if __name__ == "__main__":
    run_command(main, Config)
