"""The README's results: LaTRO, its ablations and SFT on the toy task, from one warm start per seed.

    python recipes/latro/experiment.py          # runs/latro_experiment

Prints a table, writes results.json and a plot. Finished runs are kept; killed runs resume.
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
from posttrain.tracking.figures import Panel, curves_by_label, draw_panels, read_curve, save_figure
from posttrain.tracking.metrics_log import read_metrics
from posttrain.tracking.run_config import log_path_field
from posttrain.tracking.stages import run_stages
from recipes.labels import folder_name
from recipes.latro import train
from recipes.latro.variants import ABLATIONS, COLUMNS, NORM, START, Lines, last
from recipes.results import write_results
from recipes.warm_start import seeds_of

PANELS = {
    "likelihood/answer_logprob": "log p(answer | question, rationale), nats",
    "env/all/useful": "useful rationales among those sampled",
    "test/env/all/correct": "greedy accuracy, validation split",
}
EARLY = 5  # first updates, whose gradients are compared while the policies are still similar


@chz.chz
class Config:
    """LaTRO against its ablations and SFT."""

    seeds: str = chz.field(default="0,1,2", doc="seeds, by comma")
    log_path: str = log_path_field("runs/latro_experiment", "folder of the runs")


async def run(line: str, options: dict[str, Any], shared: dict[str, Any], folder: str, seed: int) -> Path:
    """Runs the line to its end; returns its folder."""
    base = train.prepared(train.Config(seed=seed, log_path=folder, behavior_if_log_dir_exists="resume", **shared))
    config = train.prepared(chz.replace(base, log_path=f"{folder}/{folder_name(line)}", **options))
    await run_stages([train.method_stage(config, train.beginning(base))])
    return config.folder(config.method)


def is_supervised(folder: Path) -> bool:
    return folder.name == "sft"  # its loss has another scale, and its run no rewards


def read_summary(folder: Path) -> dict[str, dict[str, float]]:
    """Metrics `before` and `after` the run, and of its `last` checkpoint."""
    return json.loads((folder / "summary.json").read_text())


def results_of(folders: dict[str, Path]) -> dict[str, float]:
    """A seed's metrics on the test set, and the gradient's norm early in the run, by "line | column"."""
    weights = {}
    for line, folder in folders.items():
        summary = read_summary(folder)
        weights |= {START: summary["before"], line: summary["after"], last(line): summary["last"]}
    results = {
        f"{line} | {column}": metrics[key]
        for line, metrics in weights.items()
        for column, key in COLUMNS.items()
        if key in metrics
    }
    for line, folder in folders.items():
        if not is_supervised(folder):
            norms = read_curve(read_metrics(folder), "optim/grad_norm").values_K[:EARLY]
            results[f"{line} | {NORM}"] = float(np.sqrt(np.mean(np.square(norms))))
    return results


def picture(folders: dict[str, list[Path]], out: Path) -> Path:
    """Curves of each line's seeds and mean; SFT has only the accuracy at its end, as a level."""
    supervised = {line: seeds for line, seeds in folders.items() if is_supervised(seeds[0])}
    runs = {line: [read_metrics(seed) for seed in seeds] for line, seeds in folders.items() if line not in supervised}
    panels = [
        # dashed: it overlaps the first curve
        Panel(title, curves_by_label(runs, key), dashed=["kl_coef=0"], xlabel="update")
        for key, title in PANELS.items()
    ]
    levels = {
        f"{line}: its best checkpoint, on the test set": float(
            np.mean([read_summary(seed)["after"]["test/env/all/correct"] for seed in seeds])
        )
        for line, seeds in supervised.items()
    }
    panels[-1] = replace(panels[-1], levels=levels)
    return save_figure(draw_panels(panels, shared_legend=True), out)


async def compare(lines: Lines, shared: dict[str, Any], seeds: str, log_path: str) -> None:
    """Runs all lines, each with the options `shared`, and reports them. LOG_PATH/results.json has means over seeds."""
    numbers = seeds_of(seeds)
    folders = {
        line: [await run(line, options, shared, f"{log_path}/seed{seed}", seed) for seed in numbers]
        for line, options in lines.items()
    }
    results_S = [results_of({line: seeds[i] for line, seeds in folders.items()}) for i in range(len(numbers))]
    write_results(log_path, {name: float(np.mean([results[name] for results in results_S])) for name in results_S[0]})
    for name in results_S[0]:
        print(f"{name:60s} " + "  ".join(f"{results[name]:9.3f}" for results in results_S))
    print(f"picture: {picture(folders, Path(log_path) / 'curves.png')}")


async def main(config: Config) -> None:
    await compare(ABLATIONS, {}, config.seeds, config.log_path)


if __name__ == "__main__":
    run_command(main, Config)
