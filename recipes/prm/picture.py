"""The README's plot: training, scores around the first wrong step, best of N."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from posttrain.tracking.figures import (
    COLORS,
    SHARE,
    Panel,
    draw_panel,
    finish_axis,
    panel_axes,
    read_curve,
    save_figure,
)
from posttrain.tracking.metrics_log import read_metrics
from recipes.prm.evaluation import Aligned

CHOICES = {
    "sampled": "mean of\nthe samples",
    "majority": "majority",
    "best_of_n": "best by\nthe PRM",
    "any": "any right",
}
LABELS = {"steps": "accuracy", "first step labelled 0": "first_error", "one guess for all steps": "majority"}
LEAST_SCORES = 30  # minimum number of scores for an offset to be drawn


def draw(run: Path, results: Mapping[str, float], aligned: Aligned, out: Path) -> Path:
    figure, (left, middle, right) = panel_axes(3, size=(4, 3.3))
    records = read_metrics(run)
    accuracies = {label: [read_curve(records, f"test/{key}")] for label, key in LABELS.items()}
    draw_panel(left, Panel("held-out labels predicted", accuracies, limits=SHARE, xlabel="training step"))
    offsets = [offset for offset in sorted(aligned) if len(aligned[offset]) >= LEAST_SCORES]
    # the reshape is for no offsets
    quartiles = np.array([np.percentile(aligned[offset], (25, 50, 75)) for offset in offsets]).reshape(-1, 3).T
    middle.fill_between(offsets, quartiles[0], quartiles[2], color=COLORS[0], alpha=0.2)
    middle.plot(offsets, [np.mean(aligned[offset]) for offset in offsets], color=COLORS[0], marker="o")
    heights, errors = [results[name] for name in CHOICES], [results.get(f"{name}_se", 0.0) for name in CHOICES]
    colors = [COLORS[0] if name == "best_of_n" else COLORS[-1] for name in CHOICES]
    right.bar(list(CHOICES.values()), heights, yerr=errors, color=colors, capsize=4)
    for x, height in enumerate(heights):
        right.text(x, 0.03, f"{height:.3f}", ha="center", color="white")
    finish_axis(middle, "score of a step (mean, quartiles)", xlabel="steps after the first wrong one")
    finish_axis(right, "held-out chains answered right", xlabel="", integer=False)
    for axis in (middle, right):
        axis.set_ylim(SHARE)
    return save_figure(figure, out)
