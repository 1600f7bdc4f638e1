"""What the methods reached: one table, and first-hop accuracy against optimizer steps, from the metrics.jsonl of each run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.tracking.metrics_log import read_metrics
from posttrain.tracking.plots import COLORS, finish_axis, save_figure

KEYS = {  # as the loops name them: test/ by an evaluator, test/env/all/ by rl/
    "first_hop": ("test/first_hop", "test/env/all/first_hop"),
    "exact": ("test/exact", "test/env/all/correct"),
}


@dataclass(frozen=True)
class Curve:
    """One method, one seed: steps_K and accuracies in K evaluations."""

    steps_K: list[int]
    first_hop_K: list[float]
    exact_K: list[float]


def read_curve(folder: Path) -> Curve:
    points = []
    for record in read_metrics(folder):
        found = [next((record[key] for key in KEYS[name] if key in record), None) for name in ("first_hop", "exact")]
        if found[0] is not None:
            points.append((int(record["step"]), *found))
    steps, first_hop, exact = zip(*points, strict=True) if points else ([], [], [])
    return Curve(list(steps), list(first_hop), list(exact))


def table(curves: Mapping[str, Sequence[Curve]]) -> str:
    """Accuracy at the end of each method's training: the mean over seeds, then each seed."""
    lines = [f"{'method':12s} {'steps':>6s}  {'first hop':>9s}  {'whole path':>10s}   first hop of each seed"]
    for name, runs in curves.items():
        hops, paths = [run.first_hop_K[-1] for run in runs], [run.exact_K[-1] for run in runs]
        each = " ".join(f"{hop:.3f}" for hop in hops)
        lines.append(f"{name:12s} {runs[0].steps_K[-1]:6d}  {np.mean(hops):9.3f}  {np.mean(paths):10.3f}   {each}")
    return "\n".join(lines)


def picture(panels: Mapping[str, Mapping[str, Sequence[Curve]]], chance: float, title: str, out: Path) -> Path:
    """A panel for each way to begin. A thick line is the mean over seeds, thin ones are the seeds; dashed is a choice by chance."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = {name: curves for name, curves in panels.items() if curves}
    figure = Figure(figsize=(5.0 * len(panels), 3.6), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.012, ha="left", fontsize=12, fontweight="bold")
    for place, (name, curves) in enumerate(panels.items(), start=1):
        axis: Any = figure.add_subplot(1, len(panels), place)
        axis.axhline(chance, color="#9aa3ad", linestyle="--", linewidth=1)
        for number, (method, runs) in enumerate(curves.items()):
            color = COLORS[number % len(COLORS)]
            for run in runs:
                axis.plot(run.steps_K, run.first_hop_K, color=color, linewidth=0.7, alpha=0.4)
            shared = sorted(set(runs[0].steps_K).intersection(*(run.steps_K for run in runs)))
            at = [dict(zip(run.steps_K, run.first_hop_K, strict=True)) for run in runs]
            axis.plot(
                shared, [np.mean([values[step] for values in at]) for step in shared], color=color, linewidth=2, label=method
            )
        finish_axis(axis, f"first-hop accuracy, {name}", with_legend=False)
        axis.set_ylim(-0.03, 1.03)
        axis.legend(fontsize=8, frameon=False, ncols=2)
    return save_figure(figure, out)
