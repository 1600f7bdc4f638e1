"""The README's results: LaTRO, its ablations and SFT on the toy task, from one warm start per seed.

    python recipes/latro/experiment.py                                     # all; runs/latro_experiment
    python recipes/latro/experiment.py seeds=0 variants=latro,sft

Prints a table and writes a plot. Finished runs are kept; killed runs resume.
"""

if not __package__:  # run as a file: put the project on the path
    import os
    import sys

    sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import chz
import numpy as np

from posttrain.tracking.command_line import run_command
from posttrain.tracking.figures import Panel, curves_by_label, draw_panels, save_figure
from posttrain.tracking.metrics_log import read_metrics
from posttrain.tracking.run_config import log_path_field
from posttrain.tracking.stages import run_stages
from recipes.latro import train
from recipes.warm_start import seeds_of

VARIANTS: dict[str, dict[str, Any]] = {
    "latro": {},
    "sft": {"method": "sft"},
    "sft_rationale": {"method": "sft", "sft_target": "rationale"},
    "likelihood_coef=0": {"likelihood_coef": 0.0},
    "no_baseline": {"baseline": "none"},
    "kl_coef=0": {"kl_coef": 0.0},
}
PANELS = {
    "likelihood/answer_logprob": "log p(answer | question, rationale), nats",
    "env/all/useful": "useful rationales among those sampled",
    "test/env/all/correct": "greedy accuracy, validation split",
}
EARLY = 5  # first updates, whose gradients are compared while the policies are still similar


@chz.chz
class Config:
    """LaTRO against its ablations and SFT."""

    variants: str = chz.field(default=",".join(VARIANTS), doc="variants to run, by comma")
    seeds: str = chz.field(default="0,1,2", doc="seeds, by comma")
    log_path: str = log_path_field("runs/latro_experiment", "folder of the runs")


async def run(config: Config, variant: str, seed: int) -> Path:
    """Runs the variant to its end; returns its folder."""
    base = train.prepared(
        train.Config(seed=seed, log_path=f"{config.log_path}/seed{seed}", behavior_if_log_dir_exists="resume")
    )
    options = train.prepared(chz.replace(base, log_path=f"{base.log_path}/{variant}", **VARIANTS[variant]))
    await run_stages([train.method_stage(options, train.beginning(base))])
    return options.folder(options.method)


def table(folders: dict[str, list[Path]]) -> str:
    """Test-set metrics: mean over seeds, minimum and maximum."""
    header = f"{'':18s} {'log p(y|x,z)':>24s} {'useful':>20s} {'greedy':>20s} {'maj@8':>20s} {'gradient norm':>14s}"
    keys = ("likelihood/answer_logprob", "env/all/useful", "test/env/all/correct", "test/env/all/maj@8")
    lines = [header]
    for name, runs in folders.items():
        summaries = [_summary(folder) for folder in runs]
        if name == "latro":
            lines.append(
                f"{'warm start':18s} " + " ".join(_spread([s["before"][key] for s in summaries]) for key in keys)
            )
        norms = [record["optim/grad_norm"] for folder in runs for record in read_metrics(folder)[:EARLY]]
        # SFT's loss has another scale
        norm = "" if name.startswith("sft") else f"{np.sqrt(np.mean(np.square(norms))):14.0f}"
        row = " ".join(_spread([s["after"][key] for s in summaries]) for key in keys)
        lines.append(f"{name:18s} {row} {norm}")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    return f"{np.mean(values):6.3f} ({min(values):.3f}..{max(values):.3f})"


def picture(folders: dict[str, list[Path]], out: Path) -> Path:
    """Curves of each variant's seeds and mean; SFT has only the accuracy at its end, as a level."""
    runs = {
        name: [read_metrics(seed) for seed in seeds] for name, seeds in folders.items() if not name.startswith("sft")
    }
    panels = [
        # dashed: it overlaps the first curve
        Panel(title, curves_by_label(runs, key), dashed=["kl_coef=0"], xlabel="update")
        for key, title in PANELS.items()
    ]
    levels = {
        f"{name}: its best checkpoint, on the test set": float(
            np.mean([_summary(seed)["after"]["test/env/all/correct"] for seed in seeds])
        )
        for name, seeds in folders.items()
        if name.startswith("sft")
    }
    panels[-1] = replace(panels[-1], levels=levels)
    return save_figure(draw_panels(panels, shared_legend=True), out)


def _summary(folder: Path) -> dict[str, dict[str, float]]:
    """Metrics `before` and `after` the run."""
    return json.loads((folder / "summary.json").read_text())


async def main(config: Config) -> None:
    seeds = seeds_of(config.seeds)
    folders = {variant: [await run(config, variant, seed) for seed in seeds] for variant in config.variants.split(",")}
    print(table(folders))
    print(f"picture: {picture(folders, Path(config.log_path) / 'latro.png')}")


if __name__ == "__main__":
    run_command(main, Config)
