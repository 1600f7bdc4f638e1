"""The README's picture: training, scores around the first wrong step, and the ways to choose one of eight solutions."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from posttrain.tracking.metrics_log import read_metrics
from recipes.prm.evaluation import Aligned

CHOICES = {"sampled": "mean of\nthe samples", "majority": "majority", "best_of_n": "best by\nthe PRM", "any": "any right"}

LEAST_SCORES = 30  # at a distance from the first wrong step, for it to be drawn


def draw(run: Path, results: Mapping[str, float], aligned: Aligned, out: Path) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    records = read_metrics(run)
    for key, label in (
        ("test/accuracy", "steps"),
        ("test/first_error", "first step labelled 0"),
        ("test/majority", "one guess for all steps"),
    ):
        points = [(record["step"], record[key]) for record in records if key in record]
        left.plot([step for step, _ in points], [value for _, value in points], label=label)
    left.set(title="held-out labels predicted", xlabel="training step", ylim=(0, 1.02))
    left.legend(frameon=False, loc="lower right")
    offsets = [offset for offset in sorted(aligned) if len(aligned[offset]) >= LEAST_SCORES]
    quartiles = np.array([np.percentile(aligned[offset], (25, 50, 75)) for offset in offsets]).reshape(-1, 3).T  # none: empty
    middle.fill_between(offsets, quartiles[0], quartiles[2], alpha=0.2)
    middle.plot(offsets, [np.mean(aligned[offset]) for offset in offsets], marker="o")
    middle.set(title="score of a step (mean, quartiles)", xlabel="steps after the first wrong one", ylim=(0, 1.02))
    heights, errors = [results[name] for name in CHOICES], [results[f"{name}_se"] for name in CHOICES]
    right.bar(list(CHOICES.values()), heights, yerr=errors, color=["C7", "C7", "C0", "C7"], capsize=4)
    for x, height in enumerate(heights):
        right.text(x, 0.03, f"{height:.3f}", ha="center", color="white")
    right.set(title="held-out chains answered right", ylim=(0, 1.02))
    for axis in (left, middle, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=90)
    pyplot.close(figure)
    return out
